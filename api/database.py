"""The API's connections: a small pool, opened when first needed, that recovers by itself when the database does."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from jobqueue.database.pool import connect_async, is_pooled, open_pool
from jobqueue.errors import ConfigurationError, DatabaseUnavailable
from jobqueue.settings import Settings, resolve_dsn

logger = logging.getLogger(__name__)

Read = TypeVar("Read")

API_ROLE = "jobqueue_api"
APPLICATION_NAME = "jobqueue api"
# The pool doubles its waits between attempts; given up after this long, the next request begins anew.
RECONNECT_SECONDS = 5.0

GRACE_SECONDS = 2.0
"""Beyond the statement's time-out, before a server that does not answer at all is given up."""

_MAY_TAKE_ROLE = """\
select
    case when current_setting('server_version_num')::int >= 160000
        then pg_has_role(session_user, 'jobqueue_api', 'SET')
        else pg_has_role(session_user, 'jobqueue_api', 'MEMBER') end,
    exists (
        select from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where n.nspname = 'jobqueue' and c.relname = 'job' and pg_has_role(session_user, c.relowner, 'USAGE')),
    (select rolbypassrls from pg_roles where rolname = session_user)
"""


class Database:
    """Statements on pooled connections.

    `pool_size`: connections at most (4). `patience`: seconds that a request waits for one (5), then it is answered 503.
    `role` is what each transaction takes upon itself: jobqueue_api, or None if the login user may not take it and is
    bound by the row policies in its own name.
    """

    def __init__(self, settings: Settings, dsn: str | None, *, pool_size: int = 4, patience: float = 5.0) -> None:
        self.settings = settings
        self.role: str | None = API_ROLE
        self.patience = patience
        self._dsn = dsn
        self._pool_size = pool_size
        self._pool: AsyncConnectionPool[AsyncConnection[Any]] | None = None
        self._pooled = settings.pooler
        self._opening = asyncio.Lock()

    @property
    def can_listen(self) -> bool:
        """Whether there is a direct connection to listen on."""
        return bool(self.settings.listen_dsn) or not self._pooled

    async def open(self, timeout: float = 0.0) -> AsyncConnectionPool[AsyncConnection[Any]]:
        """Open the pool unless it is open. `timeout`: seconds to wait for the server (0: one attempt).

        Raises DatabaseUnavailable, and ConfigurationError if the login user would see all tenants' rows.
        """
        async with self._opening:
            if self._pool is None:
                dsn = await self.dsn()
                if not self.settings.pooler:
                    # In the start-up message: no round trip. A pooler would refuse it, or give it to somebody else.
                    dsn = _with_timeout(dsn, self.settings.api_statement_timeout)
                pool = await open_pool(
                    dsn, 1, self._pool_size, APPLICATION_NAME, pooler=self.settings.pooler, timeout=timeout
                )
                pool.reconnect_timeout = RECONNECT_SECONDS
                try:
                    await self._choose_role(pool)
                except BaseException:
                    await pool.close()
                    raise
                self._pool = pool
            return self._pool

    async def close(self) -> None:
        """Close the pool; the next statement would open it again."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close()

    def connections(self) -> dict[str, int]:
        """Return how many connections of the pool are idle and used, and how many requests wait for one."""
        found = self._pool.get_stats() if self._pool is not None else {}
        size, idle = found.get("pool_size", 0), found.get("pool_available", 0)
        return {"idle": idle, "used": size - idle, "waiting": found.get("requests_waiting", 0)}

    async def dsn(self) -> str:
        """Return the connection string; without any, start the embedded server."""
        if self._dsn is None:
            self._dsn = resolve_dsn(self.settings)
        if self._dsn is None:
            self._dsn = await asyncio.to_thread(_embedded_dsn, self.settings)
        return self._dsn

    async def connect_listener(self) -> AsyncConnection[Any]:
        """Open a connection of its own for LISTEN. Raises DatabaseUnavailable."""
        return await connect_async(self.settings.listen_dsn or await self.dsn(), APPLICATION_NAME + " listener")

    @asynccontextmanager
    async def connection(self, timeout: float | None = None) -> AsyncIterator[AsyncConnection[Any]]:
        """Lend a connection (autocommit). `timeout`: seconds to wait for one; None: `patience`."""
        pool = self._pool or await self.open()
        async with pool.connection(self.patience if timeout is None else timeout) as connection:
            yield connection

    async def rows(
        self, query: str, parameters: Sequence[Any], *, read_only: bool = False, prepare: bool | None = None
    ) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows. A read that meets a dead connection is tried once more."""
        if not read_only:
            return await self._rows(query, parameters, prepare)
        return await self.reading(lambda: self._rows(query, parameters, prepare))

    async def reading(self, read: Callable[[], Awaitable[Read]]) -> Read:
        """Run what only reads; once more if it met a dead connection: after a restart of the server all may be dead."""
        try:
            return await read()
        except psycopg.OperationalError as error:
            if isinstance(error, PoolTimeout) or not _is_lost(error) or self._pool is None:
                raise
            await self._pool.check()
            return await read()

    async def _rows(self, query: str, parameters: Sequence[Any], prepare: bool | None) -> list[tuple[Any, ...]]:
        async with self.connection() as connection:
            try:
                async with asyncio.timeout(self.settings.api_statement_timeout + GRACE_SECONDS):
                    cursor = await connection.execute(query.encode(), parameters, prepare=prepare)
                    return await cursor.fetchall()
            except TimeoutError:
                raise psycopg.errors.QueryCanceled("the server does not answer") from None

    async def _choose_role(self, pool: AsyncConnectionPool[AsyncConnection[Any]]) -> None:
        try:
            async with pool.connection(self.patience) as connection:
                self._pooled = is_pooled(connection)
                row = await (await connection.execute(_MAY_TAKE_ROLE)).fetchone()
        except psycopg.errors.UndefinedObject:
            # No such role, so no schema yet: /readyz says so, and once there is one the role can be taken.
            return
        assert row is not None
        may_take, owns, bypasses = row
        if may_take:
            self.role = API_ROLE
        elif owns or bypasses:
            raise ConfigurationError(
                f"the login user of the API cannot take the role {API_ROLE}, and is bound by no row policy either",
                hint=f"Run: grant {API_ROLE} to <the user in JOBQUEUE_DSN>",
            )
        else:
            self.role = None


def _is_lost(error: psycopg.OperationalError) -> bool:
    # 57014 is a statement that took too long, and would take as long again.
    return error.sqlstate is None or (error.sqlstate[:2] in {"08", "57"} and error.sqlstate != "57014")


def _with_timeout(dsn: str, seconds: float) -> str:
    given = conninfo_to_dict(dsn).get("options") or os.environ.get("PGOPTIONS", "")
    return make_conninfo(dsn, options=f"{given} -c statement_timeout={round(seconds * 1000)}".strip())


def _embedded_dsn(settings: Settings) -> str:
    from jobqueue.database.embedded import EmbeddedServer, EmbeddedServerError, default_data_dir

    try:
        return EmbeddedServer(settings.data_dir or default_data_dir()).start(timeout=settings.start_timeout)
    except EmbeddedServerError as error:
        raise DatabaseUnavailable(f"the embedded server does not start: {error}") from error
