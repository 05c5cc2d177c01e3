"""Answers of a bundle or a base for a split, to the images and to images that cannot help, as one Ray Data pipeline."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from pefomed_ray import errors
from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import local_path
from pefomed_ray.data.feature_cache import open_cache
from pefomed_ray.data.plan import RowIndex, open_index, read_rows
from pefomed_ray.errors import PefomedError
from pefomed_ray.evaluation.answers import Answered, Key, Question
from pefomed_ray.evaluation.controls import VARIANTS, questions, shown_images
from pefomed_ray.evaluation.predictions import Prediction
from pefomed_ray.evaluation.preflight import read_texts
from pefomed_ray.model.generate import Generator, Prompt
from pefomed_ray.model.load import open_generator

REAL_IMAGES = ("image", "shuffled_image")
"""Variants that show the split's own images, whose features may be cached."""
MAX_NEW_TOKENS: dict[Task, int] = {"vqa": 64, "caption": 128, "report": 256}
"""PathVQA's longest answer has 34 words; 95 % of ROCO's captions have at most 50, of IU-Xray's findings 58."""


BATCHES_SORTED_TOGETHER = 4
"""A worker takes so many batches' rows at a time and answers those of like length together: of SLAKE's questions about
an image of 36 tokens, padding is then 7 % and not 21 %."""


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated; `workers` are actors, each with the whole model."""

    workers: int = 1
    use_gpu: bool = False
    """One GPU a worker."""
    cpus_per_worker: float = 0.5
    """What a worker reserves; its threads are this, rounded up. Half a CPU: so two workers start on two CPUs."""
    batch_size: int = 64
    """Rows generated at once by one worker."""
    max_new_tokens: int | None = None
    """Longer answers are cut. None: by task, see MAX_NEW_TOKENS."""
    seed: int = 42
    """Of the noise and of who gets whose images."""
    feature_cache: str | None = None
    """Folder of a feature cache: images of the split come from it, only blank and noise ones go through the tower."""

    def token_limit(self, task: Task) -> int:
        """`max_new_tokens`, or the task's own."""
        return MAX_NEW_TOKENS[task] if self.max_new_tokens is None else self.max_new_tokens


def predict(
    model: str | Path,
    shards: str | Path,
    split: str,
    settings: GenerationSettings,
    *,
    variants: Sequence[str] = VARIANTS,
    rows_limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Prediction]]:
    """Variant -> a prediction for each of the first `rows_limit` rows of the split (default: all), in row order.

    Ray must have been started; model and shards must be visible to every node. `on_progress(done, total)` counts
    answers. A row that has no other image to be shown has no prediction under `shuffled_image`. Raises what `generate`
    raises.
    """
    texts = read_texts(shards, split, rows_limit)
    asked = questions([tuple(row["image_sha256"]) for row in texts], variants, settings.seed)
    answers: dict[Key, Answered] = {}
    for answer in generate(asked, model, open_index(shards, split), settings):
        answers[answer.key] = answer
        if on_progress:
            on_progress(len(answers), len(asked))
    return {variant: predictions_of(texts, variant, answers) for variant in variants}


def generate(
    asked: Sequence[Question], model: str | Path, index: RowIndex, settings: GenerationSettings
) -> Iterator[Answered]:
    """A bundle's or base's answers as they come, in no order, by as many workers as `settings` say.

    Raises PefomedError where Ray was not started or answers got lost, and what opening the model or an image raises.
    """
    if not ray.is_initialized():
        raise PefomedError("predict needs Ray: call ray.init() first")
    count = 0
    for found in _pipeline(asked, model, index, settings).iter_rows():
        if found["error_kind"]:
            raise getattr(errors, found["error_kind"])(found["error"])
        count += 1
        yield Answered(found["variant"], int(found["row"]), found["prediction"])
    if count != len(asked):
        raise PefomedError(f"{len(asked)} answers were asked for and {count} came back")


def predictions_of(texts: list[dict[str, Any]], given: str, answers: Mapping[Key, Answered]) -> list[Prediction]:
    """A prediction for each row of a split's texts, in their order, from the answers to what was shown."""
    found = [answers.get((given, number)) for number in range(len(texts))]
    return [_prediction(row, answer.text if answer else None) for row, answer in zip(texts, found, strict=True)]


def _pipeline(
    asked: Sequence[Question], model: str | Path, index: RowIndex, settings: GenerationSettings
) -> ray.data.Dataset:
    items = [{"variant": question.given, "row": question.row, "image_row": question.image_row} for question in asked]
    dataset = ray.data.from_items(items, override_num_blocks=max(1, ceil(len(items) / settings.batch_size)))
    dataset.context.enable_progress_bars = False  # the command line draws its own
    return dataset.map_batches(
        Predictor,
        fn_constructor_args=(str(model), index, settings),
        batch_size=settings.batch_size * BATCHES_SORTED_TOGETHER,
        # One actor is enough to begin with: where the cluster is smaller than asked for, it is slow and does not hang.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=settings.workers),
        num_cpus=settings.cpus_per_worker,
        num_gpus=1 if settings.use_gpu else 0,
    )


class Predictor:
    """A Ray Data actor that loads the model once and reads the images of a batch itself."""

    def __init__(self, model: str, index: RowIndex, settings: GenerationSettings) -> None:
        torch.set_num_threads(max(1, ceil(settings.cpus_per_worker)))
        self.model = model
        self.index = index
        self.settings = settings
        self.generator: Generator | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Columns `variant`, `row`, `image_row` -> `variant`, `row`, `prediction`, `error_kind`, `error`.

        Our own errors come back as rows: raised here, Ray would wrap them, and their exit code would be lost.
        """
        answers, kind, message = [""] * len(batch["row"]), "", ""
        try:
            answers = self._answers(batch)
        except PefomedError as error:
            kind, message = type(error).__name__, str(error)
        found = {"variant": batch["variant"], "row": batch["row"], "prediction": answers}
        return found | {"error_kind": [kind] * len(answers), "error": [message] * len(answers)}

    def _answers(self, batch: dict[str, np.ndarray]) -> list[str]:
        if self.generator is None:
            device = "cuda" if self.settings.use_gpu else "cpu"
            self.generator = open_generator(self.model, device, self.settings.batch_size)
        records = read_rows(self.index, batch["row"])
        shown = read_rows(self.index, batch["image_row"])
        prompts = [
            self._prompt(variant, record, images)
            for variant, record, images in zip(batch["variant"], records, shown, strict=True)
        ]
        limits = [self.settings.token_limit(prompt.task) for prompt in prompts]
        return [answer.text for answer in self.generator.answer(prompts, limits)]

    def _prompt(self, variant: str, record: dict[str, Any], shown: dict[str, Any]) -> Prompt:
        if self.settings.feature_cache and variant in REAL_IMAGES:
            features_NVW = open_cache(local_path(self.settings.feature_cache)).features(shown["image_sha256"])
            return Prompt(record["task"], record["question"], features_NVW=features_NVW)
        encoded = [image["bytes"] for image in shown["images"]]
        return Prompt(record["task"], record["question"], shown_images(variant, encoded, self.settings.seed))


def _prediction(row: dict[str, Any], prediction: str | None) -> Prediction:
    fields = ("id", "question", "answer", "answer_type", "question_type", "source", "group")
    return Prediction(**{field: row[field] for field in fields}, prediction=prediction)
