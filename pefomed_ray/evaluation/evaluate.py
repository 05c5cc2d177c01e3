"""A model on one split: predictions, controls, `metrics.json` and the report, published together."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pefomed_ray.artifacts.base import EMBEDDED, EMBEDDED_FOLDER, base_digest
from pefomed_ray.artifacts.manifests import (
    ShardManifest,
    load_bundle_manifest,
    load_feature_cache_manifest,
    load_shard_manifest,
)
from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import local_path, publishing, read_json, write_bytes, write_json
from pefomed_ray.data.plan import RowIndex, open_index, read_rows
from pefomed_ray.errors import DataError
from pefomed_ray.evaluation.answers import Answered, Key, Question, answers_folder, check_same, keeping_answers
from pefomed_ray.evaluation.controls import VARIANTS, ConstantText, constant_text, questions, shown_images, text_priors
from pefomed_ray.evaluation.endpoint import Endpoint
from pefomed_ray.evaluation.normality import normal_share
from pefomed_ray.evaluation.overlap import image_overlap_share, text_overlap
from pefomed_ray.evaluation.predict import GenerationSettings, generate, predictions_of
from pefomed_ray.evaluation.predictions import Prediction, read_predictions, write_predictions
from pefomed_ray.evaluation.preflight import base_template, check_evaluation, is_bundle, is_finished, read_texts
from pefomed_ray.evaluation.primary import row_scores
from pefomed_ray.evaluation.remote import ask_endpoint, instruction
from pefomed_ray.evaluation.report import choose_examples, render_report
from pefomed_ray.evaluation.score import (
    score_by_question_type,
    score_systems_fully,
    unique_output_ratio,
)
from pefomed_ray.evaluation.verdicts import read_verdicts
from pefomed_ray.metrics.intervals import paired_difference
from pefomed_ray.metrics.vqa import Normalizer, normalizer_named
from pefomed_ray.rendering.templates import template_named

TRAINING_SPLIT = "train"
PREDICTIONS_FILE = "predictions.jsonl"
Rows = dict[str, list[Prediction]]
"""What the model was shown, or the baseline's name -> a row for each of the split's."""


@dataclass(frozen=True)
class Texts:
    """A split's rows and the training split's, without images."""

    rows: list[dict[str, Any]]
    training: list[dict[str, Any]]
    """None of them where the shards have no training split."""


def evaluate(
    model: str | Path | Endpoint,
    shards: str | Path,
    split: str,
    output_dir: str | Path,
    *,
    settings: GenerationSettings | None = None,
    normalizer: str = "strict",
    rows_limit: int | None = None,
    image_controls: bool = True,
    judge: str | Path | None = None,
    resume: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a bundle, a base without adapter (a folder, or `embedded`) or an endpoint on a split, or on its first
    `rows_limit` rows; everything is written under `output_dir`.

    Answers `{"predictions": path, "metrics": path, "report": path, "values": {metric name: value}}`; the controls'
    predictions lie under `output_dir/controls`. Answers are kept beside `output_dir` as they come: with `resume` only
    what is missing is asked, and nothing where the evaluation is complete; it is scored and its report written again.
    `judge` is the folder that `judge` wrote about the predictions of a complete evaluation. Ray must have been started
    unless the model is an endpoint or nothing is missing. `on_progress(done, total)` counts answers. Raises what
    `check_evaluation`, `keeping_answers`, `generate`, `ask_endpoint` and `read_verdicts` raise; `output_dir` is not
    touched then.
    """
    settings = settings or GenerationSettings()
    shards_dir, target = local_path(shards), local_path(output_dir)
    cache = local_path(settings.feature_cache) if settings.feature_cache else None
    task = check_evaluation(
        model, shards_dir, split, target, normalizer, cache, use_gpu=settings.use_gpu, resume=resume
    )
    verdicts = read_verdicts(local_path(judge), target / PREDICTIONS_FILE, task) if judge else None
    manifest = load_shard_manifest(shards_dir)
    training = read_texts(shards_dir, TRAINING_SPLIT) if manifest.rows.get(TRAINING_SPLIT) else []
    texts = Texts(read_texts(shards_dir, split, rows_limit), training)
    given = VARIANTS if image_controls else VARIANTS[:1]
    asked: dict[str, Any] = {
        "model": _identity(model, task),
        "shards": manifest.digest,
        "split": split,
        "rows": len(texts.rows),
        "given": list(given),
        "max_new_tokens": settings.token_limit(task),
        "seed": settings.seed,
        "feature_cache": load_feature_cache_manifest(cache).digest if cache else None,
    }
    finished = is_finished(target)
    if finished:
        before = read_json(target / "metrics.json")
        check_same(asked, before.get("asked"), target)
        rows, answered = _read_back(target, texts, given), before["answered"]
    else:
        ask = _asker(model, open_index(shards_dir, split), settings, task)
        answers = _answers(answers_folder(target), asked, texts, ask, on_progress)
        rows = {name: predictions_of(texts.rows, name, answers) for name in given}
        answered = _answered(answers)
    constant = constant_text([row["answer"] for row in training]) if task != "vqa" else None
    rows |= _text_baselines(rows["image"], texts, constant)
    normalize = normalizer_named(normalizer)
    found = score_systems_fully(rows, task, normalize)
    metrics: dict[str, Any] = {
        "schema_version": 1,
        **found["image"],
        **(verdicts.metrics if verdicts else {}),
        "controls": {name: own for name, own in found.items() if name != "image"},
        "against_controls": _against_controls(rows, task, normalize),
        "unique_output_ratio": unique_output_ratio(rows["image"], normalize),
        "unique_reference_ratio": unique_output_ratio(_references(rows["image"]), normalize),
        "by_question_type": score_by_question_type(rows["image"], normalize) if task == "vqa" else {},
        **_overlaps(rows["image"], texts, manifest, split, task),
        "normal_reports_heuristic": _normal_reports(rows["image"]) if task == "report" else None,
        "constant_text": _constant_to_json(constant, manifest.licence),
        "judge": verdicts.to_json() if verdicts else None,
        "bundle": asked["model"]["digest"] if asked["model"]["kind"] == "bundle" else None,
        **{key: asked[key] for key in ("model", "shards", "split", "rows", "feature_cache")},
        "source": manifest.source,
        "licence": manifest.licence,
        "task": task,
        "normalizer": normalizer,
        "asked": asked,
        "answered": answered,
        "generation": _generation(model, settings) | {"max_new_tokens": settings.token_limit(task)},
    }
    scores = row_scores(rows["image"], task, normalize)
    examples = choose_examples(rows["image"], scores, verdicts, shards_dir, split, manifest.licence)
    page = render_report(metrics, examples)
    if finished:
        write_bytes(target / "report.html", page.encode())
        write_json(target / "metrics.json", metrics)
    else:
        _publish(target, rows, metrics, page)
        shutil.rmtree(answers_folder(target))
    files = {"predictions": PREDICTIONS_FILE, "metrics": "metrics.json", "report": "report.html"}
    return {key: str(target / name) for key, name in files.items()} | {"values": metric_values(metrics)}


