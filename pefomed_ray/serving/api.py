"""The HTTP application over anything that answers: no Ray, no torch.

/                      the page, and /page/* that it loads                   open: nothing secret in it
/healthz               whether this process lives                            open
/readyz                whether a replica answers
/v1/models(/{id})      base, aliases and bundles, with lineage
/v1/chat/completions   OpenAI's, streamed or whole
/v1/vqa, /v1/report    a picture's file as the body, for curl
/v1/image              a picture as the model's side sees it: DICOM becomes PNG
/v1/refresh            look at the registry now
/metrics               for Prometheus
/openapi.json          where `show_api` is set
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from importlib.resources import files
from time import monotonic
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pefomed_ray.config import ServeConfig
from pefomed_ray.errors import PefomedError
from pefomed_ray.serving.api_error import ApiError
from pefomed_ray.serving.ask_routes import DISCLAIMER, Answering, ask_routes
from pefomed_ray.serving.contract import Backend, Catalogue, Follows, ServedAdapter
from pefomed_ray.serving.guard import RETRY, Door, Visit, key_check, open_check
from pefomed_ray.serving.metrics import CONTENT_TYPE, Metrics
from pefomed_ray.serving.schemas import ChatRequest, ErrorBody, ModelCard, ModelList, Standing, Status

PAGE = "index.html"
PAGE_TYPES = {"page.js": "text/javascript", "page.css": "text/css"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""The page may load nothing from anywhere else, and nobody may frame it."""
READY_TIMEOUT_S = 5.0

logger = logging.getLogger("ray.serve")


def make_api(
    catalogue: Catalogue, door: Door, config: ServeConfig, backend: Backend, follow: Follows | None = None
) -> FastAPI:
    """The application: page and /healthz open, every other route behind a key.

    `follow` is run every `refresh_s` while the application lives.
    """
    metrics = Metrics()
    app = FastAPI(
        title="PeFoMed-Ray",
        description=f"Medical images and questions, OpenAI-compatible. {DISCLAIMER}",
        version="1",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=_following(follow, config.refresh_s) if follow else None,
        responses={status: {"model": ErrorBody} for status in ("4XX", "5XX")},
    )
    app.add_exception_handler(ApiError, _send_api_error)
    for kind in (HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _send_other_error)
    app.include_router(_open_routes())
    key = Depends(key_check(door))
    app.include_router(_told_routes(catalogue, config, backend, door, metrics, app), dependencies=[key])
    answering = Answering(catalogue, config, backend, metrics)
    app.include_router(ask_routes(answering), dependencies=[key, Depends(open_check(door))])
    app.add_middleware(_Counted, metrics=metrics, door=door)
    return app


def _open_routes() -> APIRouter:
    routes = APIRouter()
    page = files("pefomed_ray.serving") / "page"

    @routes.get("/healthz", openapi_extra={"security": []})
    async def healthz() -> Status:
        return Status(status="ok")

    @routes.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse((page / PAGE).read_bytes(), headers=PAGE_HEADERS)

    @routes.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in PAGE_TYPES:
            raise ApiError(404, "no such route")
        return Response((page / name).read_bytes(), media_type=PAGE_TYPES[name], headers=PAGE_HEADERS)

    return routes


def _told_routes(
    catalogue: Catalogue, config: ServeConfig, backend: Backend, door: Door, metrics: Metrics, app: FastAPI
) -> APIRouter:
    """What the endpoint says of itself."""
    routes = APIRouter()

    @routes.get("/readyz")
    async def readyz() -> Status:
        if door.is_closing:
            raise ApiError(503, "the endpoint is going down", code="closing", headers=RETRY)
        try:
            await asyncio.wait_for(backend.ready(), READY_TIMEOUT_S)
        except TimeoutError:
            raise ApiError(503, "no replica is ready", code="timeout", headers=RETRY) from None
        return Status(status="ready")

    @routes.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=_cards(catalogue))

    @routes.get("/v1/models/{model}")
    async def model(request: Request, model: str) -> ModelCard:
        found = await Visit(request, config).bounded(catalogue.find(model))
        if found.adapter is None:
            return _cards(catalogue)[-1]
        return _card(found.name, found.adapter, catalogue)

    @routes.post("/v1/refresh")
    async def refresh(request: Request) -> Standing:
        await Visit(request, config).bounded(_refreshed(catalogue))
        now = catalogue.standing
        return Standing(aliases=dict(now.aliases), not_followed=dict(now.not_followed))

    @routes.get("/metrics", include_in_schema=False)
    async def scraped(request: Request) -> Response:
        stats = await Visit(request, config).bounded(backend.stats())
        return Response(metrics.page(stats), media_type=CONTENT_TYPE)

    if config.show_api:

        @routes.get("/openapi.json", include_in_schema=False)
        async def openapi() -> dict[str, Any]:
            return openapi_of(app)

    return routes


def openapi_of(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the body of chat requests: routes read bodies themselves, once the key is known."""
    document = dict(app.openapi())
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update({**schema.pop("$defs"), "ChatRequest": schema})
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    return document


def _cards(catalogue: Catalogue) -> list[ModelCard]:
    """A card for each alias, then for each bundle that has none, then the base: who takes the first gets an adapter."""
    cards = [
        _card(f"{catalogue.base}:{name}", adapter, catalogue)
        for adapter in catalogue.adapters
        for name in (adapter.aliases or (adapter.ref.digest,))
    ]
    return [*cards, ModelCard(id=catalogue.base, created=0, parent=None)]


def _card(name: str, adapter: ServedAdapter, catalogue: Catalogue) -> ModelCard:
    return ModelCard(
        id=name,
        created=adapter.created,
        parent=catalogue.base,
        aliases=list(adapter.aliases),
        lineage={"task": adapter.task, **adapter.lineage, "notice": DISCLAIMER},
        not_followed=catalogue.standing.not_followed.get(name.removeprefix(f"{catalogue.base}:")),
    )


async def _refreshed(catalogue: Catalogue) -> None:
    try:
        await catalogue.refresh()
    except PefomedError:
        raise ApiError(503, "the registry cannot be read now; try again", headers=RETRY) from None


def _following(follow: Follows, every_s: float) -> Any:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_repeat(follow, every_s))
        yield
        task.cancel()

    return lifespan


async def _repeat(follow: Follows, every_s: float) -> None:
    while True:
        try:
            await follow()
        except Exception as error:
            # What is known stays as it is: an endpoint outlives the store it was filled from.
            logger.warning("the registry could not be read (%s); going on with what is known", type(error).__name__)
        await asyncio.sleep(every_s)


class _Counted:
    """Counts requests and their time, to the last byte of the answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics, door: Door) -> None:
        self._app = app
        self._metrics = metrics
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = monotonic(), [499]  # what a client that left is counted as

        async def seen(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        self._metrics.began()
        self._door.under_way += 1
        try:
            await self._app(scope, receive, seen)
        finally:
            self._door.under_way -= 1
            # The route's pattern and not the path: that is the client's to choose.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.ended(route, status[0], monotonic() - started)


async def _send_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _send_other_error(request: Request, error: Exception) -> Response:
    """FastAPI's own answers would be of another shape and, for a validation error, would repeat the input."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    status = 422 if isinstance(error, RequestValidationError) else status
    message = {404: "no such route", 405: "method not allowed", 422: "the request is not valid"}.get(status, "refused")
    headers = error.headers if isinstance(error, HTTPException) else None
    return ApiError(status, message, headers=headers).response()
