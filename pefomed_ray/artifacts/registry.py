"""The registry: which bundle an alias such as `champion` stands for, now and before.

    REGISTRY/aliases/<alias>.json    history of the alias, replaced in one rename
    REGISTRY/bundles/<digest>/       copies of what was promoted: deleting a run never breaks an endpoint
    REGISTRY/evaluations/<digest>/   ids and scores (no texts) of evaluations that a gate was asked with
    REGISTRY/decisions/<alias>.json  what the gate said of every bundle that was to get the alias, refusals too

History is ordered by its counter: clocks of two machines disagree. A rollback is one more entry, so nothing is lost.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from pefomed_ray.artifacts.manifests import verify_bundle
from pefomed_ray.artifacts.storage import digest_of, publishing, write_json
from pefomed_ray.errors import ConfigError, DataError, PefomedError

D = TypeVar("D", bound=BaseModel)
DEFAULT_REGISTRY = "runs/registry"
LOCK_TIMEOUT_S = 30.0
ALIAS = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class AliasEntry(BaseModel):
    """One move of an alias."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    """Of the bundle; what the endpoint names its adapter by."""
    bundle: str
    """Folder of the registry's own copy, relative to the registry."""
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


class Decision(BaseModel):
    """What the gate said of a bundle that was to get an alias."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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


class _Decisions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    decisions: tuple[Decision, ...] = ()


class _Alias(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    history: tuple[AliasEntry, ...] = ()


def promote(registry: Path, alias: str, bundle: Path, decision: Decision | None = None) -> AliasEntry:
    """Copy a bundle into the registry and let `alias` stand for it; nothing happens where it already does.

    `decision` is the gate's, where it was asked. Raises ConfigError for a bad alias name, DataError where a file of the
    bundle does not match its sha256, PefomedError where the alias was moved since the gate decided.
    """
    _check_name(alias)
    digest = verify_bundle(bundle).digest
    with _locked(registry):
        known = _read(registry, alias)
        if decision is not None and decision.champion != (known[-1].digest if known else None):
            raise PefomedError(f"alias {alias!r} was moved while the gate was asked; ask it again")
        stored = _store(registry, bundle, digest)
        if known and known[-1].digest == digest:
            return known[-1]
        return _append(registry, alias, known, digest, stored, "promote", "passed" if decision else "not asked")


def rollback(registry: Path, alias: str) -> AliasEntry:
    """Let `alias` stand again for what it did before its last promotion; each further call goes one promotion back.

    Raises ConfigError where there is no earlier promotion, DataError where that bundle's copy was changed.
    """
    with _locked(registry):
        known = _existing(registry, alias)
        standing: list[AliasEntry] = []
        for entry in known:
            if entry.action == "promote":
                standing.append(entry)
            else:
                standing.pop()
        if len(standing) < 2:
            raise ConfigError(f"alias {alias!r} was promoted once only; there is nothing to roll back to")
        before = standing[-2]
        _verify(registry, before)
        return _append(registry, alias, known, before.digest, before.bundle, "rollback")


def standing(registry: Path, alias: str) -> str | None:
    """Digest of what `alias` stands for now, not verified; None where it stands for nothing yet.

    Raises ConfigError for a bad alias name.
    """
    _check_name(alias)
    known = _read(registry, alias)
    return known[-1].digest if known else None


def keep_evaluation(registry: Path, evaluation: Evaluation) -> None:
    """Keep a bundle's scores, in place of those of the same split, metric and ids."""
    folder = registry / "evaluations" / evaluation.bundle
    with _locked(registry):
        folder.mkdir(parents=True, exist_ok=True)
        name = digest_of([*evaluation.about, *evaluation.ids])[:16]
        write_json(folder / f"{name}.json", evaluation.model_dump(mode="json"))


def evaluations(registry: Path, digest: str) -> list[Evaluation]:
    """What is kept of a bundle's evaluations. Raises DataError where a file is not one."""
    return [_load(Evaluation, path) for path in sorted((registry / "evaluations" / digest).glob("*.json"))]


def keep_decision(registry: Path, alias: str, decision: Decision) -> None:
    """Add what the gate said to the alias's decisions. Raises ConfigError for a bad alias name."""
    _check_name(alias)
    path = registry / "decisions" / f"{alias}.json"
    with _locked(registry):
        path.parent.mkdir(exist_ok=True)
        every = _Decisions(decisions=(*decisions(registry, alias), decision))
        write_json(path, every.model_dump(mode="json"))


