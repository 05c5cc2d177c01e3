"""Aliases move whole, in order, and never to a bundle that was changed."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pefomed_ray.artifacts.folders import LocalFolder, open_folder
from pefomed_ray.artifacts.registry import (
    aliases,
    bundle_folder,
    cache_folder,
    history,
    promote,
    resolve,
    rollback,
)
from pefomed_ray.errors import ConfigError, DataError, PefomedError

MakeBundle = Callable[[Path, str], str]


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def bundles(tmp_path: Path, make_bundle: MakeBundle) -> dict[str, tuple[Path, str]]:
    return {name: (tmp_path / name, make_bundle(tmp_path / name, name)) for name in "abc"}


def test_promote_copies_and_resolves_after_the_run_is_gone(
    registry: Path, bundles: dict[str, tuple[Path, str]]
) -> None:
    path, digest = bundles["a"]
    entry = promote(registry, "champion", path)
    (path / "inner" / "weights.safetensors").unlink()
    assert (entry.digest, entry.counter, entry.action) == (digest, 1, "promote")
    assert resolve(registry, "champion") == entry
    assert (registry / "bundles" / entry.digest / "inner" / "weights.safetensors").read_text() == "a"
    assert aliases(registry) == ["champion"]


def test_promoting_again_changes_nothing(registry: Path, bundles: dict[str, tuple[Path, str]]) -> None:
    first = promote(registry, "champion", bundles["a"][0])
    assert promote(registry, "champion", bundles["a"][0]) == first
    assert history(registry, "champion") == (first,)


def test_rollback_goes_back_once_however_often_it_is_asked(
    registry: Path, bundles: dict[str, tuple[Path, str]]
) -> None:
    promote(registry, "champion", bundles["a"][0])
    with pytest.raises(ConfigError, match="nothing to roll back"):
        rollback(registry, "champion")
    for name in "bc":
        promote(registry, "champion", bundles[name][0])
    first = rollback(registry, "champion")
    assert (first.digest, first.counter, first.action) == (bundles["b"][1], 4, "rollback")
    assert rollback(registry, "champion") == first
    promote(registry, "champion", bundles["c"][0])
    assert rollback(registry, "champion").digest == bundles["b"][1]
    moves = history(registry, "champion")
    assert [entry.counter for entry in moves] == list(range(1, 7))
    assert [entry.action[0] for entry in moves] == list("ppprpr")


def test_rollback_to_any_earlier_one(registry: Path, bundles: dict[str, tuple[Path, str]]) -> None:
    for name in "abc":
        promote(registry, "champion", bundles[name][0])
    first = bundles["a"][1]
    assert rollback(registry, "champion", first[:12]).digest == first
    assert rollback(registry, "champion", first).counter == 4
    for wrong in ("0" * 64, first[:11], ""):
        with pytest.raises(ConfigError, match=f"never stood for .*{first[:16]}"):
            rollback(registry, "champion", wrong)


def test_order_is_the_counter_not_the_clock(registry: Path, bundles: dict[str, tuple[Path, str]]) -> None:
    for name in "ab":
        promote(registry, "champion", bundles[name][0])
    path = registry / "aliases" / "champion" / "000002.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"promoted_at": "1999-01-01T00:00:00+00:00"}))
    assert resolve(registry, "champion").digest == bundles["b"][1]


def test_on_s3_all_of_it(s3: str, bundles: dict[str, tuple[Path, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    registry = f"{s3}/registry"
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundles["a"][0].parent / "cache"))
    for name in "ab":
        promote(registry, "champion", bundles[name][0])
    assert rollback(registry, "champion").digest == bundles["a"][1]
    assert [entry.counter for entry in history(registry, "champion")] == [1, 2, 3]
    assert aliases(registry) == ["champion"]
    with pytest.raises(ConfigError, match="there are: champion"):
        resolve(registry, "other")
    folder = bundle_folder(registry, bundles["b"][1])
    assert (folder / "inner" / "weights.safetensors").read_text() == "b"
    # What was fetched is hashed again each time it is asked for.
    (folder / "inner" / "weights.safetensors").write_text("B")
    with pytest.raises(DataError, match=r"weights\.safetensors"):
        bundle_folder(registry, bundles["b"][1])


def test_on_s3_a_changed_copy_is_refused_and_not_kept(
    s3: str, bundles: dict[str, tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = f"{s3}/registry"
    digest = bundles["a"][1]
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundles["a"][0].parent / "cache"))
    promote(registry, "champion", bundles["a"][0])
    shutil.rmtree(cache_folder())
    store_of = open_folder(registry)
    store_of.write_bytes(f"bundles/{digest}/inner/weights.safetensors", b"A")
    with pytest.raises(DataError, match=r"weights\.safetensors"):
        resolve(registry, "champion")
    assert not list(cache_folder().iterdir())
    store_of.write_bytes(f"bundles/{digest}/inner/weights.safetensors", b"a")
    assert resolve(registry, "champion").digest == digest


def test_unknown_alias_names_those_there_are(registry: Path, bundles: dict[str, tuple[Path, str]]) -> None:
    with pytest.raises(ConfigError, match="there are: none"):
        resolve(registry, "champion")
    promote(registry, "challenger", bundles["a"][0])
    with pytest.raises(ConfigError, match="there are: challenger"):
        resolve(registry, "champion")


@pytest.mark.parametrize("alias", ["", "Champion", "../x", "a/b", "-a", "a" * 65, "a\n"])
def test_bad_alias_names(registry: Path, bundles: dict[str, tuple[Path, str]], alias: str) -> None:
    with pytest.raises(ConfigError, match="alias"):
        promote(registry, alias, bundles["a"][0])
    with pytest.raises(ConfigError, match="alias"):
        resolve(registry, alias)
    assert not list(registry.rglob("*.json"))


def test_changed_bundle_is_not_promoted(registry: Path, bundles: dict[str, tuple[Path, str]]) -> None:
    promote(registry, "champion", bundles["a"][0])
    path = bundles["b"][0]
    (path / "inner" / "weights.safetensors").write_text("B")
    with pytest.raises(DataError, match=r"weights\.safetensors"):
        promote(registry, "champion", path)
    assert resolve(registry, "champion").digest == bundles["a"][1]


def test_changed_copy_is_refused_by_resolve_and_rollback(registry: Path, bundles: dict[str, tuple[Path, str]]) -> None:
    entry = promote(registry, "champion", bundles["a"][0])
    promote(registry, "champion", bundles["b"][0])
    (registry / "bundles" / entry.digest / "extra.py").write_text("")
    with pytest.raises(DataError, match=r"extra\.py"):
        rollback(registry, "champion")
    assert resolve(registry, "champion").digest == bundles["b"][1]


def test_copy_swapped_for_another_valid_bundle_is_refused(registry: Path, bundles: dict[str, tuple[Path, str]]) -> None:
    a = promote(registry, "champion", bundles["a"][0])
    b = promote(registry, "other", bundles["b"][0])
    (registry / "bundles" / a.digest).rename(registry / "aside")
    (registry / "bundles" / b.digest).rename(registry / "bundles" / a.digest)
    with pytest.raises(DataError, match="holds bundle"):
        resolve(registry, "champion")


@pytest.mark.parametrize("on_s3", [False, True])
def test_concurrent_promotions_are_all_kept(
    on_s3: bool,
    registry: Path,
    tmp_path: Path,
    make_bundle: MakeBundle,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    where = f"{request.getfixturevalue('s3')}/registry" if on_s3 else registry
    paths = [tmp_path / f"many-{i}" for i in range(6)]
    digests = {make_bundle(path, str(path)) for path in paths}
    with ThreadPoolExecutor(max_workers=6) as pool:
        list(pool.map(lambda path: promote(where, "champion", path), paths))
    moves = history(where, "champion")
    assert {entry.digest for entry in moves} == digests
    assert [entry.counter for entry in moves] == list(range(1, 7))


def test_one_that_never_gets_through_says_so(
    registry: Path, bundles: dict[str, tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(registry, "champion", bundles["a"][0])
    monkeypatch.setattr(LocalFolder, "create", _taken)
    with pytest.raises(PefomedError, match="moved by others"):
        promote(registry, "champion", bundles["b"][0])


def _taken(*arguments: object) -> None:
    raise FileExistsError


def test_a_promotion_that_dies_leaves_the_old_one_and_can_be_made_again(
    registry: Path, bundles: dict[str, tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every file that it writes."""
    promote(registry, "champion", bundles["a"][0])
    write = LocalFolder.write_bytes
    for files in range(3):
        left = [files]

        def die(self: LocalFolder, name: str, data: bytes, left: list[int] = left) -> None:
            if not left[0]:
                raise OSError("no space left on device")
            left[0] -= 1
            write(self, name, data)

        monkeypatch.setattr(LocalFolder, "write_bytes", die)
        with pytest.raises(OSError, match="no space"):
            promote(registry, "champion", bundles["b"][0])
        monkeypatch.undo()
        assert resolve(registry, "champion").digest == bundles["a"][1]
    assert promote(registry, "champion", bundles["b"][0]).counter == 2
    assert resolve(registry, "champion").digest == bundles["b"][1]
