"""The tower alone gives what it gives inside the model, and has an identity of its own; features stand in for it."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER, features_shape, tower_digest
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.generate import Generator, Prompt
from pefomed_ray.model.tower import open_tower
from pefomed_ray.rendering.images import normalise


@pytest.fixture(scope="module")
def base() -> Base:
    return open_base("embedded", "short")


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    found = []
    for picture in (Image.radial_gradient("L"), Image.linear_gradient("L"), Image.effect_noise((80, 60), 90)):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def features_in_model(base: Base, images: list[bytes]) -> torch.Tensor:
    with torch.no_grad():
        return base.model.patch_features(normalise(base.renderer.pixels(images), base.renderer.image_spec))


def test_the_tower_alone_is_the_models(base: Base, images: list[bytes]) -> None:
    found = open_tower("embedded", "short", "cpu")(images)
    assert (found.dtype, tuple(found.shape[1:])) == (torch.float32, features_shape(EMBEDDED_FOLDER))
    assert torch.equal(found, features_in_model(base, images))
    assert not torch.equal(found, found.flip(0))  # the control: pictures differ
    with pytest.raises(DataError):
        open_tower("embedded", "short", "cpu")([b"no image"])
    with pytest.raises(ConfigError, match="template"):
        open_tower("embedded", "shrot", "cpu")


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the embedded base in which one number of one tensor is another."""

    def change(tensor: str) -> Path:
        folder = tmp_path / tensor
        shutil.copytree(EMBEDDED_FOLDER, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[tensor].view(-1)[-1] += 1
        save_file(tensors, folder / "model.safetensors")
        return folder

    return change


def test_a_towers_identity_is_its_own_not_the_language_models(changed: Callable[[str], Path], tmp_path: Path) -> None:
    embedded = tower_digest(EMBEDDED_FOLDER)
    assert tower_digest(changed("language_model.model.norm.weight")) == embedded
    assert tower_digest(changed("projector.bias")) == embedded
    assert tower_digest(changed("vision_tower.post_layernorm.bias")) != embedded
    other = tmp_path / "joined"
    shutil.copytree(EMBEDDED_FOLDER, other)
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"patches_per_token": 4', '"patches_per_token": 2'))
    assert tower_digest(other) != embedded
    assert features_shape(other) == (72, 256)


def test_answers_from_features_are_those_from_images(base: Base, images: list[bytes]) -> None:
    generator = Generator(base)
    features = features_in_model(base, images)
    questions = ["Which region?", "Is this a CT?", "What is it?"]
    shown = [Prompt("vqa", text, (image,)) for text, image in zip(questions, images, strict=True)]
    cached = [Prompt("vqa", text, features_NVW=features[i : i + 1]) for i, text in enumerate(questions)]
    expected = generator.answer(shown, 8)
    assert generator.answer(cached, 8) == expected
    assert generator.answer([shown[0], cached[1], shown[2]], 8) == expected  # each in its place
    swapped = [Prompt("vqa", text, features_NVW=torch.zeros_like(features[:1])) for text in questions]
    assert generator.answer(swapped, 8) != expected  # the control: features are what is looked at


def test_a_model_without_its_tower_works_from_features(images: list[bytes]) -> None:
    base = open_base("embedded", "short")
    features = features_in_model(base, images[:1]).half()
    ids = torch.tensor([base.renderer.prompt_ids("vqa", "Which region?", 1)])
    with torch.no_grad():
        expected = base.model(input_ids=ids, patch_features=features).logits
        del base.model.vision_tower
        assert torch.equal(base.model(input_ids=ids, patch_features=features).logits, expected)
