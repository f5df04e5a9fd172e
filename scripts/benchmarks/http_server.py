"""A measured server: the API, or a bare Starlette route that selects the row. Both by uvicorn, with a pool of one size."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from psycopg_pool import AsyncConnectionPool
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from benchmarks.children import STOP, answer, arguments, say_ready, wait_for_word
from jobqueue.api import create_app
from jobqueue.database.pool import open_pool
from jobqueue.settings import load_settings

STATE = "/bench-state"
BARE = "select row_to_json(j)::text from jobqueue.job j where j.id = %s"


def bare_app(dsn: str, pool_size: int) -> Starlette:
    """What anybody would write: one route, one statement, the row as JSON made by the database."""
    pools: list[AsyncConnectionPool[Any]] = []

    async def get(request: Request) -> Response:
        async with pools[0].connection() as connection:
            row = await (await connection.execute(BARE, (request.path_params["id"],))).fetchone()
        return Response(row[0] if row else "", status_code=200 if row else 404, media_type="application/json")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        pools.append(await open_pool(dsn, 1, pool_size, "bench bare"))
        yield
        await pools[0].close()

    return Starlette(routes=[Route("/jobs/{id}", get)], lifespan=lifespan)


def product_app(dsn: str, pool_size: int) -> Starlette:
    """The API as `jobqueue api` serves it, and a route that says how many requests wait and who has connections."""
    app = create_app(load_settings(dsn=dsn, api_access_log=False), pool_size=pool_size)
    services = app.state.services

    async def state(request: Request) -> Response:
        found = (await services.database.open()).get_stats()
        in_use = found["pool_size"] - found["pool_available"]
        return JSONResponse({"waiting": services.hub.waiting, "open": found["pool_size"], "in_use": in_use})

    app.router.routes.append(Route(STATE, state))
    return app


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        say_ready()
        threading.Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        while wait_for_word() != STOP:
            pass
        self.should_exit = True


def main() -> None:
    """Serve until told to stop."""
    given = arguments()
    allow_many_sockets()
    make = bare_app if given["bare"] else product_app
    config = uvicorn.Config(
        make(given["dsn"], given["pool_size"]),
        port=given["port"],
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=2048,
        timeout_graceful_shutdown=5,
    )
    asyncio.set_event_loop_policy(None)
    _Server(config).run()
    answer({})


def allow_many_sockets() -> None:
    """Raise the soft limit on open files to the hard one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
