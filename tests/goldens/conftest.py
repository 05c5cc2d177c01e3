"""The published model's weights, through our own converter, and what the published code made of them.

Every weight set below `model/` is taken, so one that is added is tested without a change here.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pefomed_ray.artifacts.records import TASKS, Task
from pefomed_ray.artifacts.storage import read_json
from pefomed_ray.model.base import Base
from pefomed_ray.model.bundle import open_bundle
from pefomed_ray.model.published import Settings, convert_published
from pefomed_ray.rendering.batches import Rendered
from pefomed_ray.rendering.renderer import Renderer
from pefomed_ray.rendering.templates import template_named

NONE = "no weight set"
IMAGE_TAGS = "<img><imagehere></img> "
ASKED = "based on the image, respond to this question with a short answer"


def task_of(tag: str) -> Task:
    """`[vqa]` -> `vqa`."""
    return next(task for task in TASKS if tag == f"[{task}]")


def published_name(name: str) -> str:
    """Of a tensor of projector or language model, by its name in our model."""
    if name.startswith("projector."):
        return name.replace("projector.", "llama_proj.")
    return name.replace("language_model.", "llama_model.base_model.model.", 1)


@dataclass(frozen=True)
class WeightSet:
    """A folder of reference numbers, and the base and bundle that were converted from its weights."""

    folder: Path
    base: Path
    bundle: Path

    def open(self, *, trainable: bool = False) -> Base:
        """The converted model, and the final LayerNorm of the reference.

        No file that is converted holds that LayerNorm (the published code makes it anew); a set of random weights has
        a random one, in `full_state.safetensors` alone.
        """
        base = open_bundle(self.bundle, trainable=trainable)[0]
        norm = {kind: self.full_state[f"ln_vision.{kind}"] for kind in ("weight", "bias")}
        base.model.vision_tower.post_layernorm.load_state_dict(norm)  # type: ignore[union-attr, operator]
        return base

    def renderer(self, template: str) -> Renderer:
        """The base's, with one of the templates."""
        return Renderer.open(self.base, template_named(template))

    def training_prompt(self, text_input: str) -> tuple[Renderer, Task, str]:
        """What renders a training row, its task and its question, by the published text that was made of it."""
        tag, _, words = text_input.removeprefix(IMAGE_TAGS).partition(" ")
        task = task_of(tag)
        if task == "vqa" and not words.startswith(ASKED):
            return self.renderer("legacy-train-bare"), task, words
        return self.renderer("legacy-train"), task, words.removeprefix(ASKED).strip()

    def training_row(
        self, row: dict[str, str], max_prompt_tokens: int | None = None, max_answer_tokens: int | None = None
    ) -> Rendered:
        """A row of a reference batch. No limit of ours cuts a prompt; the published one does not count the BOS."""
        renderer, task, question = self.training_prompt(row["text_input"])
        prompt = renderer.prompt_ids(task, question, 1)
        if max_prompt_tokens is not None:
            prompt = prompt[: 1 + max_prompt_tokens]
        return Rendered(prompt, renderer.answer_ids(row["answer"], max_answer_tokens))

    def evaluation_prompt(self, text_input: str) -> list[int]:
        """Ids of an evaluation prompt."""
        tag, _, words = text_input.partition(" ")
        return self.renderer("legacy").prompt_ids(task_of(tag), words.removeprefix(ASKED).strip(), 1)

    @cached_property
    def full_state(self) -> dict[str, Tensor]:
        """The whole reference model, by the published names."""
        return load_file(self.folder / "full_state.safetensors")

    @cached_property
    def train_cases(self) -> dict[str, Any]:
        """By case."""
        cases = json.loads((self.folder / "train_cases.json").read_text(encoding="utf-8"))
        return {name: case for name, case in cases.items() if not name.startswith("_")}

    @cached_property
    def gen_cases(self) -> dict[str, Any]:
        """By case."""
        return dict(json.loads((self.folder / "gen_cases.json").read_text(encoding="utf-8")))

    published_name = staticmethod(published_name)

    @staticmethod
    def trained(base: Base) -> dict[str, nn.Parameter]:
        """What learns, by its published name."""
        return {published_name(name): p for name, p in base.model.named_parameters() if p.requires_grad}

    def arrays(self, file: str, case: str) -> dict[str, Tensor]:
        """The case's arrays in `<file>.npz`."""
        return self.load_arrays(self.folder / f"{file}.npz", f"{case}/")

    @staticmethod
    def load_arrays(path: Path, prefix: str = "") -> dict[str, Tensor]:
        """Arrays of a file whose names start with `prefix`, without it."""
        with np.load(path) as arrays:
            wanted = [name for name in arrays.files if name.startswith(prefix)]
            return {name.removeprefix(prefix): torch.from_numpy(arrays[name]) for name in wanted}


def settings_of(folder: Path) -> Settings:
    """What the converter is told of a set's sizes: they are not the published ones."""
    config = read_json(folder / "config.json")
    vit = config["vit"]
    return Settings(
        image_size=vit["img_size"],
        vision_layers=vit["depth"],
        vision_heads=vit["num_heads"],
        lora_alpha=config["lora"]["alpha"],
    )


def convert(folder: Path, target: Path, checkpoint: str = "checkpoint.pth") -> WeightSet:
    """A set, converted into `target`."""
    found = WeightSet(folder, target / "base", target / "bundle")
    convert_published(
        folder / checkpoint,
        folder / "eva_vit_g_tiny.pth",
        str(folder / "llm_base"),
        found.base,
        found.bundle,
        settings_of(folder),
    )
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One run a weight set; without any, one that fails (or is skipped where there are no reference files at all)."""
    if "weights" in metafunc.fixturenames:
        models = Path(os.environ.get("PEFOMED_PARITY") or "none") / "model"
        wanted = ("train_cases.json", "gen_cases.json")
        found = [p.name for p in sorted(models.glob("*")) if all((p / name).is_file() for name in wanted)]
        metafunc.parametrize("weights", found or [NONE], indirect=True)


@pytest.fixture(scope="session")
def weights(request: pytest.FixtureRequest, parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> WeightSet:
    """A weight set, converted."""
    assert request.param != NONE, f"{parity_dir / 'model'} holds no set with train_cases.json and gen_cases.json"
    return convert(parity_dir / "model" / request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def trained_weights(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> WeightSet:
    """The set that the reference trained further, converted."""
    return convert(parity_dir / "model" / "T", tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
