"""Survivors answer the validation split through a real Ray Data pipeline; the test split is not there to be read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.artifacts.storage import write_json
from pefomed_ray.config import SearchConfig, TrainConfig, build_config, save_config
from pefomed_ray.data.plan import open_index
from pefomed_ray.errors import DataError
from pefomed_ray.evaluation.predictions import read_predictions
from pefomed_ray.evaluation.preflight import read_texts
from pefomed_ray.evaluation.score import score_rows
from pefomed_ray.metrics.vqa import normalizer_named
from pefomed_ray.model.base import open_base
from pefomed_ray.model.bundle import save_bundle
from pefomed_ray.model.lora import attach_lora
from pefomed_ray.search.choice import choose
from pefomed_ray.search.leaderboard import EndedTrial, ranked, trial_row

pytestmark = [pytest.mark.ray, pytest.mark.long]


def leave(output: Path, trial: str, shards: Path, rank: int) -> None:
    """What a trial leaves that has only just begun: adapters as they are drawn."""
    folder = output / "trials" / trial
    (folder / "epochs").mkdir(parents=True)
    values = {
        "name": trial,
        "task": "vqa",
        "template": "short",
        "data": {"shards": str(shards)},
        "lora": {"rank": rank},
    }
    config = build_config(TrainConfig, values | {"validation": {"batch_size": 4}}, "test")
    save_config(config, folder / "run.yaml")
    base = open_base("embedded", "short")
    attach_lora(base, config.lora, train_projector=True)
    trained = {name: value for name, value in base.model.named_parameters() if value.requires_grad}
    lineage: dict[str, Any] = {"shards": "none", "source": "phantom", "licence": "open", "rows": 27, "split": "train"}
    save_bundle(folder / "epochs" / "001", base, config, trained, lineage, {})
    row = {"exact_match": 0.5, "n": 4.0, "train_s": 1.0, "trainable_parameters": rank}
    write_json(folder / "epochs.json", {"best": 1, "epochs": [row]})


def test_survivors_answer_the_validation_split_and_nobody_opens_the_test_split(
    phantom_shards: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(phantom_shards, shards)
    shutil.rmtree(shards / "test")
    with pytest.raises(DataError):
        open_index(shards, "test")  # so whoever opened it would be noticed
    for trial, rank in (("0000", 2), ("0001", 4)):
        leave(tmp_path, trial, shards, rank)
    space = {"lora.rank": {"choice": [2, 4]}}
    search = build_config(SearchConfig, {"name": "s", "preset": "p", "space": space}, "test")
    rows = ranked(trial_row(tmp_path, EndedTrial(trial, {}), "exact_match") for trial in ("0000", "0001"))
    done: list[tuple[int, int]] = []
    found = choose(search, rows, tmp_path, on_progress=lambda *at: done.append(at))
    texts = read_texts(shards, "validation")
    assert max(done) == (len(texts), len(texts))
    answers = read_predictions(tmp_path / "choice" / "0000.jsonl")
    assert [answer.id for answer in answers] == [row["id"] for row in texts]
    scored = score_rows(answers, "vqa", normalizer_named("strict"))["exact_match"]
    document = json.loads((tmp_path / "choice.json").read_text())
    (mine,) = (row for row in document["ranking"] if row["trial"] == "0000")
    assert mine["rescored"] == scored  # as `evaluate` would
    # Adapters as they are drawn change nothing, so both answered alike, and the smaller one wins.
    assert found.winner.trial == "0000"
    assert found.runner_up is not None
    assert found.runner_up.difference.value == 0.0
