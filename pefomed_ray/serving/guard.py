"""Who may ask, and how much and how long: keys, sizes, deadlines."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Annotated, Any, TypeVar
from uuid import uuid4

from fastapi import Header, Request

from pefomed_ray.config import ServeConfig
from pefomed_ray.serving.api_error import ApiError
from pefomed_ray.serving.contract import Piece
from pefomed_ray.serving.keys import name_of

RETRY_AFTER_S = 1
RETRY = {"Retry-After": str(RETRY_AFTER_S)}

logger = logging.getLogger("ray.serve")
T = TypeVar("T")


@dataclass
class Door:
    """What changes while the endpoint runs: its keys, whether it still lets anybody in, and how many are."""

    keys: Mapping[str, str]
    """Name -> sha256."""
    is_closing: bool = False
    under_way: int = 0
    """Requests that are being answered."""


def key_check(door: Door) -> Callable[..., Coroutine[Any, Any, None]]:
    """A dependency that lets in who has a key; the key's name is then `request.state.key_name`.

    A dependency of routers and not a middleware that looks at the URL: odd Host headers have talked around those.
    """

    async def require_key(request: Request, authorization: Annotated[str, Header()] = "") -> None:
        scheme, _, key = authorization.partition(" ")
        name = name_of(key, door.keys) if scheme.lower() == "bearer" else None
        if name is None:
            raise ApiError(
                401,
                "a valid key is required: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        request.state.key_name = name

    return require_key


def open_check(door: Door) -> Callable[[], Coroutine[Any, Any, None]]:
    """A dependency that lets nobody in any more while the endpoint goes down; who is in is answered."""

    async def require_open() -> None:
        if door.is_closing:
            raise ApiError(503, "the endpoint is going down; try again later", code="closing", headers=RETRY)

    return require_open


@dataclass
class Visit:
    """A request under way. All it may take, body and answer, is `request_timeout_s`."""

    request: Request
    config: ServeConfig
    started: float = field(default_factory=monotonic)
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")

    @property
    def _left_s(self) -> float:
        return max(self.started + self.config.request_timeout_s - monotonic(), 0.0)

    async def body(self) -> bytes:
        """Raises ApiError 413 over the limit, 408 where it does not come in time, 400 where it is not whole."""
        limit, body = self.config.max_body_bytes, bytearray()
        try:
            async with asyncio.timeout(self._left_s):
                async for chunk in self.request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise ApiError(413, f"the body is over {limit} bytes", code="body_too_large")
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self.config.request_timeout_s:g} s") from None
        return bytes(body)

    async def bounded(self, work: Awaitable[T]) -> T:
        """Its result. Raises ApiError: its own, 504 where the time is over, 500 for anything else."""
        try:
            return await asyncio.wait_for(work, self._left_s)
        except TimeoutError:
            timeout_s = self.config.request_timeout_s
            raise ApiError(504, f"no answer within {timeout_s:g} s", code="timeout", headers=RETRY) from None
        except (ApiError, StopAsyncIteration):
            raise
        except Exception as error:
            # Its text may hold anything; its class is enough to look it up in the replica's own log.
            logger.error("%s 500 %s", self.id, type(error).__name__)
            raise ApiError(500, "the endpoint failed to answer; its log has more", code="internal_error") from None

    async def bounded_pieces(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
        """The same of each piece; to close it early closes `pieces`."""
        try:
            while True:
                try:
                    yield await self.bounded(anext(pieces))
                except StopAsyncIteration:
                    return
        finally:
            await pieces.aclose()

    def log(self, images: tuple[bytes, ...], tokens: int) -> None:
        """Sizes and times, and nothing of what was asked."""
        logger.info(
            "%s key=%s images=%d bytes=%d tokens=%d ms=%.0f",
            self.id,
            self.request.state.key_name,
            len(images),
            sum(map(len, images)),
            tokens,
            (monotonic() - self.started) * 1e3,
        )
