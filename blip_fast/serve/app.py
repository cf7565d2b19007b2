"""The web application: the API, the page and its files, the operators' routes, and the guard around them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from blip_fast.serve.http.guard import Guard
from blip_fast.serve.reference import reference_page
from blip_fast.serve.refusals import Refused, draining, internal, not_ready
from blip_fast.serve.routes import routes
from blip_fast.serve.service import Service

PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
         ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml", ".png": "image/png"}
METRICS = "text/plain; version=0.0.4; charset=utf-8"


def make_app(service: Service) -> Guard:
    """The application of a service. It starts and stops the service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(title="blip-fast", version=service.info()["version"], docs_url=None, redoc_url=None,
                  redirect_slashes=False, lifespan=lifespan,
                  description="Captions, scores, answers and search for pictures, by BLIP.")
    app.state.service = service
    app.include_router(routes)
    _add_page(app)
    _add_operation(app, service)
    app.add_exception_handler(Refused, _refuse)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(Exception, _fail)
    return Guard(app, service.settings, service.house, service.observing)


def _add_page(app: FastAPI) -> None:
    """Serve the page and its files. They are read once, here, and only these can be requested."""
    files = {file.name: Response(file.read_bytes(), media_type=TYPES[file.suffix])
             for file in sorted(PAGE.glob("*")) if file.suffix in TYPES}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _page_file(files, "index.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return _page_file(files, name)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(reference_page(app.openapi()))


def _add_operation(app: FastAPI, service: Service) -> None:
    @app.get("/health", summary="Whether the server lives", tags=["operation"])
    async def health() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @app.get("/ready", tags=["operation"],
             summary="Whether all workers have a model; 503 until then, and while the server shuts down")
    async def ready() -> JSONResponse:
        if not service.ready:
            raise draining() if service.house.draining else not_ready()
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", summary="For Prometheus", tags=["operation"], response_class=Response)
    async def metrics() -> Response:
        return Response(service.observing.text(), media_type=METRICS)


def _page_file(files: dict[str, Response], name: str) -> Response:
    if name not in files:
        raise Refused(404, "not_found", "There is no such page.")
    return files[name]


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return JSONResponse(error.body(), error.status, error.headers())


async def _refuse_route(request: Request, error: Exception) -> JSONResponse:
    """Unknown routes and methods, which the framework itself refuses."""
    assert isinstance(error, HTTPException)
    codes = {404: ("not_found", "There is no such page: see /docs."),
             405: ("wrong_method", "This page does not take that method: see /docs.")}
    code, message = codes.get(error.status_code, ("refused", "The request is refused: see /docs."))
    return JSONResponse(Refused(error.status_code, code, message).body(), error.status_code, error.headers)


async def _fail(request: Request, error: Exception) -> JSONResponse:
    """An unexpected error. The guard logs it."""
    return JSONResponse(internal().body(), 500)
