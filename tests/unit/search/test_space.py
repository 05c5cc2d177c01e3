"""What a space draws and what a trial is given; whose search a folder holds, and who runs it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.config import SearchConfig, TrainConfig, build_config
from pefomed_ray.errors import ConfigError
from pefomed_ray.search.lock import LOCK_FILE, check_not_running, locked
from pefomed_ray.search.space import (
    check_same_search,
    check_space,
    drawn_of,
    is_begun,
    params_of,
    record_search,
    trial_config,
)

VALUES = {"name": "a", "task": "vqa", "data": {"shards": "x"}}
ALPHA = {"times": "lora.rank", "choice": [0.25, 1, 2]}
SPACE = {"lora.rank": {"choice": [8, 64]}, "lora.alpha": ALPHA, "training.epochs": {"int": [1, 3]}}


def search(**changes: Any) -> SearchConfig:
    return build_config(SearchConfig, {"name": "s", "preset": "p", "space": SPACE, **changes}, "s")


def test_a_multiple_is_drawn_as_a_factor_and_given_as_a_product() -> None:
    drawn = {"lora.rank": 64, "lora.alpha per lora.rank": 0.25, "training.epochs": 2}
    given = {"lora.rank": 64, "lora.alpha": 16.0, "training.epochs": 2}
    assert params_of(search(), drawn) == given
    assert drawn_of(search(), given) == drawn
    assert trial_config(VALUES, given).lora.alpha == 16
    assert drawn_of(search(), {"lora.rank": 8}) == {"lora.rank": 8}  # the rest is drawn
    thirds = search(space=SPACE | {"lora.alpha": {"times": "lora.rank", "choice": [1 / 3, 0.1]}})
    for factor in (1 / 3, 0.1):
        point = params_of(thirds, drawn | {"lora.alpha per lora.rank": factor})
        assert drawn_of(thirds, point)["lora.alpha per lora.rank"] == factor


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"lora.rank": 64, "lora.alpha": 17}, r"points\[0\]: lora.alpha / lora.rank = 0.265625 lies outside"),
        ({"lora.alpha": 16}, r"points\[0\]: lora.alpha is a multiple of lora.rank, which the point leaves out"),
        ({"lora.rnak": 64}, r"points\[0\]: lora.rnak is not in space"),
        ({"training.epochs": 4}, r"points\[0\]: training.epochs = 4 lies outside"),
    ],
)
def test_points_outside_the_space_are_refused(point: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_space(search(points=[point]), VALUES)
    check_space(search(points=[{"lora.rank": 64, "lora.alpha": 16, "training.epochs": 3}]), VALUES)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"lora.alpha": ALPHA}, "times 'lora.rank' is not another key of space"),
        ({"lora.alpha": {"times": "lora.alpha", "choice": [1]}}, "times 'lora.alpha' is not another key"),
        ({**SPACE, "lora.dropout": {"times": "lora.alpha", "uniform": [0, 1]}}, "drawn by itself .lora.rank, training"),
        ({"optimizer.learning_rate": {"loguniform": [1e-3, 1e-5]}}, r"loguniform \[0.001, 1e-05\] must be"),
        ({"lora.rank": {"int": [8, 8]}}, "int .8, 8. must be"),
    ],
)
def test_spaces_that_say_nothing_are_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(space=space)


def test_a_product_that_does_not_validate_is_found() -> None:
    """At either end of the factor, and of what it multiplies."""
    check_space(search(), VALUES)
    bad = {"training.batch_size": {"choice": [8, 16]}, "training.micro_batch_size": {"times": "training.batch_size"}}
    bad["training.micro_batch_size"] |= {"choice": [1, 2]}  # type: ignore[operator]
    with pytest.raises(ConfigError, match="batch_size"):
        check_space(search(space=bad), VALUES)


def test_a_search_goes_on_as_itself_alone(tmp_path: Path) -> None:
    config = search(output_dir=str(tmp_path))
    first = trial_config(VALUES, {}, output_dir=str(tmp_path))
    assert not is_begun(tmp_path)
    record_search(config, first)
    assert is_begun(tmp_path)
    more = {
        "trials": 99,
        "time_budget_s": 5,
        "plateau_trials": 3,
        "max_concurrent": 1,
        "storage": "sqlite:///elsewhere",
    }
    check_same_search(search(output_dir=str(tmp_path), **more), first)
    with pytest.raises(ConfigError, match="seed was 42 and is 43"):
        check_same_search(search(output_dir=str(tmp_path), seed=43), first)
    with pytest.raises(ConfigError, match=r"preset\.lora\.dropout was 0\.05 and is 0\.5"):
        check_same_search(config, trial_config(VALUES, {"lora.dropout": 0.5}))
    with pytest.raises(ConfigError, match=r"space\.lora\.rank\.choice was \[8, 64\] and is \[8\]"):
        check_same_search(search(output_dir=str(tmp_path), space=SPACE | {"lora.rank": {"choice": [8]}}), first)


def test_the_storages_password_is_not_written_down(tmp_path: Path) -> None:
    config = search(output_dir=str(tmp_path), storage="postgresql://me:s3cret@host/db")
    record_search(config, build_config(TrainConfig, VALUES, "t"))
    written = [path.read_text() for path in tmp_path.iterdir() if path.is_file()]
    assert len(written) == 2
    assert not any("s3cret" in text for text in written)


def test_one_process_runs_a_search_and_its_lock_dies_with_it(tmp_path: Path) -> None:
    """Two drivers on one study: the second is told who the first is. A killed one is in nobody's way."""
    code = (
        "import sys, time; from pathlib import Path; from pefomed_ray.search.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    check_not_running(tmp_path)  # the control: nobody runs it
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for second in (check_not_running, lambda output: locked(output).__enter__()):
            with pytest.raises(ConfigError, match=f"already running as process {holder.pid} on "):
                second(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    check_not_running(tmp_path)
    assert (tmp_path / LOCK_FILE).is_file()
    with locked(tmp_path):
        pass