def metric_values(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Metric name -> value of a `metrics.json`'s top level."""
    return {name: found["value"] for name, found in metrics.items() if isinstance(found, dict) and "ci95" in found}


def _identity(model: str | Path | Endpoint, task: Task) -> dict[str, Any]:
    """What must be the same for answers to be of the same model."""
    if isinstance(model, Endpoint):
        return {"kind": "endpoint", "url": model.url, "name": model.model, "instruction": instruction(task)}
    if is_bundle(model):
        return {"kind": "bundle", "digest": load_bundle_manifest(local_path(model)).digest}
    folder = EMBEDDED_FOLDER if str(model) == EMBEDDED else local_path(model)
    template = template_named(base_template(folder))
    name = EMBEDDED if str(model) == EMBEDDED else folder.name
    return {
        "kind": "base",
        "name": name,
        "digest": base_digest(folder),
        "template": template.name,
        "template_digest": template.digest,
    }


Ask = Callable[[Sequence[Question]], Iterator[Answered]]


def _asker(model: str | Path | Endpoint, index: RowIndex, settings: GenerationSettings, task: Task) -> Ask:
    if not isinstance(model, Endpoint):
        return partial(generate, model=model, index=index, settings=settings)

    def show(question: Question) -> tuple[str, tuple[bytes, ...]]:
        record, shown = read_rows(index, np.asarray([question.row, question.image_row]))
        encoded = [image["bytes"] for image in shown["images"]]
        return record["question"], shown_images(question.given, encoded, settings.seed)

    return partial(ask_endpoint, model, show=show, task=task, max_tokens=settings.token_limit(task))


def _answers(
    folder: Path, asked: dict[str, Any], texts: Texts, ask: Ask, on_progress: Callable[[int, int], None] | None
) -> Mapping[Key, Answered]:
    """All answers: those kept in `folder`, and those asked for now."""
    every = questions([tuple(row["image_sha256"]) for row in texts.rows], asked["given"], asked["seed"])
    with keeping_answers(folder, asked) as kept:
        missing = [question for question in every if question.key not in kept.by_key]
        for answer in ask(missing) if missing else ():
            kept.add(answer)
            if on_progress:
                on_progress(len(kept.by_key), len(every))
    return kept.by_key


def _answered(answers: Mapping[Key, Answered]) -> dict[str, Any]:
    """Who answered, in its own words; reasons for no answer by what was shown; tokens, as an endpoint counts them."""
    reasons: dict[str, Counter[str]] = {}
    for answer in answers.values():
        if answer.unscored is not None:
            reasons.setdefault(answer.given, Counter())[answer.unscored] += 1
    return {
        "by": dict(Counter(answer.by for answer in answers.values() if answer.by is not None)),
        "unscored": {given: dict(counts) for given, counts in reasons.items()},
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers.values()),
        "completion_tokens": sum(answer.completion_tokens for answer in answers.values()),
    }


