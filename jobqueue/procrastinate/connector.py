"""`JobqueueConnector`: an asynchronous procrastinate connector whose jobs live in `jobqueue.job`."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from uuid import UUID, uuid4

from procrastinate import connector as procrastinate_connector
from procrastinate import exceptions
from procrastinate.psycopg_connector import PsycopgConnector
from procrastinate.schema import SchemaManager
from psycopg import AsyncConnection
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from jobqueue.procrastinate.backstage import Backstage
from jobqueue.procrastinate.failures import as_procrastinate
from jobqueue.procrastinate.ids import job_uuid
from jobqueue.procrastinate.listening import listen
from jobqueue.procrastinate.pools import configured_dsn, conninfo_of, dsn_of_pool, is_placed, pool_arguments
from jobqueue.procrastinate.queries import check_queries
from jobqueue.procrastinate.statements import Row, end_of, ending, number_ids, retry_end, translate
from jobqueue.procrastinate.sync_connector import SyncJobqueueConnector
from jobqueue.procrastinate.tracing import Instrumented, deferring
from jobqueue.worker.resilience import Backoff

WORKER_QUERIES = frozenset({"register_worker", "unregister_worker", "update_heartbeat", "fetch_job"})
PATIENT_SECONDS = 600.0
"""How long a periodic task's tick waits for a database that is away, before the stock worker learns of it and stops."""

logger = logging.getLogger(__name__)


