"""A model served by this project as the judge: the protocol fits; what a tiny model says is unscored, not guessed."""

import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.artifacts.registry import promote
from pefomed_ray.config import ServeConfig, TrainConfig
from pefomed_ray.config.schema import JudgeConfig
from pefomed_ray.errors import ConfigError
from pefomed_ray.evaluation.judge.run import JudgeResult, judge_rows
from pefomed_ray.evaluation.predictions import Prediction
from pefomed_ray.model.base import open_base
from pefomed_ray.model.bundle import save_bundle
from pefomed_ray.model.lora import attach_lora
from pefomed_ray.serving import deploy
from pefomed_ray.serving.keys import CLIENT_KEY_FILE

pytestmark = [pytest.mark.ray, pytest.mark.long]

ROWS = [Prediction(f"r{i}", f"Is number {i} normal?", "yes", "yes" if i % 2 else "no", "closed") for i in range(4)]


@dataclass(frozen=True)
class Served:
    """A running endpoint and where its key is."""

    endpoint: deploy.Endpoint
    registry: Path

    def judge(self, cache: Path, **settings: Any) -> JudgeResult:
        config = {
            "model": self.endpoint.model,
            "base_url": self.endpoint.url,
            "key_file": str(self.registry / CLIENT_KEY_FILE),
            "local": True,
            "canaries": 1,
            "max_tokens": 16,
            "max_retries": 1,
        }
        return judge_rows(ROWS, "vqa", JudgeConfig.model_validate(config | settings), licence="restricted", cache=cache)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    folder = Path(tempfile.mkdtemp(prefix="pfj-", dir="/tmp"))  # short: Ray's sockets allow 107 characters
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = open_base("embedded", "short")
    config = TrainConfig.model_validate(
        {"name": "t", "task": "vqa", "template": "short", "base": {"path": "embedded"}, "data": {"shards": "none"}}
    )
    attach_lora(base, config.lora, train_projector=True)
    trained = {name: p.detach() for name, p in base.model.named_parameters() if p.requires_grad}
    try:
        save_bundle(folder / "bundle", base, config, trained, {"source": "phantom"}, {"exact_match": {"value": 0.5}})
        promote(folder / "registry", "champion", folder / "bundle")
        registry = folder / "registry"
        endpoint = deploy.start(ServeConfig(port=port), registry, "champion")
        yield Served(endpoint, registry)
    finally:
        deploy.stop()
        shutil.rmtree(folder, ignore_errors=True)


def test_every_item_of_a_judge_that_cannot_judge_is_unscored(served: Served, tmp_path: Path) -> None:
    result = served.judge(tmp_path / "cache.sqlite")
    assert {one.unscored for one in result.judgements} <= {"unparsable", "empty", "cut_short"}
    assert [one.score for one in result.judgements] == [None] * len(ROWS)
    assert all(served.endpoint.digest in (one.identity or "") for one in result.judgements)
    metric = result.metrics["judge_accuracy"]
    assert (metric["value"], metric["n"], metric["unscored"]) == (None, 0, len(ROWS))
    assert result.flagged
    # What the endpoint refuses by name was left out, and what it takes was kept.
    asked_with = {"temperature": 0.0, "max_tokens": 16, "seed": 42, "store": False, "response_format": None}
    assert result.about["asked_with"] == asked_with
    assert result.usage["prompt_tokens"] > 0
    assert served.judge(tmp_path / "cache.sqlite").usage["calls"] == 0


def test_with_a_blank_picture_where_an_endpoint_wants_one(served: Served, tmp_path: Path) -> None:
    result = served.judge(tmp_path / "cache.sqlite", blank_image=True)
    assert len(result.judgements) == len(ROWS)
    assert result.usage["prompt_tokens"] > served.judge(tmp_path / "plain.sqlite").usage["prompt_tokens"]


def test_a_wrong_key_ends_it(served: Served, tmp_path: Path) -> None:
    (tmp_path / "client.key").write_text("wrong")
    with pytest.raises(ConfigError, match="401"):
        served.judge(tmp_path / "cache.sqlite", key_file=str(tmp_path / "client.key"))
