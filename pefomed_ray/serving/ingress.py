"""The HTTP side on Ray Serve. It loads no torch: it is cheap, and outlives the crash of a replica."""

from collections.abc import Sequence

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from pefomed_ray.config import ServeConfig
from pefomed_ray.errors import DataError
from pefomed_ray.serving.api import ServedModel, make_api
from pefomed_ray.serving.api_error import ApiError
from pefomed_ray.serving.schemas import Ask, Completion

RETRY_AFTER_S = 1


class ReplicaBackend:
    """Answers by asking the replicas."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas

    async def answer(self, ask: Ask) -> Completion:
        """Raises ApiError 400 for images that do not decode and prompts too long, 429 when the queue is full, 503 when
        the replica is lost."""
        outcome: Completion | DataError = await self._call("answer", ask)
        if isinstance(outcome, DataError):
            raise ApiError(400, f"messages: {outcome}", param="messages", code="invalid_value")
        return outcome

    async def ready(self) -> None:
        """Raises ApiError 503 where no replica answers."""
        await self._call("ready")

    async def _call(self, method: str, *arguments: Ask) -> Completion | DataError:
        retry = {"Retry-After": str(RETRY_AFTER_S)}
        try:
            return await getattr(self._replicas, method).remote(*arguments)
        except BackPressureError:
            raise ApiError(429, "the queue is full; try again", code="overloaded", headers=retry) from None
        except (RayActorError, DeploymentUnavailableError):
            raise ApiError(503, "the replica was lost; try again", code="unavailable", headers=retry) from None


@serve.ingress()
class Ingress:
    """Serve deployment that holds the API; the application is made on the replica, from plain arguments."""

    def __init__(
        self, model: ServedModel, key_hashes: Sequence[str], config: ServeConfig, replicas: DeploymentHandle
    ) -> None:
        self._arguments = (model, key_hashes, config, ReplicaBackend(replicas))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(*self._arguments)
