"""The databases that tests share one after the other are as if they were new."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row

from jobqueue.database.embedded import EmbeddedServer
from tests.support.databases import Databases, drop_database

TABLES = "select relname from pg_class where relnamespace = 'jobqueue'::regnamespace and relkind = 'r' order by relname"
SEQUENCES = "select sequencename, last_value from pg_sequences where schemaname = 'jobqueue' order by sequencename"


@pytest.fixture
def databases(server: EmbeddedServer, template: str) -> Databases:
    """Databases that no other test has used."""
    return Databases(server.dsn, template)


def state(dsn: str) -> dict[str, list[tuple[object, ...]]]:
    """All rows of all tables, and where the sequences stand."""
    with psycopg.connect(dsn) as connection:
        found = {"sequences": connection.execute(SEQUENCES).fetchall()}
        for (table,) in connection.execute(TABLES).fetchall():
            query = sql.SQL("select t::text from {} t order by 1").format(sql.Identifier("jobqueue", table))
            found[table] = connection.execute(query).fetchall()
        return found


def use(dsn: str, *statements: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def test_a_used_database_is_emptied_and_used_again(databases: Databases) -> None:
    # its own: those of other tests would be handed out in turn
    databases = Databases(databases.server_dsn, databases.template)
    with databases.lend() as first:
        new = state(first)
        use(
            first,
            "select * from jobqueue.send('q', '{}', '{\"stages\": [\"a\"]}')",
            "select * from jobqueue.claim('{q}', gen_random_uuid(), 1)",
            "select jobqueue.maintain()",
            "update jobqueue.maintenance set next_at = now() + interval '1 day'",
            "delete from jobqueue.maintenance where step = 'rescue'",
        )
        assert state(first) != new
        left_open = psycopg.connect(first)
        left_open.execute("select * from jobqueue.job for update")
    with databases.lend() as second:
        assert second == first
        assert state(second) == new
    left_open.close()
    drop_database(databases.server_dsn, str(conninfo_to_dict(first)["dbname"]))


@pytest.mark.parametrize(
    "change",
    [
        "create table public.effect (n int)",
        "drop index jobqueue.job_waiting",
        "create or replace function jobqueue.can_become(_from text, _to text) returns boolean language sql immutable"
        " parallel safe as 'select true'",
        "alter function jobqueue.http_job_body rename to gone",
        "alter table jobqueue.job disable trigger job_guard",
        "comment on table jobqueue.job is 'changed'",
        "revoke execute on function jobqueue.can_become from public",
        "do $$ begin execute format('alter database %I set work_mem = ''1MB''', current_database()); end $$",
        "analyze jobqueue.maintenance",
    ],
)
def test_a_database_that_cannot_be_made_as_new_by_emptying_it_is_not_used_again(
    databases: Databases, change: str
) -> None:
    with databases.lend() as first:
        use(first, change)
    with databases.lend() as second:
        assert second != first


def test_a_lent_session_is_used_again_and_is_as_new(databases: Databases) -> None:
    databases = Databases(databases.server_dsn, databases.template)
    with databases.lend(with_session=True) as conninfo, databases.session(conninfo) as first:
        backend = first.info.backend_pid
        for statement in (
            "set work_mem = '1MB'",
            "set role jobqueue_api",
            "prepare kept as select 1",
            "select pg_advisory_lock(1)",
            "listen kept",
            "notify kept",
        ):
            first.execute(statement.encode())
        first.execute("select 1", prepare=True)
        first.row_factory = dict_row
    with databases.lend(with_session=True) as again, databases.session(again) as second:
        assert (again, second.info.backend_pid) == (conninfo, backend)
        row = second.execute(
            "select current_user, current_setting('work_mem'), (select count(*) from pg_prepared_statements),"
            " (select count(*) from pg_locks where locktype = 'advisory'), (select count(*) from pg_listening_channels())"
        ).fetchone()
        assert row == ("postgres", "4MB", 0, 0, 0)
        assert list(second.notifies(timeout=0)) == []
    databases.drop_all()


@pytest.mark.parametrize(
    "end",
    [
        lambda session: session.close(),
        lambda session: session.execute("begin"),
        lambda session: session.execute("select set_config('jobqueue.tenants', 'a', false)"),
        lambda session: session.execute("select set_config('jobqueue.actor', 'a', true)"),
    ],
    ids=["closed", "in a transaction", "a setting", "a setting of one transaction"],
)
def test_a_session_that_cannot_be_made_as_new_is_closed(
    databases: Databases, end: Callable[[psycopg.Connection[tuple[object, ...]]], object]
) -> None:
    databases = Databases(databases.server_dsn, databases.template)
    with databases.lend(with_session=True) as conninfo, databases.session(conninfo) as first:
        backend = first.info.backend_pid
        end(first)
    with databases.lend(with_session=True) as again, databases.session(again) as second:
        assert again == conninfo
        assert second.info.backend_pid != backend
        assert second.execute("select current_setting('jobqueue.tenants', true)").fetchone() == (None,)
    databases.drop_all()


def test_a_database_lent_without_a_session_has_nobody_connected(databases: Databases) -> None:
    databases = Databases(databases.server_dsn, databases.template)
    with databases.lend(with_session=True) as conninfo:
        pass
    with databases.lend() as again, psycopg.connect(again) as connection:
        assert again == conninfo
        others = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        assert connection.execute(others).fetchone() == (0,)
    databases.drop_all()
