"""What a run would find on this machine."""

import os
import platform
import shutil
from importlib.metadata import version
from typing import Any

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER
from pefomed_ray.artifacts.storage import sha256_file
from pefomed_ray.errors import PefomedError

PACKAGES = ("ray", "torch", "transformers", "peft", "bitsandbytes", "optuna", "pyarrow", "openai")


def examine() -> dict[str, Any]:
    """Versions, cores, memory, disk and GPUs; raises PefomedError where the embedded base is damaged."""
    check_embedded_base()
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "free_disk_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "embedded_base": "ok",
    }


def check_embedded_base() -> None:
    """Compare the embedded base's files with the sha256 they were committed with."""
    for line in (EMBEDDED_FOLDER / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        expected, name = line.split()
        if sha256_file(EMBEDDED_FOLDER / name) != expected:
            raise PefomedError(f"the embedded base's {name} does not match its sha256; install the package again")
