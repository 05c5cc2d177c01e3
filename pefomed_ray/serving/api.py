"""The HTTP routes, as a plain FastAPI application over anything that answers: no Ray, no torch."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pefomed_ray.artifacts.records import Task
from pefomed_ray.config import ServeConfig
from pefomed_ray.serving.api_error import ApiError
from pefomed_ray.serving.keys import is_known
from pefomed_ray.serving.schemas import (
    Ask,
    ChatCompletion,
    Choice,
    Completion,
    ReplyMessage,
    Usage,
    parse_request,
    to_ask,
)

READY_TIMEOUT_S = 5.0
DISCLAIMER = "Not for diagnosis or any clinical use."

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class ServedModel:
    """What the endpoint says about the adapter it serves."""

    base: str
    """Short name of the base, never its path."""
    alias: str
    digest: str
    task: Task
    created: int
    """When it was promoted, seconds since 1970."""
    lineage: dict[str, Any]
    """Data, split, template and metrics it came from."""

    @property
    def name(self) -> str:
        """What clients pass as `model`."""
        return f"{self.base}:{self.alias}"


class Backend(Protocol):
    """Whatever answers. Refusals come as ApiError."""

    async def answer(self, ask: Ask) -> Completion:
        """Answer one request."""

    async def ready(self) -> None:
        """Return once a replica answers."""


def make_api(model: ServedModel, key_hashes: Sequence[str], config: ServeConfig, backend: Backend) -> FastAPI:
    """The application: /healthz open, every other route behind the key."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(ApiError, _send_api_error)
    for kind in (HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _send_other_error)
    app.include_router(_open_routes())
    # A dependency of the router, not a middleware that looks at the URL: odd Host headers have talked around those.
    app.include_router(_guarded_routes(model, config, backend), dependencies=[Depends(_key_check(key_hashes))])
    return app


def _open_routes() -> APIRouter:
    routes = APIRouter()

    @routes.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return routes


def _guarded_routes(model: ServedModel, config: ServeConfig, backend: Backend) -> APIRouter:
    routes = APIRouter()

    @routes.get("/readyz")
    async def readyz() -> dict[str, str]:
        await _bounded(backend.ready(), READY_TIMEOUT_S, "no replica is ready", 503)
        return {"status": "ready"}

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": _model_list(model)}

    @routes.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        # The body is read here and not by FastAPI, which would read and parse it before it asks for the key.
        started = time.monotonic()
        reply_id = f"chatcmpl-{uuid.uuid4().hex}"
        chat_request = parse_request(await _read_body(request, config.max_body_bytes))
        if chat_request.model not in (model.name, model.alias):
            raise ApiError(
                404,
                f"the model asked for is not served here; there is {model.name!r}",
                param="model",
                code="model_not_found",
            )
        ask = to_ask(chat_request, model.task, config)
        completion = await _bounded(
            backend.answer(ask),
            config.request_timeout_s,
            f"no answer within {config.request_timeout_s:g} s",
            504,
            reply_id,
        )
        logger.info(
            "%s 200 images=%d bytes=%d tokens=%d ms=%.0f",
            reply_id,
            len(ask.images),
            sum(map(len, ask.images)),
            completion.tokens,
            (time.monotonic() - started) * 1e3,
        )
        return _reply(reply_id, model.name, completion)

    return routes


def _key_check(hashes: Sequence[str]) -> Callable[..., Coroutine[Any, Any, None]]:
    async def require_key(authorization: Annotated[str, Header()] = "") -> None:
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not is_known(key, hashes):
            raise ApiError(
                401,
                "a valid key is required: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return require_key


async def _read_body(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise ApiError(413, f"the body is over {limit} bytes", code="body_too_large")
    return bytes(body)


async def _bounded(
    work: Coroutine[Any, Any, Any], timeout_s: float, message: str, status: int, reply_id: str = "-"
) -> Any:
    try:
        return await asyncio.wait_for(work, timeout_s)
    except TimeoutError:
        raise ApiError(status, message, code="timeout") from None
    except ApiError:
        raise
    except Exception as error:
        # Its text may hold anything; its class is enough to look it up in the replica's own log.
        logger.error("%s 500 %s", reply_id, type(error).__name__)
        raise ApiError(500, "the endpoint failed to answer; its log has more", code="internal_error") from None


def _model_list(model: ServedModel) -> list[dict[str, Any]]:
    common = {"object": "model", "created": model.created, "owned_by": "pefomed-ray"}
    lineage = {"digest": model.digest, "task": model.task, **model.lineage, "notice": DISCLAIMER}
    return [
        # First the one that answers: clients that take the first of the list get it.
        {"id": model.name, **common, "parent": model.base, "lineage": lineage},
        {"id": model.base, **common, "parent": None},
    ]


def _reply(reply_id: str, name: str, completion: Completion) -> JSONResponse:
    body = ChatCompletion(
        id=reply_id,
        created=int(time.time()),
        model=name,
        choices=[
            Choice(
                message=ReplyMessage(content=completion.text),
                finish_reason="stop" if completion.finished else "length",
            )
        ],
        usage=Usage(
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.tokens,
            total_tokens=completion.prompt_tokens + completion.tokens,
        ),
        system_fingerprint=completion.digest,
    )
    headers = {"x-adapter-sha256": completion.digest, "x-notice": DISCLAIMER}
    return JSONResponse(body.model_dump(mode="json"), headers=headers)


async def _send_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _send_other_error(request: Request, error: Exception) -> Response:
    """FastAPI's own answers would be of another shape and, for a validation error, would repeat the input."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    status = 422 if isinstance(error, RequestValidationError) else status
    message = {404: "no such route", 405: "method not allowed", 422: "the request is not valid"}.get(status, "refused")
    return ApiError(status, message).response()
