"""The application: settings, services and the operation table put together."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jobqueue import __version__
from jobqueue.api import actions, administration, bulk, docs_page, events, groups, history, jobs, lists, metrics, probes
from jobqueue.api.authenticators import ApiKeys, DefaultAuthenticator
from jobqueue.api.context import Call, Services
from jobqueue.api.database import Database
from jobqueue.api.encoding import dump_json
from jobqueue.api.endpoint import Endpoint, error_answer
from jobqueue.api.feed import Feed
from jobqueue.api.hub import Hub
from jobqueue.api.identity import Authenticator
from jobqueue.api.limits import MAX_BODY_BYTES
from jobqueue.api.meter import Meter
from jobqueue.api.metrics import Numbers
from jobqueue.api.openapi import build_document
from jobqueue.api.operations import Operation, Reply
from jobqueue.api.paths import Paths
from jobqueue.api.probes import Readiness
from jobqueue.api.quotas import Quotas
from jobqueue.api.reads import Reads
from jobqueue.api.security import EXPOSED_HEADERS, Headers
from jobqueue.api.shutdown import waits_end_at_signals
from jobqueue.api.tickets import Tickets
from jobqueue.api.tokens import make_tokens
from jobqueue.api.ui import routes as ui
from jobqueue.database.migrations import check_schema_async
from jobqueue.settings import Settings, load_settings

ALLOWED_HEADERS = ("Authorization", "Content-Type", "Idempotency-Key", "If-None-Match", "X-Request-Id")
TRACE_HEADERS = ("traceparent", "tracestate", "baggage")


async def get_document(call: Call) -> Response:
    """Answer with the OpenAPI document of this installation; mounted in another application, with its path there."""
    document: bytes = call.scope["app"].state.openapi
    if mounted_at := call.scope.get("root_path", ""):
        url = mounted_at + call.services.settings.api_prefix
        document = dump_json({**json.loads(document), "servers": [{"url": url}]})
    return Response(document, media_type="application/json")


OPERATIONS: tuple[Operation, ...] = (
    # Paths with fixed words before those with {id} in the same place.
    *lists.OPERATIONS,
    *bulk.OPERATIONS,
    *jobs.OPERATIONS,
    *actions.OPERATIONS,
    *history.OPERATIONS,
    *events.OPERATIONS,
    *groups.OPERATIONS,
    *administration.OPERATIONS,
    *probes.OPERATIONS,
    *metrics.OPERATIONS,
    Operation(
        name="openapi",
        method="GET",
        path="/openapi.json",
        summary="This document",
        handler=get_document,
        tag="about",
        replies={200: Reply("The OpenAPI 3.1 document")},
    ),
    Operation(
        name="docs",
        method="GET",
        path="/docs",
        summary="This document for people",
        handler=docs_page.get_docs,
        tag="about",
        replies={200: Reply("A page", media="text/html")},
    ),
)


def create_app(
    settings: Settings | None = None,
    *,
    dsn: str | None = None,
    pool_size: int = 4,
    patience: float = 5.0,
    max_body_bytes: int = MAX_BODY_BYTES,
    authenticator: Authenticator | None = None,
) -> Starlette:
    """Return the HTTP API as an ASGI application.

    `settings`: None reads them (`JOBQUEUE_*`, `jobqueue.toml`). `dsn`: wins over the settings'; without any the
    embedded server is used. `pool_size`: database connections at most, besides one that listens. `patience`: seconds
    that a request waits for a connection before it is answered 503. `max_body_bytes`: larger bodies are answered 413.
    `authenticator`: says who sent a request, instead of API keys and tokens; for an application that mounts this one
    and knows its users (docs/guide/http-security.md).

    Its lifespan waits for the database (`JOBQUEUE_START_TIMEOUT`) and raises DatabaseUnavailable, SchemaOutdated or
    SchemaTooNew. A server that has no lifespan may use the application too: connections are opened when needed.
    """
    settings = settings or load_settings()
    database = Database(settings, dsn, pool_size=pool_size, patience=patience)
    services = Services(
        settings,
        database,
        Hub(database),
        Readiness(database),
        authenticator or DefaultAuthenticator(ApiKeys(database), make_tokens(settings)),
        Quotas(database),
        Tickets(database),
        Reads(database),
        max_body_bytes,
    )
    meter = Meter()
    app = Starlette(
        routes=[Paths(_routes(services, _operations(settings))), *ui.routes(services)],
        middleware=_middleware(settings, meter),
        exception_handlers={Exception: _answer_error, 404: _answer_error, 405: _answer_error},
        lifespan=_lifespan,
    )
    app.router.redirect_slashes = False
    app.state.services = services
    app.state.feed = Feed(database, services.hub)
    app.state.meter, app.state.numbers, app.state.version = meter, Numbers(database), __version__
    app.state.job_links = {operation.link: operation.path for operation in OPERATIONS if operation.link}
    app.state.openapi, app.state.docs = _documents(settings.api_prefix, settings.tenant_segment)
    return app


@cache
def _documents(prefix: str, tenant_segment: str) -> tuple[bytes, str]:
    """The OpenAPI document and its page; a fifth of a second to make."""
    document = build_document(OPERATIONS, prefix, tenant_segment)
    return dump_json(document), docs_page.build_page(document)


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    services: Services = app.state.services
    await services.database.open(services.settings.start_timeout)
    try:
        async with services.database.connection() as connection:
            await check_schema_async(connection)
        services.hub.start()
        app.state.meter.start(services, app.state.feed)
        with waits_end_at_signals():
            yield
    finally:
        await app.state.meter.stop()
        await services.hub.stop()
        await services.quotas.stop()
        await services.database.close()


def _middleware(settings: Settings, meter: Meter) -> list[Middleware]:
    found = [Middleware(Headers, access_log=settings.api_access_log, meter=meter)]
    if settings.api_cors_origins:
        # No credentials: keys travel in a header that scripts set themselves, and the dashboard's cookie is for its own pages.
        found.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.api_cors_origins,
                allow_methods=["GET", "HEAD", "POST", "PATCH", "DELETE"],
                allow_headers=[*ALLOWED_HEADERS, *(TRACE_HEADERS if settings.otel else ())],
                expose_headers=EXPOSED_HEADERS,
                max_age=600,
            )
        )
    return found


def _operations(settings: Settings) -> Iterable[Operation]:
    """The table; traced if the settings say so. Raises ConfigurationError if OpenTelemetry is not installed."""
    if not settings.otel:
        return OPERATIONS
    from jobqueue.instrumentation import require_opentelemetry

    require_opentelemetry()
    from jobqueue.api.tracing import traced

    return traced(OPERATIONS)


def _routes(services: Services, operations: Iterable[Operation]) -> list[Route]:
    """One route per path, in the order of the table; each path knows its methods."""
    prefix, segment = services.settings.api_prefix, services.settings.tenant_segment
    by_base: dict[tuple[str, str], dict[str, Operation]] = {}
    for operation in operations:
        bases = [prefix]
        if operation.of_tenant:
            bases.append(f"{prefix}/{segment}/{{tenant}}")
        if (operation.is_probe or operation.at_root) and prefix:
            bases.append("")
        for base in bases:
            by_base.setdefault((base, operation.path), {})[operation.method] = operation
    return [Route(base + path, Endpoint(services, base, methods)) for (base, path), methods in by_base.items()]


async def _answer_error(request: Request, error: Any) -> Response:
    return error_answer(request.scope, error)
