"""What is gathered and saved is what learns: megabytes, whatever the base weighs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER
from pefomed_ray.artifacts.family import FAMILIES, PEFOMED
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.config.schema import LoraConfig, OptimizerConfig
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.bundle import PROJECTOR_FILE, save_bundle
from pefomed_ray.model.lora import ADAPTER_FILE, attach_lora, parameter_counts
from pefomed_ray.model.pefomed import PefomedConfig, PefomedForConditionalGeneration
from pefomed_ray.rendering.opening import open_renderer
from pefomed_ray.training.checkpoint import gather, save_checkpoint, weights
from pefomed_ray.training.progress import STATE_FILE, Progress
from pefomed_ray.training.step import build_optimizer, trainable

LEARNING = 56_627_200
"""Parameters: LoRA of rank 64 on query and value of Llama-2-7b, and the projector."""
LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


@pytest.fixture
def paper_size() -> Iterator[Base]:
    """Tensors with sizes and a device, and no numbers, as is everything that is made of them in the test."""
    family = FAMILIES[PEFOMED]
    with torch.device("meta"):
        model: Any = PefomedForConditionalGeneration(
            PefomedConfig(vision_config={"image_size": 448}, text_config=LLAMA_2_7B)
        )
    base = Base(EMBEDDED_FOLDER, model, open_renderer(EMBEDDED_FOLDER, family, "paper"), family)
    attach_lora(base, LoraConfig(), train_projector=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        yield base


def one_step(base: Base) -> torch.optim.AdamW:
    optimizer = build_optimizer(base.model, OptimizerConfig())
    for parameter in trainable(base.model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def content_bytes(file: Path) -> int:
    """Of a safetensors file without its header, whose length stands in the first eight bytes."""
    with open(file, "rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def test_of_the_papers_model_226_megabytes_are_saved_and_three_times_that_for_a_checkpoint(paper_size: Base) -> None:
    tensors = gather(paper_size.model, one_step(paper_size))
    assert size(weights(tensors)) == 4 * LEARNING == 226_508_800
    assert size(tensors) == 3 * 4 * LEARNING
    assert parameter_counts(paper_size.model)[1] > 7.7e9  # the control: there is more that could have been
    paper_size.model.get_submodule("language_model.model.embed_tokens").requires_grad_(True)
    assert size(weights(gather(paper_size.model, one_step(paper_size)))) == 4 * (LEARNING + 32000 * 4096)


def test_files_hold_what_was_gathered_and_nothing_else(tmp_path: Path) -> None:
    values = {"name": "t", "task": "vqa", "template": "short", "data": {"shards": "x"}}
    base = open_base("embedded", "short")
    attach_lora(base, LoraConfig(rank=4), train_projector=True)
    learning = parameter_counts(base.model)[0]
    tensors = gather(base.model, one_step(base))
    checkpoint = save_checkpoint(tmp_path, Progress(step=1), tensors, {})
    assert content_bytes(checkpoint / STATE_FILE) == 3 * 4 * learning
    save_bundle(tmp_path / "bundle", base, build_config(TrainConfig, values, "test"), weights(tensors), {}, {})
    files = [tmp_path / "bundle" / name for name in (ADAPTER_FILE, PROJECTOR_FILE)]
    assert sum(map(content_bytes, files)) == 4 * learning
    assert sorted(tmp_path.rglob("*.safetensors")) == sorted([checkpoint / STATE_FILE, *files])
