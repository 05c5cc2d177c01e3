"""What is written and refused, with a stand-in for the model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.artifacts.manifests import (
    BundleManifest,
    load_bundle_manifest,
    load_shard_manifest,
    save_document,
)
from pefomed_ray.artifacts.storage import sha256_file
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.evaluation import evaluate as evaluate_module
from pefomed_ray.evaluation.evaluate import evaluate
from pefomed_ray.evaluation.gate import gate
from pefomed_ray.evaluation.predict import VARIANTS, GenerationSettings, _prediction
from pefomed_ray.evaluation.predictions import Prediction, read_predictions
from pefomed_ray.evaluation.preflight import read_texts

MakeShards = Callable[..., Path]
CONTROLS = ["blank_image", "noise_image", "shuffled_image", "majority", "question_prior"]


def sees_colours(_: Path, shards: Path, split: str, settings: Any, **limits: Any) -> dict[str, list[Prediction]]:
    """Right when shown the image, `red` otherwise."""
    rows = [_prediction(row, row["answer"]) for row in read_texts(shards, split, limits["rows_limit"])]
    return {name: rows if name == "image" else [replace(row, prediction="red") for row in rows] for name in VARIANTS}


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
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_module, "predict", sees_colours)


def test_a_bundle_of_a_quantised_base_needs_a_gpu(bundle: Path, make_shards: MakeShards, tmp_path: Path) -> None:
    (bundle / "run.yaml").write_text("base: {path: x, quantization: int8}\n")
    files = {path.name: sha256_file(path) for path in bundle.iterdir() if path.name != "bundle.json"}
    save_document(load_bundle_manifest(bundle).model_copy(update={"files": files}), bundle / "bundle.json")
    with pytest.raises(ConfigError, match="trained on a base in int8, which needs a GPU"):
        evaluate(bundle, make_shards(), "test", tmp_path / "out")
    evaluate(bundle, tmp_path / "shards", "test", tmp_path / "out", settings=GenerationSettings(use_gpu=True))


def test_what_is_written(bundle: Path, make_shards: MakeShards, tmp_path: Path) -> None:
    shards, output = make_shards(), tmp_path / "out"
    answer = evaluate(bundle, shards, "test", output)
    assert [Path(answer[key]) for key in ("predictions", "metrics", "report")] == [
        output / "predictions.jsonl",
        output / "metrics.json",
        output / "report.html",
    ]
    assert answer["values"]["exact_match"] == 1.0
    assert answer["values"]["exact_match_closed"] is None
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["exact_match"]["n"] == metrics["rows"] == 7
    assert list(metrics["controls"]) == CONTROLS
    assert metrics["controls"]["blank_image"]["exact_match"]["value"] == pytest.approx(2 / 7)
    # Train holds rows 0..5: red and green twice; `What is seen?` was red twice, `Which colour?` green twice.
    assert metrics["controls"]["majority"]["exact_match"]["value"] == pytest.approx(2 / 7)
    assert metrics["controls"]["question_prior"]["exact_match"]["value"] == pytest.approx(4 / 7)
    assert metrics["unique_output_ratio"] == pytest.approx(4 / 7)
    assert metrics["by_question_type"]["Colour"]["exact_match"]["n"] == 3
    assert metrics["image_overlap"] == {"train/test": 4}
    assert metrics["shards"] == load_shard_manifest(shards).digest
    assert (metrics["split"], metrics["normalizer"], metrics["task"]) == ("test", "strict", "vqa")
    assert gate(metrics) == []
    assert [row.id for row in read_predictions(output / "predictions.jsonl")] == [f"test-{n}" for n in range(7)]
    assert sorted(path.stem for path in (output / "controls").iterdir()) == sorted(CONTROLS)


def test_the_page_holds_examples_and_no_markup_of_theirs(bundle: Path, make_shards: MakeShards, tmp_path: Path) -> None:
    page = Path(evaluate(bundle, make_shards(), "test", tmp_path / "out")["report"]).read_text()
    assert "data:image/jpeg;base64," in page
    assert "What is &lt;b&gt;seen&lt;/b&gt;?" in page
    assert "<b>seen" not in page
    assert "Not for diagnosis" in page
    assert "http://" not in page
    assert "https://" not in page


def test_a_restricted_corpus_shows_nothing_on_the_page(bundle: Path, make_shards: MakeShards, tmp_path: Path) -> None:
    page = Path(evaluate(bundle, make_shards("restricted"), "test", tmp_path / "out")["report"]).read_text()
    assert "licence of this data set is restricted" in page
    assert "data:image" not in page
    assert "seen" not in page
    assert "test-0" not in page


def test_reports_have_lexical_metrics_only(bundle: Path, make_shards: MakeShards, tmp_path: Path) -> None:
    answer = evaluate(bundle, make_shards(task="report"), "test", tmp_path / "out")
    assert answer["values"] == {"rougeL": 1.0, "token_f1": 1.0}
    assert "rougeL" in Path(answer["report"]).read_text()


def test_without_a_training_split_the_text_baselines_are_unscored(
    bundle: Path, make_shards: MakeShards, tmp_path: Path
) -> None:
    answer = evaluate(bundle, make_shards(rows={"test": 5}), "test", tmp_path / "out")
    metrics = json.loads(Path(answer["metrics"]).read_text())
    assert metrics["controls"]["majority"]["exact_match"] == {"value": None, "n": 0, "unscored": 5, "ci95": None}
    assert len(gate(metrics)) == 2


def test_the_first_rows_only(bundle: Path, make_shards: MakeShards, tmp_path: Path) -> None:
    answer = evaluate(bundle, make_shards(), "test", tmp_path / "out", rows_limit=3)
    assert len(read_predictions(Path(answer["predictions"]))) == 3


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


def test_an_empty_split_and_an_unknown_normalizer(bundle: Path, make_shards: MakeShards, tmp_path: Path) -> None:
    shards = make_shards()
    with pytest.raises(DataError, match="no rows for split 'validation'"):
        evaluate(bundle, shards, "validation", tmp_path / "out")
    with pytest.raises(ConfigError, match="normalizer"):
        evaluate(bundle, shards, "test", tmp_path / "out", normalizer="kind")
    assert not (tmp_path / "out").exists()
