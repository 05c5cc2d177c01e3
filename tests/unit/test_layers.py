"""The lower rooms load neither torch nor Ray, not even through somebody else's import.

The import-linter contracts read the source; this loads the modules, so it also sees what a dependency pulls in.
"""

import subprocess
import sys

CHECK = "import sys; assert not {'torch', 'ray'} & set(sys.modules)"
LOWER_ROOMS = "import pefomed_ray.config, pefomed_ray.artifacts, pefomed_ray.metrics, pefomed_ray.errors"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_lower_rooms_load_neither_torch_nor_ray() -> None:
    result = run(f"{LOWER_ROOMS}; {CHECK}")
    assert result.returncode == 0, result.stderr


def test_the_check_sees_torch() -> None:
    result = run(f"import torch; {CHECK}")
    assert result.returncode != 0
    assert "AssertionError" in result.stderr


def test_what_is_checked_before_ray_starts_loads_neither() -> None:
    rooms = ("training", "evaluation", "serving")
    result = run(
        f"import {', '.join(f'pefomed_ray.{room}.preflight' for room in rooms)}, pefomed_ray.search.space; {CHECK}"
    )
    assert result.returncode == 0, result.stderr


def test_a_packed_trial_loads_no_torch() -> None:
    """There are many, and each would take ten seconds to. Where the handle of its host goes, the host's module goes."""
    client = "import sys, pefomed_ray.search.packed_trial, pefomed_ray.search.host"
    result = run(f"{client}; assert not {{'torch', 'transformers', 'scipy'}} & set(sys.modules)")
    assert result.returncode == 0, result.stderr
