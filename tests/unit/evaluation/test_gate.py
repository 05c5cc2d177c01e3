import json
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.artifacts.manifests import BundleManifest, save_document
from pefomed_ray.errors import ConfigError, DataError, RefusedError
from pefomed_ray.evaluation.gate import MUST_BEAT, gate, require_passed


def scores(value: float | None, n: int = 10, metric: str = "exact_match") -> dict[str, Any]:
    return {metric: {"value": value, "n": n, "unscored": 0, "ci95": None}}


def metrics(value: float = 0.6, **changed: float | None) -> dict[str, Any]:
    controls = {"blank_image": 0.4, "noise_image": 0.9, "shuffled_image": 0.9, "majority": 0.2, "question_prior": 0.5}
    return {**scores(value), "controls": {name: scores(v) for name, v in (controls | changed).items()}}


def test_a_model_that_beats_its_controls_passes() -> None:
    assert gate(metrics()) == []


@pytest.mark.parametrize("control", MUST_BEAT)
@pytest.mark.parametrize("floor", [0.6, 0.7])
def test_a_control_that_is_as_good_refuses(control: str, floor: float) -> None:
    (reason,) = gate(metrics(**{control: floor}))
    assert control in reason
    assert "0.600" in reason
    assert f"{floor:.3f}" in reason


@pytest.mark.parametrize("control", MUST_BEAT)
def test_a_control_that_was_not_measured_refuses(control: str) -> None:
    (reason,) = gate(metrics(**{control: None}))
    assert control in reason
    assert "not measured" in reason
    without = metrics()
    del without["controls"][control]
    assert gate(without) == [reason]


def test_no_row_refuses() -> None:
    assert gate(scores(None, n=0)) == ["exact_match was scored on no row"]
    assert gate(metrics(), "rougeL") == ["rougeL was scored on no row"]
    assert gate({"schema_version": 1}) == ["exact_match was scored on no row"]


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[Path, str]:
    """Folder and digest."""
    manifest = BundleManifest(base="b", base_digest="d", template="t", template_digest="d", image_size=8, files={})
    save_document(manifest, tmp_path / "bundle.json")
    return tmp_path, manifest.digest


def test_require_passed(bundle: tuple[Path, str], tmp_path: Path) -> None:
    folder, digest = bundle
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps(metrics() | {"task": "vqa", "bundle": digest}))
    require_passed(file, folder)
    file.write_text(json.dumps(metrics(0.45) | {"task": "vqa", "bundle": digest}))
    with pytest.raises(RefusedError, match=r"does not beat the control question_prior at 0\.500"):
        require_passed(file, folder)
    file.write_text(json.dumps(metrics() | {"task": "report", "bundle": digest}))
    with pytest.raises(RefusedError, match="rougeL was scored on no row"):
        require_passed(file, folder)
    file.write_text(json.dumps(metrics() | {"task": "vqa", "bundle": "f" * 64}))
    with pytest.raises(RefusedError, match="measured bundle ffff"):
        require_passed(file, folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"task": "vqa", "bundle": "b", "exact_match": 0.9}'])
def test_what_is_no_evaluation_is_bad_data(bundle: tuple[Path, str], tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(DataError, match=r"not the metrics\.json of an evaluation"):
        require_passed(tmp_path / "metrics.json", bundle[0])
    with pytest.raises(ConfigError, match="does not exist"):
        require_passed(tmp_path / "none.json", bundle[0])
