"""What is written and refused, with a stand-in for the model."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pefomed_ray.artifacts.base import EMBEDDED, EMBEDDED_FOLDER, base_digest
from pefomed_ray.artifacts.manifests import (
    BundleManifest,
    load_bundle_manifest,
    load_shard_manifest,
    save_document,
)
from pefomed_ray.artifacts.storage import read_json, sha256_file, write_json
from pefomed_ray.data.plan import RowIndex, read_rows
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.evaluation import evaluate as evaluate_module
from pefomed_ray.evaluation.answers import Answered, Question
from pefomed_ray.evaluation.evaluate import evaluate
from pefomed_ray.evaluation.gate import beats_controls
from pefomed_ray.evaluation.judgements import Judgement, write_judgements
from pefomed_ray.evaluation.predict import GenerationSettings
from pefomed_ray.evaluation.predictions import Prediction, read_predictions
from pefomed_ray.evaluation.score import score_rows

MakeShards = Callable[..., Path]
CONTROLS = ["blank_image", "noise_image", "shuffled_image", "majority", "question_prior"]


class SeesColours:
    """Right when shown the image, `red` otherwise; dies before the answer number `dies_at`."""

    def __init__(self) -> None:
        self.asked: list[Question] = []
        self.dies_at: int | None = None

    def __call__(
        self, asked: Sequence[Question], model: Any, index: RowIndex, settings: GenerationSettings
    ) -> Iterator[Answered]:
        for number, question in enumerate(asked):
            if number == self.dies_at:
                raise KeyboardInterrupt
            self.asked.append(question)
            (row,) = read_rows(index, np.asarray([question.row]))
            yield Answered(question.given, question.row, row["answer"] if question.given == "image" else "red")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(b"weights")
    files = {"weights.safetensors": sha256_file(folder / "weights.safetensors")}
    manifest = BundleManifest(base="b", base_digest="d", template="t", template_digest="d", image_size=8, files=files)
    save_document(manifest, folder / "bundle.json")
    return folder


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> SeesColours:
    model = SeesColours()
    monkeypatch.setattr(evaluate_module, "generate", model)

    def quickly(systems: dict[str, list[Prediction]], *how: Any) -> dict[str, Any]:
        return {name: score_rows(rows, *how) for name, rows in systems.items()}

    monkeypatch.setattr(evaluate_module, "score_systems_fully", quickly)  # no Java here
    return model


def test_a_bundle_of_a_quantised_base_needs_a_gpu(bundle: Path, make_shards: MakeShards, tmp_path: Path) -> None:
    (bundle / "run.yaml").write_text("base: {path: x, quantization: int8}\n")
    files = {path.name: sha256_file(path) for path in bundle.iterdir() if path.name != "bundle.json"}
    save_document(load_bundle_manifest(bundle).model_copy(update={"files": files}), bundle / "bundle.json")
    with pytest.raises(ConfigError, match="trained on a base in int8, which needs a GPU"):
        evaluate(bundle, make_shards(), "test", tmp_path / "out")
    evaluate(bundle, tmp_path / "shards", "test", tmp_path / "out", settings=GenerationSettings(use_gpu=True))


def test_what_is_written(bundle: Path, make_shards: MakeShards, tmp_path: Path) -> None:
    shards, output = make_shards(), tmp_path / "out"
    done: list[tuple[int, int]] = []
    answer = evaluate(bundle, shards, "test", output, on_progress=lambda *at: done.append(at))
    assert [Path(answer[key]) for key in ("predictions", "metrics", "report")] == [
        output / "predictions.jsonl",
        output / "metrics.json",
        output / "report.html",
    ]
    assert done == [(number, 28) for number in range(1, 29)]
    assert answer["values"]["exact_match"] == 1.0
    assert answer["values"]["exact_match_closed"] is None
    assert "image_overlap_with_training" not in answer["values"]
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["exact_match"]["n"] == metrics["rows"] == 7
    assert list(metrics["controls"]) == CONTROLS
    assert metrics["controls"]["blank_image"]["exact_match"]["value"] == pytest.approx(2 / 7)
    # Train holds rows 0..5: red and green twice; `What is seen?` was red twice, `Which colour?` green twice.
    assert metrics["controls"]["majority"]["exact_match"]["value"] == pytest.approx(2 / 7)
    assert metrics["controls"]["question_prior"]["exact_match"]["value"] == pytest.approx(4 / 7)
    assert metrics["against_controls"]["question_prior"]["value"] == pytest.approx(3 / 7)
    assert metrics["unique_output_ratio"] == metrics["unique_reference_ratio"] == pytest.approx(4 / 7)
    assert metrics["by_question_type"]["Colour"]["exact_match"]["n"] == 3
    assert metrics["image_overlap"] == {"train/test": 4}
    assert metrics["image_overlap_with_training"] == {"value": 1.0, "n": 4}
    assert metrics["text_overlap"]["references"] == {"value": 1.0, "n": 7}
    assert metrics["normal_reports_heuristic"] is None
    assert metrics["shards"] == load_shard_manifest(shards).digest
    assert metrics["bundle"] == load_bundle_manifest(bundle).digest == metrics["model"]["digest"]
    assert (metrics["split"], metrics["normalizer"], metrics["task"]) == ("test", "strict", "vqa")
    assert beats_controls(metrics).passed
    assert [row.id for row in read_predictions(output / "predictions.jsonl")] == [f"test-{n}" for n in range(7)]
    first = json.loads((output / "predictions.jsonl").read_text().splitlines()[0])
    assert first["produced_by"]["licence"] == "open"
    assert sorted(path.stem for path in (output / "controls").iterdir()) == sorted(CONTROLS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "out", "shards"]


def test_a_killed_evaluation_asks_only_what_is_missing(
    bundle: Path, make_shards: MakeShards, tmp_path: Path, stand_in: SeesColours
) -> None:
    shards, output, kept = make_shards(), tmp_path / "out", tmp_path / "out.answers"
    whole = evaluate(bundle, shards, "test", tmp_path / "whole")
    stand_in.asked.clear()
    stand_in.dies_at = 10
    with pytest.raises(KeyboardInterrupt):
        evaluate(bundle, shards, "test", output)
    with open(kept / "part-000.jsonl", "a") as file:
        file.write('{"given": "image", "row": 6, "te')  # what a kill leaves of a line
    assert not output.exists()
    with pytest.raises(ConfigError, match="--resume"):
        evaluate(bundle, shards, "test", output)
    with pytest.raises(KeyboardInterrupt):
        evaluate(bundle, shards, "test", output, resume=True)
    stand_in.dies_at = None
    resumed = evaluate(bundle, shards, "test", output, resume=True)
    assert len(stand_in.asked) == len(set(stand_in.asked)) == 28
    assert not kept.exists()
    for key in ("predictions", "metrics", "report"):
        assert Path(resumed[key]).read_bytes() == Path(whole[key]).read_bytes()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"rows_limit": 3}, "rows"),
        ({"settings": GenerationSettings(seed=1)}, "seed"),
        ({"settings": GenerationSettings(max_new_tokens=3)}, "max_new_tokens"),
        ({"image_controls": False}, "given"),
        ({"model": EMBEDDED}, "model"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_answers_to_something_else_are_not_mixed_in(
    bundle: Path,
    make_shards: MakeShards,
    tmp_path: Path,
    stand_in: SeesColours,
    other: dict[str, Any],
    named: str,
    finished: bool,
) -> None:
    words: dict[str, Any] = {"model": bundle, "shards": make_shards(), "split": "test", "output_dir": tmp_path / "out"}
    if finished:
        evaluate(**words)
    else:
        stand_in.dies_at = 5
        with pytest.raises(KeyboardInterrupt):
            evaluate(**words)
    with pytest.raises(ConfigError, match=f"something else: {named} differ"):
        evaluate(**words | other, resume=True)


def test_resuming_a_complete_evaluation_asks_nothing_and_writes_the_page_again(
    bundle: Path, make_shards: MakeShards, tmp_path: Path, stand_in: SeesColours
) -> None:
    shards, output = make_shards(), tmp_path / "out"
    evaluate(bundle, shards, "test", output)
    before = {name: (output / name).read_bytes() for name in ("metrics.json", "report.html")}
    (output / "report.html").unlink()
    stand_in.asked.clear()
    evaluate(bundle, shards, "test", output, resume=True)
    assert stand_in.asked == []
    assert {name: (output / name).read_bytes() for name in before} == before
    evaluate(bundle, shards, "test", output, resume=True, normalizer="pefomed")
    assert json.loads((output / "metrics.json").read_text())["normalizer"] == "pefomed"
    lines = (output / "predictions.jsonl").read_text().splitlines(keepends=True)
    (output / "predictions.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(DataError, match="does not hold the rows"):
        evaluate(bundle, shards, "test", output, resume=True)


def test_a_judges_numbers_come_onto_the_page_afterwards(
    bundle: Path, make_shards: MakeShards, tmp_path: Path, stand_in: SeesColours
) -> None:
    shards, output, judge = make_shards(), tmp_path / "out", tmp_path / "judge"
    evaluate(bundle, shards, "test", output)
    stand_in.asked.clear()
    judge.mkdir()
    verdicts = [Judgement(f"test-{n}", 0, float(n != 3), None, "judge-1", "vqa") for n in range(7)]
    write_judgements(judge / "judgements.jsonl", verdicts)
    write_json(judge / "asked.json", {"predictions": sha256_file(output / "predictions.jsonl")})
    accuracy = {"value": 6 / 7, "n": 7, "unscored": 0, "ci95": [0.5, 1.0]}
    write_json(judge / "metrics.json", {"judge_accuracy": accuracy, "flags": ["a canary got 1"]})
    answer = evaluate(bundle, shards, "test", output, resume=True, judge=judge)
    assert stand_in.asked == []
    assert answer["values"]["judge_accuracy"] == 6 / 7
    metrics = read_json(output / "metrics.json")
    assert metrics["judge"] == {"judge": "judge-1", "flagged": True, "flags": ["a canary got 1"]}
    page = (output / "report.html").read_text()
    disputed = page[page.index("Most disputed") :]
    assert disputed.count('class="example"') == 1
    assert "test-3" in disputed
    assert "The judge judge-1 is flagged: a canary got 1" in page


def test_a_base_without_adapter(make_shards: MakeShards, tmp_path: Path) -> None:
    metrics = json.loads(Path(evaluate(EMBEDDED, make_shards(), "test", tmp_path / "out")["metrics"]).read_text())
    assert metrics["bundle"] is None
    assert metrics["model"]["kind"] == "base"
    assert metrics["model"]["name"] == EMBEDDED
    assert metrics["model"]["digest"] == base_digest(EMBEDDED_FOLDER)
    assert metrics["model"]["template"] == "short"
    assert "without an adapter" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(DataError, match="adapter bundle"):
        evaluate(tmp_path, tmp_path / "shards", "test", tmp_path / "other")


def test_the_page_holds_examples_and_no_markup_of_theirs(bundle: Path, make_shards: MakeShards, tmp_path: Path) -> None:
    page = Path(evaluate(bundle, make_shards(), "test", tmp_path / "out")["report"]).read_text()
    assert "data:image/jpeg;base64," in page
    assert "What is &lt;b&gt;seen&lt;/b&gt;?" in page
    assert "<b>seen" not in page
    assert "Not for diagnosis" in page
    assert "http://" not in page
    assert "https://" not in page


def test_a_restricted_corpus_shows_ids_only(bundle: Path, make_shards: MakeShards, tmp_path: Path) -> None:
    page = Path(evaluate(bundle, make_shards("restricted"), "test", tmp_path / "out")["report"]).read_text()
    assert "licence of this data set is restricted" in page
    assert "test-0" in page
    assert "data:image" not in page
    assert "seen" not in page
    assert "green" not in page


def test_reports(bundle: Path, make_shards: MakeShards, tmp_path: Path) -> None:
    answer = evaluate(bundle, make_shards(task="report"), "test", tmp_path / "out")
    assert answer["values"]["rougeL"] == answer["values"]["token_f1"] == 1.0
    metrics = json.loads(Path(answer["metrics"]).read_text())
    assert metrics["controls"]["constant_text"]["rougeL"]["value"] == pytest.approx(2 / 7)  # red, the last of two
    assert metrics["constant_text"] == {"how": "the most frequent of 6 training texts, 2 times", "text": "red"}
    assert metrics["normal_reports_heuristic"]["references"] == {"value": 0.0, "n": 7}
    assert list(metrics["against_controls"]) == ["blank_image", "noise_image", "shuffled_image", "constant_text"]
    page = Path(answer["report"]).read_text()
    assert "by a keyword rule (heuristic)" in page
    assert "The same training text for all" in page


def test_the_constant_text_of_a_restricted_corpus_is_not_written(
    bundle: Path, make_shards: MakeShards, tmp_path: Path
) -> None:
    answer = evaluate(bundle, make_shards("restricted", task="report"), "test", tmp_path / "out")
    assert json.loads(Path(answer["metrics"]).read_text())["constant_text"]["text"] is None


def test_without_a_training_split_the_text_baselines_are_unscored(
    bundle: Path, make_shards: MakeShards, tmp_path: Path
) -> None:
    answer = evaluate(bundle, make_shards(rows={"test": 5}), "test", tmp_path / "out")
    metrics = json.loads(Path(answer["metrics"]).read_text())
    assert metrics["controls"]["majority"]["exact_match"] == {"value": None, "n": 0, "unscored": 5, "ci95": None}
    assert len(beats_controls(metrics).why) == 2
    assert "Not measured: always giving the most frequent training answer" in Path(answer["report"]).read_text()


def test_the_first_rows_only(bundle: Path, make_shards: MakeShards, tmp_path: Path) -> None:
    answer = evaluate(bundle, make_shards(), "test", tmp_path / "out", rows_limit=3)
    assert len(read_predictions(Path(answer["predictions"]))) == 3


def test_without_image_controls_the_page_says_so(bundle: Path, make_shards: MakeShards, tmp_path: Path) -> None:
    answer = evaluate(bundle, make_shards(), "test", tmp_path / "out", image_controls=False)
    assert list(json.loads(Path(answer["metrics"]).read_text())["controls"]) == ["majority", "question_prior"]
    assert "Not measured: the same model shown grey pictures" in Path(answer["report"]).read_text()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda bundle, out: (bundle / "weights.safetensors").write_bytes(b"wrong"),
            DataError,
            "does not match its sha256",
        ),
        (lambda bundle, out: (bundle / "bundle.json").unlink(), DataError, "does not exist"),
        (lambda bundle, out: (out.mkdir(), (out / "old").touch()), ConfigError, "not empty"),
    ],
)
def test_refusals_write_nothing(
    bundle: Path, make_shards: MakeShards, tmp_path: Path, spoil: Any, error: type[Exception], message: str
) -> None:
    output = tmp_path / "out"
    spoil(bundle, output)
    with pytest.raises(error, match=message):
        evaluate(bundle, make_shards(), "test", output)
    assert not (output / "metrics.json").exists()
    assert not (tmp_path / "out.answers").exists()


def test_an_empty_split_and_an_unknown_normalizer(bundle: Path, make_shards: MakeShards, tmp_path: Path) -> None:
    shards = make_shards()
    with pytest.raises(DataError, match="no rows for split 'validation'"):
        evaluate(bundle, shards, "validation", tmp_path / "out")
    with pytest.raises(ConfigError, match="normalizer"):
        evaluate(bundle, shards, "test", tmp_path / "out", normalizer="kind")
    assert not (tmp_path / "out").exists()
