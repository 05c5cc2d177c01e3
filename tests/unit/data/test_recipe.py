"""The reader on the page docs/add-a-corpus.md is complete and does what the page says."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.records import Reference
from pefomed_ray.data.corpora import READERS, open_corpus
from pefomed_ray.data.corpora.reading import BadRow, Reader
from pefomed_ray.data.options import DataOptions
from pefomed_ray.errors import DataError

PAGE = Path(__file__).parents[3] / "docs/add-a-corpus.md"
TABLE = """study,patient,use,view_1,view_2,findings
S001,P1,fit,S001-a.png,S001-b.png,"Clear lungs, no effusion."
S002,P1,fit,S002-a.png,,
S003,P2,tune,S003-a.png,,Normal.
S004,P3,final,S004-a.png,,Normal.
S005,P4
S006,P5,fit,S006-a.png,,Normal, as before.
S007,P6,other,S007-a.png,,Normal.
"""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    module = ModuleType("example")
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(READERS, "example", module)  # type: ignore[arg-type]
    return module


def test_the_recipes_reader(tmp_path: Path, example: ModuleType) -> None:
    (tmp_path / "studies.csv").write_text(TABLE)
    (tmp_path / "xrays").mkdir()
    root = open_folder(tmp_path)
    assert open_corpus(root) is example
    rows = list(open_corpus(root).read(root, DataOptions()))
    found = {row.id: row for row in rows if isinstance(row, Reference)}
    splits = {name: row.split for name, row in found.items()}
    assert splits == {"S001": "train", "S002": "train", "S003": "validation", "S004": "test"}
    assert found["S001"].image_paths == ("xrays/S001-a.png", "xrays/S001-b.png")
    assert (found["S001"].answer, found["S001"].group) == ("Clear lungs, no effusion.", "P1")
    assert found["S002"].answer == ""
    bad = {row.line: row.reason for row in rows if isinstance(row, BadRow)}
    assert bad == dict.fromkeys(["studies.csv:6", "studies.csv:7", "studies.csv:8"], "malformed_row")


def test_without_it_the_folder_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "studies.csv").write_text(TABLE)
    (tmp_path / "xrays").mkdir()
    with pytest.raises(DataError, match="no known corpus layout"):
        open_corpus(open_folder(tmp_path))


def test_the_page_explains_every_name_a_reader_has(example: ModuleType) -> None:
    names = [name for name in vars(Reader) if name.isupper()]
    assert len(names) == 5
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page and hasattr(example, name) for name in names)
