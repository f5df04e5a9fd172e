"""An application's own tables, beside the jobs and none of their business.

The tables are created when a job first needs them. All jobs of a process share a few connections, so that a hundred jobs at
a time do not need a hundred of them.
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

Pool = AsyncConnectionPool[AsyncConnection[Any]]

MAX_CONNECTIONS = 8
WAIT_SECONDS = 120.0
"""For a connection, while a hundred jobs share eight of them: longer means that something is stuck."""


class Tables:
    """The tables of one application: `async with TABLES.open(dsn) as pool:` around the work of a job.

    Args:
        schema: the schema that holds them; also the application_name of the connections.
        definition: SQL that creates them and can be run again.
    """

    def __init__(self, schema: str, definition: str) -> None:
        self.schema = schema
        self.definition = definition
        self._pool: Pool | None = None
        self._users = 0

    @asynccontextmanager
    async def open(self, dsn: str) -> AsyncIterator[Pool]:
        """Lend the connections; they are closed when the last user has left. Raises PoolTimeout after 120 s without one."""
        pool = self._pool
        if pool is None:
            settings = {"autocommit": True, "application_name": self.schema}
            pool = self._pool = AsyncConnectionPool(
                dsn, kwargs=settings, min_size=1, max_size=MAX_CONNECTIONS, timeout=WAIT_SECONDS, open=False
            )
        self._users += 1
        try:
            await pool.open()
            await self._create(pool)
            yield pool
        finally:
            self._users -= 1
            if self._users == 0:
                self._pool = None
                await pool.close()

    async def _create(self, pool: Pool) -> None:
        async with pool.connection() as connection:
            found = await connection.execute(
                "select obj_description(to_regnamespace(%s), 'pg_namespace')", (self.schema,)
            )
            # The comment says which definition was run: a later version of the example adds what it needs.
            version = f"{zlib.crc32(self.definition.encode()):08x}"
            if await found.fetchone() == (version,):
                return
            async with connection.transaction():
                # Two workers must not create them at the same time.
                await connection.execute("select pg_advisory_xact_lock(hashtext(%s))", (self.schema,))
                await connection.execute("set local client_min_messages = warning")
                await connection.execute(f"create schema if not exists {self.schema}")
                await connection.execute(self.definition)
                await connection.execute(f"comment on schema {self.schema} is '{version}'")