def decisions(registry: Path, alias: str) -> tuple[Decision, ...]:
    """What the gate ever said about an alias, oldest first."""
    path = registry / "decisions" / f"{alias}.json"
    return _load(_Decisions, path).decisions if path.is_file() else ()


def resolve(registry: Path, alias: str) -> AliasEntry:
    """What `alias` stands for, its copy hashed again.

    Raises ConfigError naming the aliases there are, DataError where a file was changed.
    """
    entry = _existing(registry, alias)[-1]
    _verify(registry, entry)
    return entry


def history(registry: Path, alias: str) -> tuple[AliasEntry, ...]:
    """Every move of an alias, oldest first. Raises ConfigError naming the aliases there are."""
    return _existing(registry, alias)


def aliases(registry: Path) -> list[str]:
    """Names of all aliases, sorted."""
    return sorted(path.stem for path in (registry / "aliases").glob("*.json") if ALIAS.fullmatch(path.stem))


@contextmanager
def _locked(registry: Path) -> Iterator[None]:
    registry.mkdir(parents=True, exist_ok=True)
    lock = FileLock(registry / ".lock", timeout=LOCK_TIMEOUT_S)
    try:
        lock.acquire()
    except Timeout:
        raise PefomedError(
            f"registry {str(registry)!r}: another promotion has held the lock for {LOCK_TIMEOUT_S:g} s; try again"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _check_name(alias: str) -> None:
    if not ALIAS.fullmatch(alias):
        raise ConfigError(
            f"alias {alias!r}: a name starts with a-z or 0-9 and goes on with up to 63 of a-z, 0-9, '.', '_', '-'"
        )


def _read(registry: Path, alias: str) -> tuple[AliasEntry, ...]:
    path = registry / "aliases" / f"{alias}.json"
    if not path.is_file():
        return ()
    try:
        found = _Alias.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{str(path)!r} is not an alias's history ({error.error_count()} mistakes)") from None
    return tuple(sorted(found.history, key=lambda entry: entry.counter))


def _load(kind: type[D], path: Path) -> D:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{str(path)!r} is not the registry's ({error.error_count()} mistakes)") from None


def _existing(registry: Path, alias: str) -> tuple[AliasEntry, ...]:
    _check_name(alias)
    known = _read(registry, alias)
    if not known:
        there = ", ".join(aliases(registry)) or "none; `pefomed-ray promote BUNDLE --alias NAME` makes one"
        raise ConfigError(f"registry {str(registry)!r} has no alias {alias!r}; there are: {there}")
    return known


def _verify(registry: Path, entry: AliasEntry) -> None:
    found = verify_bundle(registry / entry.bundle).digest
    if found != entry.digest:
        raise DataError(
            f"registry {str(registry)!r}: {entry.bundle!r} holds bundle {found[:16]}, not {entry.digest[:16]}"
        )


def _store(registry: Path, bundle: Path, digest: str) -> str:
    relative = f"bundles/{digest}"
    target = registry / relative
    if not target.exists():
        with publishing(target) as folder:
            shutil.copytree(bundle, folder, dirs_exist_ok=True)
            # What was copied is what counts: the source may have changed since it was verified.
            if verify_bundle(folder).digest != digest:
                raise DataError(f"bundle {str(bundle)!r} changed while it was copied; promote it again")
    elif verify_bundle(target).digest != digest:
        raise DataError(
            f"{str(target)!r} holds another bundle than its name says; remove that folder and promote again"
        )
    return relative


def _append(
    registry: Path,
    alias: str,
    known: tuple[AliasEntry, ...],
    digest: str,
    stored: str,
    action: Literal["promote", "rollback"],
    gate: Literal["passed", "not asked"] | None = None,
) -> AliasEntry:
    entry = AliasEntry(
        digest=digest,
        bundle=stored,
        promoted_at=datetime.now(UTC).isoformat(timespec="seconds"),
        counter=known[-1].counter + 1 if known else 1,
        action=action,
        gate=gate,
    )
    folder = registry / "aliases"
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{alias}.json", _Alias(history=(*known, entry)).model_dump(mode="json"))
    return entry
