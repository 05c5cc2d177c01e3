"""What the endpoint can be asked for, followed from a real registry; the replicas are a few lines here."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pefomed_ray.artifacts.manifests import BundleManifest, save_document
from pefomed_ray.artifacts.registry import promote, rollback
from pefomed_ray.artifacts.storage import sha256_file
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.serving.api_error import ApiError
from pefomed_ray.serving.catalogue import RegistryCatalogue, without_paths
from pefomed_ray.serving.contract import AdapterRef, CannotServeError
from tests.served_stub import StubBackend

BASE = "0" * 64


class Replicas(StubBackend):
    """Refuse what they are told to, and count what they are asked to read."""

    def __init__(self) -> None:
        super().__init__()
        self.refuses: dict[str, str] = {}
        self.loaded: list[str] = []

    async def load(self, ref: AdapterRef) -> None:
        self.loaded.append(ref.digest)
        if ref.digest in self.refuses:
            raise CannotServeError(self.refuses[ref.digest])


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """A bundle as far as its manifest goes."""

    def make(name: str, base_digest: str = BASE) -> tuple[Path, str]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.yaml").write_text("task: vqa\n")
        (folder / "lineage.json").write_text(json.dumps({"source": name}))
        (folder / "metrics.json").write_text("{}")
        files = {path.name: sha256_file(path) for path in folder.iterdir()}
        manifest = BundleManifest(
            base="x", base_digest=base_digest, template="short", template_digest="1", image_size=96, files=files
        )
        save_document(manifest, folder / "bundle.json")
        return folder, manifest.digest

    return make


def catalogue_of(registry: Path | str, replicas: Replicas) -> RegistryCatalogue:
    return RegistryCatalogue(str(registry), "base", BASE, replicas)


def test_aliases_are_followed_and_read_once(made: Callable[..., tuple[Path, str]], tmp_path: Path) -> None:
    registry, replicas = tmp_path / "registry", Replicas()
    (one, first), (two, second) = made("one"), made("two")
    promote(registry, "champion", one)

    async def follow() -> None:
        catalogue = catalogue_of(registry, replicas)
        assert catalogue.adapters == []
        await catalogue.follow()
        await catalogue.follow()
        assert replicas.loaded == [first]
        promote(registry, "champion", two)
        promote(registry, "other", two)
        await catalogue.follow()
        assert catalogue.standing.aliases == {"champion": second, "other": second}
        assert [adapter.aliases for adapter in catalogue.adapters] == [("champion", "other"), ()]
        for name in ("champion", "base:champion", f"base:{second}", f"base:{second[:12]}"):
            assert (await catalogue.find(name)).digest == second
        assert (await catalogue.find("base:other")).name == "base:other"
        assert (await catalogue.find(f"base:{first}")).adapter is not None
        assert (await catalogue.find("base")).adapter is None
        assert catalogue.adapters[0].lineage["trained_on"] == {"source": "two"}
        shutil.rmtree(registry / "aliases" / "other")
        await catalogue.follow()
        assert catalogue.standing.aliases == {"champion": second}

    asyncio.run(follow())


@pytest.mark.parametrize(
    "name", ["other", "base:other", "base:", "", "base:" + "f" * 64, "base:0123", "../x", "a" * 64]
)
def test_other_names_are_not_found(name: str, made: Callable[..., tuple[Path, str]], tmp_path: Path) -> None:
    promote(tmp_path / "registry", "champion", made("one")[0])
    catalogue = catalogue_of(tmp_path / "registry", Replicas())

    async def find() -> None:
        await catalogue.follow()
        await catalogue.find(name)

    with pytest.raises(ApiError) as refused:
        asyncio.run(find())
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")
    assert name not in str(refused.value) or name in ("", "base:")


def test_what_replicas_refuse_is_not_followed_until_it_moves(
    made: Callable[..., tuple[Path, str]], tmp_path: Path
) -> None:
    registry, replicas = tmp_path / "registry", Replicas()
    (one, first), (two, second) = made("one"), made("two")
    promote(registry, "champion", one)
    replicas.refuses[second] = f"bundle '{registry}/bundles/{second}' has rank 99"

    async def follow() -> None:
        catalogue = catalogue_of(registry, replicas)
        await catalogue.follow()
        promote(registry, "champion", two)
        promote(registry, "new", two)
        for _ in range(3):
            await catalogue.follow()
        assert replicas.loaded.count(second) == 2  # once for each alias, not at each look
        assert catalogue.standing.aliases == {"champion": first}
        assert "rank 99" in catalogue.standing.not_followed["champion"]
        assert str(registry) not in catalogue.standing.not_followed["champion"]
        assert (await catalogue.find("champion")).digest == first
        with pytest.raises(ApiError, match="rank 99"):
            await catalogue.find("new")
        del replicas.refuses[second]
        await catalogue.refresh()  # whoever asks has mended it
        assert catalogue.standing.aliases == {"champion": second, "new": second}
        assert catalogue.standing.not_followed == {}

    asyncio.run(follow())


def test_another_base_and_damaged_files_are_not_followed(made: Callable[..., tuple[Path, str]], tmp_path: Path) -> None:
    registry, replicas = tmp_path / "registry", Replicas()
    one, first = made("one")
    promote(registry, "champion", one)

    async def follow() -> None:
        catalogue = catalogue_of(registry, replicas)
        await catalogue.follow()
        promote(registry, "champion", made("other", "2" * 64)[0])
        await catalogue.follow()
        assert "trained on base" in catalogue.standing.not_followed["champion"]
        rollback(registry, "champion")
        await catalogue.follow()
        assert catalogue.standing.not_followed == {}
        damaged, digest = made("damaged")
        promote(registry, "champion", damaged)
        (registry / "bundles" / digest / "run.yaml").unlink()
        await catalogue.follow()
        assert "missing" in catalogue.standing.not_followed["champion"]
        assert catalogue.standing.aliases == {"champion": first}

    asyncio.run(follow())


def test_a_store_that_fails_changes_nothing(
    made: Callable[..., tuple[Path, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = tmp_path / "registry"
    one, first = made("one")
    promote(registry, "champion", one)

    def fails(registry: str) -> None:
        raise ConfigError("access denied")

    async def follow() -> None:
        catalogue = catalogue_of(registry, Replicas())
        await catalogue.follow()
        monkeypatch.setattr("pefomed_ray.serving.catalogue.newest", fails)
        with pytest.raises(ConfigError):
            await catalogue.follow()
        assert catalogue.standing.aliases == {"champion": first}
        assert (await catalogue.find("champion")).digest == first

    asyncio.run(follow())


def test_on_s3(made: Callable[..., tuple[Path, str]], s3: str) -> None:
    one, first = made("one")
    promote(f"{s3}/registry", "champion", one)

    async def follow() -> None:
        catalogue = catalogue_of(f"{s3}/registry", Replicas())
        await catalogue.follow()
        found = await catalogue.find("champion")
        assert found.adapter is not None
        assert found.adapter.ref == AdapterRef(first, f"{s3}/registry/bundles/{first}")

    asyncio.run(follow())


def test_words_keep_the_last_part_of_a_path() -> None:
    error = DataError("bundle '/home/jane/bundles/abc': 'a.safetensors' and 's3://bucket/jane/x/' do not fit")
    assert without_paths(error) == "bundle 'abc': 'a.safetensors' and 'x' do not fit"
