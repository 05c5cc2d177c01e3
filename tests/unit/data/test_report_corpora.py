"""The readers of chest X-ray reports on small trees in their publishers' layouts, dirt of the real files included."""

import gzip
import json
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.records import Reference
from pefomed_ray.data.check import check
from pefomed_ray.data.corpora import mimic_cxr, open_corpus, open_i, r2gen
from pefomed_ray.data.corpora.reading import BadRow, Row
from pefomed_ray.data.options import DataOptions
from pefomed_ray.errors import ConfigError, DataError


def write(path: Path, content: bytes | str | Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def picture(number: int, format: str = "PNG") -> bytes:
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


# Open-i: the publisher's XML

REPORT_XML = """<?xml version="1.0" encoding="utf-8"?>{dtd}
<eCitation><meta type="rr"/><uId id="CXR{uid}"/>
<MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText>
<AbstractText Label="INDICATION">{indication}</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION">{impression}</AbstractText>
</Abstract></Article></MedlineCitation>
<MeSH><major>Cardiomegaly/mild</major><automatic>cardiomegaly</automatic></MeSH>
{images}</eCitation>"""


def report_xml(uid: int, images: int = 2, **changes: str) -> str:
    names = [f"CXR{uid}_1_IM-{uid:04d}-{number}001" for number in range(1, images + 1)]
    elements = "\n".join(
        f'<parentImage id="{name}"><figureId>F{number}</figureId><url>/hadoop/{name}.jpg</url></parentImage>'
        for number, name in enumerate(names, 1)
    )
    texts = {"findings": "The XXXX is normal.", "impression": "No disease.", "indication": "Cough", "dtd": ""}
    return REPORT_XML.format(uid=uid, images=elements, **texts | changes)


def make_open_i(root: Path, reports: dict[int, str], folder: str = "NLMCXR_reports/ecgen-radiology") -> None:
    for uid, text in reports.items():
        write(root / folder / f"{uid}.xml", text)


def test_open_i_reads_reports_with_any_number_of_images(tmp_path: Path) -> None:
    make_open_i(tmp_path, {uid: report_xml(uid, images) for uid, images in ((10, 0), (2, 1), (1, 2), (30, 5))})
    (tmp_path / "NLMCXR_png").mkdir()
    rows = read(tmp_path)
    assert [row.id for row in rows if isinstance(row, Reference)] == ["CXR1", "CXR2", "CXR10", "CXR30"]
    found = good(rows)
    assert {name: len(row.image_paths) for name, row in found.items()} == {"CXR1": 2, "CXR2": 1, "CXR10": 0, "CXR30": 5}
    row = found["CXR1"]
    assert row.image_paths == ("NLMCXR_png/CXR1_1_IM-0001-1001.png", "NLMCXR_png/CXR1_1_IM-0001-2001.png")
    assert (row.task, row.split, row.group) == ("report", "train", "CXR1")
    assert row.answer == "The XXXX is normal."
    assert row.line == "NLMCXR_reports/ecgen-radiology/1.xml"
    assert row.meta == {
        "section": "findings",
        "impression": "No disease.",
        "mesh": ["Cardiomegaly/mild"],
        "automatic": ["cardiomegaly"],
    }


def test_open_i_answers_with_the_impression_where_there_are_no_findings(tmp_path: Path) -> None:
    reports = {1: report_xml(1), 2: report_xml(2, findings=""), 3: report_xml(3, findings=" ", impression="")}
    make_open_i(tmp_path, reports, "ecgen-radiology")
    found = good(read(tmp_path))
    assert [row.answer for row in found.values()] == ["The XXXX is normal.", "No disease.", ""]
    assert [row.meta["section"] for row in found.values()] == ["findings", "impression", "impression"]
    assert found["CXR1"].image_paths[0] == "CXR1_1_IM-0001-1001.png"  # unpacked without a folder of their own


def test_open_i_counts_what_cannot_be_used(tmp_path: Path) -> None:
    reports = {uid: report_xml(uid, 1) for uid in range(1, 41)}
    reports |= {50: report_xml(50, 0), 51: report_xml(51, 1, findings="", impression=""), 52: report_xml(52, 1)}
    make_open_i(tmp_path, reports | {53: "<eCitation>"})
    for uid in (*range(1, 41), 51):
        write(tmp_path / f"NLMCXR_png/CXR{uid}_1_IM-{uid:04d}-1001.png", picture(uid))
    report = check(tmp_path, DataOptions(max_bad_fraction=0.5))
    assert sum(report["rows"].values()) == 40
    assert all(report["rows"].values())
    counts = {"no_image": 1, "empty_answer": 1, "missing_image": 1, "malformed_row": 1}
    assert report["quarantined"] == dict(sorted(counts.items()))


LAUGHS = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "{}"><!ENTITY c "{}">]>'.format("&a;" * 10, "&b;" * 10)


