"""How long rows are in tokens, told from a sample of a run's shards: no image is read, and no torch is needed.

A row is its prompt, images as visual tokens, and its answer; a micro-batch is padded to its longest row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from pefomed_ray.artifacts.base import family_of
from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.manifests import load_shard_manifest
from pefomed_ray.artifacts.records import Task
from pefomed_ray.config import TrainConfig
from pefomed_ray.rendering.template import IMAGE_SLOT, Template
from pefomed_ray.rendering.templates import template_for

SAMPLE_ROWS = 2048
"""Of each part of a mixture: the first of its training split, which is shuffled."""
CHAT_TOKENS = 32
"""Assumed around a prompt by a model's own chat template."""
COLUMNS = ["task", "question", "answer", "image_sha256"]


@dataclass(frozen=True)
class Texts:
    """A run's rows and their lengths; arrays have an entry for each row of the sample."""

    prompts: np.ndarray
    """Tokens, visual ones too."""
    answers: np.ndarray
    """Tokens with the end token, cut as the run cuts them."""
    images_per_row: float
    distinct_images: float
    """Of all splits that training uses, by the sample's share."""
    rows: dict[str, int]
    """By split, of all parts."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """Prompt and answer."""
        return self.prompts + self.answers

    @property
    def longest(self) -> int:
        """Row of the sample."""
        return int(self.lengths.max())

    @property
    def longest_prompt(self) -> int:
        """Of the sample."""
        return int(self.prompts.max())

    @property
    def most_columns(self) -> int:
        """In which a row has a label, at worst."""
        return self.longest - int(self.prompts.min())

    def padded(self, rows: int) -> float:
        """Length of a micro-batch of so many rows drawn at random, on average."""
        return expected_largest(self.lengths, rows)

    def columns(self, rows: int) -> float:
        """Columns of such a micro-batch in which some row has a label, on average, at most."""
        return self.padded(rows) + expected_largest(-self.prompts, rows)


def expected_largest(values: np.ndarray, draws: int) -> float:
    """Of so many draws with replacement: sum of v_(i) ((i / n)^draws - ((i - 1) / n)^draws) over the sorted values."""
    below = (np.arange(len(values) + 1) / len(values)) ** draws
    return float(np.sort(values) @ np.diff(below))


def read_texts(config: TrainConfig, base: Path, image_tokens: int) -> Texts:
    """Of a run's shards, with the base's own tokenizer; `image_tokens`: what one image becomes.

    Raises DataError where the shards are not there.
    """
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    template = template_for(config.template, family_of(base))
    rows = {"train": 0, "validation": 0}
    prompts, answers, images, names = [], [], 0, set[str]()
    for part in config.data.shards:
        found = load_shard_manifest(part.shards).rows
        rows = {split: count + found.get(split, 0) for split, count in rows.items()}
        for task, question, answer, sha256 in _sample(part.shards):
            prompts.append(_prompt(template, task, question, len(sha256)))
            answers.append(template.answer(answer))
            images += len(sha256)
            names.update(sha256)
    tokens = [len(found.ids) for found in tokenizer.encode_batch(prompts + answers, add_special_tokens=False)]
    around = CHAT_TOKENS if template.chat else template.bos_tokens
    per_row = images / len(prompts)
    return Texts(
        prompts=np.array(tokens[: len(prompts)]) + around + round(per_row * image_tokens),
        answers=np.minimum(np.array(tokens[len(prompts) :]) + 1, config.data.max_answer_tokens),
        images_per_row=per_row,
        distinct_images=sum(rows.values()) * len(names) / len(prompts),
        rows=rows,
    )


def _prompt(template: Template, task: Task, question: str, images: int) -> str:
    if template.chat:
        return template.words(task, question)
    return " ".join(piece for piece in template.segments(task, question, images) if piece != IMAGE_SLOT)


def _sample(shards: str) -> Iterator[tuple[Task, str, str, list[str]]]:
    folder, left = open_folder(shards), SAMPLE_ROWS
    for file in load_shard_manifest(folder).files:
        if file.split != "train" or left <= 0:
            continue
        with folder.open(file.path) as opened, pq.ParquetFile(opened) as parquet:
            for batch in parquet.iter_batches(batch_size=left, columns=COLUMNS):
                rows = batch.slice(0, left).to_pylist()
                yield from ((row["task"], row["question"], row["answer"], row["image_sha256"]) for row in rows)
                left -= len(rows)
                if left <= 0:
                    break
