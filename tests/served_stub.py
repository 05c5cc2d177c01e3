"""An endpoint's HTTP side over a stub: what answers is a few lines here, everything else is the real thing."""

import asyncio
import base64
import io
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from PIL import Image

from pefomed_ray.config import ServeConfig
from pefomed_ray.serving.api import make_api
from pefomed_ray.serving.api_error import ApiError
from pefomed_ray.serving.contract import AdapterRef, Ask, Completion, Found, Piece, ServedAdapter, Standing
from pefomed_ray.serving.guard import Door
from pefomed_ray.serving.keys import hash_key

KEY = "k" * 43
DIGEST, REPORTS = "d" * 64, "e" * 64
ADAPTERS = (
    ServedAdapter(AdapterRef(DIGEST, "/x"), ("champion",), "vqa", 1_700_000_000, {"template": "short"}),
    ServedAdapter(AdapterRef(REPORTS, "/y"), ("reports",), "report", 1_700_000_001, {"template": "short"}),
)


class StubBackend:
    """Says the question backwards, word by word; fails as told."""

    def __init__(self, failure: Exception | None = None, delay_s: float = 0.0, fails_after: int = 0) -> None:
        self.failure = failure
        self.delay_s = delay_s
        self.fails_after = fails_after
        """Pieces of a stream before the failure."""
        self.asked: list[Ask] = []
        self.closed = 0

    async def ready(self) -> None:
        if self.failure:
            raise self.failure

    async def load(self, ref: AdapterRef) -> None:
        if self.failure:
            raise self.failure

    async def stats(self) -> Sequence[Mapping[str, float]]:
        return [{"running": 1, "adapters": 2}, {"running": 0, "adapters": 1}]

    async def answer(self, ask: Ask) -> Completion:
        await asyncio.sleep(self.delay_s)
        self.asked.append(ask)
        if self.failure:
            raise self.failure
        return self._completion(ask)

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        self.asked.append(ask)
        completion = self._completion(ask)
        try:
            for number, word in enumerate(completion.text.split(" ")):
                if self.failure and number >= self.fails_after:
                    raise self.failure
                yield Piece(word if number == 0 else f" {word}")
                await asyncio.sleep(self.delay_s)
            yield Piece("", completion)
        finally:
            self.closed += 1

    def _completion(self, ask: Ask) -> Completion:
        words = [*ask.question.split()[::-1], f"({len(ask.images)})"]
        ended = "length" if ask.sampling.max_tokens == 3 else "stop"
        return Completion(" ".join(words), ended, 40, len(words), ask.adapter.digest if ask.adapter else None)


class StubCatalogue:
    """A base and two aliases."""

    base = "embedded"

    def __init__(self) -> None:
        self.adapters = ADAPTERS
        self.standing = Standing({"champion": DIGEST, "reports": REPORTS}, {"reports": "bundle 1234 has rank 99"})
        self.refreshed = 0

    async def find(self, model: str) -> Found:
        if model == self.base:
            return Found(model, None)
        for adapter in ADAPTERS:
            if model.removeprefix("embedded:") in (*adapter.aliases, adapter.ref.digest):
                return Found(f"embedded:{model.removeprefix('embedded:')}", adapter)
        raise ApiError(404, "the model asked for is not served here", param="model", code="model_not_found")

    async def refresh(self) -> None:
        self.refreshed += 1


def stub_api(
    backend: StubBackend | None = None, config: ServeConfig | None = None, catalogue: StubCatalogue | None = None
) -> FastAPI:
    """The application that knows KEY."""
    config = config or ServeConfig(max_body_bytes=200_000, max_new_tokens=64, request_timeout_s=0.5, show_api=True)
    return make_api(catalogue or StubCatalogue(), Door({"tests": hash_key(KEY)}), config, backend or StubBackend())


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    """A picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (10, 20, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def png_url(size: tuple[int, int] = (8, 8)) -> str:
    """The same as a data: URL."""
    return "data:image/png;base64," + base64.b64encode(png(size)).decode()


def user(text: str | None = "Is it normal?", *urls: str) -> dict[str, Any]:
    """A message."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": parts + ([{"type": "text", "text": text}] if text is not None else [])}


def body(**changes: Any) -> dict[str, Any]:
    """Of a chat request."""
    return {"model": "champion", "messages": [user("Is it normal?", png_url())], **changes}
