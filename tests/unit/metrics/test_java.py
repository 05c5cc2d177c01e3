import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from pycocoevalcap.tokenizer import ptbtokenizer

from pefomed_ray.metrics import java
from pefomed_ray.metrics.java import JavaError, Meteor, meteor_of_sums, ptb_tokens

SECRET = "Mrs Miller has"
PATIENCE_S = 10
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="java is not there")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the PATH for a `java` of the test's own; `became` lists the processes that it was."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(java, "PTB_START_S", 1.0)
    monkeypatch.setattr(java, "METEOR_START_S", 1.0)
    monkeypatch.setattr(java, "METEOR_ITEM_S", 0.0)
    return folder


def write_java(folder: Path, script: str) -> None:
    path = folder / "java"
    path.write_text(f"#!/bin/sh\necho $$ >> {folder}/became\n{script}\n")
    path.chmod(0o755)


def assert_gone(folder: Path) -> None:
    pids = [int(pid) for pid in (folder / "became").read_text().split()]
    assert pids
    deadline = time.monotonic() + PATIENCE_S
    while alive := [pid for pid in pids if runs(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def python(code: str) -> str:
    return f"exec {sys.executable} -c '{code}'"


HANGING = "exec sleep 60"
HANGING_CHILD = "sleep 60 & echo $! >> $(dirname $0)/became; wait"


@pytest.mark.parametrize("script", [HANGING, HANGING_CHILD])
def test_a_tokeniser_that_hangs_is_ended(stand_in: Path, script: str) -> None:
    write_java(stand_in, script)
    before = time.monotonic()
    with pytest.raises(JavaError, match="did not answer within 1 s") as caught:
        ptb_tokens([SECRET])
    assert time.monotonic() - before < PATIENCE_S
    assert SECRET not in str(caught.value)
    assert_gone(stand_in)


def test_a_tokeniser_that_fails(stand_in: Path) -> None:
    write_java(stand_in, "exit 3")
    with pytest.raises(JavaError, match="ended with code 3"):
        ptb_tokens([SECRET])


def test_lines_that_do_not_fit_the_texts(stand_in: Path) -> None:
    write_java(stand_in, "head -n 1")
    with pytest.raises(JavaError, match="1 lines for 2 texts"):
        ptb_tokens(["one", "two"])


def test_a_line_break_within_a_text_does_not_move_the_others(stand_in: Path) -> None:
    write_java(stand_in, "cat")
    assert ptb_tokens(["a\r\nb\vc\u2028d", "", "e ."]) == ["a b c d", "", "e"]


@pytest.mark.parametrize("script", [HANGING, HANGING_CHILD])
def test_a_meteor_that_hangs_is_ended(stand_in: Path, script: str) -> None:
    write_java(stand_in, script)
    before = time.monotonic()
    with pytest.raises(JavaError, match="METEOR did not answer within") as caught, Meteor() as meteor:
        meteor.score([[SECRET]], [SECRET])
    assert time.monotonic() - before < PATIENCE_S
    assert SECRET not in str(caught.value)
    assert_gone(stand_in)


@pytest.mark.parametrize(
    "script",
    [
        "exit 1",
        "read line",  # dies after the first question
        python("import sys\nfor line in sys.stdin: print(1, flush=True)"),
        python('import sys\nfor line in sys.stdin: print(*23 * ["one"], flush=True)'),
    ],
    ids=["dead", "dies", "too few numbers", "no numbers"],
)
def test_a_meteor_that_dies_or_babbles(stand_in: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "METEOR_START_S", 60.0)
    write_java(stand_in, script)
    with pytest.raises(JavaError, match="METEOR died or answered oddly"), Meteor() as meteor:
        meteor.score([["a"], ["b"]], ["a", "b"])
    assert_gone(stand_in)


def test_what_meteor_is_asked(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in a text is a separator, and the last number is the corpus'."""
    monkeypatch.setattr(java, "METEOR_START_S", 60.0)
    code = (
        "import sys\n"
        f'log = open("{stand_in}/asked", "w")\n'
        "for line in sys.stdin:\n"
        '    print(line, end="", file=log, flush=True)\n'
        '    if line.startswith("EVAL"): print(0.25, 0.5, 0.125, sep="\\n", flush=True)\n'
        "    else: print(*[1.0] * 23, flush=True)\n"
    )
    write_java(stand_in, python(code))
    with Meteor() as meteor:
        corpus, items, sums_NK = meteor.score([["a ||| b", "c"], ["d"]], ["e ||| f", "g"])
    assert (corpus, items, sums_NK.shape) == (0.125, [0.25, 0.5], (2, 23))
    lines = (stand_in / "asked").read_text().splitlines()
    assert lines[:2] == ["SCORE ||| a b ||| c ||| e f", "SCORE ||| d ||| g"]
    assert lines[2].count("|||") == 2


def test_no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(JavaError, match="no `java`"):
        ptb_tokens(["a"])
    with pytest.raises(JavaError, match="no `java`"), Meteor():
        pass


def test_a_java_that_cannot_be_started(stand_in: Path) -> None:
    (stand_in / "java").write_bytes(b"\x7fELF no program")
    (stand_in / "java").chmod(0o755)
    with pytest.raises(JavaError, match="does not start"):
        ptb_tokens(["a"])


def test_meteor_of_sums_by_hand() -> None:
    # "the lungs are clear bilaterally" against "the lungs are clear": 2 content and 2 function words match, 1 chunk.
    numbers = np.zeros(23)
    numbers[:8] = [5, 4, 2, 2, 2, 2, 2, 2]
    numbers[20:] = [1, 4, 4]
    precision, recall = (0.75 * 2 + 0.25 * 2) / (0.75 * 3 + 0.25 * 2), 1.0
    f_mean = precision * recall / (0.85 * precision + 0.15 * recall)
    assert float(meteor_of_sums(numbers)) == pytest.approx(f_mean * (1 - 0.6 * 0.25**0.2))
    assert float(meteor_of_sums(np.zeros(23))) == 0.0


@needs_java
def test_the_real_tokeniser_writes_nothing_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder may be read-only, and what a patient's report says stays in memory."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    folder = Path(ptbtokenizer.__file__).parent
    before = sorted(folder.iterdir())
    texts = ["The lungs are clear.", "", "Größe: 3 µm (left)\r\nT2-weighted; x-ray", "No effusion."]
    assert ptb_tokens(texts) == [
        "the lungs are clear",
        "",
        "größe 3 µm -lrb- left -rrb- t2-weighted x-ray",
        "no effusion",
    ]
    assert sorted(folder.iterdir()) == before
    with pytest.raises(PermissionError):  # what pycocoevalcap's own wrapper does
        ptbtokenizer.PTBTokenizer().tokenize({"1": [{"caption": "a"}]})
