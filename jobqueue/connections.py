"""Connections that are lent for one piece of work, asynchronous and blocking ones, opened when first needed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psycopg import AsyncConnection, Connection
    from psycopg_pool import AsyncConnectionPool, ConnectionPool


class Connections:
    """Two pools on one DSN.

    `max_size`: connections of each kind at most (default 10). `timeout`: seconds to wait for the server when the first
    one is opened, and for a free connection afterwards. All connections are in autocommit mode.
    The asynchronous pool belongs to the event loop that used it last: another loop gets a pool of its own.
    """

    def __init__(
        self,
        dsn: str,
        *,
        application_name: str = "jobqueue",
        pooler: bool = False,
        max_size: int = 10,
        timeout: float = 60.0,
    ) -> None:
        self.dsn = dsn
        self._application_name = application_name
        self._pooler = pooler
        self._max_size = max_size
        self._timeout = timeout
        self._pool: AsyncConnectionPool[AsyncConnection[Any]] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening: asyncio.Lock | None = None
        self._lent: weakref.WeakSet[AsyncConnection[Any]] = weakref.WeakSet()
        self._blocking_pool: ConnectionPool[Connection[Any]] | None = None
        self._blocking_lock = threading.Lock()

    @contextlib.asynccontextmanager
    async def lend(self) -> AsyncIterator[AsyncConnection[Any]]:
        """Lend an asynchronous connection. Raises DatabaseUnavailable if the server cannot be reached at first."""
        pool = await self._opened()
        async with pool.connection() as connection:
            self._lent.add(connection)
            yield connection

    @contextlib.contextmanager
    def lend_blocking(self) -> Iterator[Connection[Any]]:
        """Lend a blocking connection, to any thread. Raises as of `lend`."""
        with self._opened_blocking().connection() as connection:
            yield connection

    def cut(self) -> None:
        """Cut the asynchronous connections, lent ones too, without closing them: what waits on one fails at once."""
        for connection in list(self._lent):
            if not connection.closed:
                with socket.socket(fileno=os.dup(connection.fileno())) as handle, contextlib.suppress(OSError):
                    handle.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """Close everything; a later use opens it again."""
        pool, self._pool = self._pool, None
        if pool is not None:
            if self._loop is asyncio.get_running_loop():
                await pool.close()
            else:
                self._abandon()
        if self._blocking_pool is not None:
            await asyncio.to_thread(self.close_blocking)

    def close_blocking(self) -> None:
        """Close the blocking connections."""
        with self._blocking_lock:
            pool, self._blocking_pool = self._blocking_pool, None
        if pool is not None:
            pool.close()

    async def _opened(self) -> AsyncConnectionPool[AsyncConnection[Any]]:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._abandon()
            self._loop, self._pool, self._opening = loop, None, asyncio.Lock()
        if self._pool is not None:
            return self._pool
        assert self._opening is not None
        async with self._opening:
            if self._pool is None:
                self._pool = await self._open()
        return self._pool

    async def _open(self) -> AsyncConnectionPool[AsyncConnection[Any]]:
        from jobqueue.database.pool import open_pool

        return await open_pool(
            self.dsn, 1, self._max_size, self._application_name, pooler=self._pooler, timeout=self._timeout
        )

    def _opened_blocking(self) -> ConnectionPool[Connection[Any]]:
        with self._blocking_lock:
            if self._blocking_pool is None:
                self._blocking_pool = self._open_blocking()
            return self._blocking_pool

    def _open_blocking(self) -> ConnectionPool[Connection[Any]]:
        from jobqueue.database.alive import LiveBlockingPool
        from jobqueue.database.pool import configure_blocking, connect, connection_options

        # The pool itself would only say "timeout": this one learns the reason, and whether the server is too old.
        connect(self.dsn, self._application_name, pooler=self._pooler, timeout=self._timeout).close()
        return LiveBlockingPool(
            self.dsn,
            kwargs=connection_options(self.dsn, self._application_name, pooler=self._pooler),
            min_size=1,
            max_size=self._max_size,
            configure=configure_blocking,
            name=self._application_name,
            timeout=self._timeout,
            open=True,
        )

    def _abandon(self) -> None:
        """Let go of connections whose event loop has ended: nothing can be awaited for them any more."""
        for connection in list(self._lent):
            connection.pgconn.finish()
        self._lent.clear()
