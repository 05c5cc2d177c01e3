"""What there is to rate: answers from files of predictions, with question, reference and pictures from the shards.

Answers to the same row that are the same text, by whichever model, are one item: who rates it rates them all, and is
not asked twice. An item's key is the digest of what is shown, so it tells nobody whose answer it is, and a rating
never passes on to another answer.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import digest_of, sha256_bytes
from pefomed_ray.data.plan import RowIndex, open_index, read_rows
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.evaluation.predictions import Prediction, read_predictions
from pefomed_ray.evaluation.preflight import read_texts

KEY_CHARACTERS = 24
MODEL_CHARACTERS = 12
"""Of a bundle's digest, as a model's name."""
NAMED = 5
"""Rows that a message names."""


@dataclass(frozen=True)
class Item:
    """What a rater sees; `row` is where its pictures are in the split."""

    key: str
    row: int
    images: int
    question: str
    """Empty for captions and reports without one."""
    reference: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """Whose answer an item is: one for each model that gave it."""

    model: str
    id: str
    """Of the row of the predictions."""
    item: str
    """Key of the item."""


@dataclass(frozen=True)
class Items:
    """All items of a session."""

    task: Task
    by_key: dict[str, Item]
    answers: tuple[Answer, ...]
    unanswered: int
    """Rows of the files without an answer: nothing to rate."""
    index: RowIndex

    def image(self, key: str, number: int) -> bytes:
        """An item's picture as the shards have it, JPEG or PNG."""
        (record,) = read_rows(self.index, np.asarray([self.by_key[key].row]))
        data: bytes = record["images"][number]["bytes"]
        return data


def open_items(
    predictions: Sequence[Path], shards: str | Path, split: str, sample: int | None = None, seed: int = 0
) -> Items:
    """The items of files of predictions about a split of shards, or of `sample` rows that all the files have.

    Of two samples with one seed the larger has the smaller's rows. Raises what `read_predictions` and `open_index`
    raise; ConfigError where two files are of one model; DataError where rows are of several tasks, an id is not in the
    split, a row's question or reference is not the shards', a row has no picture, or nothing is left to rate.
    """
    files = _read(predictions)
    texts = {row["id"]: (number, row) for number, row in enumerate(read_texts(shards, split))}
    for path, rows in files.values():
        _check_rows(path, rows, texts, split)
    chosen = _sampled(files, sample, seed)
    task = _task(texts, chosen)
    by_key: dict[str, Item] = {}
    answers = []
    unanswered = 0
    for model, (_, rows) in files.items():
        for row in rows:
            if row.id not in chosen:
                continue
            if row.prediction is None:
                unanswered += 1
                continue
            number, text = texts[row.id]
            item = _item(number, text, row.prediction)
            by_key[item.key] = item
            answers.append(Answer(model, row.id, item.key))
    if not by_key:
        raise DataError(f"nothing to rate: not one of {len(chosen)} rows has an answer")
    return Items(task, by_key, tuple(answers), unanswered, open_index(shards, split))


def order_of(items: Items, rater: str, seed: int) -> list[str]:
    """The items' keys in an order of this rater's own, the same whenever it is asked for."""
    return sorted(items.by_key, key=lambda key: _drawn(seed, rater, key))


def _read(paths: Sequence[Path]) -> dict[str, tuple[Path, list[Prediction]]]:
    """Model -> its file and rows."""
    files: dict[str, tuple[Path, list[Prediction]]] = {}
    for path in paths:
        rows = read_predictions(path)
        model = _model(path)
        if model in files:
            raise ConfigError(
                f"{str(path)!r} and {str(files[model][0])!r} are both of {model!r}: ratings could not be told apart; "
                "give one of them, or rename files that do not say which model made them"
            )
        files[model] = path, rows
    return files


def _model(path: Path) -> str:
    """Who answered, as the file says in `produced_by`: a bundle by its digest, another model by its name, and what it
    was shown if not the pictures; a file that says nothing by its own name."""
    with open(path, encoding="utf-8") as file:
        first = json.loads(next(line for line in file if line.strip()))
    found = first.get("produced_by")
    made: dict[str, Any] = found if isinstance(found, dict) else {}
    model = made.get("model")
    name = model.get("name") if isinstance(model, dict) else model
    bundle = made.get("bundle")
    if isinstance(bundle, str) and bundle:
        name = bundle[:MODEL_CHARACTERS]
    if not isinstance(name, str) or not name:
        return path.stem
    given = made.get("given")
    return f"{name}-{given}" if isinstance(given, str) and given != "image" else name


def _check_rows(
    path: Path, rows: Sequence[Prediction], texts: dict[str, tuple[int, dict[str, Any]]], split: str
) -> None:
    unknown = [row.id for row in rows if row.id not in texts]
    if unknown:
        raise DataError(
            f"predictions {str(path)!r}: {len(unknown)} of {len(rows)} ids are not in split {split!r} of the shards "
            f"({_some(unknown)}); is it the split they are about?"
        )
    other = [row.id for row in rows if not _same_row(row, texts[row.id][1])]
    if other:
        raise DataError(
            f"predictions {str(path)!r}: {len(other)} rows have another question or reference than the shards' row of "
            f"the same id ({_some(other)}): their pictures would be shown beside wrong texts; are these the shards "
            "they are about?"
        )
    blind = [row.id for row in rows if not texts[row.id][1]["image_sha256"]]
    if blind:
        raise DataError(f"{len(blind)} rows of the shards have no picture to show ({_some(blind)})")


def _same_row(row: Prediction, text: dict[str, Any]) -> bool:
    """Whether question, where the file has it, and reference agree but for case, spaces and punctuation, which tools
    for captions take off."""
    return _bare(row.answer) == _bare(text["answer"]) and _bare(row.question) in ("", _bare(text["question"]))


def _bare(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def _sampled(files: dict[str, tuple[Path, list[Prediction]]], sample: int | None, seed: int) -> set[str]:
    """Ids to rate: all, or so many of those that every file has."""
    ids = [{row.id for row in rows} for _, rows in files.values()]
    if sample is None:
        return set.union(*ids)
    common = set.intersection(*ids)
    if not common:
        raise DataError("nothing to rate: there is no row that all files of predictions have")
    return set(sorted(common, key=lambda name: _drawn(seed, "sample", name))[:sample])


def _task(texts: dict[str, tuple[int, dict[str, Any]]], chosen: set[str]) -> Task:
    tasks: list[Task] = sorted({texts[name][1]["task"] for name in chosen})
    if len(tasks) != 1:
        raise DataError(f"rows of {' and '.join(tasks)}: they have no scale in common; rate each by itself")
    return tasks[0]


def _item(number: int, text: dict[str, Any], answer: str) -> Item:
    shown = [text["id"], text["question"], text["answer"], text["image_sha256"], answer]
    key = digest_of(shown)[:KEY_CHARACTERS]
    return Item(key, number, len(text["image_sha256"]), text["question"], text["answer"], answer)


def _drawn(seed: int, *names: str) -> str:
    """What to sort by for an order that is random, and fixed by seed and names."""
    return sha256_bytes(json.dumps([seed, *names]).encode())


def _some(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:NAMED])) + (", ..." if len(ids) > NAMED else "")
