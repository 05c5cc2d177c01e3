"""A replica: one copy of the base, answering for every adapter."""

from collections.abc import AsyncGenerator

from pefomed_ray.config import ServeConfig
from pefomed_ray.config.schema import Precision
from pefomed_ray.errors import PefomedError
from pefomed_ray.model.base import open_base
from pefomed_ray.serving.contract import AdapterRef, Ask, Completion, Piece, Stats
from pefomed_ray.serving.engine.engine import Engine


class ModelReplica:
    """Serve deployment around `Engine`. What is refused comes back as a value: raised, Serve would log it with a
    traceback."""

    def __init__(self, base: str, template: str, precision: Precision, config: ServeConfig) -> None:
        device = "cuda" if config.use_gpu else "cpu"
        self._engine = Engine(open_base(base, template, precision, device), precision, config, device)

    async def answer(self, ask: Ask) -> Completion | PefomedError:
        """Answer one request, together with what else is asked."""
        try:
            return await self._engine.answer(ask)
        except PefomedError as error:
            return error

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece | PefomedError, None]:
        """The same piece by piece; the last thing is the piece with the completion, or why there is none."""
        pieces = self._engine.stream(ask)
        try:
            async for piece in pieces:
                yield piece
        except PefomedError as error:
            yield error
        finally:
            await pieces.aclose()

    async def load(self, ref: AdapterRef) -> PefomedError | None:
        """Read an adapter; why it cannot be served, where it cannot."""
        try:
            await self._engine.load(ref)
        except PefomedError as error:
            return error
        return None

    async def ready(self) -> None:
        """Returns: the constructor is through."""

    async def stats(self) -> Stats:
        """How it is doing."""
        return self._engine.stats()

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        if not self._engine.healthy():
            raise RuntimeError("the engine's thread has ended")

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()