@pytest.mark.parametrize(
    ("dtd", "findings", "reason"),
    [
        (LAUGHS, "&c;", "malformed_row"),
        ('<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]>', "&a;", "malformed_row"),
        ("", "ha", None),  # the control: the same report without entities
    ],
)
def test_entities_in_xml_are_refused(tmp_path: Path, dtd: str, findings: str, reason: str | None) -> None:
    make_open_i(tmp_path, {1: report_xml(1, dtd=dtd, findings=findings), 2: report_xml(2)})
    rows = read(tmp_path)
    assert bad(rows) == ({} if reason is None else {"NLMCXR_reports/ecgen-radiology/1.xml": reason})
    assert [row.answer for row in good(rows).values()] == (["ha"] if reason is None else []) + ["The XXXX is normal."]


# Open-i: Kaggle's tables


def make_kaggle(root: Path, folder: str = "images/images_normalized") -> None:
    reports = [
        "uid,MeSH,Problems,image,indication,comparison,findings,impression",
        '1,normal,normal,Xray Chest PA and Lateral,Cough,None.,"Clear, XXXX.",Normal.',
        "2,Cardiomegaly/mild;Opacity,x,x,,,,Mild.",
        "3,normal,normal,x,,,Fine.,",
    ]
    projections = [
        "uid,filename,projection",
        "1,1_IM-0001-3001.dcm.png,Lateral",
        "1,1_IM-0001-4001.dcm.png,Frontal",
        "2,2_IM-0652-1001.dcm.png,Frontal",
    ]
    write(root / "indiana_reports.csv", "\n".join(reports) + "\n")
    write(root / "indiana_projections.csv", "\n".join(projections) + "\n")
    (root / folder).mkdir(parents=True)


@pytest.mark.parametrize("folder", ["images/images_normalized", "images"])
def test_open_i_of_kaggle(tmp_path: Path, folder: str) -> None:
    make_kaggle(tmp_path, folder)
    rows = read(tmp_path)
    assert not bad(rows)
    found = good(rows)
    assert found["CXR1"].image_paths == (f"{folder}/1_IM-0001-4001.dcm.png", f"{folder}/1_IM-0001-3001.dcm.png")
    assert [row.answer for row in found.values()] == ["Clear, XXXX.", "Mild.", "Fine."]
    assert found["CXR2"].meta == {
        "section": "impression",
        "impression": "Mild.",
        "mesh": ["Cardiomegaly/mild", "Opacity"],
    }
    assert found["CXR3"].image_paths == ()
    make_open_i(tmp_path, {1: report_xml(1)})
    with pytest.raises(DataError, match="keep one"):
        read(tmp_path)


def test_a_byte_that_is_not_utf_8_costs_its_own_row_alone(tmp_path: Path) -> None:
    make_kaggle(tmp_path)
    file = tmp_path / "indiana_reports.csv"
    file.write_bytes(file.read_bytes().replace(b"Mild.", b"Mild, 30\xb0"))
    assert bad(read(tmp_path)) == {"indiana_reports.csv:3": "malformed_row"}  # a comma that no quotes enclose
    file.write_bytes(file.read_bytes().replace(b"Mild, 30\xb0", b"Mild 30\xb0"))
    for name in ("1_IM-0001-3001", "1_IM-0001-4001", "2_IM-0652-1001"):
        write(tmp_path / f"images/images_normalized/{name}.dcm.png", picture(1))
    report = check(tmp_path, DataOptions(max_bad_fraction=0.9, validation_fraction=0, test_fraction=0))
    assert report["quarantined"] == {"no_image": 1, "text_encoding": 1}
    assert report["rows"]["train"] == 1


# IU X-ray: R2Gen and PeFoMed


def test_iu_xray_of_r2gen_has_two_images_a_report(tmp_path: Path) -> None:
    row = {"id": "CXR2384_IM-0942", "report": "XXXX is normal.", "split": "train"}
    images = {"image_path": ["CXR2384_IM-0942/0.png", "CXR2384_IM-0942/1.png"]}
    annotation = {
        key: [row | images | {"id": f"CXR{n}_IM-0694-1001"}] for n, key in enumerate(("train", "val", "test"))
    }
    write(tmp_path / "annotation.json", annotation)
    (tmp_path / "images").mkdir()
    rows = read(tmp_path)
    assert Counter(row.split for row in rows) == {"train": 1, "validation": 1, "test": 1}
    assert [row.group for row in good(rows).values()] == ["CXR0", "CXR1", "CXR2"]


