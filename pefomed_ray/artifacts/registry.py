"""The registry: which bundle an alias such as `champion` stands for, now and before. A local folder or an `s3://` URL.

    REGISTRY/aliases/<alias>/<counter>.json    one move of the alias; what has the highest counter is what counts
    REGISTRY/bundles/<digest>/                 copies of what was promoted: deleting a run never breaks an endpoint
    REGISTRY/evaluations/<digest>/             ids and scores (no texts) of evaluations that a gate was asked with
    REGISTRY/decisions/<alias>/<counter>.json  what the gate said of each bundle that was to get the alias
    REGISTRY/proofs/<alias>/<counter>.json     what an endpoint that follows the alias answered after this move

A move is a file that must not be there yet (`link` on a disk, `If-None-Match` on S3): of two promotions at once one
wins, and no lock is needed that a dead process could keep. History is ordered by the counter: clocks of two machines
disagree. A rollback is one more entry, so nothing is lost.
"""

import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pefomed_ray.artifacts.folders import Folder, LocalFolder, open_folder
from pefomed_ray.artifacts.manifests import BUNDLE_FILE, verify_bundle
from pefomed_ray.artifacts.storage import digest_of, json_bytes, publishing, sha256_bytes
from pefomed_ray.errors import ConfigError, DataError, PefomedError

D = TypeVar("D", bound=BaseModel)
DEFAULT_REGISTRY = "runs/registry"
ALIAS = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
MIN_DIGEST_CHARS = 12
"""Of the beginning of a digest that stands for the whole."""
ATTEMPTS = 32
"""Of a move, where others move the same alias at the same time."""


class AliasEntry(BaseModel):
    """One move of an alias."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    digest: str
    """Of the bundle; what the endpoint names its adapter by."""
    promoted_at: str
    """UTC, ISO 8601; for people, never for ordering."""
    counter: int
    """1 for the alias's first entry, then one more each."""
    action: Literal["promote", "rollback"]
    gate: Literal["passed", "not asked"] | None = None
    """None in a rollback, and in what was promoted before this was kept."""


class Evaluation(BaseModel):
    """What of an evaluation is kept to hold the next candidate against: scores of its items, no texts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    bundle: str
    """Digest."""
    shards: str
    """Digest."""
    split: str
    task: str
    metric: str
    """What the scores are."""
    normalizer: str
    ids: tuple[str, ...]
    scores: tuple[float | None, ...]
    """Of each id; None where unscored."""
    clusters: tuple[int, ...]
    """Of each id: rows of one patient, study or image have the same number."""

    @property
    def about(self) -> tuple[str, ...]:
        """What two evaluations must have in common to be compared; and the same ids."""
        return self.shards, self.split, self.task, self.metric, self.normalizer


class Proof(BaseModel):
    """That an endpoint followed a move of an alias."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    endpoint: str
    asked_at: str
    """UTC, ISO 8601; for people, never for ordering."""
    digest: str
    """Of the weights that answered for the alias."""
    probed: int
    """Questions that were answered token for token as offline, before the alias was moved."""
    followed_after_s: float
    """From the move to the first answer by these weights."""


class Decision(BaseModel):
    """What the gate said of a bundle that was to get an alias."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    asked_at: str
    """UTC, ISO 8601; for people, never for ordering."""
    bundle: str
    champion: str | None
    """Digest of what the alias stood for; None where there was nothing."""
    passed: bool
    reasons: tuple[str, ...]
    """Why it was refused."""
    rules: tuple[dict[str, Any], ...]
    """Each rule's name, whether it passed, and the numbers it looked at."""


def promote(registry: str | Path, alias: str, bundle: Path, decision: Decision | None = None) -> AliasEntry:
    """Copy a bundle into the registry and let `alias` stand for it; nothing happens where it already does.

    `decision` is the gate's, where it was asked. Raises ConfigError for a bad alias name, DataError where a file of the
    bundle does not match its sha256, PefomedError where the alias was moved since the gate decided.
    """
    _check_name(alias)
    digest = store(registry, bundle)
    for _ in range(ATTEMPTS):
        known = _read(registry, alias)
        if decision is not None and decision.champion != (known[-1].digest if known else None):
            raise PefomedError(f"alias {alias!r} was moved while the gate was asked; ask it again")
        if known and known[-1].digest == digest:
            return known[-1]
        if moved := _move(registry, alias, known, digest, "promote", "passed" if decision else "not asked"):
            return moved
    raise _busy(alias)


