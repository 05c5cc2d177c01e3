"""Each rule by itself, then the gate as `promote` asks it: what is refused, why, and where it is written."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pefomed_ray.artifacts.manifests import BundleManifest, save_document
from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.registry import (
    AliasEntry,
    Decision,
    Evaluation,
    decisions,
    evaluations,
    history,
    promote,
    standing,
)
from pefomed_ray.errors import ConfigError, DataError, PefomedError, RefusedError
from pefomed_ray.evaluation.gate import (
    MUST_BEAT,
    ask_gate,
    beats_controls,
    judge_not_flagged,
    not_worse_than_champion,
)
from pefomed_ray.evaluation.predictions import Prediction, write_predictions


def through_gate(
    registry: Path, alias: str, bundle: Path, metrics_file: Path, margin: float = 0.0
) -> tuple[AliasEntry, Decision]:
    """As `pefomed-ray promote --metrics` does."""
    decision = ask_gate(registry, alias, bundle, metrics_file, margin)
    return promote(registry, alias, bundle, decision), decision


CONTROLS = ("blank_image", "noise_image", "shuffled_image", "majority", "question_prior")


def scores(value: float | None, n: int = 10, metric: str = "exact_match") -> dict[str, Any]:
    return {metric: {"value": value, "n": n, "unscored": 0, "ci95": None}}


def metrics(value: float | None = 0.6, **changed: float | None) -> dict[str, Any]:
    controls = {"blank_image": 0.4, "noise_image": 0.9, "shuffled_image": 0.9, "majority": 0.2, "question_prior": 0.5}
    found = {name: scores(v) for name, v in (controls | changed).items()}
    return {**scores(value), "task": "vqa", "controls": found}


def test_a_model_that_beats_its_controls_passes() -> None:
    assert beats_controls(metrics()).passed


@pytest.mark.parametrize("control", MUST_BEAT["vqa"])
@pytest.mark.parametrize("floor", [0.6, 0.7])
def test_a_control_that_is_as_good_refuses(control: str, floor: float) -> None:
    ruling = beats_controls(metrics(**{control: floor}))
    assert not ruling.passed
    (reason,) = ruling.why
    assert control in reason
    assert "0.600" in reason
    assert f"{floor:.3f}" in reason


@pytest.mark.parametrize("control", MUST_BEAT["vqa"])
def test_a_control_that_was_not_measured_refuses(control: str) -> None:
    (reason,) = beats_controls(metrics(**{control: None})).why
    assert control in reason
    assert "not measured" in reason
    without = metrics()
    del without["controls"][control]
    assert beats_controls(without).why == (reason,)


def test_no_row_refuses() -> None:
    assert beats_controls(metrics(None)).why == ("exact_match was scored on no row",)


def test_a_report_must_beat_the_constant_text() -> None:
    controls = {"constant_text": scores(0.4, metric="rougeL"), "blank_image": scores(0.1, metric="rougeL")}
    found = {**scores(0.3, metric="rougeL"), "task": "report", "controls": controls}
    assert beats_controls(found).why == ("rougeL 0.300 does not beat the control constant_text at 0.400",)


def test_a_flagged_judge_refuses_and_none_does_not() -> None:
    assert judge_not_flagged({}).passed
    assert judge_not_flagged({"judge": {"judge": "j", "flagged": False, "flags": []}}).passed
    ruling = judge_not_flagged({"judge": {"judge": "j", "flagged": True, "flags": ["a canary got 4 of 4"]}})
    assert (ruling.passed, ruling.why) == (False, ("the judge j is flagged: a canary got 4 of 4",))


def evaluation(bundle: str, own: Sequence[float | None], **changed: Any) -> Evaluation:
    words = {"shards": "s", "split": "test", "task": "vqa", "metric": "exact_match", "normalizer": "strict"}
    ids = tuple(f"q{number}" for number in range(len(own)))
    words |= {"ids": ids, "clusters": tuple(range(len(own)))}
    return Evaluation(bundle=bundle, scores=tuple(own), **words | changed)


HALF = [1.0, 0.0] * 50
BETTER = [1.0, 0.0, 1.0, 1.0] * 25
WORSE = [0.0, 0.0, 1.0, 0.0] * 25


@pytest.mark.parametrize(
    ("own", "margin", "passed"), [(BETTER, 0, True), (HALF, 0, True), (WORSE, 0, False), (WORSE, 0.2, True)]
)
def test_the_whole_interval_must_be_worse(own: list[float], margin: float, passed: bool) -> None:
    ruling = not_worse_than_champion(evaluation("new", own), "old", [evaluation("old", HALF)], margin)
    assert ruling.passed is passed
    value = ruling.numbers["difference"]["value"]
    assert value == pytest.approx(np.mean(own) - 0.5)
    assert "on the same 100 items" in ruling.why[0]


def test_items_are_matched_by_id_not_by_place() -> None:
    turned = evaluation("old", HALF[::-1], ids=tuple(f"q{number}" for number in range(99, -1, -1)))
    ruling = not_worse_than_champion(evaluation("new", HALF), "old", [turned], 0)
    assert ruling.numbers["difference"]["value"] == 0
    assert ruling.numbers["difference"]["p"] == 1.0


def test_questions_about_one_image_are_one_cluster() -> None:
    """Ten images with ten questions each: what looks sure by rows is not by images."""
    own = [0.0] * 30 + [1.0] * 70
    theirs = [1.0] * 30 + [0.0] * 10 + [1.0] * 60
    by_image = tuple(number // 10 for number in range(100))
    alone = not_worse_than_champion(evaluation("new", own), "old", [evaluation("old", theirs)], 0)
    together = evaluation("new", own, clusters=by_image)
    assert not alone.passed
    assert not_worse_than_champion(together, "old", [evaluation("old", theirs)], 0).passed


@pytest.mark.parametrize(
    "changed",
    [
        {"shards": "other"},
        {"split": "validation"},
        {"metric": "rougeL"},
        {"normalizer": "pefomed"},
        {"ids": ("a",) * 100},
    ],
)
def test_other_items_are_not_compared(changed: dict[str, Any]) -> None:
    ruling = not_worse_than_champion(evaluation("new", BETTER), "old", [evaluation("old", HALF, **changed)], 0)
    assert not ruling.passed
    assert "was evaluated on other items" in ruling.why[0]
    assert "on the split of the candidate" in ruling.why[0]


def test_a_champion_without_scores_and_no_champion() -> None:
    unknown = not_worse_than_champion(evaluation("new", BETTER), "old", [], 0)
    assert not unknown.passed
    assert "promoted without --metrics" in unknown.why[0]
    assert not_worse_than_champion(evaluation("new", WORSE), None, [], 0).passed
    assert not_worse_than_champion(evaluation("new", WORSE), "new", [], 0).passed


def test_what_cannot_be_compared_is_refused() -> None:
    nothing = evaluation("old", [None] * 100)
    assert "no item has a score" in not_worse_than_champion(evaluation("new", HALF), "old", [nothing], 0).why[0]
    one = not_worse_than_champion(evaluation("new", HALF, clusters=(0,) * 100), "old", [evaluation("old", HALF)], 0)
    assert not one.passed
    assert "one image or patient" in one.why[0]


MakeEvaluated = Callable[..., tuple[Path, Path, str]]


@pytest.fixture
def make_evaluated(tmp_path: Path) -> MakeEvaluated:
    """A function (name, scores of 100 questions) -> bundle, metrics.json of its evaluation, digest."""

    def make(name: str, own: Sequence[float], task: Task = "vqa", **changed: Any) -> tuple[Path, Path, str]:
        bundle, folder = tmp_path / name, tmp_path / f"evaluation-{name}"
        bundle.mkdir()
        folder.mkdir()
        manifest = BundleManifest(base=name, base_digest="d", template="t", template_digest="d", image_size=8, files={})
        save_document(manifest, bundle / "bundle.json")
        rows = [
            Prediction(f"q{number}", "Secret?", "lung", "lung" if score else "heart", group=f"patient {number}")
            for number, score in enumerate(own)
        ]
        write_predictions(folder / "predictions.jsonl", rows, {})
        found = metrics(float(np.mean(own)), blank_image=0.1, question_prior=0.1) | {"bundle": manifest.digest}
        found |= {"shards": "s", "split": "test", "normalizer": "strict"} | changed
        (folder / "metrics.json").write_text(json.dumps(found))
        return bundle, folder / "metrics.json", manifest.digest

    return make


def test_promotions_through_the_gate(make_evaluated: MakeEvaluated, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    first, first_metrics, first_digest = make_evaluated("first", HALF)
    entry, decision = through_gate(registry, "champion", first, first_metrics)
    assert (entry.digest, entry.gate, decision.champion) == (first_digest, "passed", None)

    worse, worse_metrics, worse_digest = make_evaluated("worse", WORSE)
    with pytest.raises(RefusedError, match=r"exact_match is -0\.250 against the champion") as refused:
        through_gate(registry, "champion", worse, worse_metrics)
    assert refused.value.exit_code == 5
    assert standing(registry, "champion") == first_digest
    written = json.loads((worse_metrics.parent / "gate.json").read_text())
    assert (written["passed"], written["alias"], written["bundle"]) == (False, "champion", worse_digest)
    assert written["champion"] == first_digest
    assert written["reasons"][0] in str(refused.value)
    assert [rule["rule"] for rule in written["rules"]] == [
        "beats_controls",
        "judge_not_flagged",
        "not_worse_than_champion",
    ]

    entry, _ = through_gate(registry, "champion", worse, worse_metrics, margin=0.2)
    assert entry.digest == worse_digest
    better, better_metrics, better_digest = make_evaluated("better", BETTER)
    through_gate(registry, "champion", better, better_metrics)
    assert [found.digest for found in history(registry, "champion")] == [first_digest, worse_digest, better_digest]
    assert [found.passed for found in decisions(registry, "champion")] == [True, False, True, True]
    kept = (tmp_path / "registry").rglob("*.json")
    assert not any(text in path.read_text() for path in kept for text in ("Secret", "lung", "patient"))


def test_a_champion_promoted_without_the_gate_gets_its_scores_later(
    make_evaluated: MakeEvaluated, tmp_path: Path
) -> None:
    registry = tmp_path / "registry"
    old, old_metrics, old_digest = make_evaluated("old", HALF, controls={})  # would not pass itself
    assert promote(registry, "champion", old).gate == "not asked"
    new, new_metrics, new_digest = make_evaluated("new", BETTER)
    with pytest.raises(RefusedError, match="was promoted without --metrics, so its scores are not known"):
        through_gate(registry, "champion", new, new_metrics)
    with pytest.raises(RefusedError, match="was not measured"):
        through_gate(registry, "champion", old, old_metrics)
    assert len(evaluations(registry, old_digest)) == 1
    assert through_gate(registry, "champion", new, new_metrics)[0].digest == new_digest


def test_an_alias_that_moved_meanwhile(make_evaluated: MakeEvaluated, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    first, first_metrics, _ = make_evaluated("first", HALF)
    _, decision = through_gate(registry, "champion", first, first_metrics)
    with pytest.raises(PefomedError, match="was moved while the gate was asked"):
        promote(registry, "champion", make_evaluated("second", HALF)[0], decision)


def test_the_metrics_of_another_bundle(make_evaluated: MakeEvaluated, tmp_path: Path) -> None:
    first, _, _ = make_evaluated("first", HALF)
    _, other_metrics, other_digest = make_evaluated("other", HALF)
    with pytest.raises(RefusedError, match=f"measured bundle {other_digest[:16]}"):
        through_gate(tmp_path / "registry", "champion", first, other_metrics)
    base, base_metrics, _ = make_evaluated("base", HALF, bundle=None)
    with pytest.raises(RefusedError, match="measured a model that is no bundle"):
        through_gate(tmp_path / "registry", "champion", base, base_metrics)
    assert not (tmp_path / "registry").exists()


def test_predictions_that_are_not_those_of_the_metrics(make_evaluated: MakeEvaluated, tmp_path: Path) -> None:
    bundle, file, _ = make_evaluated("first", HALF)
    lines = (file.parent / "predictions.jsonl").read_text().splitlines(keepends=True)
    (file.parent / "predictions.jsonl").write_text("".join(lines[:51]))
    with pytest.raises(DataError, match="does not add up to exact_match"):
        through_gate(tmp_path / "registry", "champion", bundle, file)
    (file.parent / "predictions.jsonl").unlink()
    with pytest.raises(DataError, match="is missing"):
        through_gate(tmp_path / "registry", "champion", bundle, file)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"task": "vqa", "bundle": "b", "exact_match": 0.9}'])
def test_what_is_no_evaluation_is_bad_data(make_evaluated: MakeEvaluated, tmp_path: Path, text: str) -> None:
    bundle, file, _ = make_evaluated("first", HALF)
    file.write_text(text)
    with pytest.raises(DataError, match=r"not the metrics\.json of an evaluation"):
        through_gate(tmp_path / "registry", "champion", bundle, file)
    with pytest.raises(ConfigError, match="does not exist"):
        through_gate(tmp_path / "registry", "champion", bundle, tmp_path / "none.json")
    with pytest.raises(ConfigError, match="margin"):
        through_gate(tmp_path / "registry", "champion", bundle, file, margin=-0.1)