def test_iu_xray_of_pefomed_has_one_image_a_row(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        rows = [{"image_path": f"CXR692_IM-2258/{n}.png", "report": f"XXXX {split}."} for n in (0, 1)]
        write(tmp_path / f"{split}.json", [*rows, {"image_path": ["a", "b"], "report": ""}])
    (tmp_path / "images/CXR692_IM-2258").mkdir(parents=True)
    rows = read(tmp_path)
    assert open_corpus(open_folder(tmp_path)).NAME == "iu_xray"
    row = good(rows)["CXR692_IM-2258-0"]
    assert (row.group, row.image_paths) == ("CXR692", ("images/CXR692_IM-2258/0.png",))
    assert [row.split for row in rows] == ["train"] * 3 + ["validation"] * 3 + ["test"] * 3
    assert bad(rows) == {f"{split}.json[2]": "malformed_row" for split in ("train", "val", "test")}
    write(tmp_path / "annotation.json", {})
    with pytest.raises(DataError, match="keep one"):
        read(tmp_path)


# MIMIC-CXR

TITLE = "                                 FINAL REPORT\n"
STUDIES = [
    # study, subject, split, images with their views, report
    (
        "50000001",
        "10000032",
        "train",
        [("a", "LATERAL"), ("b", "PA")],
        " FINDINGS:  Clear.\n \n IMPRESSION:  Normal.\n",
    ),
    ("50000002", "10000032", "train", [("c", "AP")], " FINDINGS:  ___ clear.\n"),
    ("50000003", "11000764", "validate", [("d", "")], " \n Title.\n \n Lungs clear.\n"),
    ("50000004", "19999999", "test", [("e", "LL"), ("f", "AP"), ("g", "PA")], " IMPRESSION: Effusion.\n"),
    ("50000005", "19999999", "test", [("h", "PA")], None),  # no report
    ("50000006", "19999999", "test", [("i", "PA")], " HISTORY: Cough.\n"),  # nothing to learn from
]


def make_mimic(root: Path, reports: str = "files", packed: bool = False, metadata: bool = True) -> None:
    split, views = ["dicom_id,study_id,subject_id,split"], ["dicom_id,subject_id,study_id,ViewPosition,Rows"]
    for study, subject, name, images, report in STUDIES:
        folder = f"p{subject[:2]}/p{subject}"
        for image, view in images:
            split.append(f"{image},{study},{subject},{name}")
            views.append(f"{image},{subject},{study},{view},3056")
            write(root / f"files/{folder}/s{study}/{image}.jpg", picture(ord(image), "JPEG"))
        if report is not None:
            write(root / f"{reports}/{folder}/s{study}.txt", TITLE + report)
    tables = {"split": split} | ({"metadata": views} if metadata else {})
    for table, lines in tables.items():
        data = "\n".join(lines).encode() + b"\n"
        suffix, content = (".csv.gz", gzip.compress(data)) if packed else (".csv", data)
        write(root / f"mimic-cxr-2.0.0-{table}{suffix}", content)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reports", ["files", "mimic-cxr-reports/files"])
def test_mimic_cxr_has_a_record_a_study(tmp_path: Path, reports: str, packed: bool) -> None:
    make_mimic(tmp_path, reports, packed)
    rows = read(tmp_path)
    found = good(rows)
    assert [(row.id, row.split, row.group) for row in found.values()] == [
        ("s50000001", "train", "p10000032"),
        ("s50000002", "train", "p10000032"),
        ("s50000003", "validation", "p11000764"),
        ("s50000004", "test", "p19999999"),
        ("s50000005", "test", "p19999999"),
        ("s50000006", "test", "p19999999"),
    ]
    assert [(row.answer, row.meta["section"]) for row in found.values()] == [
        ("Normal.", "impression"),
        ("___ clear.", "findings"),
        ("Title.\n \n Lungs clear.", "last_paragraph"),
        ("Effusion.", "impression"),
        ("", ""),
        ("", ""),
    ]
    first = found["s50000001"]
    assert first.image_paths == tuple(f"files/p10/p10000032/s50000001/{name}.jpg" for name in ("b", "a"))
    assert first.meta["views"] == ["PA", "LATERAL"]
    assert [Path(path).stem for path in found["s50000004"].image_paths] == ["f", "g", "e"]
    assert first.line == f"{reports}/p10/p10000032/s50000001.txt"
    report = check(tmp_path, DataOptions(max_bad_fraction=0.9))
    assert (report["rows"], report["quarantined"]) == ({"train": 2, "validation": 1, "test": 1}, {"empty_answer": 2})
    assert report["licence"] == "restricted"


def test_mimic_cxr_without_views_keeps_the_order_of_its_table(tmp_path: Path) -> None:
    make_mimic(tmp_path, metadata=False)
    first = good(read(tmp_path))["s50000001"]
    assert [Path(path).stem for path in first.image_paths] == ["a", "b"]
    assert first.meta == {"section": "impression"}


@pytest.mark.parametrize("line", ["a,50000001,10000032,dev", "a,50000001"])
def test_mimic_cxr_with_a_torn_table_is_refused(tmp_path: Path, line: str) -> None:
    write(tmp_path / "mimic-cxr-2.0.0-split.csv", f"dicom_id,study_id,subject_id,split\n{line}\n")
    with pytest.raises(DataError, match=r"split\.csv:2"):
        read(tmp_path)
    make_mimic(tmp_path)
    assert len(read(tmp_path)) == len(STUDIES)


def test_a_torn_archive_is_named(tmp_path: Path) -> None:
    make_mimic(tmp_path, packed=True)
    file = tmp_path / "mimic-cxr-2.0.0-split.csv.gz"
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"split\.csv\.gz"):
        read(tmp_path)


