"""The HTTP side on Ray Serve. It loads no torch: it is cheap, and outlives the crash of a replica."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from pefomed_ray.config import ServeConfig
from pefomed_ray.errors import DataError, PefomedError
from pefomed_ray.serving.api import make_api
from pefomed_ray.serving.api_error import ApiError
from pefomed_ray.serving.catalogue import RegistryCatalogue, without_paths
from pefomed_ray.serving.contract import AdapterRef, Ask, CannotServeError, Completion, Piece, Standing, Stats
from pefomed_ray.serving.guard import RETRY, Door
from pefomed_ray.serving.keys import read_keys

ATTEMPTS = 3
"""Of an answer, where its replica is lost on the way: it is the same on any replica."""

LOST = (RayActorError, DeploymentUnavailableError)


class ReplicaBackend:
    """Answers by asking the replicas."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas

    async def answer(self, ask: Ask) -> Completion:
        """Raises ApiError 400 for images that do not decode and prompts too long, 404 for an adapter that cannot be
        served, 429 when the queue is full, 503 when one replica after the other is lost."""
        for _ in range(ATTEMPTS):
            try:
                said: Completion | PefomedError = await self._replicas.answer.remote(ask)
            except LOST:
                continue
            except BackPressureError:
                raise _full() from None
            if isinstance(said, Completion):
                return said
            _refuse(said)
        raise _lost()

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """Raises as `answer`. Where a replica is lost on the way another one begins anew, and what was sent already is
        left out: greedy answers are the same everywhere, and so are drawn ones with their seed."""
        sent = ""
        for _ in range(ATTEMPTS):
            pieces = self._replicas.options(stream=True).stream.remote(ask)
            repeated = sent  # what this replica says once more
            try:
                async for piece in pieces:
                    if not isinstance(piece, Piece):
                        _refuse(piece)
                        break  # the replica has failed; another one is asked
                    both = min(len(repeated), len(piece.text))
                    if repeated[:both] != piece.text[:both]:
                        raise _lost()  # it is on its way to another answer
                    repeated, new = repeated[both:], piece.text[both:]
                    sent += new
                    if new or piece.completion is not None:
                        yield Piece(new, piece.completion)
                    if piece.completion is not None:
                        return
            except LOST:
                continue
            except BackPressureError:
                raise _full() from None
            finally:
                pieces.cancel()
        raise _lost()

    async def load(self, ref: AdapterRef) -> None:
        """See Backend."""
        await self.ready()
        for said in await self._replicas.broadcast("load", ref).results_async():
            if said is not None:
                raise said

    async def ready(self) -> None:
        """Raises ApiError 503 where no replica answers."""
        try:
            await self._replicas.ready.remote()
        except LOST:
            raise _lost() from None
        except BackPressureError:
            return  # they are busy, and so there are some

    async def stats(self) -> Sequence[Mapping[str, float]]:
        """See Backend."""
        found: list[Stats] = await self._replicas.broadcast("stats").results_async()
        return [asdict(stats) for stats in found]


def _refuse(error: PefomedError) -> None:
    """Raise ApiError for what asking again would not change."""
    if isinstance(error, CannotServeError):
        raise ApiError(404, f"model: {without_paths(error)}", param="model", code="model_not_found")
    if isinstance(error, DataError):
        raise ApiError(400, f"messages: {error}", param="messages", code="invalid_value")


def _full() -> ApiError:
    return ApiError(429, "the queue is full; try again", code="overloaded", headers=RETRY)


def _lost() -> ApiError:
    return ApiError(503, "the replica was lost; try again", code="unavailable", headers=RETRY)


@serve.ingress()
class Ingress:
    """Serve deployment that holds the API; the application is made on the replica, from plain arguments."""

    def __init__(
        self, registry: str, base_name: str, base_digest: str, config: ServeConfig, replicas: DeploymentHandle
    ) -> None:
        self._registry = registry
        self._config = config
        self._backend = ReplicaBackend(replicas)
        self._catalogue = RegistryCatalogue(registry, base_name, base_digest, self._backend)
        self._door = Door(read_keys(registry))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self._catalogue, self._door, self._config, self._backend, self._follow)

    async def refresh(self) -> Standing:
        """Look at the registry now."""
        await self._catalogue.refresh()
        return self._catalogue.standing

    async def close(self) -> None:
        """Let nobody in any more."""
        self._door.is_closing = True

    async def under_way(self) -> int:
        """Requests that are being answered."""
        return self._door.under_way

    async def _follow(self) -> None:
        self._door.keys = await asyncio.to_thread(read_keys, self._registry)
        await self._catalogue.follow()