def _read_back(target: Path, texts: Texts, given: Sequence[str]) -> Rows:
    """The predictions of a complete evaluation. Raises DataError where they are not about these rows."""
    files = {name: target / "controls" / f"{name}.jsonl" for name in given} | {"image": target / PREDICTIONS_FILE}
    rows = {name: read_predictions(files[name]) for name in given}
    for name, found in rows.items():
        if [row.id for row in found] != [row["id"] for row in texts.rows]:
            raise DataError(f"{str(files[name])!r} does not hold the rows of the split; evaluate into another output")
    return rows


def _text_baselines(rows: Sequence[Prediction], texts: Texts, constant: ConstantText | None) -> Rows:
    """Baselines that know the training split's answers and see no image; without one, rows that stay unscored."""
    priors = text_priors((row["question"], row["answer"], row["answer_type"]) for row in texts.training)
    unscored = [replace(row, prediction=None) for row in rows]
    baselines = {"majority": unscored, "question_prior": unscored}
    if priors is not None:
        baselines = {
            "majority": [replace(row, prediction=priors.majority(row.answer_type)) for row in rows],
            "question_prior": [
                replace(row, prediction=priors.question_prior(row.question, row.answer_type)) for row in rows
            ],
        }
    if constant is not None:
        baselines["constant_text"] = [replace(row, prediction=constant.text) for row in rows]
    return baselines


def _against_controls(rows: Rows, task: Task, normalize: Normalizer) -> dict[str, Any]:
    """Control -> how far the model is ahead of it in the task's first metric, on the rows where both have a score."""
    scores = {name: row_scores(own, task, normalize) for name, own in rows.items()}
    clusters = [row.cluster for row in rows["image"]]
    found: dict[str, Any] = {}
    # For captions and reports these two say what the constant text says.
    left_out = {"image"} if task == "vqa" else {"image", "majority", "question_prior"}
    for name in (name for name in rows if name not in left_out):
        pairs = [
            (ours, theirs, cluster)
            for ours, theirs, cluster in zip(scores["image"], scores[name], clusters, strict=True)
            if ours is not None and theirs is not None
        ]
        found[name] = paired_difference(*zip(*pairs, strict=True)).to_json() if pairs else None
    return found


def _references(rows: Sequence[Prediction]) -> list[Prediction]:
    return [replace(row, prediction=row.answer) for row in rows]


def _overlaps(
    rows: Sequence[Prediction], texts: Texts, manifest: ShardManifest, split: str, task: Task
) -> dict[str, Any]:
    own, training = ([row["image_sha256"] for row in some] for some in (texts.rows, texts.training))
    return {
        "image_overlap": {pair: count for pair, count in manifest.image_overlap.items() if split in pair.split("/")},
        "image_overlap_with_training": image_overlap_share(own, training),
        "text_overlap": text_overlap(rows, ((row["question"], row["answer"]) for row in texts.training), task),
    }


def _normal_reports(rows: Sequence[Prediction]) -> dict[str, Any]:
    return {
        "predictions": normal_share([row.prediction for row in rows]),
        "references": normal_share([row.answer for row in rows]),
    }


def _constant_to_json(constant: ConstantText | None, licence: str) -> dict[str, Any] | None:
    if constant is None:
        return None
    return {"how": constant.how, "text": constant.text if licence == "open" else None}


def _generation(model: str | Path | Endpoint, settings: GenerationSettings) -> dict[str, Any]:
    if isinstance(model, Endpoint):
        return {"concurrency": model.concurrency, "local": model.local, "seed": settings.seed}
    return asdict(settings)


def _publish(target: Path, rows: Rows, metrics: dict[str, Any], page: str) -> None:
    produced_by = {key: metrics[key] for key in ("bundle", "model", "shards", "split", "licence")}
    with publishing(target) as folder:
        write_predictions(folder / PREDICTIONS_FILE, rows["image"], {**produced_by, "given": "image"})
        (folder / "controls").mkdir()
        for name in metrics["controls"]:
            write_predictions(folder / "controls" / f"{name}.jsonl", rows[name], {**produced_by, "given": name})
        write_bytes(folder / "report.html", page.encode())
        write_json(folder / "metrics.json", metrics)
