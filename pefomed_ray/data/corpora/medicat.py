"""MedICaT (Subramanian et al., 2020): 217,060 figures of open-access articles with their captions. Two layouts:

- the publisher's `release/`, or the folder it holds: `s2_full_figures_oa_nonroco_combined_medical_top4_public.jsonl`
  and `figures/`. Only rows marked `radiology` are read; the others (histology, photographs, ...) are left out as rows
  of another language would be, and counted nowhere. The caption is Semantic Scholar's, else S2ORC's;
- PeFoMed's `medicat_full.json`, of whose image paths only the file's name counts, beside `release/figures/`.

Captions keep their "Figure 1.". There are no official splits; the group is the article.
"""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import Reference
from pefomed_ray.data.corpora.reading import Row, decode, id_of, lines_of, load_json, numbered, rows_of, text_of
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.reasons import RowError
from pefomed_ray.errors import DataError

NAME = "medicat"
LICENCE: Literal["open", "restricted"] = "open"
LAYOUT = "release/ with s2_full_figures_*.jsonl and figures/; or PeFoMed's medicat_full.json and release/figures/"
OFFICIAL_SPLITS = False
OPTIONS: frozenset[str] = frozenset()

ROWS = "s2_full_figures_oa_nonroco_combined_medical_top4_public.jsonl"
FOLDERS = ("release/", "")
PEFOMED = "medicat_full.json"


def detect(root: Folder) -> bool:
    """Either layout."""
    return bool(_layouts(root))


def read(root: Folder, options: DataOptions) -> Iterator[Row]:
    """Every radiology figure, as `train`. Raises DataError where there is more than one layout."""
    layouts = _layouts(root)
    if len(layouts) != 1:
        raise DataError(f"{str(root)!r} holds MedICaT several times ({', '.join(layouts)}); keep one of them")
    (name,) = layouts
    if name == PEFOMED:
        yield from rows_of(numbered(load_json(root, name), name, "train"), "train", _json_reference)
    else:
        rows = ((line, data) for line, data in lines_of(root, name, "train") if _is_wanted(data))
        yield from rows_of(rows, "train", partial(_reference, folder=name.removesuffix(ROWS)))


def _layouts(root: Folder) -> list[str]:
    return [name for name in (*(folder + ROWS for folder in FOLDERS), PEFOMED) if root.is_file(name)]


def _is_wanted(data: bytes) -> bool:
    # A row that does not say is wanted here, and quarantined as malformed below.
    try:
        item = json.loads(decode(data))
    except (ValueError, RecursionError):
        return True
    return not isinstance(item, dict) or item.get("radiology") is not False


def _reference(data: bytes, line: str, folder: str) -> Reference:
    item = json.loads(decode(data))
    if item["radiology"] is not True:
        raise RowError("malformed_row")
    image = f"{text_of(item['pdf_hash'])}_{text_of(item['fig_uri'])}"
    caption = text_of(item["s2_caption"]) or text_of(item.get("s2orc_caption"))
    access = (item.get("oa_info") or {}).get("oa") or {}
    return _figure(f"{folder}figures/{image}", caption, line, {"licence": access.get("license")})


def _json_reference(item: dict[str, Any], line: str) -> Reference:
    image = text_of(item["image"]).rsplit("/", 1)[-1]
    return _figure(f"release/figures/{image}", text_of(item["caption"]), line, {})


def _figure(image: str, caption: str, line: str, meta: dict[str, Any]) -> Reference:
    name = image.rsplit("/", 1)[-1]
    return Reference(
        id=id_of(name),
        split="train",
        task="caption",
        image_paths=(image,),
        question="",
        answer=caption,
        answer_type=None,
        question_type=None,
        # "ffd83b6453f9..._4-Figure3-1.png": the part before the underscore is the article.
        group=name.split("_")[0],
        line=line,
        meta=meta,
    )
