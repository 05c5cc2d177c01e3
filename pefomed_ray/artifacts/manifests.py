"""What each artifact says about itself: JSON documents with a schema version, written last."""

from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pefomed_ray.artifacts.folders import Folder, open_folder
from pefomed_ray.artifacts.storage import digest_of, sha256_file, write_json
from pefomed_ray.errors import DataError

BUNDLE_FILE = "bundle.json"
BUNDLE_SUFFIXES = frozenset({".jinja", ".json", ".md", ".model", ".safetensors", ".txt", ".yaml"})
"""Formats whose reading runs no code: a bundle may hold no others, whatever its manifest lists. Pickles (.bin, .pt,
.pth, .pkl) and Python modules run what they like when opened."""


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


D = TypeVar("D", bound=_Document)


class ShardFile(_Document):
    """One Parquet file of a split."""

    path: str
    split: str
    rows: int
    bytes: int
    sha256: str


class ShardManifest(_Document):
    """`manifest.json` of a shard directory. Rows in == sum(rows) + sum(quarantined)."""

    schema_version: Literal[1] = 1
    source: str
    licence: Literal["open", "restricted"]
    rows: dict[str, int]
    tasks: dict[str, int]
    answer_types: dict[str, int]
    bytes: dict[str, int]
    quarantined: dict[str, int]
    image_overlap: dict[str, int]
    """Images that stand in both splits, by `train/test` and so on."""
    files: tuple[ShardFile, ...]
    made_by: dict[str, Any]
    """Reader, options, code version: enough to make it again."""

    @property
    def digest(self) -> str:
        """Identity of the shards: the digest of every file's digest."""
        return digest_of([[file.path, file.sha256] for file in self.files])


class BundleManifest(_Document):
    """`bundle.json` of an adapter bundle: sha256 of every other file in it."""

    schema_version: Literal[1] = 1
    base: str
    """Where the base model was found; `embedded` for the one in the package."""
    base_digest: str
    template: str
    template_digest: str
    image_size: int | None
    """Side in pixels; None where the base's own processor decides."""
    files: dict[str, str]

    @property
    def digest(self) -> str:
        """Identity of the adapter; what the registry, the endpoint and the lineage name it by."""
        return digest_of(self.model_dump(mode="json"))


class FeaturesKey(_Document):
    """What cached features depend on; a cache with another key than a run's is stale for that run."""

    tower_digest: str
    """`artifacts.base.tower_digest` of the base: vision tower and joining of patches, not the language model."""
    image_spec: dict[str, Any]
    """The base's `preprocessor_config.json`."""
    pixels_version: int
    """Of decoding and resizing, `rendering.key.PIXELS_VERSION`."""
    template: str
    template_digest: str


class FeatureFile(_Document):
    """One safetensors file of a feature cache."""

    path: str
    images: int
    bytes: int
    sha256: str


class FeatureCacheManifest(_Document):
    """`cache.json` of a feature cache: what the frozen tower made of every image of some shards."""

    schema_version: Literal[1] = 1
    key: FeaturesKey
    shards: tuple[str, ...]
    """Digests of the shards whose images are in it."""
    splits: tuple[str, ...]
    dtype: Literal["float16", "bfloat16"]
    shape: tuple[int, int]
    """Of one image's features: visual tokens, and numbers the projector reads for one."""
    images: int
    """Distinct ones, by sha256 of their encoded bytes."""
    index_sha256: str
    files: tuple[FeatureFile, ...]
    made_by: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Of all feature files."""
        return sum(file.bytes for file in self.files)

    @property
    def digest(self) -> str:
        """Identity of the features: the digest of the index's and every file's digest."""
        return digest_of([self.index_sha256, *(file.sha256 for file in self.files)])


def save_document(document: _Document, path: Path) -> None:
    """Write a manifest atomically."""
    write_json(path, document.model_dump(mode="json"))


def load_shard_manifest(directory: str | Path | Folder) -> ShardManifest:
    """Read `manifest.json` of a local folder or `s3://` URL.

    Raises DataError where it is missing (nothing was published there) or not a manifest of this version.
    """
    folder = directory if isinstance(directory, Folder) else open_folder(directory)
    if not folder.is_file("manifest.json"):
        raise DataError(
            f"{folder.url_of('manifest.json')!r} does not exist: {folder.url!r} does not hold shards; make them with "
            "`pefomed-ray data prepare`"
        )
    return _parse(ShardManifest, folder.read_bytes("manifest.json"), folder.url_of("manifest.json"))


def load_bundle_manifest(directory: Path) -> BundleManifest:
    """Read `directory/bundle.json`. Raises DataError where it is missing or malformed."""
    return _load(BundleManifest, directory / BUNDLE_FILE, "an adapter bundle; `pefomed-ray train` writes one")


def load_feature_cache_manifest(directory: Path) -> FeatureCacheManifest:
    """Read `directory/cache.json`. Raises DataError where it is missing or malformed."""
    what = "a feature cache; make it with `pefomed-ray data cache`"
    return _load(FeatureCacheManifest, directory / "cache.json", what)


def verify_bundle(directory: Path) -> BundleManifest:
    """The bundle's manifest, once the folder was found to hold exactly what it lists and every file was hashed again.

    Raises DataError naming the first file or folder that is missing, changed, present without being listed, a link,
    outside the folder, or of a format that could run code. Nothing but bundle.json is opened before all that is
    known from names alone.
    """
    manifest = load_bundle_manifest(directory)
    for name in manifest.files:
        _check_listed(directory, name)
    listed = {BUNDLE_FILE, *manifest.files}
    for name in sorted(listed - _plain_files(directory, listed)):
        raise _refusal(directory, name, "is missing; fetch the bundle again")
    for name, expected in manifest.files.items():
        if sha256_file(directory / name) != expected:
            raise _refusal(directory, name, "does not match its sha256; fetch the bundle again")
    return manifest


def _check_listed(directory: Path, name: str) -> None:
    """Raise DataError for a name in bundle.json that no bundle has."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.as_posix() != name or "\\" in name:
        raise _refusal(directory, name, "is listed in bundle.json, but is no path inside the bundle")
    if path.suffix not in BUNDLE_SUFFIXES:
        raise _refusal(
            directory, name, f"is of a format that may run code; a bundle holds {', '.join(sorted(BUNDLE_SUFFIXES))}"
        )


def _plain_files(directory: Path, listed: set[str]) -> set[str]:
    """Names of all files below `directory`. Raises DataError for a link, and for what is not listed."""
    folders = {parent.as_posix() for name in listed for parent in PurePosixPath(name).parents}
    found = set()
    # Files before folders: the file in an unlisted folder is what a person looks for. Linked folders are not entered.
    for path in sorted(directory.rglob("*"), key=lambda path: (path.is_dir(), path)):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink():
            raise _refusal(directory, name, "is a symbolic link; bundles hold plain files only")
        if path.is_dir() and name in folders:
            continue
        if not path.is_file() or name not in listed:
            raise _refusal(directory, name, "is not listed in bundle.json; fetch the bundle again")
        found.add(name)
    return found


def _refusal(directory: Path, name: str, why: str) -> DataError:
    return DataError(f"bundle {str(directory)!r}: {name!r} {why}")


def _load(kind: type[D], path: Path, what: str) -> D:
    if not path.is_file():
        raise DataError(f"{str(path)!r} does not exist: {str(path.parent)!r} does not hold {what}")
    return _parse(kind, path.read_bytes(), str(path))


def _parse(kind: type[D], data: bytes, name: str) -> D:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{name!r} is not a valid {kind.__name__} ({where}: {first['msg']})") from None
