"""What the base under a bundle is held in, as the run that made the bundle says."""

from pathlib import Path

from pefomed_ray.config.load import read_yaml
from pefomed_ray.config.schema import Precision
from pefomed_ray.errors import ConfigError


def precision_of(bundle: Path) -> Precision:
    """From the bundle's `run.yaml`; where that says nothing (before there was a choice), float32."""
    file = bundle / "run.yaml"
    said = read_yaml(file).get("base", {}) if file.is_file() else {}
    return Precision(**{name: said[name] for name in Precision.model_fields if name in said})


def check_has_gpu(bundle: Path, *, use_gpu: bool) -> None:
    """Raise ConfigError where a bundle of a base in int8 is to run without a GPU."""
    if precision_of(bundle).quantization == "int8" and not use_gpu:
        raise ConfigError(
            f"bundle {str(bundle)!r} was trained on a base in int8, which needs a GPU; "
            "evaluate it with --use-gpu, serve it with use_gpu=true"
        )
