"""The readers of captioned figures on small trees in their publishers' layouts, dirt of the real files included."""

import csv
import json
from collections import Counter
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.records import Reference
from pefomed_ray.data.check import check
from pefomed_ray.data.corpora import imageclef, medicat, open_corpus, roco, rocov2
from pefomed_ray.data.corpora.reading import BadRow, Row
from pefomed_ray.data.options import DataOptions
from pefomed_ray.errors import DataError


def write(path: Path, content: bytes | str | Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def table(*rows: tuple[str, ...]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def picture(number: int, format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (16, 16), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def read(root: Path, **options: Any) -> list[Row]:
    folder = open_folder(root)
    return list(open_corpus(folder).read(folder, DataOptions(**options)))


def good(rows: list[Row]) -> dict[str, Reference]:
    return {row.id: row for row in rows if isinstance(row, Reference)}


def bad(rows: list[Row]) -> dict[str, str]:
    return {row.line: row.reason for row in rows if isinstance(row, BadRow)}


# ROCO v1


def make_roco(root: Path) -> Path:
    folder = root / "data/train/radiology"
    captions = "ROCO_00001\t Preop CT.\nROCO_00002\t R\u00f6ntgen \u2013 normal.\nno tab here\nROCO_00004\t \n"
    write(folder / "captions.txt", captions.encode() + b"ROCO_00005\t Caf\xe9\n")
    (folder / "images").mkdir()
    write(root / "data/train/non-radiology/captions.txt", "ROCO_00003\t A chart.\n")
    return folder


def test_roco_captions_begin_after_a_tab_and_a_space(tmp_path: Path) -> None:
    make_roco(tmp_path)
    rows = read(tmp_path)
    found = good(rows)
    assert list(found) == ["ROCO_00001", "ROCO_00002", "ROCO_00004", "ROCO_00005"]
    assert found["ROCO_00001"].answer == "Preop CT."
    assert found["ROCO_00002"].answer == "R\u00f6ntgen \u2013 normal."
    assert (found["ROCO_00001"].group, found["ROCO_00001"].meta) == ("ROCO_00001", {})
    assert bad(rows) == {"data/train/radiology/captions.txt:3": "malformed_row"}


def test_roco_takes_licence_article_and_terms_from_the_files_beside(tmp_path: Path) -> None:
    folder = make_roco(tmp_path)
    licences = "ROCO_ID,PMC_ID,CC\nROCO_00001,PMC3970251_CRIONM2014.003.jpg,CC BY\nROCO_00002,PMC5_b.jpg,NO-CC CODE\n"
    write(folder / "licences.txt", licences)
    write(folder / "keywords.txt", "ROCO_00001\tpreop\tct\nROCO_00002\t\n")
    write(folder / "semtypes.txt", "ROCO_00001\t\tT060\tDiagnostic Procedure\n")
    found = good(read(tmp_path))
    first = found["ROCO_00001"]
    assert first.group == "PMC3970251"
    assert first.meta["licence"] == "CC BY"
    assert first.meta["keywords"] == ["preop", "ct"]
    assert first.meta["semtypes"] == ["T060", "Diagnostic Procedure"]
    assert found["ROCO_00002"].meta["keywords"] == []
    assert found["ROCO_00004"].meta == {}


def test_roco_images_under_the_names_of_the_older_script(tmp_path: Path) -> None:
    folder = make_roco(tmp_path)
    write(folder / "licences.txt", "ROCO_ID,PMC_ID,CC\nROCO_00001,PMC1_a.jpg,CC BY\nROCO_00002,PMC2_b.jpg,CC BY\n")
    write(folder / "images/PMC1_a.jpg", b"")
    found = good(read(tmp_path))
    assert found["ROCO_00001"].image_paths == ("data/train/radiology/images/PMC1_a.jpg",)
    # Neither name is there: a dead link.
    assert found["ROCO_00002"].image_paths == ("data/train/radiology/images/ROCO_00002.jpg",)


def test_roco_counts_what_cannot_be_used(tmp_path: Path) -> None:
    folder = make_roco(tmp_path)
    write(folder / "images/ROCO_00001.jpg", picture(1))
    write(folder / "images/ROCO_00004.jpg", picture(4))
    report = check(tmp_path, DataOptions(max_bad_fraction=0.9, validation_fraction=0))
    assert report["rows"]["train"] == 1
    counts = {"malformed_row": 1, "missing_image": 1, "empty_answer": 1, "text_encoding": 1}
    assert report["quarantined"] == dict(sorted(counts.items()))


# ROCOv2


def make_rocov2(root: Path, folder: str = "{}") -> None:
    for split, count in (("train", 3), ("valid", 1), ("test", 2)):
        names = [f"ROCOv2_2023_{split}_{number:06d}" for number in range(1, count + 1)]
        captions = [(name, f'CT, "axial" {number}') for number, name in enumerate(names)]
        write(root / f"{split}_captions.csv", table(("ID", "Caption"), *captions))
        write(root / f"{split}_concepts.csv", table(("ID", "CUIs"), *[(name, "C1;C2") for name in names[:1]]))
        for number, name in enumerate(names):
            write(root / folder.format(split) / f"{name}.jpg", picture(number))


@pytest.mark.parametrize("folder", ["{}", "{}_images", "{0}_images/{0}"])
def test_rocov2_wherever_its_archives_unpacked_to(tmp_path: Path, folder: str) -> None:
    make_rocov2(tmp_path, folder)
    rows = read(tmp_path)
    assert not bad(rows)
    assert Counter(row.split for row in rows) == {"train": 3, "validation": 1, "test": 2}
    row = good(rows)["ROCOv2_2023_valid_000001"]
    assert row.image_paths == (f"{folder.format('valid')}/ROCOv2_2023_valid_000001.jpg",)
    assert (row.task, row.answer, row.line) == ("caption", 'CT, "axial" 0', "valid_captions.csv:2")
    assert row.meta == {"cuis": ["C1", "C2"]}
    assert good(rows)["ROCOv2_2023_train_000002"].meta == {}


def test_rocov2_is_grouped_by_article_where_the_licences_are_there(tmp_path: Path) -> None:
    make_rocov2(tmp_path)
    assert good(read(tmp_path))["ROCOv2_2023_train_000001"].group == "ROCOv2_2023_train_000001"
    # Some copies have spaces in the header.
    rows = [(f"ROCOv2_2023_train_00000{number}", "PMC7", "CC BY [A]", "https://x") for number in (1, 2)]
    write(tmp_path / "license_information.csv", table(("ID", " PMCID", " Attribution", " Link"), *rows))
    found = good(read(tmp_path))
    groups = [found[f"ROCOv2_2023_train_00000{number}"].group for number in (1, 2, 3)]
    assert groups == ["PMC7", "PMC7", "ROCOv2_2023_train_000003"]
    assert found["ROCOv2_2023_train_000001"].meta["attribution"] == "CC BY [A]"


def test_rocov2_rows_that_are_dirty_and_their_neighbours(tmp_path: Path) -> None:
    make_rocov2(tmp_path)
    lines = [
        b"ID,Caption",
        b"ROCOv2_2023_train_000001,Caf\xe9",  # Latin-1
        "ROCOv2_2023_train_000002,one\u2028caption".encode(),  # a line separator ends no line
        b'ROCOv2_2023_train_000003,"two',
        b'lines, quoted"',
        b"a,cut, at a bare comma",
        b"short",
    ]
    write(tmp_path / "train_captions.csv", b"\r\n".join(lines))
    rows = read(tmp_path)
    assert bad(rows) == {"train_captions.csv:6": "malformed_row", "train_captions.csv:7": "malformed_row"}
    assert good(rows)["ROCOv2_2023_train_000002"].answer == "one\u2028caption"
    assert good(rows)["ROCOv2_2023_train_000003"].answer == "two\r\nlines, quoted"
    report = check(tmp_path, DataOptions(max_bad_fraction=0.9))
    assert report["rows"] == {"train": 2, "validation": 1, "test": 2}
    assert report["quarantined"] == {"malformed_row": 2, "text_encoding": 1}
    assert [row["id"] for row in report["bad_rows"] if row["reason_code"] == "text_encoding"] == [
        "ROCOv2_2023_train_000001"
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [("ID\tCaption\nx\ty\n", r"'train_captions\.csv' has no column"), ("", "no column"), ("ID,Caption\n", "no rows")],
)
def test_a_table_without_its_columns_or_rows_is_named(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path / "train_captions.csv", content)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def make_parquet(root: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split, count in (("train", 2), ("validation", 1), ("test", 1)):
        columns: dict[str, Any] = {
            "image": pa.array([{"bytes": picture(n), "path": None} for n in range(count)], type=image),
            "image_id": [f"ROCOv2_2023_{split}_{n:06d}" for n in range(count)],
            "caption": [f"Caption {n}" for n in range(count)],
            "cui": [["C1", "C2"]] * count,
        }
        (root / "data").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), root / f"data/{split}-00000-of-00001.parquet")


def test_rocov2_of_hugging_face(tmp_path: Path) -> None:
    make_parquet(tmp_path)
    rows = good(read(tmp_path))
    row = rows["ROCOv2_2023_train_000001"]
    assert row.image_paths == ("data/train-00000-of-00001.parquet#1",)
    assert (row.answer, row.meta, row.line) == (
        "Caption 1",
        {"cuis": ["C1", "C2"]},
        "data/train-00000-of-00001.parquet[1]",
    )
    report = check(tmp_path)
    assert (report["rows"], report["quarantined"]) == ({"train": 2, "validation": 1, "test": 1}, {})
    make_rocov2(tmp_path)
    with pytest.raises(DataError, match="keep one"):
        read(tmp_path)


def test_the_real_sample_of_rocov2(data_dir: Path) -> None:
    root = data_dir / "rocov2"
    rows = read(root)
    assert not bad(rows)
    assert Counter(row.split for row in rows) == {"train": 400, "validation": 60, "test": 60}
    assert all((root / path).is_file() for row in good(rows).values() for path in row.image_paths)
    assert all(row.answer.strip() for row in good(rows).values())


# ImageCLEF 2022, 2023

CLEF = "ImageCLEFmedCaption_2022"
UUID = "c856ae07-029b-449e-bd06-99c04d3ad1e0_"


def make_clef(root: Path, stem: str = f"{CLEF}_caption_prediction_{{}}", folder: str = "{}") -> None:
    for split, first in (("train", 1), ("valid", 84258)):
        names = [f"{CLEF}_{split}_{first + number:06d}" for number in range(2)]
        rows = [(name, f"CT, axial, {number}.") for number, name in enumerate(names)]
        write(root / f"{stem.format(split)}.csv", "ID\tcaption\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
        for number, name in enumerate(names):
            write(root / folder.format(split) / f"{name}.jpg", picture(number))


@pytest.mark.parametrize(
    ("stem", "folder"),
    [
        (f"{CLEF}_caption_prediction_{{}}", "{}"),
        (f"{UUID}{CLEF}_caption_prediction_{{}}", f"{UUID}{CLEF}_{{0}}_images/{{0}}"),
        ("caption_prediction_{}", f"{CLEF}_{{}}_images"),
        ("ImageCLEFmedical_Caption_2023_caption_prediction_{}_labels", "images"),
    ],
)
def test_imageclef_is_separated_by_tabs_whatever_its_name_says(tmp_path: Path, stem: str, folder: str) -> None:
    make_clef(tmp_path, stem, folder)
    rows = read(tmp_path)
    assert Counter(row.split for row in rows) == {"train": 2, "validation": 2}
    row = good(rows)[f"{CLEF}_valid_084259"]
    assert row.answer == "CT, axial, 1."
    assert row.image_paths == (f"{folder.format('valid')}/{CLEF}_valid_084259.jpg",)
    report = check(tmp_path)
    assert (report["rows"], report["quarantined"]) == ({"train": 2, "validation": 2, "test": 0}, {})


def test_imageclef_with_two_captions_files_of_a_split_is_refused(tmp_path: Path) -> None:
    make_clef(tmp_path)
    make_clef(tmp_path, UUID + CLEF + "_caption_prediction_{}")
    with pytest.raises(DataError, match="several captions files"):
        read(tmp_path)


@pytest.mark.parametrize("folder", ["", "train/"])
def test_imageclef_of_pefomed_takes_the_name_of_the_image_alone(tmp_path: Path, folder: str) -> None:
    name = f"{CLEF}_train_000001"
    write(tmp_path / f"{folder}{name}.jpg", b"")
    rows = [{"image": f"elsewhere/{name}.jpg", "caption": "CT"}, {"image": f"{name}.jpg"}]
    write(tmp_path / "clef2022_train.json", rows)
    write(tmp_path / "clef2022_val.json", [{"image": "v.jpg", "caption": "MR"}])
    found = read(tmp_path)
    assert good(found)[name].image_paths == (f"{folder}{name}.jpg",)
    assert good(found)["v"].split == "validation"
    assert bad(found) == {"clef2022_train.json[1]": "malformed_row"}
    make_clef(tmp_path)
    with pytest.raises(DataError, match="keep one"):
        read(tmp_path)


# MedICaT

HASH = "ffd83b6453f94f2a1ddb346e324f5bdbf228c1f3"


def figure(uri: str, **changes: Any) -> dict[str, Any]:
    row = {"pdf_hash": HASH, "fig_key": "Figure1", "fig_uri": uri, "s2_caption": "Figure 1. CT.", "s2orc_caption": None}
    access = {"doi": "10.1/x", "oa": {"is_oa": True, "oa_status": "gold", "license": "cc-by"}}
    return row | {"s2orc_references": None, "radiology": True, "scope": False, "oa_info": access} | changes


def make_medicat(folder: Path, rows: list[Any]) -> None:
    write(folder / medicat.ROWS, "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    (folder / "figures").mkdir()


@pytest.mark.parametrize("folder", ["release/", ""])
def test_medicat_reads_radiology_alone(tmp_path: Path, folder: str) -> None:
    unsaid = {key: value for key, value in figure("5-Figure5-1.png").items() if key != "radiology"}
    rows = [
        figure("2-Figure1-1.png"),
        figure("3-Figure2-1.png", radiology=False),
        figure("4-Figure3-1.png", s2_caption="", s2orc_caption="Fig. 2. MR."),
        figure("4 Figure 4.png"),
        unsaid,
        '{"torn',
        figure("6-Figure6-1.png", radiology="yes"),
    ]
    make_medicat(tmp_path / folder, rows)
    found = read(tmp_path)
    assert {row.split for row in found} == {"train"}
    assert list(good(found)) == [f"{HASH}_2-Figure1-1", f"{HASH}_4-Figure3-1", f"{HASH}_4-Figure-4"]
    first, second, _ = good(found).values()
    assert first.answer == "Figure 1. CT."
    assert first.image_paths == (f"{folder}figures/{HASH}_2-Figure1-1.png",)
    assert (first.group, first.meta) == (HASH, {"licence": "cc-by"})
    assert second.answer == "Fig. 2. MR."
    name = f"{folder}{medicat.ROWS}"
    assert bad(found) == {f"{name}:{line}": "malformed_row" for line in (5, 6, 7)}


def test_medicat_has_no_splits_of_its_own(tmp_path: Path) -> None:
    rows = [figure(f"{number}-Figure1-1.png", pdf_hash=f"{number:040x}") for number in range(40)]
    make_medicat(tmp_path / "release", rows)
    for number, row in enumerate(rows):
        write(tmp_path / f"release/figures/{row['pdf_hash']}_{row['fig_uri']}", picture(number, "PNG"))
    report = check(tmp_path)
    assert sum(report["rows"].values()) == 40
    assert all(report["rows"].values())
    assert not medicat.OFFICIAL_SPLITS


def test_medicat_of_pefomed(tmp_path: Path) -> None:
    write(tmp_path / "medicat_full.json", [{"image": f"release/figures/{HASH}_2-Figure1-1.png", "caption": "CT"}])
    (row,) = read(tmp_path)
    assert isinstance(row, Reference)
    assert row.image_paths == (f"release/figures/{HASH}_2-Figure1-1.png",)
    assert (row.id, row.group) == (f"{HASH}_2-Figure1-1", HASH)
    make_medicat(tmp_path / "release", [figure("2-Figure1-1.png")])
    with pytest.raises(DataError, match="several times"):
        read(tmp_path)


def test_licences_are_open_and_splits_are_told() -> None:
    readers = (roco, rocov2, imageclef, medicat)
    assert [reader.LICENCE for reader in readers] == ["open"] * 4
    assert [reader.OFFICIAL_SPLITS for reader in readers] == [True, True, True, False]


@pytest.mark.parametrize("make", [make_rocov2, make_clef, make_parquet])
def test_rows_are_the_same_from_s3(tmp_path: Path, s3: str, make: Any) -> None:
    make(tmp_path)
    there = open_folder(s3 + "/corpus")
    for name in open_folder(tmp_path).files():
        there.write_bytes(name, (tmp_path / name).read_bytes())
    rows = list(open_corpus(there).read(there, DataOptions()))
    assert rows
    assert rows == read(tmp_path)
