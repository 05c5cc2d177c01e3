"""What Hugging Face's copies of the VQA corpora share: `data/<split>-*.parquet` with columns image, question, answer.

`flaviagiammarino/vqa-rad`, `flaviagiammarino/path-vqa` and `mdwiratathya/SLAKE-vqa-english` are such copies. None has
an id or an answer type, and nothing in the last two says which of them it is.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import SPLITS, Reference, Split
from pefomed_ray.artifacts.storage import sha256_bytes
from pefomed_ray.data.corpora.reading import parquet_columns, parquet_rows, text_of

COLUMNS = ("image", "question", "answer")


def has_parquet(root: Folder, splits: tuple[Split, ...]) -> bool:
    """Whether there are such files of just these splits."""
    files = {split: root.matching("data", f"{split}-*.parquet") for split in SPLITS}
    if any(bool(files[split]) != (split in splits) for split in SPLITS):
        return False
    return parquet_columns(root, files[splits[0]][0]) == set(COLUMNS)


def parquet_items(root: Folder, split: Split) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a split, each with its place: `("data/train-0.parquet[3]", {"question": ..., "answer": ...})`.

    Added to them: `number` in the split, `image_name` (the file it once was, where told), and for a row with an image
    `image` (where it stands, for `read_image`) and `sha256` of its bytes.
    """
    number = 0
    for name in root.matching("data", f"{split}-*.parquet"):
        first_row_of: dict[str, int] = {}
        for row, item in enumerate(parquet_rows(root, name, COLUMNS)):
            image = item.pop("image", None)
            image = image if isinstance(image, dict) else {}
            item |= {"number": number, "image_name": image.get("path")}
            if image.get("bytes") is not None:
                # Rows of one image name the same place, so that they stay together in the shards.
                digest = sha256_bytes(image["bytes"])
                item |= {"sha256": digest, "image": f"{name}#{first_row_of.setdefault(digest, row)}"}
            yield f"{name}[{row}]", item
            number += 1


def parquet_reference(
    item: dict[str, Any], line: str, split: Split, answer_type: Literal["open", "closed"], answer_type_from: str
) -> Reference:
    """One of `parquet_items` as a Reference; the group is the image."""
    return Reference(
        id=f"{split}-{item['number']}",
        split=split,
        task="vqa",
        image_paths=(item["image"],) if "image" in item else (),
        question=text_of(item["question"]),
        answer=text_of(item["answer"]),
        answer_type=answer_type,
        question_type=None,
        group=item.get("sha256", line),
        line=line,
        meta={"answer_type_from": answer_type_from},
    )


def yes_no_type(answer: str) -> Literal["open", "closed"]:
    """`closed` for yes and no, `open` for all else: what is left where no answer type is told."""
    return "closed" if answer.strip().lower() in ("yes", "no") else "open"