class JobqueueConnector(Instrumented, PsycopgConnector):
    """`procrastinate.App(connector=JobqueueConnector("postgresql://…"))`: the application stays as it is.

    `dsn`: where the jobs live; default: `conninfo`/`kwargs` among `pool_options`, else the settings (`JOBQUEUE_DSN`, …).
    `json_dumps`, `json_loads`, `pool_factory` and all other arguments are those of procrastinate's PsycopgConnector.
    The schema must be there (`jobqueue migrate up`); `procrastinate schema --apply` does the same.

    Raises ConfigurationError if the installed procrastinate is a version whose queries are not known.
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        json_dumps: Callable[..., Any] | None = None,
        json_loads: Callable[..., Any] | None = None,
        pool_factory: Callable[..., AsyncConnectionPool[Any]] = AsyncConnectionPool,
        **pool_options: Any,
    ) -> None:
        self._names = check_queries()
        self._dsn = dsn
        self._given = pool_options
        placed = pool_arguments(dsn, pool_options) if is_placed(dsn, pool_options) else dict(pool_options)
        super().__init__(json_dumps=json_dumps, json_loads=json_loads, pool_factory=pool_factory, **placed)
        self._backstages: dict[UUID, Backstage] = {}
        self._unheard: deque[Backstage] = deque()
        self._for_threads: SyncJobqueueConnector | None = None
        self._lock = threading.Lock()

    # -- life ----------------------------------------------------------------------------------------------------------

    @property
    def json_encoder(self) -> Callable[[Any], str]:
        """The application's JSON encoder, or the standard one."""
        return self._json_dumps or json.dumps

    @property
    def json_decoder(self) -> Callable[[Any], Any]:
        """The application's JSON decoder, or the standard one."""
        return self._json_loads or json.loads

    def get_sync_connector(self) -> procrastinate_connector.BaseConnector:
        """The connector itself once it is open, else a blocking one with the same arguments."""
        if self._async_pool:
            return self
        if self._sync_connector is None:
            self._sync_connector = SyncJobqueueConnector(
                self._dsn, json_dumps=self._json_dumps, json_loads=self._json_loads, **self._given
            )
            self._sync_connector.telemetry = self.telemetry
        return self._sync_connector

    def execute_query(self, query: Any, **arguments: Any) -> None:
        """The blocking form, for tasks in threads and other blocking code of an open application."""
        self._blocking().execute_query(query, **arguments)

    def execute_query_one(self, query: Any, **arguments: Any) -> Row:
        """The blocking form of `execute_query_one_async`."""
        return self._blocking().execute_query_one(query, **arguments)

    def execute_query_all(self, query: Any, **arguments: Any) -> list[Row]:
        """The blocking form of `execute_query_all_async`."""
        return self._blocking().execute_query_all(query, **arguments)

    def execute_query_one_with_connection(self, connection: Any, query: Any, **arguments: Any) -> Row:
        """The same in the transaction of a blocking connection of the application's own."""
        return self._blocking().execute_query_one_with_connection(connection, query, **arguments)

    def execute_query_all_with_connection(self, connection: Any, query: Any, **arguments: Any) -> list[Row]:
        """The same in the transaction of a blocking connection of the application's own."""
        return self._blocking().execute_query_all_with_connection(connection, query, **arguments)

    def _blocking(self) -> SyncJobqueueConnector:
        """Blocking calls have connections of their own: a thread of ours is not the event loop's, nor can it wait for it."""
        with self._lock:
            if self._for_threads is None:
                place = conninfo_of(self.pool.conninfo, self.pool.kwargs)
                self._for_threads = SyncJobqueueConnector(
                    place, json_dumps=self._json_dumps, json_loads=self._json_loads, min_size=0, max_size=10
                )
                self._for_threads.telemetry = self.telemetry
                self._for_threads.open()
            return self._for_threads

    async def open_async(self, pool: Any = None) -> None:
        """Open the pool, or use the one that is given. Raises ConnectorException."""
        if pool is None and not is_placed(self._dsn, self._given):
            self._dsn = await asyncio.to_thread(configured_dsn)
            self._pool_args = pool_arguments(self._dsn, self._given)
        self.instrument_as_set()
        await super().open_async(pool)

    async def close_async(self) -> None:
        """Give back what a worker still holds, and close the pool."""
        for backstage in list(self._backstages.values()):
            await self._dismiss(backstage)
        blocking, self._for_threads = self._for_threads, None
        if blocking is not None:
            await asyncio.to_thread(blocking.close)
        await super().close_async()

    async def dsn(self) -> str:
        """Return the connection string in use. The connector must be open."""
        return await dsn_of_pool(self.pool)

    # -- queries -------------------------------------------------------------------------------------------------------

    async def execute_query_async(self, query: Any, **arguments: Any) -> None:
        """Do what a query of procrastinate asks for; other queries go to the database as they are."""
        if query in self._names:
            await self._answer(None, self._names[query], arguments)
        elif query == _applying():
            await self._migrate()
        else:
            await super().execute_query_async(query, **arguments)

    async def execute_query_one_async(self, query: Any, **arguments: Any) -> Row:
        """The same, for one row. Raises NoResult if there is none."""
        if query not in self._names:
            row: Row = await super().execute_query_one_async(query, **arguments)
            return row
        return _first(await self._answer(None, self._names[query], arguments))

    async def execute_query_all_async(self, query: Any, **arguments: Any) -> list[Row]:
        """The same, for all rows."""
        if query not in self._names:
            rows: list[Row] = await super().execute_query_all_async(query, **arguments)
            return rows
        return await self._answer(None, self._names[query], arguments)

    async def execute_query_one_async_with_connection(self, connection: Any, query: Any, **arguments: Any) -> Row:
        """The same in the transaction of a connection of the application's own."""
        if query not in self._names:
            row: Row = await super().execute_query_one_async_with_connection(connection, query, **arguments)
            return row
        return _first(await self._answer(connection, self._names[query], arguments))

    async def execute_query_all_async_with_connection(self, connection: Any, query: Any, **arguments: Any) -> list[Row]:
        """The same in the transaction of a connection of the application's own."""
        if query not in self._names:
            rows: list[Row] = await super().execute_query_all_async_with_connection(connection, query, **arguments)
            return rows
        return await self._answer(connection, self._names[query], arguments)

    async def listen_notify(self, on_notification: procrastinate_connector.Notify, channels: Iterable[str]) -> None:
        """Tell the worker of jobs and of orders to abort, until it is cancelled; outlives restarts of the database."""
        channel = next(iter(channels), "")
        queues = [name.partition("#")[2] for name in channels if "#" in name] or None
        if self._unheard:
            await self._unheard.popleft().listen(on_notification, channel, queues)
        else:
            await listen(await self.dsn(), queues, lambda kind, id: _notify(on_notification, channel, kind, id))

    async def _answer(
        self, connection: AsyncConnection[Any] | None, name: str, arguments: Mapping[str, Any]
    ) -> list[Row]:
        if name in WORKER_QUERIES:
            with as_procrastinate():
                return await self._serve(name, arguments)
        if connection is None and name in ("finish_job", "retry_job") and await self._settle(name, arguments):
            return []
        if self.telemetry is not None and name == "defer_jobs":
            with deferring(self.telemetry, arguments) as traced:
                return traced.note(await self._ask(connection, name, traced.arguments))
        return await self._ask(connection, name, arguments)

    async def _ask(self, connection: AsyncConnection[Any] | None, name: str, arguments: Mapping[str, Any]) -> list[Row]:
        with as_procrastinate():
            statement = translate(name, arguments, self.json_encoder)
        if name == "defer_periodic_job":
            return await self._patiently(statement.sql, statement.parameters)
        return await self._run(connection, statement.sql, statement.parameters)

    async def _run(self, connection: AsyncConnection[Any] | None, query: Any, parameters: tuple[Any, ...]) -> list[Row]:
        with as_procrastinate():
            if connection is not None:
                return await self._rows(connection, query, parameters)
            async with self.pool.connection() as lent:
                return await self._rows(lent, query, parameters)

    async def _rows(self, connection: AsyncConnection[Any], query: Any, parameters: tuple[Any, ...]) -> list[Row]:
        async with connection.cursor(row_factory=dict_row) as cursor:
            if self._json_loads:
                from psycopg.types.json import set_json_loads

                set_json_loads(self._json_loads, context=cursor)
            await cursor.execute(query, parameters)
            return [number_ids(row) for row in await cursor.fetchall()]

    async def _patiently(self, query: Any, parameters: tuple[Any, ...]) -> list[Row]:
        """A database that is away must not end the stock worker, whose deferrer does not try again."""
        loop = asyncio.get_running_loop()
        deadline, backoff = loop.time() + PATIENT_SECONDS, Backoff()
        while True:
            try:
                return await self._run(None, query, parameters)
            except exceptions.ConnectorException as error:
                if not _is_away(error) or loop.time() > deadline:
                    raise
                logger.warning("a periodic task waits for the database: %s", error.__cause__)
                await asyncio.sleep(backoff.next())

    async def _migrate(self) -> None:
        from jobqueue.database.migrations import migrate_up

        with as_procrastinate():
            await asyncio.to_thread(migrate_up, await self.dsn())

    # -- the worker's side ---------------------------------------------------------------------------------------------

    async def _serve(self, name: str, arguments: Mapping[str, Any]) -> list[Row]:
        if name == "register_worker":
            backstage = Backstage(await self.dsn(), uuid4(), self.json_decoder)
            await backstage.start()
            self._backstages[backstage.id] = backstage
            self._unheard.append(backstage)
            return [{"worker_id": backstage.id.int}]
        backstage_or_none = self._backstages.get(job_uuid(arguments["worker_id"]))
        if backstage_or_none is None:
            # It was dismissed, or belongs to another process, which beats for itself.
            return [] if name != "fetch_job" else [dict.fromkeys(("id", "status"))]
        if name == "fetch_job":
            return [await backstage_or_none.fetch(arguments["queues"])]
        if name == "unregister_worker":
            await self._dismiss(backstage_or_none)
        # update_heartbeat: a thread beats, also while the event loop is blocked
        return []

    async def _dismiss(self, backstage: Backstage) -> None:
        self._backstages.pop(backstage.id, None)
        if backstage in self._unheard:
            self._unheard.remove(backstage)
        await backstage.stop()

    async def _settle(self, name: str, arguments: Mapping[str, Any]) -> bool:
        """Queue the end of a job that a worker of this process runs; False if none does."""
        id = str(job_uuid(arguments["job_id"]))
        for backstage in self._backstages.values():
            if backstage.runs(id):
                with as_procrastinate():
                    if name == "finish_job":
                        ending(arguments["status"])
                        end = end_of(arguments["status"], delete=arguments["delete_job"] or None)
                    else:
                        end = retry_end(arguments)
                await backstage.end(id, end)
                return True
        return False

    def note_outcome(self, id: int, result: Any, error: BaseException | None) -> None:
        """Remember what a task returned or raised, to be stored with the end of its job (see `keep_results`)."""
        for backstage in self._backstages.values():
            backstage.note_outcome(str(job_uuid(id)), result, error, self.json_encoder)


def _first(rows: list[Row]) -> Row:
    if not rows:
        raise exceptions.NoResult
    return rows[0]


def _applying() -> str:
    return SchemaManager.get_schema().replace("%", "%%")


def _is_away(error: BaseException) -> bool:
    from jobqueue.worker.resilience import DATABASE_AWAY

    return isinstance(error.__cause__, DATABASE_AWAY)


async def _notify(on_notification: procrastinate_connector.Notify, channel: str, kind: str, id: int) -> None:
    await on_notification(channel=channel, payload=json.dumps({"type": kind, "job_id": id}))
