"""What a trial leaves of an error, and what it reports again."""

from pathlib import Path

import pytest
import torch

from pefomed_ray.errors import ConfigError, DivergedError, PefomedError
from pefomed_ray.search import trial
from pefomed_ray.search.trial import beginning, failure, report_again
from pefomed_ray.training.checkpoint import Progress, save_checkpoint
from pefomed_ray.training.outcome import raise_stop


@pytest.mark.parametrize(
    ("error", "reason", "raised"),
    [
        (DivergedError("step 3: the loss is nan"), "DivergedError: step 3: the loss is nan", DivergedError),
        (ConfigError("no such base"), "ConfigError: no such base", ConfigError),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "OutOfMemoryError: CUDA out of memory (test_trial.py",
            PefomedError,
        ),
        (KeyError("what a patient said"), "KeyError (test_trial.py, line ", PefomedError),
    ],
)
def test_an_error_is_written_down_and_not_raised(
    error: Exception, reason: str, raised: type[PefomedError], tmp_path: Path
) -> None:
    """Tune would try the trial again; and nobody knows what an unforeseen message quotes."""
    folder = tmp_path / "trials" / "0000"
    with beginning(folder):
        assert failure(folder) is None
    with beginning(folder):
        raise error
    found = failure(folder) or ""
    assert found.startswith(reason)
    assert "patient" not in found
    with pytest.raises(raised):
        raise_stop(folder)


def test_what_ends_the_process_is_no_failure(tmp_path: Path) -> None:
    """So Tune ends the thread of a trial that it stops."""
    with pytest.raises(SystemExit), beginning(tmp_path):
        raise SystemExit(0)
    assert failure(tmp_path) is None
    with beginning(tmp_path):  # nor is the folder held any longer
        pass


def test_epochs_are_reported_again_up_to_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those that `epochs.json` holds beyond: the epoch whose checkpoint was not written is trained again."""
    told: list[dict[str, float]] = []
    monkeypatch.setattr(trial.tune, "report", told.append)
    report_again(tmp_path)
    assert told == []
    rows = [{"exact_match": 0.1}, {"exact_match": 0.2}, {"exact_match": 0.3}]
    for epochs in (1, 2):
        save_checkpoint(tmp_path, Progress(step=epochs * 4, epochs=rows[:epochs]), {"weight.a": torch.zeros(2)}, {})
    report_again(tmp_path)
    assert told == rows[:2]
    (tmp_path / "checkpoints/00000008/state.safetensors").write_bytes(b"torn")
    report_again(tmp_path)
    assert told == [*rows[:2], rows[0]]
