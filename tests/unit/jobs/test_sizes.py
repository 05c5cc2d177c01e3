"""What headers say of a base is what the model says of itself once it is open."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER
from pefomed_ray.config.schema import LoraConfig, Precision
from pefomed_ray.jobs.sizes import BYTES_OF_NF4, count, lora_targets, read_sizes, trained_numbers
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.lora import attach_lora, parameter_counts
from tests.tiny_bases import FAMILIES

LORAS = (
    LoraConfig(rank=4),
    LoraConfig(rank=3, target_modules=("all-linear",)),
    LoraConfig(rank=2, target_modules=("q_proj", "down_proj"), use_dora=True),
)


def assert_counts_agree(base: Base, lora: LoraConfig, *, train_projector: bool) -> None:
    attach_lora(base, lora, train_projector=train_projector)
    sizes = read_sizes(base.path)
    found = trained_numbers(sizes, lora, lora_targets(base.path, lora), train_projector=train_projector)
    assert found == parameter_counts(base.model)[0]


@pytest.mark.parametrize("lora", LORAS, ids=["q-v", "all", "dora"])
def test_trained_numbers_of_the_embedded_base(lora: LoraConfig) -> None:
    assert_counts_agree(open_base("embedded", "short"), lora, train_projector=not lora.use_dora)


@pytest.mark.parametrize("family", ["embedded", *FAMILIES])
def test_parts_and_trained_numbers_are_the_models_own(family: str, tiny_base: Callable[[str], Path]) -> None:
    folder = EMBEDDED_FOLDER if family == "embedded" else tiny_base(family)
    sizes = read_sizes(folder)
    base = open_base(str(folder), "short" if family == "embedded" else "chat")
    assert count(sizes.layers) == parameter_counts(base.decoder_layers)[1]
    assert (sizes.depth, sizes.tower_depth) == (len(base.decoder_layers), len(base.tower_blocks))
    projector = [base.model.get_submodule(name) for name in base.family.projector]
    assert count(sizes.projector) == sum(parameter_counts(module)[1] for module in projector)
    assert (sizes.vocabulary, sizes.width) == tuple(base.model.get_input_embeddings().weight.shape)
    # Biases that the file leaves out are zeros that the library holds as parameters.
    assert sizes.parameters == pytest.approx(parameter_counts(base.model)[1], rel=0.01)
    assert_counts_agree(base, LORAS[1], train_projector=True)


def test_the_papers_size(paper_base: Path) -> None:
    sizes = read_sizes(paper_base)
    lora = LoraConfig()
    assert trained_numbers(sizes, lora, lora_targets(paper_base, lora), train_projector=True) == 56_627_200
    assert count(sizes.layers) + count(sizes.embeddings) + count(sizes.other) == 6_738_415_616
    assert (sizes.image.tokens, sizes.image.patches, sizes.depth, sizes.tower_depth) == (256, 1024, 32, 39)
    assert (
        sum(file.stat().st_size for file in paper_base.glob("*.safetensors")) < 1 << 20
    )  # no weight was there to read


def test_bytes_follow_the_precision(paper_base: Path) -> None:
    sizes = read_sizes(paper_base)
    in_16_bits = sizes.frozen_bytes(Precision(dtype="bfloat16"))
    assert sum(in_16_bits.values()) == 2 * sizes.parameters
    assert sum(sizes.frozen_bytes(Precision()).values()) == 4 * sizes.parameters
    quantised = sizes.frozen_bytes(Precision(dtype="bfloat16", quantization="nf4"))
    matrices = sum(linear.entries for linear in sizes.linears)
    saved = sum(in_16_bits.values()) - sum(quantised.values())
    assert math.isclose(saved, (2 - BYTES_OF_NF4) * matrices)
    assert quantised["tower"] == in_16_bits["tower"]
