"""`data cache` as a person runs it: the size first, refusals with their codes, and training that reads what it made."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER
from pefomed_ray.data.phantom import write_slake

TIMEOUT_S = 250
CONFIG = """
name: cached
task: vqa
template: short
data: {shards: shards, feature_cache: cache}
training: {epochs: 1, batch_size: 8, micro_batch_size: 4}
validation: {rows: 4, max_new_tokens: 2}
"""


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pefomed_ray", *words],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards of 10 phantoms and a config that trains on them from `cache`."""
    folder = tmp_path_factory.mktemp("work")
    write_slake(folder / "corpus", images=10, questions_per_image=2, seed=3, splits=(6, 2, 2))
    done = run("data", "prepare", "corpus", "shards", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "run.yaml").write_text(CONFIG)
    return folder


def made(work: Path) -> list[str]:
    return sorted(path.name for path in work.iterdir())


@pytest.mark.ray
@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["nowhere", "out"], 3, "does not hold shards"),
        pytest.param(["shards", "shards"], 2, "not empty", marks=pytest.mark.long),
        pytest.param(["shards", "s3://bucket/out"], 2, "only local paths", marks=pytest.mark.long),
        (["shards", "out", "dtyp=float16"], 2, "did you mean 'dtype'"),
        pytest.param(["shards", "out", "dtype=float64"], 2, "dtype", marks=pytest.mark.long),
        pytest.param(["shards", "out", "base=nowhere"], 2, "base.path", marks=pytest.mark.long),
        pytest.param(["shards", "out", "template=shrot"], 2, "template: 'shrot'", marks=pytest.mark.long),
        pytest.param(["shards", "out", "splits=[dev]"], 2, "splits", marks=pytest.mark.long),
        (["shards", "out", "limit_gb=0.0001"], 5, "--yes"),
        pytest.param(["shards"], 2, "Missing argument", marks=pytest.mark.long),
    ],
)
def test_bad_usage_is_named_fast_and_writes_nothing(words: list[str], code: int, named: str, work: Path) -> None:
    before = made(work)
    started = time.monotonic()
    done = run("data", "cache", *words, cwd=work)
    assert done.returncode == code, done.stderr
    assert named in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr
    assert made(work) == before
    assert time.monotonic() - started < 30  # a hang is a failure; the promise of 5 s is for an idle machine


@pytest.mark.ray
def test_what_is_checked_before_ray_starts_loads_neither_torch_nor_ray(work: Path) -> None:
    code = (
        "import sys; sys.argv = ['pefomed-ray', 'data', 'cache', 'shards', 'out', 'limit_gb=0.0001']\n"
        "from pefomed_ray.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 5, end.code\n"
        "loaded = {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=work, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.ray
@pytest.mark.long
def test_a_cache_is_made_with_its_size_said_and_refused_where_it_is_stale(work: Path) -> None:
    done = run("data", "cache", "shards", "cache", "limit_gb=0.0001", "--yes", "--json", cwd=work)
    assert done.returncode == 0, done.stderr
    assert "10 images x 36 visual tokens x 512 x 2 bytes" in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"cache", "images", "bytes", "dtype", "shape", "digest"}
    assert (found["cache"], found["images"], found["shape"]) == (str(work / "cache"), 10, [36, 512])
    assert found["bytes"] == sum(path.stat().st_size for path in (work / "cache").glob("*.safetensors"))

    other_base = work / "base"
    shutil.copytree(EMBEDDED_FOLDER, other_base)
    tensors = load_file(other_base / "model.safetensors")
    tensors["vision_tower.post_layernorm.bias"][0] += 1
    save_file(tensors, other_base / "model.safetensors", metadata={"format": "pt"})
    for word, named in (("template=paper", "template is 'short'"), ("base.path=base", "vision tower is")):
        started = time.monotonic()
        stale = run("train", "run.yaml", word, cwd=work)
        assert (stale.returncode, named in stale.stderr) == (2, True), stale.stderr
        assert "pefomed-ray data cache" in stale.stderr
        assert time.monotonic() - started < 30
        assert not (work / "runs").exists()

    trained = run("train", "run.yaml", "--json", cwd=work)  # the control
    assert trained.returncode == 0, trained.stderr
    bundle = json.loads(trained.stdout.splitlines()[-1])["bundle"]
    assert json.loads((Path(bundle) / "lineage.json").read_text())["feature_cache"] == found["digest"]
