"""VQA-RAD, PathVQA and SLAKE: a small tree of each layout, with the dirt that the publishers' own files have."""

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.records import Reference
from pefomed_ray.data.corpora import open_corpus
from pefomed_ray.data.corpora.reading import BadRow, Row
from pefomed_ray.data.options import DataOptions
from pefomed_ray.errors import ConfigError, DataError

OSF_FILE = "VQA_RAD Dataset Public.json"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content, ensure_ascii=False).encode())


def read(path: Path, corpus: str | None = None, language: str | None = None) -> list[Row]:
    root = open_folder(path)
    return list(open_corpus(root, corpus).read(root, DataOptions(language=language)))


def good(rows: list[Row]) -> dict[str, Reference]:
    found = [row for row in rows if isinstance(row, Reference)]
    by_id = {row.id: row for row in found}
    assert len(by_id) == len(found), "two rows with one id"
    return by_id


def bad(rows: list[Row]) -> dict[str, str]:
    return {row.line: row.reason for row in rows if isinstance(row, BadRow)}


def counts(rows: list[Row]) -> dict[str, int]:
    return dict(Counter(row.split for row in rows if isinstance(row, Reference)))


def write_parquet(root: Path, split: str, rows: list[tuple[bytes | None, str, str]], image_name: Any = None) -> str:
    """As Hugging Face has it; the name of the file."""
    (root / "data").mkdir(exist_ok=True)
    table = [
        {"image": None if data is None else {"bytes": data, "path": image_name}, "question": q, "answer": a}
        for data, q, a in rows
    ]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("question", pa.string()), ("answer", pa.string())])
    name = f"data/{split}-00000-of-00001-0f4c7f0e2d1b3a58.parquet"
    pq.write_table(pa.Table.from_pylist(table, schema=schema), root / name)
    return name


# VQA-RAD


def rad_row(qid: Any, **changes: Any) -> dict[str, Any]:
    row = {"qid": qid, "phrase_type": "freeform", "image_name": "synpic1.jpg", "image_organ": "CHEST", "bbox": None}
    row |= {"question": "Is it?", "question_type": "PRES", "answer": "Yes", "answer_type": "CLOSED"}
    return row | {"question_rephrase": "NULL", "question_relation": "Subsumed", "evaluation": "given"} | changes


def without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


def make_osf(root: Path) -> None:
    rows = [
        rad_row("0"),
        rad_row(1, answer=12, answer_type="OPEN"),
        rad_row(2156, answer="Maybe", answer_type="CLOSED "),
        rad_row(3, answer=" Heart \tlungs", answer_type="OPEN", question_type="POS, PRSE"),
        rad_row(4, phrase_type="test_para", question_type="Other"),
        rad_row(5, phrase_type="test_freeform", answer="Left", question_type="ATRIB "),
        rad_row(6, answer_type="MAYBE"),
        without(rad_row(2036), "question_rephrase"),
        without(rad_row(8), "phrase_type"),
    ]
    write(root / OSF_FILE, rows)
    write(root / "VQA_RAD Image Folder/synpic1.jpg", b"")
    write(root / "VQA_RAD Image Folder/synpic35356.jpg", b"")  # no row names it


def test_vqa_rad_osf_with_its_dirt(tmp_path: Path) -> None:
    make_osf(tmp_path)
    rows = read(tmp_path)
    found = good(rows)
    assert counts(rows) == {"train": 5, "test": 2}
    assert [name for name, row in found.items() if row.split == "test"] == ["4", "5"]
    assert found["1"].answer == "12"
    assert (found["2156"].answer_type, found["2156"].answer) == ("closed", "Maybe")
    assert found["3"].answer == " Heart \tlungs"  # the content is kept as it is
    assert found["5"].answer_type == "closed"  # closed is not only yes and no
    types = [found[name].question_type for name in ("0", "3", "4", "5")]
    assert types == ["PRES", "POS, PRES", "OTHER", "ATTRIB"]
    assert found["0"].image_paths == ("VQA_RAD Image Folder/synpic1.jpg",)
    assert {row.group for row in found.values()} == {"synpic1"}
    assert found["0"].meta["image_organ"] == "CHEST"
    assert bad(rows) == {f"{OSF_FILE}[6]": "malformed_row", f"{OSF_FILE}[8]": "malformed_row"}


