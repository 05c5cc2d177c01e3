"""`pefomed-ray export` as a person runs it: a folder that says the same, refusals by name, nothing half-written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.model.base import open_base
from pefomed_ray.model.bundle import save_bundle
from pefomed_ray.model.lora import attach_lora

TIMEOUT_S = 120


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pefomed_ray", "export", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = {"name": "test", "task": "vqa", "template": "short", "data": {"shards": "none"}, "lora": {"rank": 2}}
    config = build_config(TrainConfig, values, "test")
    base = open_base("embedded", "short")
    attach_lora(base, config.lora, train_projector=True)
    trained = {
        name: p.detach() + 0.05 * torch.ones_like(p) for name, p in base.model.named_parameters() if p.requires_grad
    }
    target = tmp_path_factory.mktemp("bundle") / "b"
    save_bundle(target, base, config, trained, {"source": "x"}, {})
    return target


def test_export_writes_a_folder_once(bundle: Path, tmp_path: Path) -> None:
    done = run(str(bundle), "out", "--merged", "--dtype", "float32", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["folder"], found["form"], found["dtype"]) == (str(tmp_path / "out"), "merged", "float32")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "merged.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
    ]
    again = run(str(bundle), "out", cwd=tmp_path)
    assert (again.returncode, "already exists" in again.stderr) == (2, True)


def test_what_cannot_be_exported_is_named_and_nothing_is_written(bundle: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(bundle, tmp_path / "broken")
    with open(broken / "projector.safetensors", "ab") as file:
        file.write(b"x")
    for words, code, named in (
        ((str(broken), "out"), 3, "'projector.safetensors' does not match its sha256"),
        (("nowhere", "out"), 3, "does not hold an adapter bundle"),
        ((str(bundle), "out", "--dtype", "float32"), 2, "--dtype is for --merged"),
        ((str(bundle), "out", "--merged", "--dtype", "float8"), 2, "not one of bfloat16, float32"),
    ):
        done = run(*words, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert named in " ".join(done.stderr.split()), done.stderr
        assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
