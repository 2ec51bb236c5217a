"""ASGI application (FastAPI): routes, error handlers, middleware, lifespan of the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response

from .async_engine import AsyncEngine
from .config import ServerConfig
from .handlers import FINGERPRINT, Service
from .metrics import Metrics
from .middleware import RequestMiddleware
from .model_pool import FurtherModel, ModelPool
from .openai import schemas
from .openai.errors import APIError
from .openai.schemas import answers
from .request_body import BodyRoute
from .routes import add_model_routes
from .ui.playground import Playground, available
from .ui.static_pages import docs_page, landing_page


def create_app(
    make: Callable[[], Any],
    config: ServerConfig | None = None,
    keys: tuple[str, ...] = (),
    on_failure: Callable[[], None] = lambda: None,
    further: Mapping[str, FurtherModel] | None = None,
    memory: int = 0,
) -> FastAPI:
    """The ASGI application of one engine. `make()` builds its `LLM`, in a thread, once the server listens.

    `on_failure()` is called when the engine has failed for good. `further` models are loaded when they are asked for,
    as many at a time as `memory` bytes hold.
    """
    config = config or ServerConfig()
    config = replace(config, name=config.name or "warploom")
    bridge = AsyncEngine(make, config, on_failure)
    metrics = Metrics(lambda: models.engines)
    service = Service(bridge, config, metrics)
    models = ModelPool(service, further or {}, memory)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await bridge.start()
        yield
        try:
            if playground:
                await playground.close()
        finally:
            await models.stop()
            await bridge.stop()

    app = FastAPI(
        title="warploom",
        version=FINGERPRINT.removeprefix("warploom-"),
        description="A language model behind the OpenAI protocol.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
    )
    app.router.route_class = BodyRoute
    app.state.bridge, app.state.service, app.state.metrics = bridge, service, metrics
    app.state.models = models
    _add_errors(app)
    add_model_routes(app, models)
    _add_other_routes(app, bridge, metrics)
    playground = _add_page(app, service, config)
    app.add_middleware(RequestMiddleware, config=config, keys=keys, visits=metrics.visits)
    if config.cors_origins:
        app.add_middleware(CORSMiddleware, **allowed_origins(config))
    _describe(app)
    return app


def allowed_origins(config: ServerConfig) -> dict[str, Any]:
    """CORS settings: which other origins may call this server from a browser."""
    origins = {"allow_origins": config.cors_origins, "allow_methods": ["*"], "allow_headers": ["*"]}
    return {**origins, "expose_headers": ["x-request-id"]}


def _add_other_routes(app: FastAPI, bridge: AsyncEngine, metrics: Metrics) -> None:
    unhealthy = {503: {"model": schemas.Health}, 200: {"model": schemas.Health}}

    @app.api_route("/version", methods=["GET"], responses=answers(schemas.Version), tags=["server"])
    async def version() -> Response:
        """The version of this server."""
        return JSONResponse({"version": app.version})

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=unhealthy, tags=["server"])
    async def health() -> Response:
        """200 if requests are served, else 503 with the reason. Needs no key."""
        ready = bridge.engine_ready
        return JSONResponse({"status": "ok" if ready else bridge.state}, 200 if ready else 503)

    text = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, 401: {"model": schemas.ErrorAnswer}}

    @app.get("/metrics", responses=text, response_class=Response, tags=["server"])
    async def show_metrics() -> Response:
        """Prometheus metrics."""
        return Response(metrics.text(), headers={"content-type": metrics.content_type})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """API reference on one page that loads nothing from elsewhere."""
        return HTMLResponse(docs_page(app.openapi()))


def _add_page(app: FastAPI, service: Service, config: ServerConfig) -> Playground | None:
    """Add the page at /: the playground (which gets all routes nobody else has), or a landing page."""
    if config.ui and available():
        playground = Playground(service)
        app.router.default = playground
        return playground

    @app.get("/", include_in_schema=False)
    async def landing() -> Response:
        """Landing page that says what is served and how to get the playground."""
        return HTMLResponse(landing_page(config))

    return None


def _add_errors(app: FastAPI) -> None:
    def answer(error: APIError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    async def known(request: Request, error: APIError) -> Response:
        body = {"type": "error", **error.body} if request.url.path.startswith("/v1/messages") else error.body
        return JSONResponse(body, error.status, error.headers)

    async def http(request: Request, error: HTTPException) -> Response:
        headers = Headers(error.headers or {})
        says, path = str(error.detail), request.url.path[:100]
        if error.status_code == 404:
            routes = [route.path for route in app.routes if isinstance(route, APIRoute)]
            near = get_close_matches(path, routes, 1, cutoff=0.75)
            says = f"there is no {path} here{f': did you mean {near[0]}?' if near else ';'} /docs lists the routes"
        elif allowed := headers.get("allow"):
            says = f"{path} takes {allowed}, not {request.method}"
        return answer(APIError(error.status_code, says, headers=dict(error.headers or {})))

    app.add_exception_handler(APIError, known)
    app.add_exception_handler(HTTPException, http)


def _describe(app: FastAPI) -> None:
    """Fix the OpenAPI description: FastAPI documents a 422 that we never send (invalid bodies get OpenAI's 400)."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            for path in describe()["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        return app.openapi_schema

    app.openapi = openapi