def test_vqa_rad_mevf_frame_rows_get_ids_of_their_own(tmp_path: Path) -> None:
    train = [rad_row(7), rad_row(7, phrase_type="frame", question="Is there?"), rad_row(9, phrase_type="para")]
    write(tmp_path / "trainset.json", train)
    write(tmp_path / "testset.json", [rad_row(8, phrase_type="test_para")])
    (tmp_path / "images").mkdir()
    rows = good(read(tmp_path))
    splits = {name: row.split for name, row in rows.items()}
    assert splits == {"7": "train", "7-frame": "train", "9": "train", "8": "test"}
    assert rows["7"].image_paths == ("images/synpic1.jpg",)
    assert rows["7-frame"].group == rows["7"].group


def test_vqa_rad_in_two_layouts_is_refused(tmp_path: Path) -> None:
    write(tmp_path / OSF_FILE, [rad_row(1)])
    write(tmp_path / "trainset.json", [rad_row(1)])
    write(tmp_path / "testset.json", [rad_row(2)])
    with pytest.raises(DataError, match="OSF, MEVF"):
        read(tmp_path)


def test_vqa_rad_parquet(tmp_path: Path) -> None:
    rows: list[tuple[bytes | None, str, str]] = [(b"a", "is it?", "yes"), (b"b", "where?", "left"), (b"a", "?", "no")]
    file = write_parquet(tmp_path, "train", rows)
    write_parquet(tmp_path, "test", [(None, "is it?", "no"), (b"a", "?", "no")])
    found = good(read(tmp_path))
    # Rows of one image name one place, so that they are kept together.
    paths = [found[f"train-{number}"].image_paths for number in range(3)]
    assert paths == [(f"{file}#0",), (f"{file}#1",), (f"{file}#0",)]
    assert [found[f"train-{number}"].answer_type for number in range(3)] == ["closed", "open", "closed"]
    assert found["train-0"].meta == {"answer_type_from": "yes_no"}
    assert found["test-0"].image_paths == ()
    assert found["train-0"].group == found["train-2"].group == found["test-1"].group != found["train-1"].group


def test_vqa_rad_parquet_takes_answer_types_from_the_publishers_file(tmp_path: Path) -> None:
    osf = [
        rad_row(1, question="Which  side?", answer="Left"),  # closed, and no yes/no answer
        rad_row(2, question="Which organ?", answer="Heart \tlungs", answer_type="OPEN"),
        rad_row(3, question="Is it?", answer="Yes", answer_type="OPEN"),
        rad_row(4, question="Is it?", answer="Yes", image_name="synpic2.jpg"),
        rad_row(5, question="Broken", answer_type="?"),
    ]
    write(tmp_path / OSF_FILE, osf)
    write_parquet(tmp_path, "train", [(b"a", "which side?", "left"), (b"a", "which organ?", "heart lungs")])
    write_parquet(tmp_path, "test", [(b"a", "is it?", "yes"), (b"b", "unheard of?", "left")])
    found = good(read(tmp_path))
    told = {name: (row.answer_type, row.meta["answer_type_from"]) for name, row in found.items()}
    assert told == {
        "train-0": ("closed", "osf"),
        "train-1": ("open", "osf"),
        "test-0": ("closed", "yes_no"),  # the publisher says both, about different images
        "test-1": ("open", "yes_no"),
    }
    # Where the copy names the image, that decides.
    write_parquet(tmp_path, "test", [(b"a", "is it?", "yes")], image_name="synpic1.jpg")
    row = good(read(tmp_path))["test-0"]
    assert (row.answer_type, row.meta) == ("open", {"answer_type_from": "osf"})
    # With its images, the publisher's file is a layout of its own.
    (tmp_path / "VQA_RAD Image Folder").mkdir()
    with pytest.raises(DataError, match="OSF, Hugging Face"):
        read(tmp_path)


# PathVQA


def path_row(number: int, question: str = "is this normal?", answer: str = "no") -> dict[str, Any]:
    return {"image": f"train_{number:04}", "question": question, "answer": answer}


