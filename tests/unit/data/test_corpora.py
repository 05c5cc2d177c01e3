"""Each reader on a small tree in the publisher's layout, with the dirt that the publisher's own files have."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pefomed_ray.artifacts.records import Reference
from pefomed_ray.data.corpora import READERS, open_corpus
from pefomed_ray.data.corpora.reading import BadRow, Row
from pefomed_ray.data.options import DataOptions
from pefomed_ray.errors import ConfigError, DataError


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content, ensure_ascii=False).encode())


def read(root: Path, **options: Any) -> list[Row]:
    return list(open_corpus(root).read(root, DataOptions(**options)))


def good(rows: list[Row]) -> dict[str, Reference]:
    return {row.id: row for row in rows if isinstance(row, Reference)}


def bad(rows: list[Row]) -> dict[str, str]:
    return {row.line: row.reason for row in rows if isinstance(row, BadRow)}


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
    make_slake(tmp_path, [slake_row(1), slake_row(2, answer="", q_lang="zh", question="器官?")], validation_name)
    rows = good(read(tmp_path))
    assert {name: row.split for name, row in rows.items()} == {
        "1": "train",
        "2": "train",
        "900": "validation",
        "901": "test",
    }
    assert rows["1"].image_paths == ("imgs/xmlab1/source.jpg",)
    assert (rows["1"].group, rows["1"].question_type, rows["1"].answer_type) == ("xmlab1", "Organ", "open")
    assert rows["1"].meta["q_lang"] == "en"
    assert rows["1"].line == "train.json[0]"
    assert rows["2"].answer == ""  # not the reader's to judge
    assert rows["901"].answer_type == "closed"


def test_slake_filters_by_language_before_anything_else(tmp_path: Path) -> None:
    untold = {key: value for key, value in slake_row(3).items() if key != "q_lang"}
    make_slake(tmp_path, [slake_row(1), slake_row(2, q_lang="zh"), untold, "not a row"])
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


def rad_row(qid: Any, **changes: Any) -> dict[str, Any]:
    row = {"qid": qid, "phrase_type": "freeform", "image_name": "synpic1.jpg", "image_organ": "CHEST"}
    row |= {"question": "Is it?", "question_type": "PRES", "answer": "Yes", "answer_type": "CLOSED"}
    return row | changes


def test_vqa_rad_osf_with_its_dirt(tmp_path: Path) -> None:
    rows = [
        rad_row("0"),
        rad_row(1, answer=12, answer_type="OPEN"),
        rad_row(2156, answer="Maybe", answer_type="CLOSED "),
        rad_row(3, answer=" Heart \tlungs", answer_type="OPEN", question_type="POS, PRES"),
        rad_row(4, phrase_type="test_para"),
        rad_row(5, phrase_type="test_freeform", answer="Left"),
        rad_row(6, answer_type="MAYBE"),
    ]
    write(tmp_path / "VQA_RAD Dataset Public.json", rows)
    (tmp_path / "VQA_RAD Image Folder").mkdir()
    read_rows = read(tmp_path)
    found = good(read_rows)
    assert [name for name, row in found.items() if row.split == "test"] == ["4", "5"]
    assert found["1"].answer == "12"
    assert (found["2156"].answer_type, found["2156"].answer) == ("closed", "Maybe")
    assert found["3"].answer == " Heart \tlungs"  # the content is kept as it is
    assert found["5"].answer_type == "closed"  # closed is not only yes and no
    assert found["0"].image_paths == ("VQA_RAD Image Folder/synpic1.jpg",)
    assert bad(read_rows) == {"VQA_RAD Dataset Public.json[6]": "malformed_row"}


def test_vqa_rad_mevf_frame_rows_get_ids_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "trainset.json", [rad_row(7), rad_row(7, phrase_type="frame", question="Is there?")])
    write(tmp_path / "testset.json", [rad_row(8, phrase_type="test_para")])
    (tmp_path / "images").mkdir()
    rows = good(read(tmp_path))
    assert {name: row.split for name, row in rows.items()} == {"7": "train", "7-frame": "train", "8": "test"}
    assert rows["7"].image_paths == ("images/synpic1.jpg",)


def test_vqa_rad_in_two_layouts_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "VQA_RAD Dataset Public.json", [rad_row(1)])
    write(tmp_path / "trainset.json", [rad_row(1)])
    write(tmp_path / "testset.json", [rad_row(2)])
    with pytest.raises(DataError, match="OSF, MEVF"):
        read(tmp_path)


def write_hugging_face(root: Path, split: str, rows: list[tuple[bytes | None, str, str]]) -> None:
    (root / "data").mkdir(exist_ok=True)
    table = [
        {"image": None if data is None else {"bytes": data, "path": None}, "question": q, "answer": a}
        for data, q, a in rows
    ]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("question", pa.string()), ("answer", pa.string())])
    pq.write_table(pa.Table.from_pylist(table, schema=schema), root / "data" / f"{split}-00000-of-00001-abc.parquet")


def test_vqa_rad_hugging_face_parquet(tmp_path: Path) -> None:
    write_hugging_face(tmp_path, "train", [(b"a", "is it?", "yes"), (b"b", "where?", "left"), (b"a", "?", "no")])
    write_hugging_face(tmp_path, "test", [(None, "is it?", "no")])
    rows = good(read(tmp_path))
    file = "data/train-00000-of-00001-abc.parquet"
    # Rows of one image name one place, so that they are kept together.
    assert [rows[f"train-{number}"].image_paths for number in range(3)] == [
        (f"{file}#0",),
        (f"{file}#1",),
        (f"{file}#0",),
    ]
    assert [rows[f"train-{number}"].answer_type for number in range(3)] == ["closed", "open", "closed"]
    assert rows["test-0"].image_paths == ()
    # PathVQA has the same columns and a validation split.
    write_hugging_face(tmp_path, "validation", [(b"c", "?", "no")])
    with pytest.raises(DataError, match="no known corpus layout"):
        open_corpus(tmp_path)


def test_roco_captions(tmp_path: Path) -> None:
    captions = b"ROCO_00001\t Preop CT.\nROCO_00002\t Caf\xe9\nno tab here\nROCO_00004\t \n"
    write(tmp_path / "data/train/radiology/captions.txt", captions)
    write(tmp_path / "data/test/radiology/captions.txt", "ROCO_00005\t R\u00f6ntgen\n".encode())
    rows = read(tmp_path)
    found = good(rows)
    assert found["ROCO_00001"].answer == "Preop CT."
    assert found["ROCO_00001"].image_paths == ("data/train/radiology/images/ROCO_00001.jpg",)
    assert (found["ROCO_00001"].task, found["ROCO_00001"].question) == ("caption", "")
    assert found["ROCO_00002"].answer == "Caf\udce9"  # marked, for the sharder to find
    assert found["ROCO_00004"].answer == ""
    assert (found["ROCO_00005"].split, found["ROCO_00005"].answer) == ("test", "R\u00f6ntgen")
    assert bad(rows) == {"data/train/radiology/captions.txt:3": "malformed_row"}


def test_r2gen_has_two_images_a_report(tmp_path: Path) -> None:
    row = {"id": "CXR2384_IM-0942", "report": "XXXX is normal.", "split": "train"}
    row["image_path"] = ["CXR2384_IM-0942/0.png", "CXR2384_IM-0942/1.png"]  # type: ignore[assignment]
    broken = row | {"id": "CXR1_IM-1", "image_path": "CXR1_IM-1/0.png"}
    write(tmp_path / "annotation.json", {"train": [row, broken], "val": [row | {"id": "CXR2056_IM-0694-1001"}]})
    (tmp_path / "images").mkdir()
    rows = read(tmp_path)
    found = good(rows)["CXR2384_IM-0942"]
    assert found.image_paths == ("images/CXR2384_IM-0942/0.png", "images/CXR2384_IM-0942/1.png")
    assert (found.task, found.group) == ("report", "CXR2384")
    assert good(rows)["CXR2056_IM-0694-1001"].split == "validation"
    assert bad(rows) == {"annotation.json:train[1]": "malformed_row"}


def test_r2gen_refuses_mimic_cxr_of_the_same_layout(tmp_path: Path) -> None:
    write(tmp_path / "annotation.json", {"train": [{"id": "a", "subject_id": 1}]})
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="MIMIC"):
        read(tmp_path)


JSONL_ROWS: list[tuple[Any, str | None]] = [
    ({"query": "Where?", "response": "Left", "images": ["a.png", "b.png"], "id": "q1", "answer_type": "OPEN"}, None),
    (
        {
            "id": "q2",
            "messages": [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "Left"}],
            "images": ["a.png"],
        },
        None,
    ),
    (
        {
            "id": "q3",
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "Left"}],
        },
        None,
    ),
    (
        {
            "id": "q4",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.png"}},
                        {"type": "text", "text": "Where?"},
                    ],
                },
                {"role": "assistant", "content": "Left"},
            ],
        },
        None,
    ),
    ({"response": "A caption.", "image": "a.png"}, None),
    ({"query": "?", "response": "x", "image": "data:image/png;base64,AAAA"}, "image_not_local"),
    ({"query": "?", "response": "x", "image": "https://example.org/a.png"}, "image_not_local"),
    ({"conversations": [{"from": role, "value": "x"} for role in ("human", "gpt", "human", "gpt")]}, "several_turns"),
    ({"query": "<image><image>?", "response": "x", "image": "a.png"}, "malformed_row"),
    ({"query": "?", "image": "a.png"}, "malformed_row"),
    ({"query": "?", "response": True, "image": "a.png"}, "malformed_row"),
    ({"query": "?", "response": "x", "image": 3}, "malformed_row"),
    ({"query": "?", "response": "x", "task": "poem"}, "malformed_row"),
    ([1, 2], "malformed_row"),
    (b'{"query": "torn', "malformed_row"),
]


def test_jsonl_in_its_three_spellings_and_its_dirt(tmp_path: Path) -> None:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row, _ in JSONL_ROWS]
    write(tmp_path / "train.jsonl", b"\n".join(lines) + b"\n\n")
    rows = read(tmp_path)
    assert bad(rows) == {f"train.jsonl:{n}": reason for n, (_, reason) in enumerate(JSONL_ROWS, 1) if reason}
    found = good(rows)
    assert set(found) == {"q1", "q2", "q3", "q4", "train-5"}
    for name in ("q1", "q2", "q3", "q4"):
        assert (found[name].question, found[name].answer, found[name].task) == ("Where?", "Left", "vqa")
    assert found["q1"].image_paths == ("a.png", "b.png")
    assert found["q1"].answer_type == "open"
    assert found["q2"].answer_type is None
    assert found["q4"].image_paths == ("a.png",)
    assert found["q4"].meta == {"system": "Be brief."}
    assert (found["train-5"].task, found["train-5"].question) == ("caption", "")


@pytest.mark.parametrize("content", [b"[{]", b'{"a": 1}', b"[]", b"[" * 100_000])
def test_an_unreadable_or_empty_file_is_named(tmp_path: Path, content: bytes) -> None:
    make_slake(tmp_path, [slake_row(1)])
    (tmp_path / "test.json").write_bytes(content)
    with pytest.raises(DataError, match=r"test\.json"):
        read(tmp_path)


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        open_corpus(tmp_path / "nowhere")


def test_an_unknown_layout_says_what_was_found_and_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError) as error:
        open_corpus(tmp_path)
    assert "pictures/" in str(error.value)
    assert all(name in str(error.value) for name in READERS)


def test_two_layouts_in_one_folder_name_both(tmp_path: Path) -> None:
    make_slake(tmp_path, [slake_row(1)])
    assert open_corpus(tmp_path).NAME == "slake"
    write(tmp_path / "train.jsonl", b"{}\n")
    with pytest.raises(DataError, match="slake and jsonl"):
        open_corpus(tmp_path)


def test_real_slake(data_dir: Path) -> None:
    rows = read(data_dir / "slake", language="en")
    assert not bad(rows)
    found = good(rows)
    counts = {split: sum(row.split == split for row in found.values()) for split in ("train", "validation", "test")}
    assert counts == {"train": 4919, "validation": 1053, "test": 1061}
    assert [row.id for row in found.values() if not row.answer.strip()] == ["1622"]
    groups = {split: {row.group for row in found.values() if row.split == split} for split in counts}
    assert {split: len(names) for split, names in groups.items()} == {"train": 450, "validation": 96, "test": 96}
    assert len(good(read(data_dir / "slake"))) == 14_028
