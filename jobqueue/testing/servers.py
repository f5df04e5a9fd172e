"""The server of a test session, and the database that tests get copies of."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from jobqueue.database.embedded import EmbeddedServer
from jobqueue.database.ephemeral import make_ephemeral_home, sweep_ephemeral_homes
from jobqueue.testing.databases import create_database, drop_database

Prepare = Callable[[str], object]


@contextmanager
def temporary_server(bin_dir: Path | None = None) -> Iterator[EmbeddedServer]:
    """Start a PostgreSQL server that is deleted at the end, whoever runs it; root is not needed.

    `bin_dir`: a folder with `postgres` and `initdb`; default: `JOBQUEUE_TEST_PG_BIN`, else as of the embedded server. It
    writes without fsync, listens on a socket only, and ends with this process however that ends. Raises
    EmbeddedServerError.
    """
    named = os.environ.get("JOBQUEUE_TEST_PG_BIN")
    # Homes that killed sessions left behind.
    sweep_ephemeral_homes()
    binaries = bin_dir or (Path(named) if named else None)
    # Analysed in the background, a database would not be as new, and plans not the same in every run.
    server = EmbeddedServer(
        make_ephemeral_home(), ephemeral=True, bin_dir=binaries, settings={"autovacuum_naptime": "1d"}
    )
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def template_database(server_dsn: str, prepare: Prepare | None = None) -> Iterator[str]:
    """Make a database with the schema in it, to be copied; yields its name and drops it at the end.

    `server_dsn`: of a user who may create databases and roles. `prepare`: called with the conninfo of the new database,
    for an application's own tables. Nobody can connect to it afterwards: a database in use could not be copied.
    """
    from jobqueue.database.migrations import migrate_up

    name = f"jobqueue_template_{secrets.token_hex(6)}"
    _execute(server_dsn, sql.SQL("create database {} template template0").format(sql.Identifier(name)))
    try:
        conninfo = make_conninfo(server_dsn, dbname=name)
        migrate_up(conninfo)
        if prepare is not None:
            prepare(conninfo)
        _execute(server_dsn, sql.SQL("alter database {} allow_connections false").format(sql.Identifier(name)))
        yield name
    finally:
        drop_database(server_dsn, name)


@contextmanager
def clock_template(server_dsn: str, template: str) -> Iterator[str]:
    """Make a copy of a template whose functions read a clock of the test; yields its name and drops it at the end."""
    from jobqueue.testing.rewriting import install

    name = create_database(server_dsn, template)
    try:
        with psycopg.connect(make_conninfo(server_dsn, dbname=name), autocommit=True) as connection:
            install(connection)
        _execute(server_dsn, sql.SQL("alter database {} allow_connections false").format(sql.Identifier(name)))
        yield name
    finally:
        drop_database(server_dsn, name)


def _execute(dsn: str, statement: sql.Composed) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(statement)
