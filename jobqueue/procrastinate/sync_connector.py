"""`SyncJobqueueConnector`: the blocking form, for programs that only defer and read (a web application, a script)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from procrastinate import exceptions
from procrastinate.schema import SchemaManager
from procrastinate.sync_psycopg_connector import SyncPsycopgConnector
from psycopg import Connection
from psycopg.rows import dict_row

from jobqueue.procrastinate.failures import as_procrastinate
from jobqueue.procrastinate.pools import configured_dsn, conninfo_of, is_placed, pool_arguments
from jobqueue.procrastinate.queries import check_queries
from jobqueue.procrastinate.statements import TRANSLATIONS, Row, number_ids, translate
from jobqueue.procrastinate.tracing import Instrumented, deferring


class SyncJobqueueConnector(Instrumented, SyncPsycopgConnector):
    """`procrastinate.App(connector=SyncJobqueueConnector("postgresql://…"))`; arguments as of `JobqueueConnector`.

    A worker needs the asynchronous connector, as with procrastinate's own. Raises ConfigurationError if the installed
    procrastinate is a version whose queries are not known.
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        json_dumps: Callable[..., Any] | None = None,
        json_loads: Callable[..., Any] | None = None,
        **pool_options: Any,
    ) -> None:
        self._names = check_queries()
        self._dsn = dsn
        self._given = pool_options
        placed = pool_arguments(dsn, pool_options) if is_placed(dsn, pool_options) else dict(pool_options)
        super().__init__(json_dumps=json_dumps, json_loads=json_loads, **placed)

    def open(self, pool: Any = None) -> None:
        """Open the pool, or use the one that is given. Raises ConnectorException."""
        if pool is None and not is_placed(self._dsn, self._given):
            self._dsn = configured_dsn()
            self._pool_args = pool_arguments(self._dsn, self._given)
        self.instrument_as_set()
        super().open(pool)

    def execute_query(self, query: Any, **arguments: Any) -> None:
        """Do what a query of procrastinate asks for; other queries go to the database as they are."""
        if query in self._names:
            self._answer(None, self._names[query], arguments)
        elif query == SchemaManager.get_schema().replace("%", "%%"):
            self._migrate()
        else:
            super().execute_query(query, **arguments)

    def execute_query_one(self, query: Any, **arguments: Any) -> Row:
        """The same, for one row. Raises NoResult if there is none."""
        if query not in self._names:
            return super().execute_query_one(query, **arguments)
        return _first(self._answer(None, self._names[query], arguments))

    def execute_query_all(self, query: Any, **arguments: Any) -> list[Row]:
        """The same, for all rows."""
        if query not in self._names:
            return super().execute_query_all(query, **arguments)
        return self._answer(None, self._names[query], arguments)

    def execute_query_one_with_connection(self, connection: Any, query: Any, **arguments: Any) -> Row:
        """The same in the transaction of a connection of the application's own."""
        if query not in self._names:
            return super().execute_query_one_with_connection(connection, query, **arguments)
        return _first(self._answer(connection, self._names[query], arguments))

    def execute_query_all_with_connection(self, connection: Any, query: Any, **arguments: Any) -> list[Row]:
        """The same in the transaction of a connection of the application's own."""
        if query not in self._names:
            return super().execute_query_all_with_connection(connection, query, **arguments)
        return self._answer(connection, self._names[query], arguments)

    def _answer(self, connection: Connection[Any] | None, name: str, arguments: Mapping[str, Any]) -> list[Row]:
        if name not in TRANSLATIONS:
            raise exceptions.SyncConnectorConfigurationError
        if self.telemetry is not None and name == "defer_jobs":
            with deferring(self.telemetry, arguments) as traced:
                return traced.note(self._run(connection, name, traced.arguments))
        return self._run(connection, name, arguments)

    def _run(self, connection: Connection[Any] | None, name: str, arguments: Mapping[str, Any]) -> list[Row]:
        with as_procrastinate():
            statement = translate(name, arguments, self._json_dumps)
            if connection is not None:
                return self._rows(connection, statement.sql, statement.parameters)
            with self.pool.connection() as lent:
                return self._rows(lent, statement.sql, statement.parameters)

    def _rows(self, connection: Connection[Any], query: Any, parameters: tuple[Any, ...]) -> list[Row]:
        with connection.cursor(row_factory=dict_row) as cursor:
            if self._json_loads:
                from psycopg.types.json import set_json_loads

                set_json_loads(self._json_loads, context=cursor)
            cursor.execute(query, parameters)
            return [number_ids(row) for row in cursor.fetchall()]

    def _migrate(self) -> None:
        from jobqueue.database.migrations import migrate_up

        with as_procrastinate():
            migrate_up(conninfo_of(self.pool.conninfo, self.pool.kwargs))


def _first(rows: list[Row]) -> Row:
    if not rows:
        raise exceptions.NoResult
    return rows[0]
