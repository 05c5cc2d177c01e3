"""A trial's folder, and what Tune hands to it; the same for trials that are packed and for those that are not.

<output>/trials/<trial>/    the files of a run; `stopped.json` where it failed, and why
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from filelock import FileLock
from ray import tune

from pefomed_ray.artifacts.storage import read_json
from pefomed_ray.errors import PefomedError, original_error
from pefomed_ray.training.outcome import STOPPED_FILE, is_stopped, record_stop
from pefomed_ray.training.progress import progress_of_newest

LOCK_FILE = "trial.lock"
LOCK_TIMEOUT_S = 120.0
"""For a process of this trial whose driver was killed to be gone."""


class Suggestion(TypedDict):
    """What Tune hands to a trial: its config."""

    trial: str
    """Its name: its number in the study."""
    params: dict[str, Any]
    """By dotted key of the training config."""


@contextmanager
def beginning(folder: Path) -> Iterator[None]:
    """Alone in the trial's folder; an error is written down there (`failure`) and ends the trial.

    It is not raised: Tune would run the trial again, as it does where a process was lost, and meet it again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK_FILE, timeout=LOCK_TIMEOUT_S):
        try:
            yield
        except PefomedError as error:
            # A packed trial's comes from its host's process, and Ray makes a class of its own for it on the way.
            cause = original_error(error)
            assert isinstance(cause, PefomedError)
            record_stop(folder, cause)
        except Exception as error:
            from pefomed_ray.search.leaderboard import reason_of  # brings torch with it, which a packed trial is spared

            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}, line {frame.lineno}"
            record_stop(folder, PefomedError(f"{reason_of(error)} ({where})"))


def report_again(folder: Path) -> int:
    """Report the epochs up to the checkpoint that the trial goes on from: Tune counts from one each time it starts.

    Returns how many there are.
    """
    rows = progress_of_newest(folder).epochs
    for row in rows:
        tune.report(row)
    return len(rows)


def failure(folder: Path) -> str | None:
    """Why the trial failed; None where it did not, or its process was lost."""
    if not is_stopped(folder):
        return None
    found = read_json(folder / STOPPED_FILE)
    return found["message"] if found["kind"] == PefomedError.__name__ else f"{found['kind']}: {found['message']}"
