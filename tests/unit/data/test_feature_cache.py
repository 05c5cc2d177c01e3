"""The feature cache read: in order, only with the right key, never a changed byte; and planned: size first."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from pefomed_ray.artifacts.manifests import (
    FeatureCacheManifest,
    FeatureFile,
    FeaturesKey,
    ShardFile,
    ShardManifest,
    load_shard_manifest,
    save_document,
)
from pefomed_ray.artifacts.records import RECORD_SCHEMA
from pefomed_ray.artifacts.storage import sha256_bytes, sha256_file
from pefomed_ray.cli import limits
from pefomed_ray.cli.cache_size import accept_size
from pefomed_ray.data import cache_plan
from pefomed_ray.data.cache_plan import CachePlan, plan_cache
from pefomed_ray.data.feature_cache import INDEX_SCHEMA, TENSOR, FeatureCache, check_cache, open_cache
from pefomed_ray.errors import ConfigError, DataError, PefomedError, RefusedError

SHAPE = (3, 4)
KEY = FeaturesKey(
    tower_digest="a" * 64, image_spec={"size_px": 96}, pixels_version=1, template="short", template_digest="b" * 64
)
TRAIN = [["i0"], ["i1", "i0"], ["i2"], ["i0"]]
TEST = [["i3"], ["i2"]]


def digest(name: str) -> str:
    return sha256_bytes(name.encode())


def write_shards(folder: Path, splits: dict[str, list[list[str]]]) -> Path:
    """One file a split; a row shows the images named."""
    files = []
    for split, rows in splits.items():
        records = [
            dict.fromkeys(RECORD_SCHEMA.names, "x")
            | {"id": f"{split}{number}", "image_sha256": [digest(name) for name in names]}
            | {"images": [{"bytes": name.encode(), "path": name} for name in names]}
            for number, names in enumerate(rows)
        ]
        path = folder / split / "part-0.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(records, RECORD_SCHEMA), path)
        files.append(
            ShardFile(path=f"{split}/part-0.parquet", split=split, rows=len(rows), bytes=1, sha256=sha256_file(path))
        )
    manifest = ShardManifest(
        source="s", licence="open", rows={split: len(rows) for split, rows in splits.items()}, tasks={},
        answer_types={}, bytes={}, quarantined={}, image_overlap={}, files=tuple(files), made_by={},
    )  # fmt: skip
    save_document(manifest, folder / "manifest.json")
    return folder


def write_cache(folder: Path, shards: Path, names: list[str], splits: tuple[str, ...] = ("train", "test")) -> Path:
    """Two images a file; every number of image `i` in the list is `i`, its first one -1 - i."""
    folder.mkdir()
    files, places = [], []
    for number in range(0, len(names), 2):
        some = range(number, min(number + 2, len(names)))
        features = torch.stack([torch.full(SHAPE, float(i), dtype=torch.float16) for i in some])
        features[:, 0, 0] = -1 - torch.tensor(some)
        path = folder / f"features-{number // 2:05d}.safetensors"
        save_file({TENSOR: features}, path)
        files.append(FeatureFile(path=path.name, images=len(some), bytes=path.stat().st_size, sha256=sha256_file(path)))
        places += [{"image_sha256": digest(names[i]), "file": number // 2, "row": i - number} for i in some]
    pq.write_table(pa.Table.from_pylist(places, INDEX_SCHEMA), folder / "index.parquet")
    manifest = FeatureCacheManifest(
        key=KEY, shards=(load_shard_manifest(shards).digest,), splits=splits, dtype="float16", shape=SHAPE,
        images=len(names), index_sha256=sha256_file(folder / "index.parquet"), files=tuple(files), made_by={},
    )  # fmt: skip
    save_document(manifest, folder / "cache.json")
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", {"train": TRAIN, "test": TEST})


@pytest.fixture
def cache(tmp_path: Path, shards: Path) -> Path:
    return write_cache(tmp_path / "cache", shards, ["i0", "i1", "i2", "i3"])


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_features_come_in_the_order_asked_for(cache: Path) -> None:
    opened = FeatureCache(cache)
    for names in (["i3", "i0", "i2", "i0"], ["i1"]):
        found = opened.features([digest(name) for name in names])
        assert (found.dtype, tuple(found.shape)) == (torch.float16, (len(names), *SHAPE))
        assert found[:, 1, 2].tolist() == [float(name[1]) for name in names]
        assert found[:, 0, 0].tolist() == [-1 - float(name[1]) for name in names]
    assert tuple(opened.features([]).shape) == (0, *SHAPE)


def test_an_image_that_is_not_there_is_named_with_what_makes_the_cache(cache: Path) -> None:
    missing = digest("another")
    with pytest.raises(DataError, match=rf"{missing}.*`pefomed-ray data cache"):
        FeatureCache(cache).features([digest("i0"), missing])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tower_digest": "c" * 64}, r"vision tower is a{16}, the run's is c{16}"),
        ({"image_spec": {"size_px": 448}}, r"image spec is {'size_px': 96}, the run's is {'size_px': 448}"),
        ({"pixels_version": 2}, r"decoding and resizing is version 1, the run's is version 2"),
        ({"template": "paper"}, r"template is 'short' \(b{16}\), the run's is 'paper' \(b{16}\)"),
        ({"template_digest": "d" * 64}, r"template is 'short' \(b{16}\), the run's is 'short' \(d{16}\)"),
    ],
)
def test_a_stale_cache_is_refused_naming_both(change: dict[str, object], named: str, cache: Path, shards: Path) -> None:
    wanted = KEY.model_copy(update=change)
    with pytest.raises(ConfigError, match=rf"{named}.*`pefomed-ray data cache .*template={wanted.template}`"):
        check_cache(cache, wanted, shards, ["train"])
    assert check_cache(cache, KEY, shards, ["train", "test"]).images == 4  # the control


def test_other_shards_can_use_a_cache_that_holds_all_their_images(cache: Path, tmp_path: Path) -> None:
    fewer = write_shards(tmp_path / "fewer", {"train": [["i2"]], "validation": [["i1"]]})
    check_cache(cache, KEY, fewer, ["train", "validation"])
    more = write_shards(tmp_path / "more", {"train": [["i2"]], "validation": [["i1"], ["i9"]]})
    check_cache(cache, KEY, more, ["train"])
    with pytest.raises(DataError, match=rf"lacks 1 image\(s\) of split 'validation'.*{digest('i9')}"):
        check_cache(cache, KEY, more, ["train", "validation"])


def test_a_split_that_was_not_cached_is_missed(shards: Path, tmp_path: Path) -> None:
    of_train = write_cache(tmp_path / "of-train", shards, ["i0", "i1", "i2"], splits=("train",))
    check_cache(of_train, KEY, shards, ["train"])
    with pytest.raises(DataError, match=rf"lacks 1 image\(s\) of split 'test'.*{digest('i3')}"):
        check_cache(of_train, KEY, shards, ["test"])


def test_a_flipped_byte_is_never_read(cache: Path, shards: Path) -> None:
    before = FeatureCache(cache).features([digest("i2")])
    flip_last_byte(cache / "features-00001.safetensors")
    check_cache(cache, KEY, shards, ["train"])  # sizes are as they were
    opened = FeatureCache(cache)
    opened.features([digest("i0")])  # the control: the other file is whole
    with pytest.raises(DataError, match=r"features-00001.*does not match its sha256"):
        opened.features([digest("i2")])
    flip_last_byte(cache / "features-00001.safetensors")
    assert torch.equal(FeatureCache(cache).features([digest("i2")]), before)
    flip_last_byte(cache / "index.parquet")
    for read in (lambda: FeatureCache(cache), lambda: check_cache(cache, KEY, shards, ["train"])):
        with pytest.raises(DataError, match=r"index\.parquet"):
            read()


@pytest.mark.parametrize("fault", ["short", "gone"])
def test_a_file_cut_short_or_gone_is_found_before_anything_starts(fault: str, cache: Path, shards: Path) -> None:
    path = cache / "features-00000.safetensors"
    check_cache(cache, KEY, shards, ["train"])
    path.write_bytes(path.read_bytes()[:-1]) if fault == "short" else path.unlink()
    with pytest.raises(DataError, match="features-00000"):
        check_cache(cache, KEY, shards, ["train"])


def test_no_cache_and_no_manifest_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cache\.json.*does not hold a feature cache; make it with"):
        open_cache(tmp_path)
    (tmp_path / "cache.json").write_text('{"schema_version": 2}')
    with pytest.raises(DataError, match="not a valid FeatureCacheManifest"):
        open_cache(tmp_path)


def test_a_process_opens_a_cache_once_and_another_one_in_its_place_anew(
    cache: Path, shards: Path, tmp_path: Path
) -> None:
    first = open_cache(cache)
    assert open_cache(cache) is first
    cache.rename(tmp_path / "old")
    write_cache(cache, shards, ["i3", "i2", "i1", "i0"])
    assert open_cache(cache).features([digest("i3")])[0, 1, 2] == 0.0  # the first of the list now


def test_every_image_is_planned_once_in_the_order_of_the_shards(shards: Path, tmp_path: Path) -> None:
    plan = plan_cache([shards], tmp_path / "out", SHAPE, images_per_file=3)
    assert [place.sha256 for place in plan.images] == [digest(name) for name in ("i0", "i1", "i2", "i3")]
    assert [(place.split, place.row, place.position) for place in plan.images] == [
        ("train", 0, 0), ("train", 1, 0), ("train", 2, 0), ("test", 0, 0),
    ]  # fmt: skip
    assert [len(file) for file in plan.files] == [3, 1]
    assert plan.bytes == 4 * 3 * 4 * 2
    assert plan.describe().startswith("4 images x 3 visual tokens x 4 x 2 bytes = ")
    assert len(plan_cache([shards], tmp_path / "out", SHAPE, splits=("test",)).images) == 2
    with pytest.raises(DataError, match="no rows for split 'validation'"):
        plan_cache([shards], tmp_path / "out", SHAPE, splits=("validation",))
    with pytest.raises(ConfigError, match="not empty"):
        plan_cache([shards], shards, SHAPE)


def test_a_mixture_is_planned_as_one(shards: Path, tmp_path: Path) -> None:
    others = write_shards(tmp_path / "others", {"train": [["i3"], ["i4"]], "validation": [["i5"]]})
    plan = plan_cache([shards, others], tmp_path / "out", SHAPE)
    assert [place.sha256 for place in plan.images] == [digest(f"i{n}") for n in (0, 1, 2, 3, 4, 5)]
    assert [(place.split, place.row) for place in plan.images[3:]] == [("train", 4), ("train", 5), ("validation", 0)]
    assert plan.shards == (load_shard_manifest(shards).digest, load_shard_manifest(others).digest)


def test_files_hold_a_quarter_of_a_gigabyte_at_the_papers_sizes(shards: Path, tmp_path: Path) -> None:
    paper = (256, 5632)
    plan = plan_cache([shards], tmp_path / "out", paper)
    assert plan.images_per_file == 93
    assert plan.images_per_file * paper[0] * paper[1] * 2 <= cache_plan.FILE_BYTES


def test_a_full_disk_is_found_before_anything_runs(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "not" / "yet" / "there"
    free = {"bytes": 96}
    monkeypatch.setattr(cache_plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=free["bytes"]))
    plan_cache([shards], output, SHAPE)
    free["bytes"] = 95
    with pytest.raises(PefomedError, match="95 bytes free, the features take 96"):
        plan_cache([shards], output, SHAPE)


@pytest.fixture
def ask(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Offer a plan of 96 bytes: (terminal, answer, limit in bytes, --yes) -> the questions asked."""
    plan: CachePlan = plan_cache([shards], tmp_path / "out", SHAPE)

    def offer(terminal: bool, answer: bool, limit: int, yes: bool) -> list[str]:
        asked: list[str] = []
        monkeypatch.setattr(limits.sys, "stdin", SimpleNamespace(isatty=lambda: terminal))
        monkeypatch.setattr(limits.typer, "confirm", lambda text, err: asked.append(text) or answer)
        accept_size(plan, limit / 1e9, yes=yes)
        return asked

    return offer


def test_the_size_is_said_and_asked_about_above_the_limit(
    ask: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(terminal=True, answer=False, limit=96, yes=False) == []
    assert "4 images x 3 visual tokens x 4 x 2 bytes" in capsys.readouterr().err
    (question,) = ask(terminal=True, answer=True, limit=95, yes=False)
    assert "limit_gb" in question
    assert ask(terminal=False, answer=False, limit=95, yes=True) == []
    with pytest.raises(RefusedError, match="not wanted"):
        ask(terminal=True, answer=False, limit=95, yes=False)
    with pytest.raises(RefusedError, match="--yes"):
        ask(terminal=False, answer=True, limit=95, yes=False)
