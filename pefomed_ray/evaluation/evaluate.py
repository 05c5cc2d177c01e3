"""One bundle on one split: predictions, controls, `metrics.json` and the report, published together."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.manifests import (
    ShardManifest,
    load_bundle_manifest,
    load_feature_cache_manifest,
    load_shard_manifest,
)
from pefomed_ray.artifacts.storage import local_path, publishing, write_json
from pefomed_ray.evaluation.controls import TextPriors, text_priors
from pefomed_ray.evaluation.predict import GenerationSettings, predict
from pefomed_ray.evaluation.predictions import Prediction, write_predictions
from pefomed_ray.evaluation.preflight import check_evaluation, read_texts
from pefomed_ray.evaluation.report import choose_examples, write_report
from pefomed_ray.evaluation.score import score_by_question_type, score_rows, unique_output_ratio
from pefomed_ray.metrics.vqa import normalizer_named

TRAINING_SPLIT = "train"


def evaluate(
    bundle: str | Path,
    shards: str | Path,
    split: str,
    output_dir: str | Path,
    *,
    settings: GenerationSettings | None = None,
    normalizer: str = "strict",
    rows_limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a bundle on a split, or its first `rows_limit` rows; everything is written under `output_dir`.

    Answers `{"predictions": path, "metrics": path, "report": path, "values": {metric name: value}}`; the controls'
    predictions lie under `output_dir/controls`. Ray must have been started. `on_progress(done, total)` counts answers.
    Raises what `check_evaluation` and `predict` raise; nothing is written then.
    """
    settings = settings or GenerationSettings()
    bundle_dir, shards_dir, target = local_path(bundle), local_path(shards), local_path(output_dir)
    cache_dir = local_path(settings.feature_cache) if settings.feature_cache else None
    task = check_evaluation(bundle_dir, shards_dir, split, target, normalizer, cache_dir, use_gpu=settings.use_gpu)
    normalize = normalizer_named(normalizer)
    manifest = load_shard_manifest(shards_dir)
    made_from = {"bundle": load_bundle_manifest(bundle_dir).digest, "shards": manifest.digest, "split": split}
    answers = predict(bundle_dir, shards_dir, split, settings, rows_limit=rows_limit, on_progress=on_progress)
    answers |= _text_baselines(answers["image"], manifest, shards_dir)
    model = answers["image"]
    metrics: dict[str, Any] = {
        "schema_version": 1,
        **score_rows(model, task, normalize),
        "controls": {name: score_rows(rows, task, normalize) for name, rows in answers.items() if name != "image"},
        "unique_output_ratio": unique_output_ratio(model, normalize),
        "by_question_type": score_by_question_type(model, normalize) if task == "vqa" else {},
        "image_overlap": {pair: count for pair, count in manifest.image_overlap.items() if split in pair.split("/")},
        **made_from,
        "source": manifest.source,
        "task": task,
        "rows": len(model),
        "normalizer": normalizer,
        "feature_cache": load_feature_cache_manifest(cache_dir).digest if cache_dir else None,
        "generation": asdict(settings) | {"max_new_tokens": settings.token_limit(task)},
    }
    examples = None if manifest.licence == "restricted" else choose_examples(model, shards_dir, split, task, normalize)
    with publishing(target) as folder:
        write_predictions(folder / "predictions.jsonl", model, {**made_from, "given": "image"})
        (folder / "controls").mkdir()
        for name in metrics["controls"]:
            write_predictions(folder / "controls" / f"{name}.jsonl", answers[name], {**made_from, "given": name})
        write_report(folder / "report.html", metrics, examples)
        write_json(folder / "metrics.json", metrics)
    files = {"predictions": "predictions.jsonl", "metrics": "metrics.json", "report": "report.html"}
    return {key: str(target / name) for key, name in files.items()} | {"values": metric_values(metrics)}


def metric_values(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Metric name -> value of a `metrics.json`'s top level."""
    return {name: found["value"] for name, found in metrics.items() if isinstance(found, dict) and "value" in found}


def _text_baselines(rows: Sequence[Prediction], manifest: ShardManifest, shards: Path) -> dict[str, list[Prediction]]:
    """Majority and question prior by the shards' training split; without one, rows that stay unscored."""
    priors: TextPriors | None = None
    if manifest.rows.get(TRAINING_SPLIT):
        training = read_texts(shards, TRAINING_SPLIT)
        priors = text_priors((row["question"], row["answer"], row["answer_type"]) for row in training)
    if priors is None:
        unscored = [replace(row, prediction=None) for row in rows]
        return {"majority": unscored, "question_prior": unscored}
    return {
        "majority": [replace(row, prediction=priors.majority(row.answer_type)) for row in rows],
        "question_prior": [
            replace(row, prediction=priors.question_prior(row.question, row.answer_type)) for row in rows
        ],
    }
