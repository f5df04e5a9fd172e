"""The databases that tests share one after the other are as if they were new."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

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
