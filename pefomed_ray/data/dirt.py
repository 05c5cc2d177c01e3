"""What is odd about rows that are usable all the same: found and explained, never repaired.

A finding is a list of rows. Most ask one row about its own texts; some hold the rows of a split against each other, or
against those of an earlier split, in the order train, validation, test. Images are told apart by their bytes.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pefomed_ray.artifacts.records import SPLITS, Reference
from pefomed_ray.data.reasons import Reason

TABS_OR_LINE_ENDS = re.compile("[\t\n\v\f\r\x85\u2028\u2029]")
DOUBLE_SPACES = re.compile(r"  +")
REDACTION = re.compile(r"\b[Xx]{4,}\b|_{3,}")
MOJIBAKE = re.compile("\ufffd|â€|[ÂÃ][\x80-\xbf]")
"""The replacement character, or UTF-8 read as Windows-1252 or Latin-1: `â€™` for an apostrophe, `Ã©` for `é`."""
TRIVIAL_WORDS = 2
TRIVIAL_CHARACTERS = 20
"""A language written without spaces has whole sentences of one word."""

WHY = {
    "integer_answer": "The file holds a number where other answers are text; it is read as its digits.",
    "odd_answer_type": "The answer type has another spelling than OPEN or CLOSED, such as a space at its end; it is "
    "read as it is meant, but a program that compares the spellings finds a third class.",
    "edge_spaces": "Spaces before or after a text: a model learns to write them, and equal answers look different.",
    "tabs_or_line_ends": "A tab or a line end inside a question, an answer or a caption (not counted in reports, where "
    "lines are usual): often what a spreadsheet or a PDF file left behind.",
    "double_spaces": "Two spaces or more in a row: equal texts look different to whatever compares them.",
    "non_ascii": "Characters beyond ASCII: right in other languages and for units, but often many tokens each.",
    "mojibake": "The replacement character, or UTF-8 that was once read as another encoding: the text was damaged "
    "before it came here.",
    "redaction": "XXXX or ___ stands where words were taken out: a model learns to write it.",
    "trivial_text": "A caption or report of one or two words says little about its image.",
    "duplicate_question": "Same image, question and answer as an earlier row of the split: it counts twice.",
    "contradicting_answers": "Same image and question as an earlier row of the split, but another answer: no model can "
    "score 100 %.",
    "question_in_train": "Same image and question as a row of train: the score on it measures memory.",
    "image_in_earlier_split": "The row's image stands in an earlier split too: a score on it does not say how a model "
    "does on new images.",
    "group_in_earlier_split": "The row's group (patient, study or image) stands in an earlier split too: a score "
    "on it does not say how a model does on new patients.",
    "text_repeated_verbatim": "This caption or report outside train stands in train word for word: a model that only "
    "remembers texts scores on it.",
}
"""Why a finding matters, by its code."""

WHY_QUARANTINED: dict[Reason, str] = {
    "malformed_row": "A key is missing, a value has a type that cannot be read, or the line is no JSON.",
    "several_turns": "A conversation of more than one question and one answer; only single turns are trained on.",
    "bad_id": "The id is not 1 to 128 of A-Z a-z 0-9 . _ - and could not be used in file names and reports.",
    "duplicate_id": "An earlier row has this id: predictions and scores are matched by id.",
    "text_encoding": "Bytes that are not UTF-8, or control characters such as NUL.",
    "text_too_long": "A text of more than 32,768 characters: not an answer, but something that went wrong.",
    "empty_question": "The question is empty or blank, though the task is to answer one.",
    "empty_answer": "The answer, caption or report is empty or blank: nothing to learn and nothing to score.",
    "no_image": "The row names no image.",
    "image_not_local": "A URL in place of an image's path; nothing is fetched from a network.",
    "missing_image": "No file lies where the row says that its image is.",
    "path_escape": "The image's path leads out of the corpus folder; it was not followed.",
    "symlink_escape": "A symbolic link leads out of the corpus folder; it was not followed.",
    "image_format": "The file is neither JPEG nor PNG nor DICOM, whatever its name says: a GIF, or an error page, say.",
    "image_frames": "An animation, or several pictures in one file: which one is meant is not said.",
    "image_too_large": "More than 64 MiB, 25 megapixels or 8192 pixels a side; refused by its header, not decoded.",
    "corrupt_image": "The image is empty, cut short or damaged, and does not decode.",
    "trailing_bytes": "Something else follows the image in its file.",
    "dicom_encoding": "A DICOM file in an encoding that is not supported.",
    "dicom_no_pixels": "A DICOM file without an image, such as a report.",
    "missing_frame": "The DICOM file has fewer frames than the row asks for.",
    "burned_in_annotation": "The pixels of a DICOM file show a patient's data, or may; allow_burned_in=true keeps it.",
}
"""Why a row was left out."""


@dataclass(frozen=True)
class UsableRow:
    """A row that passed every check, and the sha256 of its images."""

    reference: Reference
    images: tuple[str, ...]

    @property
    def asked(self) -> tuple[tuple[str, ...], str]:
        """The images and the question, but for case and spaces."""
        return self.images, _folded(self.reference.question)


def find_dirt(rows: Sequence[UsableRow]) -> dict[str, list[UsableRow]]:
    """The rows of each finding that there is, in the order given, by a code of WHY."""
    found = {code: [row for row in rows if is_odd(row.reference)] for code, is_odd in OF_ONE_ROW.items()}
    found["duplicate_question"], found["contradicting_answers"] = _asked_again(rows)
    found["question_in_train"] = _questions_in_train(rows)
    found["image_in_earlier_split"] = _in_earlier_split(rows, lambda row: row.images)
    found["group_in_earlier_split"] = _in_earlier_split(rows, lambda row: (row.reference.group,))
    found["text_repeated_verbatim"] = _repeated_from_train(rows)
    return {code: found[code] for code in WHY if found[code]}


def _has(pattern: re.Pattern[str], row: Reference) -> bool:
    return any(pattern.search(text.strip()) for text in (row.question, row.answer))


def _is_trivial(row: Reference) -> bool:
    return (
        row.task != "vqa" and len(row.answer.split()) <= TRIVIAL_WORDS and len(row.answer.strip()) < TRIVIAL_CHARACTERS
    )


OF_ONE_ROW: dict[str, Callable[[Reference], bool]] = {
    "integer_answer": lambda row: "answer" in row.as_written,
    "odd_answer_type": lambda row: "answer_type" in row.as_written,
    "edge_spaces": lambda row: any(text != text.strip() for text in (row.question, row.answer)),
    "tabs_or_line_ends": lambda row: row.task != "report" and _has(TABS_OR_LINE_ENDS, row),
    "double_spaces": lambda row: _has(DOUBLE_SPACES, row),
    "non_ascii": lambda row: not (row.question.isascii() and row.answer.isascii()),
    "mojibake": lambda row: _has(MOJIBAKE, row),
    "redaction": lambda row: _has(REDACTION, row),
    "trivial_text": _is_trivial,
}


def _asked_again(rows: Iterable[UsableRow]) -> tuple[list[UsableRow], list[UsableRow]]:
    """Rows whose image and question an earlier row of the split has: with an answer given before, and with a new one.

    How many there are of each does not depend on the order.
    """
    same: list[UsableRow] = []
    other: list[UsableRow] = []
    answers_to: dict[tuple[str, tuple[tuple[str, ...], str]], set[str]] = {}
    for row in rows:
        if row.reference.task != "vqa":
            continue
        answer = _folded(row.reference.answer)
        answers = answers_to.setdefault((row.reference.split, row.asked), set())
        if answers:
            (same if answer in answers else other).append(row)
        answers.add(answer)
    return same, other


def _questions_in_train(rows: Sequence[UsableRow]) -> list[UsableRow]:
    in_train = {row.asked for row in rows if row.reference.split == "train" and row.reference.task == "vqa"}
    return [row for row in rows if row.reference.split != "train" and row.asked in in_train]


def _in_earlier_split(rows: Sequence[UsableRow], things_of: Callable[[UsableRow], tuple[str, ...]]) -> list[UsableRow]:
    """Rows that have a thing (image, group) in common with a row of an earlier split."""
    splits_of: dict[str, set[str]] = {}
    for row in rows:
        for thing in things_of(row):
            splits_of.setdefault(thing, set()).add(row.reference.split)
    earlier = {split: set(SPLITS[:at]) for at, split in enumerate(SPLITS)}
    return [row for row in rows if any(splits_of[thing] & earlier[row.reference.split] for thing in things_of(row))]


def _repeated_from_train(rows: Sequence[UsableRow]) -> list[UsableRow]:
    texts = [row for row in rows if row.reference.task != "vqa"]
    in_train = {row.reference.answer for row in texts if row.reference.split == "train"}
    return [row for row in texts if row.reference.split != "train" and row.reference.answer in in_train]


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
