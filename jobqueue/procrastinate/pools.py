"""Where the jobs live, as procrastinate's connectors say it: the arguments of a psycopg pool, or nothing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from psycopg.conninfo import make_conninfo

from jobqueue.database.pool import connection_options

APPLICATION_NAME = "jobqueue procrastinate"
NOT_OF_LIBPQ = ("autocommit", "row_factory", "cursor_factory", "prepare_threshold", "context")


def pool_arguments(dsn: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a pool on `dsn`; what is given wins.

    Its connections are in autocommit mode: one statement is one transaction, without a round trip to begin and to end it.
    """
    arguments = {"conninfo": dsn, **given} if dsn is not None else dict(given)
    place = conninfo_of(arguments.get("conninfo"), arguments.get("kwargs"))
    arguments["kwargs"] = {**connection_options(place, APPLICATION_NAME), **(arguments.get("kwargs") or {})}
    return arguments


def is_placed(dsn: str | None, given: Mapping[str, Any]) -> bool:
    """Whether the arguments say where the database is."""
    return dsn is not None or "conninfo" in given or bool(given.get("kwargs"))


def configured_dsn() -> str:
    """Return where the settings (`JOBQUEUE_DSN`, …) say that the jobs live. Blocking; may start the embedded server."""
    from jobqueue.app import App

    return App().resolve_dsn()


async def dsn_of_pool(pool: Any) -> str:
    """Return the connection string of a pool's connections, for those that a worker opens itself."""
    conninfo, kwargs = pool.conninfo, pool.kwargs
    # Either may be a function in psycopg_pool 3.3 and later.
    conninfo = await _value(conninfo)
    return conninfo_of(conninfo, await _value(kwargs))


async def _value(value: Any) -> Any:
    if callable(value):
        value = value()
    return await value if inspect.isawaitable(value) else value


def conninfo_of(conninfo: Any, kwargs: Any) -> str:
    """Return one connection string from a pool's two ways to say it."""
    text = conninfo if isinstance(conninfo, str) else ""
    options = kwargs if isinstance(kwargs, Mapping) else {}
    known = {name: value for name, value in options.items() if name not in NOT_OF_LIBPQ and value is not None}
    return make_conninfo(text, **known)