PATH_ROWS: list[Any] = [
    path_row(422),
    path_row(422, answer="Yes"),  # the same question again, answered otherwise
    path_row(422),  # and a row again
    path_row(7, " what is  seen?", "the cells of the Liver"),
    {"image": "train_0008", "question": "what?"},
    "not a row",
    path_row(9, answer="yes, partly"),
]


def make_pvqa(root: Path) -> None:
    for split, rows in (("train", PATH_ROWS), ("val", [path_row(1)]), ("test", [path_row(2, answer="fat")])):
        write(root / f"qas/{split}/{split}_qa.pkl", pickle.dumps(rows))
        (root / f"images/{split}").mkdir(parents=True)


@pytest.mark.parametrize("folder", ["pvqa", "."])
def test_pathvqa_as_it_unpacks(tmp_path: Path, folder: str) -> None:
    make_pvqa(tmp_path / folder)
    prefix = "pvqa/" if folder == "pvqa" else ""
    rows = read(tmp_path)
    found = good(rows)
    assert open_corpus(open_folder(tmp_path)).NAME == "pathvqa"
    assert counts(rows) == {"train": 5, "validation": 1, "test": 1}
    assert [name for name in found if name.startswith("train")] == [f"train-{number}" for number in (0, 1, 2, 3, 6)]
    assert found["train-0"].image_paths == (f"{prefix}images/train/train_0422.jpg",)
    assert found["validation-0"].image_paths == (f"{prefix}images/val/train_0001.jpg",)
    assert (found["train-1"].answer, found["train-1"].answer_type) == ("Yes", "closed")
    assert (found["train-3"].question, found["train-3"].answer_type) == (" what is  seen?", "open")
    assert found["train-6"].answer_type == "open"  # closed is yes or no, nothing longer
    assert (found["train-0"].group, found["train-0"].question_type) == ("train_0422", None)
    file = f"{prefix}qas/train/train_qa.pkl"
    assert bad(rows) == {f"{file}[4]": "malformed_row", f"{file}[5]": "malformed_row"}


def test_pathvqa_question_types_come_from_the_second_file_where_it_is_there(tmp_path: Path) -> None:
    make_pvqa(tmp_path)
    entry = {"answer_type": "yes/no", "img_id": "train_0422", "label": {"no": 1}, "question_id": 100422000}
    write(tmp_path / "qas/train_vqa.pkl", pickle.dumps([entry | {"question_type": "is", "sent": "is this normal?"}]))
    found = good(read(tmp_path))
    types = {name: row.question_type for name, row in found.items() if row.split == "train"}
    assert types == {"train-0": "is", "train-1": None, "train-2": "is", "train-3": None, "train-6": None}
    write(tmp_path / "qas/train_vqa.pkl", pickle.dumps([["another", "thing"]]))
    with pytest.raises(DataError, match=r"train_vqa\.pkl"):
        read(tmp_path)


class Touch:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["qas/val/val_qa.pkl", "qas/val_vqa.pkl"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, protocol: int, name: str) -> None:
    make_pvqa(tmp_path)
    touched = tmp_path / "touched"
    data = pickle.dumps([path_row(1) | {"answer": Touch(touched)}], protocol)
    write(tmp_path / name, data)
    with pytest.raises(DataError, match=r"val_\w+\.pkl' asks for a class or function"):
        read(tmp_path)
    assert not touched.exists()
    pickle.loads(data)  # what any other loader does
    assert touched.exists()


@pytest.mark.parametrize(
    "data", [b"", b"<html></html>", pickle.dumps(PATH_ROWS)[:-40], pickle.dumps([{b"a"}]), pickle.dumps([b"a"])]
)
def test_an_unreadable_pickle_is_named(tmp_path: Path, data: bytes) -> None:
    make_pvqa(tmp_path)
    write(tmp_path / "qas/test/test_qa.pkl", data)
    with pytest.raises(DataError, match=r"test_qa\.pkl' cannot be read as a pickle"):
        read(tmp_path)


