"""Connections as jobqueue opens them."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql

from jobqueue.connections import Connections
from jobqueue.database import pool as pool_module
from jobqueue.database.pool import connect, connect_async, connection_options, open_pool
from jobqueue.errors import ConfigurationError, DatabaseUnavailable, ServerTooOld


@pytest.mark.parametrize("timeout", [0.0, 0.2])
async def test_an_absent_server_is_reported_without_the_password(timeout: float) -> None:
    dsn = "postgresql://me:secret@127.0.0.1:1/jobs"
    for attempt in (connect_async, open_pool):
        with pytest.raises(DatabaseUnavailable, match=r"no database at postgresql://me:\*\*\*@127") as caught:
            await attempt(dsn, timeout=timeout)
        assert "secret" not in str(caught.value)
    with pytest.raises(DatabaseUnavailable):
        connect(dsn, timeout=timeout)


async def test_a_pool_gives_connections_in_utc_with_autocommit(empty_dsn: str) -> None:
    with psycopg.connect(empty_dsn, autocommit=True) as connection:
        name = sql.Identifier(connection.info.dbname)
        connection.execute(sql.SQL("alter database {} set timezone = 'Asia/Tokyo'").format(name))
    pool = await open_pool(empty_dsn, 1, 2, "jobqueue test")
    try:
        async with pool.connection() as pooled:
            cursor = await pooled.execute("select current_setting('TimeZone'), current_setting('application_name')")
            assert (await cursor.fetchone(), pooled.autocommit) == (("UTC", "jobqueue test"), True)
    finally:
        await pool.close()


def test_prepared_statements_are_off_behind_a_pooler_and_the_dsn_wins() -> None:
    assert connection_options("host=db", "x")["prepare_threshold"] == 5
    assert connection_options("host=db", "x", pooler=True)["prepare_threshold"] is None
    assert "connect_timeout" not in connection_options("host=db connect_timeout=3", "x")
    with pytest.raises(ConfigurationError) as caught:
        connection_options("postgresql//me:secret@db", "x")
    assert "secret" not in str(caught.value)


def test_a_server_older_than_needed_is_refused(empty_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MINIMUM_SERVER_VERSION", 990000)
    with pytest.raises(ServerTooOld, match="jobqueue needs 15 or newer"):
        connect(empty_dsn)


async def test_a_pool_lends_no_connection_that_died_while_it_was_idle(empty_dsn: str) -> None:
    """As after a restart of the server: all of them at once, and the first one lent works."""

    def end_connections() -> None:
        with psycopg.connect(empty_dsn, autocommit=True) as connection:
            connection.execute(
                "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
                " where datname = current_database() and application_name = 'jobqueue test'"
            )

    pool = await open_pool(empty_dsn, 3, 3, "jobqueue test")
    connections = Connections(empty_dsn, application_name="jobqueue test")
    try:
        for _ in range(3):
            end_connections()
            async with pool.connection(5) as lent:
                await lent.execute("select 1")
        with connections.lend_blocking() as blocking:
            blocking.execute("select 1")
        end_connections()
        with connections.lend_blocking() as blocking:
            blocking.execute("select 1")
    finally:
        await pool.close()
        connections.close_blocking()


async def test_our_connections_are_read_committed_whatever_the_default_of_the_database_is(empty_dsn: str) -> None:
    level = "select current_setting('transaction_isolation')"
    with psycopg.connect(empty_dsn, autocommit=True) as connection:
        name = sql.Identifier(connection.info.dbname)
        statement = "alter database {} set default_transaction_isolation = 'serializable'"
        connection.execute(sql.SQL(statement).format(name))
    with psycopg.connect(empty_dsn) as theirs, connect(empty_dsn) as ours:
        assert theirs.execute(level).fetchone() == ("serializable",)
        assert ours.execute(level).fetchone() == ("read committed",)
    pool = await open_pool(empty_dsn, 1, 1, "jobqueue test")
    async with pool.connection(5) as lent:
        assert await (await lent.execute(level)).fetchone() == ("read committed",)
    await pool.close()
