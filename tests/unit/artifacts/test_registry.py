"""Aliases move whole, in order, and never to a bundle that was changed."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pefomed_ray.artifacts import registry as registry_module
from pefomed_ray.artifacts.registry import aliases, history, promote, resolve, rollback
from pefomed_ray.errors import ConfigError, DataError

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
    assert (registry / entry.bundle / "inner" / "weights.safetensors").read_text() == "a"
    assert aliases(registry) == ["champion"]


def test_promoting_again_changes_nothing(registry: Path, bundles: dict[str, tuple[Path, str]]) -> None:
    first = promote(registry, "champion", bundles["a"][0])
    before = (registry / "aliases" / "champion.json").read_bytes()
    assert promote(registry, "champion", bundles["a"][0]) == first
    assert (registry / "aliases" / "champion.json").read_bytes() == before


def test_rollback_goes_back_one_promotion_each_time(registry: Path, bundles: dict[str, tuple[Path, str]]) -> None:
    for name in "abc":
        promote(registry, "champion", bundles[name][0])
    assert rollback(registry, "champion").digest == bundles["b"][1]
    assert rollback(registry, "champion").digest == bundles["a"][1]
    with pytest.raises(ConfigError, match="nothing to roll back"):
        rollback(registry, "champion")
    promote(registry, "champion", bundles["c"][0])
    assert rollback(registry, "champion").digest == bundles["a"][1]
    moves = history(registry, "champion")
    assert [entry.counter for entry in moves] == list(range(1, 8))
    assert [entry.action[0] for entry in moves] == list("ppprrpr")


def test_order_is_the_counter_not_the_clock(registry: Path, bundles: dict[str, tuple[Path, str]]) -> None:
    for name in "ab":
        promote(registry, "champion", bundles[name][0])
    path = registry / "aliases" / "champion.json"
    stored = json.loads(path.read_text())
    stored["history"][1]["promoted_at"] = "1999-01-01T00:00:00+00:00"
    stored["history"].reverse()
    path.write_text(json.dumps(stored))
    assert resolve(registry, "champion").digest == bundles["b"][1]


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
    (registry / entry.bundle / "extra.py").write_text("")
    with pytest.raises(DataError, match=r"extra\.py"):
        rollback(registry, "champion")
    assert resolve(registry, "champion").digest == bundles["b"][1]


def test_copy_swapped_for_another_valid_bundle_is_refused(registry: Path, bundles: dict[str, tuple[Path, str]]) -> None:
    a = promote(registry, "champion", bundles["a"][0])
    b = promote(registry, "other", bundles["b"][0])
    (registry / a.bundle).rename(registry / "aside")
    (registry / b.bundle).rename(registry / a.bundle)
    with pytest.raises(DataError, match="holds bundle"):
        resolve(registry, "champion")


def test_concurrent_promotions_are_all_kept(registry: Path, tmp_path: Path, make_bundle: MakeBundle) -> None:
    paths = [tmp_path / f"many-{i}" for i in range(12)]
    digests = {make_bundle(path, str(path)) for path in paths}
    with ThreadPoolExecutor(max_workers=12) as pool:
        list(pool.map(lambda path: promote(registry, "champion", path), paths))
    moves = history(registry, "champion")
    assert {entry.digest for entry in moves} == digests
    assert [entry.counter for entry in moves] == list(range(1, 13))


def test_the_lock_is_waited_for_only_so_long(
    registry: Path, bundles: dict[str, tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "LOCK_TIMEOUT_S", 0.1)
    with registry_module._locked(registry), pytest.raises(registry_module.PefomedError, match="lock"):
        promote(registry, "champion", bundles["a"][0])


def test_a_promotion_that_dies_leaves_the_old_one(
    registry: Path, bundles: dict[str, tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(registry, "champion", bundles["a"][0])

    def die(*arguments: object, **keywords: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(registry_module.shutil, "copytree", die)
    with pytest.raises(OSError, match="no space"):
        promote(registry, "champion", bundles["b"][0])
    assert resolve(registry, "champion").digest == bundles["a"][1]
    assert [path.name for path in (registry / "bundles").iterdir()] == [bundles["a"][1]]
