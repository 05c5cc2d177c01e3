"""What is found before Ray starts."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pefomed_ray.artifacts.manifests import BundleManifest, save_document
from pefomed_ray.artifacts.registry import promote
from pefomed_ray.artifacts.storage import sha256_file
from pefomed_ray.config import ServeConfig
from pefomed_ray.errors import ConfigError, DataError, RefusedError
from pefomed_ray.serving.preflight import check


def put_bundle(tmp_path: Path, run: str) -> Path:
    """A registry whose champion is a bundle with this `run.yaml`."""
    base = tmp_path / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text('{"model_type": "pefomed"}')
    for name in ("tokenizer.json", "preprocessor_config.json", "model.safetensors"):
        (base / name).write_text("{}")
    bundle = tmp_path / "bundle"
    bundle.mkdir(exist_ok=True)
    (bundle / "run.yaml").write_text(run)
    files = {"run.yaml": sha256_file(bundle / "run.yaml")}
    manifest = BundleManifest(
        base=str(base), base_digest="0" * 64, template="short", template_digest="1" * 64, image_size=96, files=files
    )
    save_document(manifest, bundle / "bundle.json")
    promote(tmp_path / "registry", "champion", bundle)
    return tmp_path / "registry"


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return put_bundle(tmp_path, "task: vqa\n")


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_free_port_and_a_known_alias_pass(registry: Path, free_port: int) -> None:
    assert check(ServeConfig(port=free_port), registry, "champion") is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "hospital.example"])
def test_other_hosts_need_tls_in_front(registry: Path, free_port: int, host: str) -> None:
    with pytest.raises(RefusedError, match="tls_in_front"):
        check(ServeConfig(host=host, port=free_port), registry, "champion")


def test_tls_in_front_opens_other_hosts(registry: Path, free_port: int) -> None:
    config = ServeConfig(host="0.0.0.0", port=free_port, tls_in_front=True)
    assert check(config, registry, "champion") is None  # type: ignore[func-returns-value]


def test_a_port_in_use(registry: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="port: cannot listen"):
            check(ServeConfig(port=taken.getsockname()[1]), registry, "champion")


def test_unknown_alias_and_changed_bundle(registry: Path, free_port: int) -> None:
    with pytest.raises(ConfigError, match="there are: champion"):
        check(ServeConfig(port=free_port), registry, "challenger")
    next((registry / "bundles").glob("*/run.yaml")).write_text("task: report\n")
    with pytest.raises(DataError, match=r"run\.yaml"):
        check(ServeConfig(port=free_port), registry, "champion")


def test_a_missing_base(registry: Path, free_port: int) -> None:
    (registry.parent / "base" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="tokenizer"):
        check(ServeConfig(port=free_port), registry, "champion")


def test_a_bundle_of_a_base_in_int8_needs_a_gpu(tmp_path: Path, free_port: int) -> None:
    registry = put_bundle(tmp_path, "task: vqa\nbase: {path: x, quantization: int8}\n")
    with pytest.raises(ConfigError, match=r"trained on a base in int8, which needs a GPU; .* use_gpu=true"):
        check(ServeConfig(port=free_port), registry, "champion")
    assert check(ServeConfig(port=free_port, use_gpu=True), registry, "champion") is None  # type: ignore[func-returns-value]


def test_the_ingress_loads_no_torch() -> None:
    code = "import sys, pefomed_ray.serving.ingress; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