def test_mimic_cxr_of_r2gen_is_restricted(tmp_path: Path) -> None:
    row = {
        "id": "02aa804e-bde0afdd",
        "study_id": 50414267,
        "subject_id": 10000032,
        "report": "Clear.",
        "split": "train",
    }
    row["image_path"] = ["p10/p10000032/s50414267/02aa804e-bde0afdd.jpg"]
    write(tmp_path / "annotation.json", {"train": [row], "val": [row | {"id": "b"}], "test": [{"id": "c"}]})
    (tmp_path / "images/p10").mkdir(parents=True)
    assert open_corpus(open_folder(tmp_path)).LICENCE == "restricted"
    rows = read(tmp_path)
    first = good(rows)["02aa804e-bde0afdd"]
    assert (first.group, first.answer) == ("p10000032", "Clear.")
    assert first.image_paths == ("images/p10/p10000032/s50414267/02aa804e-bde0afdd.jpg",)
    assert bad(rows) == {"annotation.json:test[0]": "malformed_row"}


def test_mimic_cxr_in_a_folder_of_iu_xray_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "annotation.json", {"train": [{"id": "a", "subject_id": 10000032}]})
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="MIMIC"):
        read(tmp_path)


def test_mimic_cxr_of_pefomed_maps_images_to_reports(tmp_path: Path) -> None:
    image = "p10/p10000032/s50414267/02aa804e.jpg"
    for split in ("train", "val", "test"):
        named = image.replace("02aa", split)
        write(tmp_path / f"{split}.json", {named: ["First.", "Second."], "no/patient.jpg": ["x"], f"{named}x": "x"})
    (tmp_path / "files/p10").mkdir(parents=True)
    rows = read(tmp_path)
    row = good(rows)["val804e"]
    assert (row.split, row.group, row.answer) == ("validation", "p10000032", "First.")
    assert row.image_paths == ("files/p10/p10000032/s50414267/val804e.jpg",)
    assert len(good(rows)) == 3
    assert bad(rows) == {f"{split}.json[{n}]": "malformed_row" for split in ("train", "val", "test") for n in (1, 2)}
    make_mimic(tmp_path)
    with pytest.raises(DataError, match="PhysioNet, PeFoMed"):
        read(tmp_path)


def test_no_option_opens_mimic_cxr(tmp_path: Path) -> None:
    make_mimic(tmp_path)
    with pytest.raises(ConfigError, match="restricted"):
        check(tmp_path, DataOptions(licence="open"))
    assert (open_i.LICENCE, r2gen.LICENCE, mimic_cxr.LICENCE) == ("open", "open", "restricted")
    assert (open_i.OFFICIAL_SPLITS, r2gen.OFFICIAL_SPLITS, mimic_cxr.OFFICIAL_SPLITS) == (False, True, True)


@pytest.mark.parametrize("make", ["mimic", "open_i", "kaggle"])
def test_rows_are_the_same_from_s3(tmp_path: Path, s3: str, make: str) -> None:
    if make == "mimic":
        make_mimic(tmp_path, packed=True)
    elif make == "open_i":
        make_open_i(tmp_path, {uid: report_xml(uid, 1) for uid in (1, 2)})
    else:
        make_kaggle(tmp_path)
        write(tmp_path / "images/images_normalized/1_IM-0001-4001.dcm.png", picture(1))
    there = open_folder(s3 + "/corpus")
    for name in open_folder(tmp_path).files():
        there.write_bytes(name, (tmp_path / name).read_bytes())
    rows = list(open_corpus(there).read(there, DataOptions()))
    assert rows
    assert rows == read(tmp_path)
