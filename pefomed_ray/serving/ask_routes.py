"""The routes that ask the model: OpenAI's chat completions, and helpers for people with a file and curl."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, cast

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from pefomed_ray.artifacts.records import Task
from pefomed_ray.config import ServeConfig
from pefomed_ray.serving.api_error import ApiError
from pefomed_ray.serving.asks import ask_of, checked_tokens, not_used, to_ask
from pefomed_ray.serving.contract import Ask, Backend, Catalogue, Completion, Found, Piece, Sampling
from pefomed_ray.serving.guard import Visit
from pefomed_ray.serving.metrics import Metrics
from pefomed_ray.serving.pictures import DICOM_TYPE, from_file, media_type
from pefomed_ray.serving.replies import chat_completion, chat_events, usage_of
from pefomed_ray.serving.schemas import Answer, ChatCompletion, ChatRequest, parse_request

DISCLAIMER = "Not for diagnosis or any clinical use."

_PICTURE = {"schema": {"type": "string", "format": "binary"}}
_FILE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"image/png": _PICTURE, "image/jpeg": _PICTURE, DICOM_TYPE: _PICTURE},
    }
}
_STREAM: dict[str, Any] = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
_PICTURES: dict[str, Any] = {"content": {"image/png": _PICTURE, "image/jpeg": _PICTURE}}
_CHAT_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}},
    }
}


class Answering:
    """Asks the backend and counts."""

    def __init__(self, catalogue: Catalogue, config: ServeConfig, backend: Backend, metrics: Metrics) -> None:
        self.catalogue = catalogue
        self.config = config
        self._backend = backend
        self._metrics = metrics

    async def whole(self, visit: Visit, ask: Ask) -> Completion:
        """One answer."""
        completion = await visit.bounded(self._backend.answer(ask))
        self._count(visit, ask, completion)
        return completion

    async def pieces(self, visit: Visit, ask: Ask) -> AsyncGenerator[Piece, None]:
        """One answer piece by piece, the first of them here already: what is refused is refused with its status."""
        pieces = visit.bounded_pieces(self._backend.stream(ask))
        first = await anext(pieces)
        return self._counted(visit, ask, first, pieces)

    async def _counted(
        self, visit: Visit, ask: Ask, first: Piece, rest: AsyncGenerator[Piece, None]
    ) -> AsyncGenerator[Piece, None]:
        async with aclosing(rest):
            yield first
            last = first
            async for last in rest:
                yield last
        if last.completion is not None:
            self._count(visit, ask, last.completion)

    def _count(self, visit: Visit, ask: Ask, completion: Completion) -> None:
        self._metrics.answered(completion.prompt_tokens, completion.tokens)
        visit.log(ask.images, completion.tokens)


def ask_routes(answering: Answering) -> APIRouter:
    """/v1/chat/completions, /v1/vqa, /v1/report and /v1/image."""
    routes = APIRouter()
    config = answering.config

    @routes.post("/v1/chat/completions", openapi_extra=_CHAT_BODY, responses={200: _STREAM})
    async def chat(request: Request) -> ChatCompletion:
        # The body is read here and not by FastAPI, which would read and parse it before it asks for the key.
        visit = Visit(request, config)
        asked = parse_request(await visit.body())
        found = await visit.bounded(answering.catalogue.find(asked.model))
        ask = await visit.bounded(asyncio.to_thread(to_ask, asked, found, config))
        headers = headers_of(found, asked)
        if asked.stream:
            with_usage = asked.stream_options is not None and asked.stream_options.include_usage
            pieces = await answering.pieces(visit, ask)
            events = chat_events(visit.id, found.name, found.digest, pieces, with_usage=with_usage)
            # What is documented is the whole reply; FastAPI sends any Response as it is.
            return cast(Any, StreamingResponse(events, media_type="text/event-stream", headers=headers))
        completion = await answering.whole(visit, ask)
        reply = chat_completion(visit.id, found.name, completion)
        return cast(Any, Response(reply.model_dump_json(), media_type="application/json", headers=headers))

    @routes.post("/v1/vqa", openapi_extra=_FILE_BODY)
    async def vqa(
        request: Request,
        response: Response,
        x_question: Annotated[str, Header(description="The question, UTF-8. Not in the URL, which proxies log.")] = "",
        model: Annotated[str | None, Query(max_length=200)] = None,
        max_tokens: Annotated[int | None, Query(gt=0)] = None,
    ) -> Answer:
        visit = Visit(request, config)
        found = await visit.bounded(_model(answering.catalogue, model))
        question = _utf8(x_question)
        if not question:
            raise ApiError(400, "x-question: a header with the question is needed", param="x-question")
        if found.adapter and found.adapter.task != "vqa":
            raise ApiError(400, f"model: {found.name!r} writes texts about pictures; ask /v1/report", param="model")
        return await _about_file(visit, response, "vqa", question, found, max_tokens)

    @routes.post("/v1/report", openapi_extra=_FILE_BODY)
    async def report(
        request: Request,
        response: Response,
        model: Annotated[str | None, Query(max_length=200)] = None,
        max_tokens: Annotated[int | None, Query(gt=0)] = None,
    ) -> Answer:
        visit = Visit(request, config)
        found = await visit.bounded(_model(answering.catalogue, model))
        task: Task = found.adapter.task if found.adapter else "report"
        if task == "vqa":
            raise ApiError(400, f"model: {found.name!r} answers questions; ask /v1/vqa", param="model")
        return await _about_file(visit, response, task, "", found, max_tokens)

    async def _about_file(
        visit: Visit, response: Response, task: Task, question: str, found: Found, max_tokens: int | None
    ) -> Answer:
        tokens = None if max_tokens is None else checked_tokens(max_tokens, "max_tokens", config)
        image = await visit.bounded(asyncio.to_thread(from_file, await visit.body()))
        ask = ask_of(task, question, (image,), found, Sampling(tokens))
        completion = await answering.whole(visit, ask)
        response.headers.update(headers_of(found))
        return Answer(
            answer=completion.text,
            finish_reason=completion.ended,
            model=found.name,
            digest=completion.digest,
            usage=usage_of(completion),
        )

    @routes.post("/v1/image", openapi_extra=_FILE_BODY, response_class=Response, responses={200: _PICTURES})
    async def image(request: Request) -> Response:
        visit = Visit(request, config)
        data = await visit.bounded(asyncio.to_thread(from_file, await visit.body()))
        return Response(data, media_type=media_type(data), headers={"Cache-Control": "no-store"})

    return routes


def headers_of(found: Found, asked: ChatRequest | None = None) -> dict[str, str]:
    """Which weights answer, what the model did not see, and what nobody should do with the answer."""
    unseen = not_used(asked) if asked else ""
    return {
        "x-notice": DISCLAIMER,
        **({"x-adapter-sha256": found.digest} if found.digest else {}),
        **({"x-not-used": unseen} if unseen else {}),
    }


async def _model(catalogue: Catalogue, name: str | None) -> Found:
    """What was named; else the first alias there is, else the base."""
    adapters = catalogue.adapters
    first = adapters[0].aliases[0] if adapters and adapters[0].aliases else catalogue.base
    return await catalogue.find(name or first)


def _utf8(header: str) -> str:
    """Headers come as Latin-1, whatever was sent."""
    try:
        return header.encode("latin-1").decode("utf-8").strip()
    except UnicodeError:
        raise ApiError(400, "x-question: the header is not UTF-8", param="x-question") from None