@pytest.mark.parametrize("data", [{}, [], "rows"])
def test_a_pickle_without_rows_is_named(tmp_path: Path, data: Any) -> None:
    make_pvqa(tmp_path)
    write(tmp_path / "qas/test/test_qa.pkl", pickle.dumps(data))
    with pytest.raises(DataError, match=r"test_qa\.pkl"):
        read(tmp_path)


def test_pathvqa_converted_by_pefomed(tmp_path: Path) -> None:
    row = {"qid": 5, "image_name": "train/train_0422.jpg", "question": "is it?", "answer": "no"}
    row |= {"answer_type": "yes/no", "question_type": "is"}
    write(tmp_path / "pathvqa_train.json", [row, row | {"answer": "fat"}, without(row, "image_name")])
    write(tmp_path / "pathvqa_test.json", [row])
    rows = read(tmp_path)
    found = good(rows)
    assert counts(rows) == {"train": 2, "test": 1}
    first = found["train-0"]
    assert (first.image_paths, first.group) == (("images/train/train_0422.jpg",), "train_0422")
    assert (first.answer_type, first.question_type, first.meta) == ("closed", "is", {"qid": 5})
    assert found["train-1"].answer_type == "open"
    assert bad(rows) == {"pathvqa_train.json[2]": "malformed_row"}


def make_parquet(root: Path) -> str:
    """As PathVQA's and SLAKE's copies have it, which look alike."""
    write_parquet(root, "validation", [(b"b", "is it?", "no")])
    write_parquet(root, "test", [(b"c", "is it?", "no")])
    return write_parquet(root, "train", [(b"a", "is it?", "yes"), (b"a", "is it?", "no"), (b"a", "where?", "left")])


@pytest.mark.parametrize("corpus", ["pathvqa", "slake"])
def test_parquet_of_pathvqa_and_slake_has_to_be_named(tmp_path: Path, corpus: str) -> None:
    file = make_parquet(tmp_path)
    with pytest.raises(DataError, match=r"slake and pathvqa.*corpus="):
        read(tmp_path)
    with pytest.raises(DataError, match="vqa_rad"):
        read(tmp_path, "vqa_rad")
    rows = read(tmp_path, corpus)
    found = good(rows)
    assert counts(rows) == {"train": 3, "validation": 1, "test": 1}
    assert [row.answer_type for row in found.values()][:3] == ["closed", "closed", "open"]
    assert {row.image_paths for row in found.values() if row.split == "train"} == {(f"{file}#0",)}
    assert found["train-0"].meta == {"answer_type_from": "yes_no"}


def test_parquet_of_slake_is_english(tmp_path: Path) -> None:
    make_parquet(tmp_path)
    assert len(read(tmp_path, "slake", "en")) == 5
    assert read(tmp_path, "slake", "zh") == []


def test_other_parquet_is_neither(tmp_path: Path) -> None:
    make_parquet(tmp_path)
    pq.write_table(pa.table({"image": [b""], "text": ["a"]}), next((tmp_path / "data").glob("train-*")))
    with pytest.raises(DataError, match="no known corpus layout"):
        read(tmp_path)


def test_pathvqa_in_two_layouts_is_refused(tmp_path: Path) -> None:
    make_pvqa(tmp_path)
    write(tmp_path / "pathvqa_train.json", [{}])
    with pytest.raises(DataError, match="publisher, PeFoMed"):
        read(tmp_path)


# SLAKE


def slake_row(qid: int, **changes: Any) -> dict[str, Any]:
    row = {"img_id": 1, "img_name": "xmlab1/source.jpg", "question": "What organ?", "answer": "Lung", "q_lang": "en"}
    row |= {"location": "Lung", "modality": "CT", "answer_type": "OPEN", "base_type": "vqa", "content_type": "Organ"}
    return row | {"triple": ["vhead", "_", "_"], "qid": qid} | changes


def make_slake(root: Path, train: list[Any], validation_name: str = "validate.json") -> None:
    write(root / "train.json", train)
    write(root / validation_name, [slake_row(900)])
    write(root / "test.json", [slake_row(901, answer_type="CLOSED", answer="Yes")])
    (root / "imgs").mkdir()


