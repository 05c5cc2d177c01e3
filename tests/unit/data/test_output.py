"""Shards appear whole or not at all, whatever kills whoever writes them; and what was finished is not done again."""

import errno
import json
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.storage import sha256_file
from pefomed_ray.data import shard_file
from pefomed_ray.data.intake import take_in
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.output import check_is_free, unfinished, work_folder
from pefomed_ray.data.shard_file import ShardSpec, plan_shards, write_shard
from pefomed_ray.errors import ConfigError, DiskFullError, PefomedError

OPTIONS = DataOptions(validation_fraction=0, shard_bytes=5_000)


def draw_images(root: Path, seed: int) -> None:
    for number in range(6):
        pixels = random.Random(seed + number).randbytes(48 * 48)
        Image.frombytes("L", (48, 48), pixels).save(root / f"i{number}.png")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Thirty rows about six images."""
    root = tmp_path / "corpus"
    root.mkdir()
    draw_images(root, seed=0)
    rows = [{"id": f"q{n}", "query": "?", "response": "Left", "image": f"i{n % 6}.png"} for n in range(30)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def specs_of(corpus: Path) -> list[ShardSpec]:
    root = open_folder(corpus)
    specs = plan_shards(take_in(root, OPTIONS).references, root, 0, OPTIONS.shard_bytes)
    assert len(specs) == 3
    return specs


def make(corpus: Path, output: str | Path, inputs: str = "inputs", shards: int = 3) -> None:
    """What `prepare` does, without Ray; cut off after so many shards."""
    files = {}
    with unfinished(open_folder(output), inputs) as work:
        for spec in specs_of(corpus)[:shards]:
            result = write_shard(spec.to_json(), open_folder(corpus), work.work, "jsonl", OPTIONS)
            assert result.file
            files[result.file.path] = result.file.bytes
        if shards < 3:
            raise KeyboardInterrupt
        work.publish({"quarantine/train.jsonl": b"{}"}, files, json.dumps(files).encode())


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(params=["disk", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "disk" else request.getfixturevalue("s3") + "/some/out"


def test_what_is_published(corpus: Path, output: str) -> None:
    make(corpus, output)
    assert open_folder(output).files() == [
        "manifest.json",
        "quarantine/train.jsonl",
        "train/part-00000.parquet",
        "train/part-00001.parquet",
        "train/part-00002.parquet",
    ]
    with pytest.raises(ConfigError, match="not empty"):
        make(corpus, output)


def test_a_run_that_was_cut_off_goes_on(corpus: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(corpus, output, shards=2)
    assert not open_folder(output).is_file("manifest.json")
    written = []
    write = shard_file.write_parquet
    monkeypatch.setattr(shard_file, "write_parquet", lambda *args: (written.append(args), write(*args)))
    make(corpus, output)
    assert len(written) == 1  # the third; the control below writes all
    make(corpus, corpus.parent / "clean")
    assert len(written) == 4
    clean = open_folder(corpus.parent / "clean")
    assert {name: open_folder(output).read_bytes(name) for name in open_folder(output).files()} == {
        name: clean.read_bytes(name) for name in clean.files()
    }


@pytest.mark.parametrize("change", ["torn shard", "other image", "torn result", "no shard"])
def test_what_does_not_fit_any_more_is_made_again(change: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(corpus, tmp_path / "out", shards=2)
    work = work_folder(tmp_path / "out")
    shard = work / "train/part-00000.parquet"
    if change == "torn shard":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif change == "no shard":
        shard.unlink()
    elif change == "torn result":
        (work / ".unfinished/train-00000.json").write_text('{"digest": ')
    else:
        draw_images(corpus, seed=100)
    make(corpus, tmp_path / "out")
    make(corpus, tmp_path / "clean")
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_work_of_other_inputs_is_not_gone_on_with(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(corpus, tmp_path / "out", shards=2)
    leftover = work_folder(tmp_path / "out") / "train/part-00009.parquet"
    leftover.write_bytes(b"old")
    make(corpus, tmp_path / "out", inputs="others")
    make(corpus, tmp_path / "clean")
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_on_s3_work_of_other_inputs_may_still_be_going_on(corpus: Path, s3: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(corpus, f"{s3}/out", shards=2)
    with pytest.raises(ConfigError, match="unfinished work of other inputs"):
        make(corpus, f"{s3}/out", inputs="others")
    make(corpus, f"{s3}/out")


def test_of_two_that_commit_at_once_one_wins(corpus: Path, s3: str) -> None:
    target = f"{s3}/out"
    with unfinished(open_folder(target), "inputs") as first, unfinished(open_folder(target), "inputs") as second:
        for work in (first, second):
            for spec in specs_of(corpus):
                write_shard(spec.to_json(), open_folder(corpus), work.work, "jsonl", OPTIONS)
        first.publish({}, {}, b"first")
        with pytest.raises(ConfigError, match="published by another run"):
            second.publish({}, {}, b"second")
    assert open_folder(target).read_bytes("manifest.json") == b"first"
    assert [name for name in open_folder(target).files() if "unfinished" in name] == []


def test_on_disk_the_second_of_two_is_told_so(corpus: Path, tmp_path: Path) -> None:
    with unfinished(open_folder(tmp_path / "out"), "inputs"):
        code = f"""
            from pefomed_ray.artifacts.folders import open_folder
            from pefomed_ray.data.output import unfinished
            with unfinished(open_folder({str(tmp_path / "out")!r}), "inputs"):
                print("got in")
        """
        second = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
        )
    assert "being made by another process" in second.stderr
    assert "got in" not in second.stdout
    make(corpus, tmp_path / "out")  # and afterwards the place is free


def test_a_shard_that_something_else_changed_is_not_published(corpus: Path, output: str) -> None:
    with unfinished(open_folder(output), "inputs") as work:
        result = write_shard(specs_of(corpus)[0].to_json(), open_folder(corpus), work.work, "jsonl", OPTIONS)
        assert result.file
        work.work.write_bytes(result.file.path, b"other")
        with pytest.raises(PefomedError, match="not there whole"):
            work.publish({}, {result.file.path: result.file.bytes}, b"{}")
    assert not open_folder(output).is_file("manifest.json")


def test_a_folder_with_something_else_in_it_is_left_alone(output: str) -> None:
    folder = open_folder(output)
    check_is_free(folder)
    folder.write_bytes("mine.txt", b"keep")
    with pytest.raises(ConfigError, match="not empty"):
        check_is_free(open_folder(output))
    folder.remove(["mine.txt"])
    check_is_free(open_folder(output))


# The commit, killed at every step it takes on the file system.

CHILD = """
    import os, signal, sys
    from pathlib import Path
    events = iter(range(10**9))
    EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree", "os.link")
    def hook(name, arguments):
        if armed and name in EVENTS and any({root!r} in str(argument) for argument in arguments):
            if next(events) == {kill_at}:
                os.kill(os.getpid(), signal.SIGKILL)
    armed = False
    sys.addaudithook(hook)
    from pefomed_ray.artifacts.folders import open_folder
    from pefomed_ray.data.output import unfinished
    def publish():
        with unfinished(open_folder({target!r}), "inputs") as work:
            for number in range(2):
                work.work.write_bytes(f"train/part-{{number}}.parquet", b"shard")
            shards = {{"train/part-0.parquet": 5, "train/part-1.parquet": 5}}
            work.publish({{"quarantine/train.jsonl": b"row"}}, shards, b"manifest")
    def naive():
        target = Path({target!r})
        (target / "train").mkdir(parents=True, exist_ok=True)
        (target / "manifest.json").write_bytes(b"manifest")
        for number in range(2):
            (target / f"train/part-{{number}}.parquet").write_bytes(b"shard")
    armed = True
    {writer}()
    print("done", next(events))
