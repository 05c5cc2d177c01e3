"""The page and what it asks for. Whose answer an item is never leaves this process.

Patients' pictures are shown, so: loopback only; a token in the address, which becomes a cookie that scripts cannot
read; no other site's page may ask (Host and Origin are checked, no CORS headers); nothing is stored by the browser's
cache, and the page may load nothing from anywhere else.
"""

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware

from pefomed_ray.errors import PefomedError
from pefomed_ray.evaluation.rate.items import Item, Items, order_of
from pefomed_ray.evaluation.rate.pictures import for_browser
from pefomed_ray.evaluation.rate.scale import scale_of
from pefomed_ray.evaluation.rate.store import MAX_COMMENT, MAX_NAME, Said, Store

PAGE = Path(__file__).parent / "page"
HOSTS = ["127.0.0.1", "localhost"]
"""Names this page may be asked for by: another one means that a stranger's domain was made to point here."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
NO_TOKEN = "Open the address that `pefomed-ray rate` printed when it was started; it ends in ?token=...\n"

Next = Callable[[Request], Awaitable[Response]]


class Change(BaseModel):
    """What a rater says about an item from now on."""

    model_config = ConfigDict(extra="forbid")

    rater: Annotated[str, Field(max_length=MAX_NAME)]
    score: int | None
    skipped: bool
    comment: Annotated[str, Field(max_length=MAX_COMMENT)]


class Undo(BaseModel):
    """Who takes back the last thing they said."""

    model_config = ConfigDict(extra="forbid")

    rater: Annotated[str, Field(max_length=MAX_NAME)]


def create_app(items: Items, store: Store, seed: int, token: str, port: int) -> FastAPI:
    """The application; `port` is the one it will listen on, as browsers keep one set of cookies for all ports."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    cookie = f"pefomed_rate_{port}"
    scale = scale_of(items.task)

    @app.middleware("http")
    async def guard(request: Request, answer: Next) -> Response:
        response = await _guarded(request, answer, cookie, token)
        response.headers.update(HEADERS)
        return response

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)
    app.mount("/page", StaticFiles(directory=PAGE))

    @app.exception_handler(PefomedError)
    async def refused(_: Request, error: PefomedError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=422)

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(PAGE / "rate.html")

    @app.get("/favicon.ico")
    def icon() -> Response:
        return Response(status_code=204)

    @app.get("/api/raters")
    def raters() -> list[str]:
        return store.raters()

    @app.get("/api/plan")
    def plan(rater: str) -> dict[str, Any]:
        name = store.name_of(rater)
        said = store.said(name)
        order = order_of(items, name, seed)
        return {
            "rater": name,
            "task": items.task,
            "scale": [{"score": score, "meaning": meaning} for score, meaning in scale.items()],
            "order": order,
            "said": {key: asdict(said[key]) for key in order if key in said},
        }

    @app.get("/api/items/{key}")
    def item(key: str) -> dict[str, Any]:
        found = known(key)
        return {
            "key": key,
            "images": [f"/api/items/{key}/images/{number}" for number in range(found.images)],
            "question": found.question,
            "reference": found.reference,
            "answer": found.answer,
        }

    @app.get("/api/items/{key}/images/{number}")
    def image(key: str, number: int) -> Response:
        if not 0 <= number < known(key).images:
            raise HTTPException(404, "no such image")
        data, media_type = for_browser(items.image(key, number))
        return Response(data, media_type=media_type)

    @app.put("/api/items/{key}/rating")
    def say(key: str, change: Change) -> dict[str, Any]:
        known(key)
        if change.score is not None and (change.score not in scale or change.skipped):
            raise HTTPException(422, f"the score is one of {', '.join(map(str, scale))}, and not of a skipped item")
        said = Said(change.score, change.skipped, change.comment)
        store.say(store.name_of(change.rater), key, said)
        return asdict(said)

    @app.post("/api/undo")
    def undo(request: Undo) -> dict[str, Any]:
        """Which item it was about, and what is said about it now; `key` is null where there is nothing to undo."""
        rater = store.name_of(request.rater)
        key = store.undo(rater, items.by_key)
        return {"key": key, "said": asdict(store.said(rater).get(key, Said())) if key else None}

    def known(key: str) -> Item:
        if key not in items.by_key:
            raise HTTPException(404, "no such item")
        return items.by_key[key]

    return app


async def _guarded(request: Request, answer: Next, cookie: str, token: str) -> Response:
    """The answer, to those who have the token; it is taken out of the address at once."""
    origin = request.headers.get("origin")
    if origin is not None and origin != f"http://{request.headers.get('host')}":
        return PlainTextResponse("asked by another site's page\n", status_code=403)
    if request.url.path == "/" and _same(request.query_params.get("token"), token):
        response: Response = RedirectResponse("/", status_code=303)
        response.set_cookie(cookie, token, httponly=True, samesite="strict", path="/")
        return response
    if not _same(request.cookies.get(cookie), token):
        return PlainTextResponse(NO_TOKEN, status_code=403)
    return await answer(request)


def _same(given: str | None, token: str) -> bool:
    return given is not None and hmac.compare_digest(given.encode(), token.encode())
