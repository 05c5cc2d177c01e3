"""The page of a run, finished or cut off."""

import json
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.training.journal import Journal
from pefomed_ray.training.progress import Progress
from pefomed_ray.training.report import write_report
from pefomed_ray.training.trackers import Trackers


class Order:
    """As much of a TrainingOrder as the journal reads."""

    batch_size = 8
    total_steps = 4


STEP = {
    "loss": 2.5,
    "grad_norm": 1.0,
    "learning_rate": 1e-3,
    "answer_tokens": 40,
    "step_s": 0.5,
    "data_wait_share": 0.1,
}
EPOCH = {
    "train_loss": 2.5, "exact_match": 0.25, "rougeL": 0.5, "loss": 2.0, "n": 4.0, "steps": 2, "rows_per_s": 16.0,
    "data_wait_share": 0.1, "bad_steps": 0,
}  # fmt: skip


def journal(output: Path, progress: Progress) -> Journal:
    config = build_config(TrainConfig, {"name": "a", "task": "vqa", "data": {"shards": "x"}}, "test")
    return Journal(output, Order(), progress, Trackers(config, output))  # type: ignore[arg-type]


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text("name: '<b>mine</b>'\nvalidation: {rows: 4}\n")
    return tmp_path


def test_a_page_of_what_there_is(output: Path) -> None:
    book = journal(output, Progress())
    for number in (1, 2):
        book.step(number, STEP)
    book.epoch(Progress(step=2, epochs=[EPOCH], best=0))
    book.close()
    page = write_report(output).read_text()
    assert "2 of 4 steps" in page
    assert page.count("<svg") == 8  # five curves of steps, three of epochs
    assert "1 (best)" in page
    assert "<b>mine</b>" not in page
    assert "&lt;b&gt;mine" in page
    assert "http://" not in page.replace("http://www.w3.org/", "").replace("http://purl.org/", "").replace(
        "http://creativecommons.org/", ""
    )  # names of formats: nothing is fetched


def test_a_run_that_took_no_step_has_a_page_too(output: Path) -> None:
    assert "No step was taken" in write_report(output).read_text()


def test_what_goes_on_takes_back_the_steps_after_its_checkpoint(output: Path) -> None:
    book = journal(output, Progress())
    for number in (1, 2, 3):
        book.step(number, STEP | {"loss": float(number)})
    book.close()
    with open(output / "steps.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # cut off within a line
    book = journal(output, Progress(step=2))
    book.step(3, STEP | {"loss": 33.0})
    book.close()
    assert [(line["step"], line["loss"]) for line in lines(output)] == [(1, 1.0), (2, 2.0), (3, 33.0)]
    assert lines(output)[0]["tokens_per_s"] == 80
    assert list((output / "tensorboard").iterdir())