"""


def killed_at_every_step(tmp_path: Path, writer: str) -> Iterator[Path]:
    """The target after each kill; the process got to its end in the last one."""
    for kill_at in range(200):
        target = tmp_path / f"{writer}-{kill_at}" / "out"
        target.parent.mkdir()
        code = textwrap.dedent(CHILD).format(
            root=str(target.parent), kill_at=kill_at, target=str(target), writer=writer
        )
        child = os.fork()
        if child == 0:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 1)
            exec(code, {})
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        yield target
        if not os.WIFSIGNALED(status):
            return
    pytest.fail("the process never got to its end")


def is_consistent(target: Path) -> bool:
    """Nothing yet, or everything that the manifest promises."""
    if not (target / "manifest.json").exists():
        return not target.exists() or not any(target.iterdir())
    shards = [target / f"train/part-{number}.parquet" for number in range(2)]
    return all(shard.is_file() and shard.read_bytes() == b"shard" for shard in shards)


def test_no_kill_leaves_half_of_an_output(tmp_path: Path) -> None:
    outcomes = [is_consistent(target) for target in killed_at_every_step(tmp_path, "publish")]
    assert len(outcomes) > 10
    assert all(outcomes)
    naive = [is_consistent(target) for target in killed_at_every_step(tmp_path, "naive")]
    assert not all(naive)  # the control: writing in place is seen by this very test


@pytest.mark.long
def test_a_killed_run_can_be_gone_on_with_from_any_step(tmp_path: Path, corpus: Path) -> None:
    make(corpus, tmp_path / "clean")
    for target in killed_at_every_step(tmp_path, "publish"):
        if target.exists():
            continue
        make(corpus, target)
        assert contents(target) == contents(tmp_path / "clean")


@pytest.mark.parametrize("limit", [1, 3_000, 7_000])
def test_a_full_disk_says_so_and_keeps_what_was_there(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """ENOSPC after so many bytes: at the first byte, inside a shard, in the second one."""
    make(corpus, tmp_path / "old")
    before = contents(tmp_path / "old")
    left = [limit]
    write = shard_file.write_parquet

    def until_full(file: Path, records: object) -> None:
        write(file, records)  # type: ignore[arg-type]
        left[0] -= file.stat().st_size
        if left[0] < 0:
            with open(file, "r+b") as opened:
                opened.truncate(100)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shard_file, "write_parquet", until_full)
    with pytest.raises(DiskFullError, match=r"train/part-0000\d\.parquet.* bytes"):
        make(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(work_folder(tmp_path / "out").rglob("shard-*"))
    assert contents(tmp_path / "old") == before
    monkeypatch.setattr(shard_file, "write_parquet", write)
    make(corpus, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_really_full_disk(corpus: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True, timeout=10, check=False
    )
    if mounted.returncode:
        pytest.skip(reason="mounting a small disk needs root")
    try:
        with pytest.raises(DiskFullError, match="bytes"):
            make(corpus, disk / "out")
        assert not (disk / "out").exists()
    finally:
        subprocess.run(["umount", str(disk)], timeout=10, check=True)


def test_a_clock_that_jumps_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    """Nothing is ordered by time: files of the work a year older or younger are gone on with all the same."""
    with pytest.raises(KeyboardInterrupt):
        make(corpus, tmp_path / "out", shards=2)
    for shift, path in enumerate(sorted(work_folder(tmp_path / "out").rglob("*"))):
        now = path.stat().st_mtime
        year = 365 * 24 * 3600
        os.utime(path, (now, now + (year if shift % 2 else -year)))
    make(corpus, tmp_path / "out")
    make(corpus, tmp_path / "clean")
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")
