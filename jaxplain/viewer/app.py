"""The pages over HTTP, for one reader on one machine.

Nothing is ever written, no address leads to a file, and what a page may load is its own style and script.
"""

from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxplain.errors import JaxplainError
from jaxplain.viewer.pages import Pages, asset, error_page, neuron_of_file
from jaxplain.viewer.searching import query_of, search
from jaxplain.viewer.site import Site

_ASSETS = {"style.css": "text/css", "view.js": "text/javascript"}
_MOST_SHOWN = 10_000
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def make_app(site: Site, *, hosts: Sequence[str] = LOOPBACK) -> Starlette:
    """The application; it answers only to those who ask for one of `hosts`, or anyone where that is `*`."""
    pages, first = Pages(site), site.store.splits[0]

    def overview(request: Request) -> Response:
        split = request.path_params.get("split", first)
        root = "../" if "split" in request.path_params else ""
        return HTMLResponse(pages.overview(split, root=root))

    def neuron(request: Request) -> Response:
        name = neuron_of_file(request.path_params["name"])
        if name is None:
            raise HTTPException(404)
        return HTMLResponse(
            pages.neuron(request.path_params["split"], name, root="../../", shown=_shown(request))
        )

    def found(request: Request) -> Response:
        query = query_of(request.query_params.multi_items(), first)
        return HTMLResponse(pages.search(query, search(site, query), root=""))

    texts = {name: asset(name) for name in _ASSETS}

    def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in texts:
            raise HTTPException(404)
        return Response(texts[name], media_type=_ASSETS[name])

    def wrong(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            message, status = "There is no such page.", error.status_code
        else:
            message, status = str(error), 404
        root = "../" * max(0, request.url.path.count("/") - 1)
        return HTMLResponse(error_page(message, root=root), status_code=status)

    handlers: dict[Any, Any] = {JaxplainError: wrong, HTTPException: wrong}
    return Starlette(
        routes=[
            Route("/", overview),
            Route("/index.html", overview),
            Route("/overview/{split}.html", overview),
            Route("/neuron/{split}/{name}", neuron),
            Route("/search.html", found),
            Route("/assets/{name}", file),
        ],
        middleware=[
            Middleware(_Headers),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
            Middleware(GZipMiddleware, minimum_size=2000, compresslevel=1),
        ],
        exception_handlers=handlers,
    )


def _shown(request: Request) -> int | None:
    text = request.query_params.get("show", "")
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and 0 < int(text[:9]) <= _MOST_SHOWN):
        raise JaxplainError(f"show is {text[:40]!r}; give a number from 1 to {_MOST_SHOWN}.")
    return int(text[:9])


class _Headers:
    """Adds HEADERS to every answer, errors included."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        await self._app(scope, receive, with_headers)
