"""procrastinate's Django app (`procrastinate.contrib.django`) on this queue. In the settings:

```
PROCRASTINATE_ON_APP_READY = "jobqueue.procrastinate.django.use_jobqueue"
```

Tasks are deferred on Django's own connection, so that they belong to its transaction; `manage.py procrastinate worker`
gets a JobqueueConnector on the same database. Our worker, in place of that one:

```
DJANGO_SETTINGS_MODULE=shop.settings jobqueue worker jobqueue.procrastinate.django:app
```
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import procrastinate
import psycopg
from django.db import Error
from procrastinate import exceptions
from procrastinate.contrib.django.django_connector import DjangoConnector

from jobqueue.integrations.django.connection import conninfo_of
from jobqueue.procrastinate.connector import JobqueueConnector
from jobqueue.procrastinate.failures import as_procrastinate
from jobqueue.procrastinate.queries import check_queries
from jobqueue.procrastinate.statements import TRANSLATIONS, Row, number_ids, translate
from jobqueue.procrastinate.tracing import Instrumented, deferring


def use_jobqueue(app: procrastinate.App) -> None:
    """Let an application of procrastinate's Django app keep its jobs here; for PROCRASTINATE_ON_APP_READY.

    Raises ConfigurationError if the installed procrastinate is a version whose queries are not known, or the database of
    PROCRASTINATE_DATABASE_ALIAS is no PostgreSQL.
    """
    from procrastinate.contrib.django.settings import settings

    conninfo_of(settings.DATABASE_ALIAS)
    connector = DjangoJobqueueConnector(settings.DATABASE_ALIAS)
    connector.instrument_as_set()
    app.connector = app.job_manager.connector = connector


class DjangoJobqueueConnector(Instrumented, DjangoConnector):
    """procrastinate's DjangoConnector, whose queries are answered from `jobqueue.job`. `alias`: the database."""

    def __init__(self, alias: str = "default") -> None:
        super().__init__(alias)
        self._names = check_queries()

    def get_worker_connector(self) -> JobqueueConnector:
        """Return a connector for a worker on the same database."""
        connector = JobqueueConnector(conninfo_of(self.alias))
        connector.telemetry = self.telemetry
        return connector

    def execute_query(self, query: Any, **arguments: Any) -> None:
        """Do what a query of procrastinate asks for; other queries go to the database as they are."""
        if query in self._names:
            self._answer(self._names[query], arguments)
        else:
            super().execute_query(query, **arguments)

    def execute_query_one(self, query: Any, **arguments: Any) -> Row:
        """The same, for one row. Raises NoResult if there is none."""
        if query not in self._names:
            row: Row = super().execute_query_one(query, **arguments)
            return row
        rows = self._answer(self._names[query], arguments)
        if not rows:
            raise exceptions.NoResult
        return rows[0]

    def execute_query_all(self, query: Any, **arguments: Any) -> list[Row]:
        """The same, for all rows."""
        if query not in self._names:
            rows: list[Row] = super().execute_query_all(query, **arguments)
            return rows
        return self._answer(self._names[query], arguments)

    def _answer(self, name: str, arguments: Mapping[str, Any]) -> list[Row]:
        if name not in TRANSLATIONS:
            raise exceptions.SyncConnectorConfigurationError
        if self.telemetry is not None and name == "defer_jobs":
            with deferring(self.telemetry, arguments) as traced:
                return traced.note(self._run(name, traced.arguments))
        return self._run(name, arguments)

    def _run(self, name: str, arguments: Mapping[str, Any]) -> list[Row]:
        with as_procrastinate():
            statement = translate(name, arguments)
            try:
                with self.connection.cursor() as cursor:
                    cursor.execute(statement.sql, statement.parameters)
                    names = [column[0] for column in cursor.description or ()]
                    return [_row(dict(zip(names, values, strict=True))) for values in cursor.fetchall()]
            except Error as error:
                raise (error.__cause__ if isinstance(error.__cause__, psycopg.Error) else error) from error


def _row(row: Row) -> Row:
    """A row as procrastinate expects it: Django has JSON come as text."""
    read = {key: json.loads(value) if key in ("args", "stats") and isinstance(value, str) else value
            for key, value in row.items()}  # fmt: skip
    return number_ids(read)


def __getattr__(name: str) -> Any:
    """`app`, made when the command line asks for it: the tasks of procrastinate's Django app, for our worker."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import django
    from django.apps import apps
    from procrastinate.contrib.django import procrastinate_app

    if not apps.ready:
        django.setup()
    made = procrastinate_app.current_app
    if isinstance(made.connector, DjangoConnector):
        made.connector = made.job_manager.connector = DjangoJobqueueConnector(
            made.connector.alias
        ).get_worker_connector()
    globals()["app"] = made
    return made