def rollback(registry: str | Path, alias: str, to: str | None = None) -> AliasEntry:
    """Let `alias` stand again for what it did before its last promotion, or for `to`, the beginning of a digest.

    To do it twice changes nothing: what was rolled back already stays as it is. Raises ConfigError where there is
    no earlier promotion or none of that digest, DataError where that bundle's copy was changed.
    """
    for _ in range(ATTEMPTS):
        known = _existing(registry, alias)
        if to is None and known[-1].action == "rollback":
            return known[-1]
        target = _earlier(known, alias, to)
        if target == known[-1].digest:
            return known[-1]
        bundle_folder(registry, target)
        if moved := _move(registry, alias, known, target, "rollback"):
            return moved
    raise _busy(alias)


def _earlier(known: tuple[AliasEntry, ...], alias: str, to: str | None) -> str:
    if to is None:
        if len(known) < 2:
            raise ConfigError(f"alias {alias!r} was promoted once only; there is nothing to roll back to")
        return known[-2].digest
    found = {entry.digest for entry in known if len(to) >= MIN_DIGEST_CHARS and entry.digest.startswith(to)}
    if len(found) != 1:
        there = ", ".join(dict.fromkeys(entry.digest[:16] for entry in known))
        raise ConfigError(f"alias {alias!r} never stood for {to!r} ({MIN_DIGEST_CHARS} characters or more): {there}")
    return found.pop()


def standing(registry: str | Path, alias: str) -> str | None:
    """Digest of what `alias` stands for now, not verified; None where it stands for nothing yet.

    Raises ConfigError for a bad alias name.
    """
    _check_name(alias)
    known = _read(registry, alias)
    return known[-1].digest if known else None


def store(registry: str | Path, bundle: Path) -> str:
    """Copy a bundle into the registry, where it is not there yet; its digest. Raises DataError as `verify_bundle`."""
    manifest = verify_bundle(bundle)
    folder = open_folder(registry)
    name = f"bundles/{manifest.digest}"
    if not folder.is_file(f"{name}/{BUNDLE_FILE}"):
        # The manifest last: what has none is no bundle yet.
        files = {file: (bundle / file).read_bytes() for file in [*manifest.files, BUNDLE_FILE]}
        # What was copied is what counts: the source may have changed since it was verified.
        if any(sha256_bytes(files[file]) != sha256 for file, sha256 in manifest.files.items()):
            raise DataError(f"bundle {str(bundle)!r} changed while it was copied; promote it again")
        for file, data in files.items():
            folder.write_bytes(f"{name}/{file}", data)
    bundle_folder(registry, manifest.digest)
    return manifest.digest


def bundle_url(registry: str | Path, digest: str) -> str:
    """Where the registry keeps a bundle: a path or an `s3://` URL."""
    return open_folder(registry).url_of(f"bundles/{digest}")


def bundle_folder(registry: str | Path, digest: str) -> Path:
    """The registry's copy of a bundle as a folder of this machine, every file of it hashed again.

    Raises DataError where there is none, a file was changed or another bundle lies there.
    """
    local = local_copy(bundle_url(registry, digest), digest)
    found = verify_bundle(local).digest
    if found != digest:
        raise DataError(f"registry {str(registry)!r}: {f'bundles/{digest}'!r} holds bundle {found[:16]}, not this one")
    return local


def local_copy(url: str, digest: str) -> Path:
    """The folder of a bundle at a path or `s3://` URL, not verified; from S3 it is fetched once, by `cache_folder()`.

    Raises DataError where there is none on S3, or one whose files were changed.
    """
    folder = open_folder(url)
    if isinstance(folder, LocalFolder):
        return folder.path
    local = cache_folder() / digest
    if not local.is_dir():
        _fetch(folder, local)
    return local


def cache_folder() -> Path:
    """Where bundles from S3 are kept on this machine, by digest."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pefomed-ray" / "bundles"


def _fetch(folder: Folder, local: Path) -> None:
    files = folder.files()
    if BUNDLE_FILE not in files:
        raise DataError(f"there is no bundle at {folder.url!r}")
    try:
        with publishing(local) as copy:
            for file in files:
                target = copy / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(folder.read_bytes(file))
            # Kept only if it is whole: another try may find it mended.
            verify_bundle(copy)
    except (ConfigError, OSError):
        if not local.is_dir():  # else another process was faster
            raise


def keep_evaluation(registry: str | Path, evaluation: Evaluation) -> None:
    """Keep a bundle's scores, in place of those of the same split, metric and ids."""
    name = digest_of([*evaluation.about, *evaluation.ids])[:16]
    data = json_bytes(evaluation.model_dump(mode="json"))
    open_folder(registry).write_bytes(f"evaluations/{evaluation.bundle}/{name}.json", data)


def evaluations(registry: str | Path, digest: str) -> list[Evaluation]:
    """What is kept of a bundle's evaluations. Raises DataError where a file is not one."""
    folder = open_folder(registry)
    return [_load(Evaluation, folder, name) for name in folder.matching(f"evaluations/{digest}", "*.json")]


