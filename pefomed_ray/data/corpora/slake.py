"""SLAKE 1.0 (Liu et al., ISBI 2021): questions in English and Chinese about 642 radiology images; CC BY 4.0.

English and Chinese rows were split independently by the publisher: within one language no image stands in two splits,
across languages 298 of 642 do. Choose one with `language=en` for numbers that can be trusted; the manifest's
`image_overlap` shows the leak otherwise. Masks, detections and the knowledge graph are not read.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import Reference, Split
from pefomed_ray.data.corpora.reading import Row, answer_type_of, load_json, numbered, rows_of, text_of
from pefomed_ray.data.options import DataOptions
from pefomed_ray.errors import ConfigError, DataError

NAME = "slake"
LICENCE: Literal["open", "restricted"] = "open"
LAYOUT = "train.json, validate.json (Hugging Face: validation.json), test.json, imgs/"
OFFICIAL_SPLITS = True
OPTIONS = frozenset({"language"})

LANGUAGES = ("en", "zh")
FILES: dict[Split, tuple[str, ...]] = {
    "train": ("train.json",),
    "validation": ("validate.json", "validation.json"),
    "test": ("test.json",),
}


def detect(root: Folder) -> bool:
    """All three JSON files, and the images or the archive that holds them."""
    found = all(any(root.is_file(name) for name in names) for names in FILES.values())
    return found and (root.is_dir("imgs") or root.is_file("imgs.zip"))


def read(root: Folder, options: DataOptions) -> Iterator[Row]:
    """Rows of the three files. Raises ConfigError for another language, DataError where imgs.zip is still packed."""
    language = options.language
    if language not in (None, *LANGUAGES):
        raise ConfigError(f"language is {language!r}; SLAKE has {' and '.join(map(repr, LANGUAGES))}")
    if not root.is_dir("imgs"):
        raise DataError(f"{root.url_of('imgs')!r} does not exist; unpack imgs.zip in {str(root)!r} first")
    for split, names in FILES.items():
        name = next(name for name in names if root.is_file(name))
        items = numbered(load_json(root, name), name, split)
        wanted = [(line, item) for line, item in items if language is None or _is_in(item, language)]
        yield from rows_of(wanted, split, partial(_reference, split=split))


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
