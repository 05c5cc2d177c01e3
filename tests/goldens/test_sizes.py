"""Position embeddings for another grid, and the paper's parameter counts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER
from pefomed_ray.artifacts.family import FAMILIES, PEFOMED
from pefomed_ray.artifacts.storage import read_json
from pefomed_ray.config.schema import LoraConfig
from pefomed_ray.model.base import Base
from pefomed_ray.model.lora import attach_lora, parameter_counts
from pefomed_ray.model.pefomed import PefomedConfig, PefomedForConditionalGeneration, interpolate_position_embeddings
from pefomed_ray.rendering.opening import open_renderer

LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def test_position_embeddings_are_resized_as_published(parity_dir: Path) -> None:
    """Tolerance 1e-6. From float16 the result is float32, as there."""
    with np.load(parity_dir / "vision" / "pos_embed_interpolation.npz") as arrays:
        cases = sorted(name.removesuffix("/in") for name in arrays.files if name.endswith("/in"))
        assert len(cases) >= 6
        for case in cases:
            before, after = (torch.from_numpy(arrays[f"{case}/{end}"]) for end in ("in", "out"))
            side = round((after.shape[1] - 1) ** 0.5)
            found = interpolate_position_embeddings(before, side)
            torch.testing.assert_close(found, after, rtol=0, atol=1e-6, msg=case)


@pytest.fixture(scope="module")
def paper_size() -> Base:
    """On the meta device: names and sizes, no numbers. Only its renderer and folder are those of the embedded base."""
    config = PefomedConfig(vision_config={"image_size": 448}, text_config=LLAMA_2_7B)
    with torch.device("meta"):
        model = PefomedForConditionalGeneration(config)
    family = FAMILIES[PEFOMED]
    return Base(EMBEDDED_FOLDER, model, open_renderer(EMBEDDED_FOLDER, family, "paper"), family)


def test_the_paper_size_model_has_the_published_counts(parity_dir: Path, paper_size: Base) -> None:
    expected = read_json(parity_dir / "params" / "param_count.json")
    model = paper_size.model
    final_norm = parameter_counts(model.get_submodule("vision_tower.post_layernorm"))[1]
    assert final_norm == expected["ln_vision"] == 2816
    # The library holds the key's bias of each block, which is zero, as a parameter; the published tower does not.
    vision = model.config.vision_config
    key_biases = vision.num_hidden_layers * vision.hidden_size
    tower = parameter_counts(model.get_submodule("vision_tower"))[1]
    assert tower - final_norm - key_biases == expected["vit"] == 986_975_872
    assert parameter_counts(model.get_submodule("language_model"))[1] == expected["llm_base"] == 6_738_415_616
    assert model.config.visual_tokens == expected["visual_tokens"]["tokens"]


def test_the_paper_size_model_trains_the_published_parameters(parity_dir: Path, paper_size: Base) -> None:
    expected = read_json(parity_dir / "params" / "param_count.json")
    attach_lora(paper_size, LoraConfig(), train_projector=True)
    trained = {name: p for name, p in paper_size.model.named_parameters() if p.requires_grad}
    assert len(trained) == expected["n_trainable_tensors"]
    assert sum(p.numel() for name, p in trained.items() if "lora_" in name) == expected["lora"]
    assert parameter_counts(paper_size.model)[0] == expected["trainable_total"] == 56_627_200
    shapes = sorted(tuple(shape) for shape in expected["trainable_shapes_layer0_and_proj"].values())
    assert sorted(tuple(p.shape) for n, p in trained.items() if ".layers.0." in n or "projector" in n) == shapes
