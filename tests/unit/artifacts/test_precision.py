"""What a bundle says of its base's precision, in every form that `run.yaml` had."""

from pathlib import Path

import pytest

from pefomed_ray.artifacts.precision import check_has_gpu, precision_of
from pefomed_ray.config.schema import Precision
from pefomed_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("base: {path: x, dtype: bfloat16, quantization: nf4}", Precision(dtype="bfloat16", quantization="nf4")),
        ("base: {path: x, quantization: int8}", Precision(quantization="int8")),
        ("base: {path: x}", Precision()),
        ("task: vqa", Precision()),
        (None, Precision()),
    ],
)
def test_what_run_yaml_says(run: str | None, expected: Precision, tmp_path: Path) -> None:
    if run is not None:
        (tmp_path / "run.yaml").write_text(run)
    assert precision_of(tmp_path) == expected
    if expected.quantization != "int8":
        check_has_gpu(tmp_path, use_gpu=False)
    else:
        with pytest.raises(ConfigError, match="trained on a base in int8, which needs a GPU"):
            check_has_gpu(tmp_path, use_gpu=False)
    check_has_gpu(tmp_path, use_gpu=True)