@pytest.mark.parametrize("validation_name", ["validate.json", "validation.json"])
def test_slake_reads_both_spellings_of_the_validation_file(tmp_path: Path, validation_name: str) -> None:
    train = [slake_row(1), slake_row(1622, answer=""), slake_row(2, answer="T2", q_lang="zh", question="器官?")]
    make_slake(tmp_path, train, validation_name)
    rows = good(read(tmp_path))
    splits = {name: row.split for name, row in rows.items()}
    assert splits == {"1": "train", "1622": "train", "2": "train", "900": "validation", "901": "test"}
    assert rows["1"].image_paths == ("imgs/xmlab1/source.jpg",)
    assert (rows["1"].group, rows["1"].question_type, rows["1"].answer_type) == ("xmlab1", "Organ", "open")
    assert rows["2"].meta["q_lang"] == "zh"
    assert rows["1"].line == "train.json[0]"
    assert rows["1622"].answer == ""  # not the reader's to judge
    assert rows["901"].answer_type == "closed"


def test_slake_filters_by_language_before_anything_else(tmp_path: Path) -> None:
    train = [slake_row(1), slake_row(2, q_lang="zh"), without(slake_row(3), "q_lang"), "not a row"]
    # Faults of rows in another language are nobody's business.
    make_slake(tmp_path, [*train, slake_row(1, q_lang="zh"), {"q_lang": "zh"}])
    rows = read(tmp_path, language="en")
    assert set(good(rows)) == {"1", "900", "901"}
    assert bad(rows) == {"train.json[2]": "malformed_row", "train.json[3]": "malformed_row"}
    with pytest.raises(ConfigError, match="'fr'"):
        read(tmp_path, language="fr")


def test_slake_asks_to_unpack_the_images(tmp_path: Path) -> None:
    make_slake(tmp_path, [slake_row(1)])
    (tmp_path / "imgs").rmdir()
    (tmp_path / "imgs.zip").touch()
    with pytest.raises(DataError, match=r"imgs\.zip"):
        read(tmp_path)


@pytest.mark.parametrize("folder", ["en", "."])
def test_slake_converted_by_pefomed(tmp_path: Path, folder: str) -> None:
    row = slake_row(1) | {"image_name": "xmlab1/source.jpg", "question_type": "Organ"}
    row = without(without(row, "img_name"), "content_type")
    write(tmp_path / folder / "slake_train.json", [row, without(row | {"qid": 2}, "q_lang"), row | {"q_lang": "zh"}])
    write(tmp_path / folder / "slake_val.json", [row | {"qid": 3}])
    write(tmp_path / folder / "slake_test.json", [row | {"qid": 4}, without(row, "image_name")])
    (tmp_path / "imgs").mkdir()
    rows = read(tmp_path, language="en")
    found = good(rows)
    assert {name: row.split for name, row in found.items()} == {
        "1": "train",
        "2": "train",
        "3": "validation",
        "4": "test",
    }
    assert found["2"].image_paths == ("imgs/xmlab1/source.jpg",)
    assert (found["2"].group, found["2"].question_type, found["2"].meta["q_lang"]) == ("xmlab1", "Organ", "en")
    assert list(bad(rows).values()) == ["malformed_row"]
    make_slake(tmp_path / "both", [slake_row(1)])
    for file in (tmp_path / "both").glob("*.json"):
        file.rename(tmp_path / file.name)
    with pytest.raises(DataError, match="publisher, PeFoMed"):
        read(tmp_path)


def test_real_slake(data_dir: Path) -> None:
    rows = read(data_dir / "slake", language="en")
    assert not bad(rows)
    found = good(rows)
    assert counts(rows) == {"train": 4919, "validation": 1053, "test": 1061}
    closed = Counter(row.split for row in found.values() if row.answer_type == "closed")
    assert closed == {"train": 1943, "validation": 422, "test": 416}
    assert [row.id for row in found.values() if not row.answer.strip()] == ["1622"]
    groups = {split: {row.group for row in found.values() if row.split == split} for split in counts(rows)}
    assert {split: len(names) for split, names in groups.items()} == {"train": 450, "validation": 96, "test": 96}
    assert not groups["train"] & groups["test"]
    assert counts(read(data_dir / "slake")) == {"train": 9835, "validation": 2099, "test": 2094}
