"""What a search shows while it runs, and at its end."""

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from pefomed_ray.cli import console as console_module
from pefomed_ray.cli import trials as trials_module
from pefomed_ray.cli.trials import MOST_ROWS, TrialTable, leaderboard, shown_trials
from pefomed_ray.metrics.intervals import Metric
from pefomed_ray.search.leaderboard import TrialRow


def report(epoch: int, value: float, **more: Any) -> dict[str, Any]:
    return {"training_iteration": epoch, "exact_match": value, **more}


def text_of(what: RenderableType) -> str:
    out = Console(file=io.StringIO(), width=160)
    out.print(what)
    return out.file.getvalue()  # type: ignore[attr-defined]


def line_of(text: str, trial: str) -> str:
    (line,) = (line for line in text.splitlines() if f" {trial} " in line)
    return line


def test_the_table_has_each_trials_latest_and_best() -> None:
    shown = TrialTable("exact_match", epochs=3, of=8)
    shown("0000", {"lora.rank": 8}, report(1, 0.5))
    shown("0000", {"lora.rank": 8}, report(2, 0.25))
    shown("0001", {"lora.rank": 16}, report(1, 0.1, done=True))
    shown("0002", {"lora.rank": 32}, report(3, 0.75, done=True))
    text = text_of(shown.render())
    assert "3 of 8 trials, best exact_match 75.0, 0:00:0" in text
    assert [cell.strip() for cell in line_of(text, "0000").split("│")[1:-1]] == [
        "0000", "running", "2/3", "25.0", "50.0", "rank=8"
    ]  # fmt: skip
    assert "stopped" in line_of(text, "0001")
    assert "finished" in line_of(text, "0002")
    assert text.index("0002") < text.index("0000") < text.index("0001")  # the best first


def test_a_trial_that_failed_is_never_the_best() -> None:
    shown = TrialTable("exact_match", epochs=3, of=8)
    shown("0000", {"lora.rank": 8}, report(1, 0.5))
    shown("0001", {"lora.rank": 16}, report(1, 0.75))
    assert "best exact_match 75.0" in text_of(shown.render())  # the control
    shown.failed("0001", {"lora.rank": 16}, "DivergedError: step 3: the loss is nan")
    shown.failed("0002", {"lora.rank": 32}, "its process was lost")
    text = text_of(shown.render())
    assert "3 of 8 trials, best exact_match 50.0" in text
    assert "DivergedError: step 3: the loss is nan (rank=16)" in line_of(text, "0001")
    assert "failed" in line_of(text, "0002")


def test_a_table_of_many_trials_fits_a_screen() -> None:
    shown = TrialTable("exact_match", epochs=3, of=64)
    assert "0 of 64 trials, best exact_match -" in text_of(shown.render())
    for number in range(MOST_ROWS + 5):
        shown(f"{number:04d}", {}, report(1, number / 100))
    text = text_of(shown.render())
    assert "and 5 others" in text
    assert " 0005 " in text
    assert " 0004 " not in text
    shown.rescoring(30, 90)
    assert "re-scoring on the whole validation split: 30/90 answers" in text_of(shown.render())


def test_without_a_terminal_there_is_a_line_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    plain = Console(file=out, highlight=False, width=160)
    monkeypatch.setattr(console_module, "err", plain)
    monkeypatch.setattr(trials_module, "err", plain)
    with shown_trials("exact_match", 3, 8) as on_report:
        on_report("0000", {"lora.rank": 8, "optimizer.learning_rate": 0.00123456}, report(1, 0.5))
        assert out.getvalue() == "trial 0000 epoch 1: exact_match 50.0 rank=8 learning_rate=0.00123\n"
        on_report.failed("0001", {"lora.rank": 8}, "no memory")
        assert out.getvalue().endswith("trial 0001 failed: no memory (rank=8)\n")
        on_report.rescoring(90, 90)
        assert "90/90 answers" in out.getvalue()


def test_on_a_terminal_there_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(trials_module, "err", Console(file=out, force_terminal=True, width=160))
    with shown_trials("exact_match", 3, 8) as on_report:
        on_report("0000", {"lora.rank": 8}, report(1, 0.5))
    assert "1 of 8 trials" in out.getvalue()


def test_the_leaderboard_says_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(console_module, "err", Console(file=out, width=200))
    won = TrialRow("0001", "finished", 0.5, 40, (0.35, 0.65), 2, 3, {"lora.rank": 8}, 1234, 9.0, "b")
    rescored = TrialRow(**{**vars(won), "rescored": Metric(0.45, 90, 0, (0.4, 0.5))})
    failed = TrialRow("0002", "failed", None, None, None, None, 0, {"lora.rank": 8}, None, 0.0, None, "DivergedError")
    leaderboard([rescored, failed], "exact_match")
    line = line_of(out.getvalue(), "0001")
    assert all(cell in line for cell in ("50.0", "35.0 to 65.0", "45.0", "1,234", "rank=8"))
    assert "DivergedError" in line_of(out.getvalue(), "0002")
