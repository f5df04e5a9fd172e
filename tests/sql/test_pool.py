"""Connections as jobqueue opens them."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql

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
