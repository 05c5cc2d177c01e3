"""`pefomed-ray convert` as a program sees it."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from pefomed_ray.cli.main import app
from tests.tiny_published import Published, write_published


@pytest.fixture
def files(tmp_path: Path) -> Published:
    return write_published(tmp_path)


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, words)])


def published(files: Published, folder: Path, *more: object) -> Result:
    return run(
        "published",
        *("--checkpoint", files.checkpoint, "--vision", files.vision, "--language-model", files.language_model),
        *("--base-out", folder / "base", "--bundle-out", folder / "bundle"),
        *("--vision-layers", 2, "--vision-heads", 2, "--json", *more),
    )


def test_a_checkpoint_there_and_back(files: Published, tmp_path: Path) -> None:
    done = published(files, tmp_path)
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["base"] == str(tmp_path / "base")
    assert [account["used"] for account in result["keys"]] == [10, 30, 21]
    done = run("to-published", result["bundle"], tmp_path / "back.pth", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["lora_alpha"] == 8
    assert (tmp_path / "back.pth").is_file()
    assert published(files, tmp_path).exit_code == 2, "outputs exist"


def test_exit_codes(files: Published, tmp_path: Path) -> None:
    assert published(files, tmp_path, "--task", "chat").exit_code == 2
    torch.save({"model": {}}, files.checkpoint)
    done = published(files, tmp_path)
    assert done.exit_code == 3
    assert "has no key 'llama_proj.weight'" in done.stderr
    assert run("to-published", tmp_path / "none", tmp_path / "x.pth").exit_code == 3
    done = run("assemble", tmp_path / "out", "--vision", tmp_path / "none", "--language-model", files.language_model)
    assert done.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_parts_are_assembled(files: Published, tmp_path: Path) -> None:
    from transformers import Blip2VisionConfig, Blip2VisionModel

    config = Blip2VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Blip2VisionModel(config).save_pretrained(tmp_path / "tower")
    parts = ("--vision", tmp_path / "tower", "--language-model", files.language_model)
    done = run("assemble", tmp_path / "out", *parts, "--image-size", 56, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["visual_tokens"] == 4
