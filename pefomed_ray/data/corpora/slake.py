"""SLAKE 1.0 (Liu et al., ISBI 2021): questions in English and Chinese about 642 radiology images; CC BY 4.0.

Three layouts are read: the publisher's; the converted one of PeFoMed and MUMC, in English; and Hugging Face's Parquet
files, in English too, which look like those of PathVQA (say `corpus=slake`) and lack `qid` and `answer_type`. There a
yes/no answer counts as closed and any other as open, while 39 different answers are closed in SLAKE: scores by answer
type do not compare with the other layouts.

English and Chinese rows were split independently by the publisher: within one language no image stands in two splits,
across languages 298 of 642 do. Choose one with `language=en` for numbers that can be trusted; the manifest's
`image_overlap` shows the leak otherwise. Masks, detections and the knowledge graph are not read.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import SPLITS, Reference, Split
from pefomed_ray.data.corpora.reading import (
    Row,
    answer_type_of,
    load_json,
    looks_like_chats,
    numbered,
    rows_of,
    text_of,
)
from pefomed_ray.data.corpora.vqa_parquet import has_parquet, parquet_items, parquet_reference, yes_no_type
from pefomed_ray.data.options import DataOptions
from pefomed_ray.errors import ConfigError, DataError

NAME = "slake"
LICENCE: Literal["open", "restricted"] = "open"
LAYOUT = (
    "train.json, validate.json (Hugging Face: validation.json), test.json, imgs/; "
    "or slake_{train,val,test}.json, here or in en/, and imgs/ (PeFoMed); "
    "or Hugging Face's data/{train,validation,test}-*.parquet with columns image, question, answer"
)
OFFICIAL_SPLITS = True
OPTIONS = frozenset({"language"})

LANGUAGES = ("en", "zh")
FILES: dict[Split, tuple[str, ...]] = {
    "train": ("train.json",),
    "validation": ("validate.json", "validation.json"),
    "test": ("test.json",),
}
CONVERTED_FILES: dict[Split, tuple[str, ...]] = {
    "train": ("en/slake_train.json", "slake_train.json"),
    "validation": ("en/slake_val.json", "slake_val.json"),
    "test": ("en/slake_test.json", "slake_test.json"),
}
RENAMED = {"image_name": "img_name", "question_type": "content_type"}


def detect(root: Folder) -> bool:
    """Any of the three layouts; of the first two, all files, and the images or the archive that holds them."""
    return bool(_layouts(root))


def read(root: Folder, options: DataOptions) -> Iterator[Row]:
    """Rows of whichever layout is there.

    Raises ConfigError for another language, DataError where there are several layouts or imgs.zip is still packed.
    """
    language = options.language
    if language not in (None, *LANGUAGES):
        raise ConfigError(f"language is {language!r}; SLAKE has {' and '.join(map(repr, LANGUAGES))}")
    layouts = _layouts(root)
    if len(layouts) != 1:
        raise DataError(f"{str(root)!r} holds SLAKE in several layouts ({', '.join(layouts)}); keep one of them")
    if layouts != ["Hugging Face"] and not root.is_dir("imgs"):
        raise DataError(f"{root.url_of('imgs')!r} does not exist; unpack imgs.zip in {str(root)!r} first")
    for split in SPLITS:
        items: Iterator[tuple[str, Any]]
        if layouts == ["Hugging Face"]:
            items = ((line, item | {"q_lang": "en"}) for line, item in parquet_items(root, split))
            make = partial(_parquet_reference, split=split)
        else:
            items = _json_items(root, split, converted=layouts == ["PeFoMed"])
            make = partial(_reference, split=split)
        wanted = ((line, item) for line, item in items if language is None or _is_in(item, language))
        yield from rows_of(wanted, split, make)


def _layouts(root: Folder) -> list[str]:
    images = root.is_dir("imgs") or root.is_file("imgs.zip")
    found = {
        "publisher": images and _has_all(root, FILES) and not looks_like_chats(root, "train.json"),
        "PeFoMed": images and _has_all(root, CONVERTED_FILES),
        "Hugging Face": has_parquet(root, SPLITS),
    }
    return [name for name, there in found.items() if there]


def _has_all(root: Folder, files: dict[Split, tuple[str, ...]]) -> bool:
    return all(any(root.is_file(name) for name in names) for names in files.values())


def _json_items(root: Folder, split: Split, converted: bool) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON file, with the publisher's keys; the converted files hold English rows only."""
    names = (CONVERTED_FILES if converted else FILES)[split]
    name = next(name for name in names if root.is_file(name))
    for line, item in numbered(load_json(root, name), name, split):
        if converted and isinstance(item, dict):
            item = {"q_lang": "en"} | {RENAMED.get(key, key): value for key, value in item.items()}
        yield line, item


def _is_in(item: Any, language: str) -> bool:
    # A row that does not state its language is kept here, and quarantined as malformed below.
    return not isinstance(item, dict) or item.get("q_lang", language) == language


def _reference(item: dict[str, Any], line: str, split: Split) -> Reference:
    image = text_of(item["img_name"])
    return Reference(
        id=text_of(item["qid"]),
        split=split,
        task="vqa",
        image_paths=(f"imgs/{image}",),
        question=text_of(item["question"]),
        answer=text_of(item["answer"]),
        answer_type=answer_type_of(item["answer_type"]),
        question_type=text_of(item["content_type"]),
        group=image.split("/")[0],
        line=line,
        meta={"q_lang": item["q_lang"]}
        | {key: item[key] for key in ("location", "modality", "base_type", "triple") if key in item},
    )


def _parquet_reference(item: dict[str, Any], line: str, split: Split) -> Reference:
    return parquet_reference(item, line, split, yes_no_type(text_of(item["answer"])), "yes_no")