def keep_decision(registry: str | Path, alias: str, decision: Decision) -> None:
    """Add what the gate said to the alias's decisions. Raises ConfigError for a bad alias name."""
    _check_name(alias)
    data = json_bytes(decision.model_dump(mode="json"))
    for _ in range(ATTEMPTS):
        folder = open_folder(registry)
        count = len(folder.matching(f"decisions/{alias}", "*.json"))
        try:
            folder.create(_numbered(f"decisions/{alias}", count + 1), data)
            return
        except FileExistsError:
            continue
    raise _busy(alias)


def decisions(registry: str | Path, alias: str) -> tuple[Decision, ...]:
    """What the gate ever said about an alias, oldest first."""
    folder = open_folder(registry)
    return tuple(_load(Decision, folder, name) for name in folder.matching(f"decisions/{alias}", "*.json"))


def keep_proof(registry: str | Path, alias: str, counter: int, proof: Proof) -> None:
    """Keep what an endpoint answered after a move; the latest counts."""
    data = json_bytes(proof.model_dump(mode="json"))
    open_folder(registry).write_bytes(_numbered(f"proofs/{alias}", counter), data)


def proof_of(registry: str | Path, alias: str, counter: int) -> Proof | None:
    """What an endpoint answered after a move; None where none was asked."""
    folder, name = open_folder(registry), _numbered(f"proofs/{alias}", counter)
    return _load(Proof, folder, name) if folder.is_file(name) else None


def resolve(registry: str | Path, alias: str) -> AliasEntry:
    """What `alias` stands for, its copy hashed again.

    Raises ConfigError naming the aliases there are, DataError where a file was changed.
    """
    entry = _existing(registry, alias)[-1]
    bundle_folder(registry, entry.digest)
    return entry


def history(registry: str | Path, alias: str) -> tuple[AliasEntry, ...]:
    """Every move of an alias, oldest first. Raises ConfigError naming the aliases there are."""
    return _existing(registry, alias)


def newest(registry: str | Path) -> dict[str, AliasEntry]:
    """What every alias stands for, not verified; one file read for each. Raises DataError where a file is not one."""
    folder = open_folder(registry)
    moves = {alias: folder.matching(f"aliases/{alias}", "*.json") for alias in aliases(registry)}
    return {alias: _load(AliasEntry, folder, names[-1]) for alias, names in moves.items() if names}


def aliases(registry: str | Path) -> list[str]:
    """Names of all aliases, sorted."""
    names = [name.removesuffix("/") for name in open_folder(registry).names("aliases") if name.endswith("/")]
    return [name for name in names if ALIAS.fullmatch(name)]


def _check_name(alias: str) -> None:
    if not ALIAS.fullmatch(alias):
        raise ConfigError(
            f"alias {alias!r}: a name starts with a-z or 0-9 and goes on with up to 63 of a-z, 0-9, '.', '_', '-'"
        )


def _read(registry: str | Path, alias: str) -> tuple[AliasEntry, ...]:
    folder = open_folder(registry)
    found = [_load(AliasEntry, folder, name) for name in folder.matching(f"aliases/{alias}", "*.json")]
    return tuple(sorted(found, key=lambda entry: entry.counter))


def _load(kind: type[D], folder: Folder, name: str) -> D:
    try:
        return kind.model_validate_json(folder.read_bytes(name))
    except ValidationError as error:
        raise DataError(f"{folder.url_of(name)!r} is not the registry's ({error.error_count()} mistakes)") from None


def _existing(registry: str | Path, alias: str) -> tuple[AliasEntry, ...]:
    _check_name(alias)
    known = _read(registry, alias)
    if not known:
        there = ", ".join(aliases(registry)) or "none; `pefomed-ray promote BUNDLE --alias NAME` makes one"
        raise ConfigError(f"registry {str(registry)!r} has no alias {alias!r}; there are: {there}")
    return known


def _move(
    registry: str | Path,
    alias: str,
    known: tuple[AliasEntry, ...],
    digest: str,
    action: Literal["promote", "rollback"],
    gate: Literal["passed", "not asked"] | None = None,
) -> AliasEntry | None:
    """The new entry; None where somebody else moved the alias since `known` was read."""
    entry = AliasEntry(
        digest=digest,
        promoted_at=datetime.now(UTC).isoformat(timespec="seconds"),
        counter=known[-1].counter + 1 if known else 1,
        action=action,
        gate=gate,
    )
    data = json_bytes(entry.model_dump(mode="json"))
    try:
        open_folder(registry).create(_numbered(f"aliases/{alias}", entry.counter), data)
    except FileExistsError:
        return None
    return entry


def _numbered(folder: str, counter: int) -> str:
    return f"{folder}/{counter:06d}.json"


def _busy(alias: str) -> PefomedError:
    return PefomedError(f"alias {alias!r} is moved by others all the time ({ATTEMPTS} tries); try again")
