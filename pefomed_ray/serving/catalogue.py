"""What the endpoint can be asked for, followed from the registry: a moved alias is followed within `refresh_s`.

An alias is followed only once every replica has read what it stands for now. Where they cannot (a changed file,
another base, too high a rank), it goes on standing for what it did, and `/v1/models` says why.
"""

import asyncio
import json
import logging
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import yaml

from pefomed_ray.artifacts.folders import Folder, open_folder
from pefomed_ray.artifacts.manifests import BUNDLE_FILE, BundleManifest
from pefomed_ray.artifacts.registry import MIN_DIGEST_CHARS, AliasEntry, bundle_url, newest
from pefomed_ray.errors import DataError, PefomedError
from pefomed_ray.serving.api_error import ApiError
from pefomed_ray.serving.contract import AdapterRef, Backend, Found, ServedAdapter, Standing

_PATH = re.compile(r"'(?:s3:/)?/[^']*?([^'/]+)/?'")

logger = logging.getLogger("ray.serve")


class RegistryCatalogue:
    """The registry's bundles over one base, behind replicas that hold it."""

    def __init__(self, registry: str, base_name: str, base_digest: str, backend: Backend) -> None:
        self.base = base_name
        self._base_digest = base_digest
        self._registry = registry
        self._backend = backend
        self._served: dict[str, AliasEntry] = {}
        """Alias -> what it stands for here."""
        self._known: dict[str, ServedAdapter] = {}
        """By digest, whatever was asked for or stood for since the start; aliases are filled in by `_named`."""
        self._not_followed: dict[str, tuple[str, str]] = {}
        """Alias -> digest that it is not followed to, and why."""
        self._one_at_a_time = asyncio.Lock()

    @property
    def adapters(self) -> Sequence[ServedAdapter]:
        """See Catalogue."""
        now = list(dict.fromkeys(entry.digest for entry in self._served.values()))
        return [self._named(digest) for digest in [*now, *(known for known in self._known if known not in now)]]

    @property
    def standing(self) -> Standing:
        """See Catalogue."""
        now = {alias: entry.digest for alias, entry in self._served.items()}
        return Standing(now, {alias: why for alias, (_, why) in self._not_followed.items()})

    async def find(self, model: str) -> Found:
        """See Catalogue."""
        if model == self.base:
            return Found(self.base, None)
        name = model.removeprefix(f"{self.base}:")
        if entry := self._served.get(name):
            return Found(f"{self.base}:{name}", self._named(entry.digest))
        if name in self._not_followed:
            raise ApiError(404, f"alias {name!r}: {self._not_followed[name][1]}", param="model", code="model_not_found")
        is_digest = name != model and len(name) >= MIN_DIGEST_CHARS and set(name) <= set("0123456789abcdef")
        if is_digest and (digest := await asyncio.to_thread(self._describe_digest, name)):
            return Found(f"{self.base}:{digest}", self._named(digest))
        there = ", ".join(f"{self.base}:{alias}" for alias in self._served)
        raise ApiError(
            404,
            f"the model asked for is not served here; there is {there or 'no alias'}, and {self.base}",
            param="model",
            code="model_not_found",
        )

    async def refresh(self) -> None:
        """Look at the registry; what cannot be followed is asked of the replicas once more."""
        await self._follow(again=True)

    async def follow(self) -> None:
        """Look at the registry; what could not be followed is left alone until the alias moves."""
        await self._follow(again=False)

    async def _follow(self, *, again: bool) -> None:
        async with self._one_at_a_time:
            found = await asyncio.to_thread(newest, self._registry)
            for alias, entry in found.items():
                await self._move(alias, entry, again=again)
            for gone in self._served.keys() - found.keys():
                del self._served[gone]

    async def _move(self, alias: str, entry: AliasEntry, *, again: bool) -> None:
        before = self._served.get(alias)
        if before and before.digest == entry.digest:
            self._not_followed.pop(alias, None)
            return
        if not again and self._not_followed.get(alias, ("", ""))[0] == entry.digest:
            return
        try:
            await asyncio.to_thread(self._describe, entry.digest, entry.promoted_at)
            await self._backend.load(self._known[entry.digest].ref)
        except DataError as error:
            why = f"bundle {entry.digest[:16]} cannot be served: {without_paths(error)}"
            self._not_followed[alias] = entry.digest, why
            logger.error("alias %s is not followed: %s", alias, why)
            return
        self._not_followed.pop(alias, None)
        self._served[alias] = entry

    def _named(self, digest: str) -> ServedAdapter:
        known = self._known[digest]
        names = tuple(sorted(alias for alias, entry in self._served.items() if entry.digest == digest))
        return ServedAdapter(known.ref, names, known.task, known.created, known.lineage)

    def _describe_digest(self, start: str) -> str | None:
        """The one bundle of the registry whose digest begins so, described."""
        known = [digest for digest in self._known if digest.startswith(start)]
        if len(known) == 1:
            return known[0]
        names = [name.rstrip("/") for name in open_folder(self._registry).names("bundles")]
        found = [digest for digest in names if digest.startswith(start)]
        if len(found) != 1:
            return None
        try:
            self._describe(found[0])
        except DataError as error:
            why = without_paths(error)
            raise ApiError(404, f"bundle {found[0][:16]}: {why}", param="model", code="model_not_found") from None
        return found[0]

    def _describe(self, digest: str, promoted_at: str | None = None) -> None:
        """Read what is said about a bundle. Its weights are the replicas' to read.

        Raises DataError where it is missing, of another base, or its files are not a bundle's.
        """
        if digest in self._known:
            return
        url = bundle_url(self._registry, digest)
        folder = open_folder(url)
        try:
            manifest = BundleManifest.model_validate_json(folder.read_bytes(BUNDLE_FILE))
            task = yaml.safe_load(folder.read_bytes("run.yaml"))["task"]
            lineage = _lineage(folder, manifest, promoted_at)
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            raise DataError("its files are missing or are not a bundle's; promote it again") from None
        if manifest.base_digest != self._base_digest:
            raise DataError(
                f"it was trained on base {manifest.base_digest[:16]}, and {self._base_digest[:16]} is served here"
            )
        created = int(datetime.fromisoformat(promoted_at).timestamp()) if promoted_at else 0
        self._known[digest] = ServedAdapter(AdapterRef(digest, url), (), task, created, lineage)


def _lineage(folder: Folder, manifest: BundleManifest, promoted_at: str | None) -> dict[str, Any]:
    return {
        "digest": manifest.digest,
        "base_digest": manifest.base_digest,
        "template": manifest.template,
        "template_digest": manifest.template_digest,
        "promoted_at": promoted_at,
        "trained_on": json.loads(folder.read_bytes("lineage.json")),
        "metrics": json.loads(folder.read_bytes("metrics.json")),
    }


def without_paths(error: PefomedError) -> str:
    """An error's words with the last part of each path and URL alone: clients read them."""
    return _PATH.sub(r"'\1'", str(error))
