"""The migrations engine: its own small schema in a temporary folder, and the product's real one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from jobqueue.database import ledger, migrations, steps
from jobqueue.database.binaries import find_binaries, server_account
from jobqueue.database.embedded import EmbeddedServer
from jobqueue.database.migrations import check_schema, check_schema_async, migrate_down, migrate_up, sql_text, status
from jobqueue.database.schema_files import load_files, split_statements
from jobqueue.errors import (
    ConfigurationError,
    InvalidArgument,
    MigrationBusy,
    MigrationEdited,
    MigrationError,
    NotAllowed,
    SchemaOutdated,
    SchemaTooNew,
)
from tests.support.server import chosen_binaries, temporary_database
from tests.support.waiting import wait_until

FILES = {
    "migrations/0001_init.up.sql": "create table jobqueue.thing (id int primary key, name text);",
    "migrations/0001_init.down.sql": "drop table jobqueue.thing;",
    "migrations/0002_colour.up.sql": "alter table jobqueue.thing add column colour text;",
    "migrations/0002_colour.down.sql": "alter table jobqueue.thing drop column colour;",
    "migrations/0003_index.up.sql": "-- jobqueue: tx=no\n"
    "create index concurrently thing_colour on jobqueue.thing (colour);",
    "migrations/0003_index.down.sql": "-- jobqueue: tx=no\ndrop index concurrently if exists jobqueue.thing_colour;",
    "functions/guard.sql": """
        create or replace function jobqueue.guard() returns trigger language plpgsql as $$ begin return new; end $$;
        create or replace trigger thing_guard before update on jobqueue.thing
            for each row execute function jobqueue.guard();""",
    "functions/size.sql": "create or replace function jobqueue.size(x int) returns int language sql as 'select x';",
    "views/things.sql": "create or replace view jobqueue.things as select id, name from jobqueue.thing;",
    "roles.sql": "revoke all on all functions in schema jobqueue from public;",
    "comments.sql": "comment on view jobqueue.things is 'What people read.';",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "sql", FILES)


@pytest.fixture
def other_dsn(server: EmbeddedServer) -> Iterator[str]:
    """A second empty database."""
    with temporary_database(server.dsn, "template0") as conninfo:
        yield conninfo


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def query(dsn: str, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(statement.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []


def dump(dsn: str) -> str:
    """The schema as pg_dump writes it, without what differs between two dumps of the same schema."""
    pg_dump = find_binaries(chosen_binaries(), server_account(Path("/var/tmp/none"))).bin_dir / "pg_dump"
    done = subprocess.run(
        [pg_dump, "--schema-only", "--schema=jobqueue", dsn], capture_output=True, text=True, check=True
    )
    return "\n".join(line for line in done.stdout.splitlines() if line and not re.match(r"--|\\(un)?restrict", line))


def without(files: dict[str, str], *names: str) -> dict[str, str]:
    return {name: text for name, text in files.items() if name not in names}


def migrator(dsn: str, source: Path) -> subprocess.Popen[bytes]:
    """A migrator in a process of its own, to be killed."""
    code = (
        "import sys, pathlib; from jobqueue.database.migrations import migrate_up;"
        "migrate_up(sys.argv[1], source=pathlib.Path(sys.argv[2]))"
    )
    return subprocess.Popen([sys.executable, "-c", code, dsn, str(source)])


def kill(process: subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def active(dsn: str, pattern: str) -> list[tuple[Any, ...]]:
    return query(
        dsn,
        "select pid from pg_stat_activity where datname = current_database() and application_name = 'jobqueue migrate'"
        " and state = 'active' and query like %s",
        pattern,
    )


def test_up_applies_every_step_then_the_repeatable_files(empty_dsn: str, source: Path) -> None:
    assert migrate_up(empty_dsn, source=source) == [
        "applied 0001_init",
        "applied 0002_colour",
        "applied 0003_index",
        "applied functions, views, roles and comments (5 files)",
    ]
    assert query(empty_dsn, "select version, name, down_sql is not null from jobqueue.schema_migration order by 1") == [
        (1, "init", True),
        (2, "colour", True),
        (3, "index", True),
    ]
    assert query(empty_dsn, "select jobqueue.size(3), (select count(*) from jobqueue.things)") == [(3, 0)]


def test_a_second_run_does_nothing(empty_dsn: str, source: Path) -> None:
    migrate_up(empty_dsn, source=source)
    before = query(
        empty_dsn, "select oid, xmin::text from pg_class where relnamespace = 'jobqueue'::regnamespace order by 1"
    )
    assert migrate_up(empty_dsn, source=source) == []
    after = query(
        empty_dsn, "select oid, xmin::text from pg_class where relnamespace = 'jobqueue'::regnamespace order by 1"
    )
    assert after == before


def test_a_fresh_schema_equals_one_built_step_by_step(empty_dsn: str, other_dsn: str, source: Path) -> None:
    migrate_up(empty_dsn, source=source)
    for version in (1, 2, 3):
        migrate_up(other_dsn, target=version, source=source)
    assert dump(other_dsn) == dump(empty_dsn)


@pytest.mark.parametrize("target", [2, 1, 0])
def test_down_and_up_again_gives_the_same_schema(empty_dsn: str, source: Path, target: int) -> None:
    migrate_up(empty_dsn, source=source)
    fresh = dump(empty_dsn)
    undone = migrate_down(empty_dsn, target=target, source=source)
    assert undone == ["undid 0003_index", "undid 0002_colour", "undid 0001_init"][: 3 - target]
    migrate_up(empty_dsn, source=source)
    assert dump(empty_dsn) == fresh


def test_down_to_zero_leaves_nothing(empty_dsn: str, source: Path) -> None:
    migrate_up(empty_dsn, source=source)
    migrate_down(empty_dsn, target=0, source=source)
    assert query(empty_dsn, "select to_regnamespace('jobqueue')") == [(None,)]


def test_down_without_a_way_down_changes_nothing(empty_dsn: str, tmp_path: Path) -> None:
    source = write(tmp_path / "sql", without(FILES, "migrations/0002_colour.down.sql"))
    migrate_up(empty_dsn, source=source)
    fresh = dump(empty_dsn)
    with pytest.raises(MigrationError, match="0002_colour cannot be undone"):
        migrate_down(empty_dsn, target=0, source=source)
    assert dump(empty_dsn) == fresh


def test_an_older_program_undoes_steps_it_does_not_know(empty_dsn: str, source: Path, tmp_path: Path) -> None:
    migrate_up(empty_dsn, source=source)
    old = write(
        tmp_path / "old", {name: text for name, text in FILES.items() if "0003" not in name and "0002" not in name}
    )
    assert migrate_down(empty_dsn, target=1, source=old) == ["undid 0003_index", "undid 0002_colour"]
    assert migrate_up(empty_dsn, source=old) == ["applied functions, views, roles and comments (5 files)"]


def test_of_two_migrators_exactly_one_applies(empty_dsn: str, source: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        done = list(threads.map(lambda _: migrate_up(empty_dsn, source=source), range(4)))
    assert sorted(map(len, done)) == [0, 0, 0, 4]


def test_an_edited_step_is_refused(empty_dsn: str, source: Path) -> None:
    migrate_up(empty_dsn, source=source)
    write(source, {"migrations/0001_init.up.sql": "create table jobqueue.thing (id bigint primary key);"})
    with pytest.raises(MigrationEdited, match="0001_init is not the one that was applied") as caught:
        migrate_up(empty_dsn, source=source)
    assert caught.value.exit_code == 78
    assert [step.state for step in status(empty_dsn, source=source)] == ["edited", "applied", "applied"]


def test_other_line_ends_are_no_edit(empty_dsn: str, source: Path) -> None:
    migrate_up(empty_dsn, source=source)
    path = source / "migrations/0003_index.up.sql"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert migrate_up(empty_dsn, source=source) == []


def test_a_failed_step_names_file_and_line_and_leaves_nothing(empty_dsn: str, source: Path) -> None:
    write(source, {"migrations/0002_colour.up.sql": "create table jobqueue.half (id int);\nselect\n  nonsense;"})
    with pytest.raises(MigrationError, match=r'0002_colour, line 3: column "nonsense" does not exist'):
        migrate_up(empty_dsn, source=source)
    assert query(empty_dsn, "select to_regclass('jobqueue.half'), max(version) from jobqueue.schema_migration") == [
        (None, 1)
    ]


def test_a_step_that_gets_no_lock_gives_up_without_a_trace(
    empty_dsn: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "LOCK_TIMEOUT", "20ms")
    monkeypatch.setattr(steps, "LOCK_PAUSE", 0.01)
    migrate_up(empty_dsn, target=1, source=source)
    with psycopg.connect(empty_dsn) as reader:
        reader.execute("select * from jobqueue.thing")
        with pytest.raises(MigrationBusy, match="0002_colour did not get its locks in 20 tries"):
            migrate_up(empty_dsn, source=source)
    assert len(migrate_up(empty_dsn, source=source)) == 3


def test_a_migrator_that_waits_too_long_for_another_gives_up(
    empty_dsn: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_WAIT_SECONDS", 0.0)
    with psycopg.connect(empty_dsn) as holder:
        holder.execute("select pg_advisory_lock(%s)", (migrations.LOCK_KEY,))
        with pytest.raises(MigrationBusy, match="another migration"):
            migrate_up(empty_dsn, source=source)


def test_a_killed_step_is_rolled_back_and_the_next_run_goes_on(empty_dsn: str, source: Path) -> None:
    slow = "create table jobqueue.half (id int); select pg_sleep(600) /* marker */;"
    write(source, {"migrations/0002_colour.up.sql": slow})
    process = migrator(empty_dsn, source)
    wait_until(lambda: active(empty_dsn, "%marker%"), what="the slow step runs")
    kill(process)
    write(source, FILES)
    assert migrate_up(empty_dsn, source=source)[:2] == ["applied 0002_colour", "applied 0003_index"]
    assert query(empty_dsn, "select to_regclass('jobqueue.half')") == [(None,)]


def test_a_killed_concurrent_index_is_built_again(empty_dsn: str, source: Path) -> None:
    migrate_up(empty_dsn, target=2, source=source)
    invalid = "select 1 from pg_index where indexrelid = to_regclass('jobqueue.thing_colour') and not indisvalid"
    with psycopg.connect(empty_dsn) as old_snapshot:
        old_snapshot.execute("insert into jobqueue.thing values (1, 'a', 'red')")
        process = migrator(empty_dsn, source)
        wait_until(lambda: query(empty_dsn, invalid), what="the index is being built")
        kill(process)
        wait_until(lambda: not active(empty_dsn, "%concurrently%"), what="the server notices the kill")
    assert query(empty_dsn, invalid) == [(1,)]
    assert migrate_up(empty_dsn, source=source)[0] == "applied 0003_index"
    assert query(empty_dsn, invalid) == []
    assert query(empty_dsn, "select to_regclass('jobqueue.thing_colour') is not null") == [(True,)]


def test_a_valid_index_of_an_unrecorded_step_is_kept(empty_dsn: str, source: Path) -> None:
    migrate_up(empty_dsn, target=2, source=source)
    query(empty_dsn, "create index thing_colour on jobqueue.thing (colour)")
    before = query(empty_dsn, "select 'jobqueue.thing_colour'::regclass::oid")
    migrate_up(empty_dsn, source=source)
    assert query(empty_dsn, "select 'jobqueue.thing_colour'::regclass::oid") == before


def test_changed_functions_and_views_are_applied_again(empty_dsn: str, other_dsn: str, source: Path) -> None:
    migrate_up(empty_dsn, source=source)
    changed = {
        "functions/size.sql": FILES["functions/size.sql"]
        .replace("x int", "x text")
        .replace("returns int", "returns text"),
        "functions/guard.sql": FILES["functions/guard.sql"].replace("return new", "return null"),
        "views/things.sql": "create or replace view jobqueue.things as select name from jobqueue.thing;",
    }
    write(source, changed)
    assert {step.name for step in status(empty_dsn, source=source) if step.state == "changed"} == set(changed)
    assert migrate_up(empty_dsn, source=source) == ["applied functions, views, roles and comments (5 files)"]
    migrate_up(other_dsn, source=source)
    assert dump(empty_dsn) == dump(other_dsn)
    assert {step.state for step in status(empty_dsn, source=source)} == {"applied"}


def test_a_new_return_type_replaces_the_function(empty_dsn: str, source: Path) -> None:
    migrate_up(empty_dsn, source=source)
    write(source, {"functions/size.sql": FILES["functions/size.sql"].replace("returns int", "returns bigint")})
    migrate_up(empty_dsn, source=source)
    assert query(empty_dsn, "select pg_typeof(jobqueue.size(1))::text") == [("bigint",)]


def test_a_new_return_type_of_a_function_in_use_is_refused(empty_dsn: str, source: Path) -> None:
    migrate_up(empty_dsn, source=source)
    query(empty_dsn, "create view public.mine as select jobqueue.size(1)")
    write(source, {"functions/size.sql": FILES["functions/size.sql"].replace("returns int", "returns bigint")})
    with pytest.raises(MigrationError, match=r"functions/size.sql: cannot change return type"):
        migrate_up(empty_dsn, source=source)
    assert query(empty_dsn, "select * from public.mine") == [(1,)]


def test_functions_that_left_the_files_are_dropped_and_those_of_others_stay(empty_dsn: str, source: Path) -> None:
    migrate_up(empty_dsn, source=source)
    query(empty_dsn, "create function jobqueue.mine() returns int language sql as 'select 1'")
    (source / "functions/size.sql").unlink()
    (source / "functions/guard.sql").unlink()
    done = migrate_up(empty_dsn, source=source)
    assert done[1:] == ["kept obsolete guard(): something still uses it"]
    names = query(empty_dsn, "select proname from pg_proc where pronamespace = 'jobqueue'::regnamespace order by 1")
    assert names == [("guard",), ("mine",)]


def test_views_under_a_users_own_view_are_replaced_in_place(empty_dsn: str, source: Path) -> None:
    migrate_up(empty_dsn, source=source)
    query(empty_dsn, "create view public.report as select id from jobqueue.things")
    write(
        source,
        {"views/things.sql": "create or replace view jobqueue.things as select id, name, colour from jobqueue.thing;"},
    )
    migrate_up(empty_dsn, source=source)
    assert query(empty_dsn, "select count(colour), (select count(*) from public.report) from jobqueue.things") == [
        (0, 0)
    ]


def test_a_newer_schema_is_refused(empty_dsn: str, source: Path, tmp_path: Path) -> None:
    migrate_up(empty_dsn, source=source)
    old = write(tmp_path / "old", without(FILES, "migrations/0003_index.up.sql", "migrations/0003_index.down.sql"))
    with pytest.raises(SchemaTooNew, match="version 3, newer than this program's 2"):
        migrate_up(empty_dsn, source=old)
    with psycopg.connect(empty_dsn) as connection, pytest.raises(SchemaTooNew) as caught:
        check_schema(connection, source=old)
    assert caught.value.exit_code == 78
    assert status(empty_dsn, source=old)[2].state == "unknown"


@pytest.mark.parametrize("target", [None, 1])
def test_an_older_or_missing_schema_is_reported_with_the_command(
    empty_dsn: str, source: Path, target: int | None
) -> None:
    if target:
        migrate_up(empty_dsn, target=target, source=source)
    with psycopg.connect(empty_dsn) as connection, pytest.raises(SchemaOutdated) as caught:
        check_schema(connection, source=source)
    assert (caught.value.exit_code, caught.value.hint) == (75, "Run: jobqueue migrate up")


async def test_the_right_schema_passes_the_check(empty_dsn: str, source: Path) -> None:
    migrate_up(empty_dsn, source=source)
    async with await psycopg.AsyncConnection.connect(empty_dsn) as connection:
        await check_schema_async(connection, source=source)


def test_a_user_without_rights_is_told_so(empty_dsn: str, source: Path) -> None:
    migrate_up(empty_dsn, source=source)
    with psycopg.connect(empty_dsn) as connection:
        connection.execute("create role nobody_special")
        connection.execute("set local role nobody_special")
        with pytest.raises(NotAllowed, match="cannot be read"):
            check_schema(connection, source=source)


def test_unknown_targets_and_missing_numbers_are_refused(empty_dsn: str, source: Path) -> None:
    with pytest.raises(InvalidArgument, match="between 0 and 3"):
        migrate_up(empty_dsn, target=4, source=source)
    (source / "migrations/0002_colour.up.sql").unlink()
    with pytest.raises(ConfigurationError, match="0002 is missing"):
        load_files(source)


def test_the_printed_sql_builds_the_same_schema_and_ledger(empty_dsn: str, other_dsn: str, source: Path) -> None:
    migrate_up(empty_dsn, source=source)
    run_text(other_dsn, sql_text(source=source))
    assert dump(other_dsn) == dump(empty_dsn)
    assert migrate_up(other_dsn, source=source) == []
    run_text(other_dsn, sql_text(3, 1, down=True, source=source))
    assert [step.state for step in status(other_dsn, source=source)][:3] == ["applied", "pending", "pending"]


def test_the_printed_sql_is_deterministic_and_can_do_without_transactions(source: Path) -> None:
    assert sql_text(1, 2, source=source) == sql_text(1, 2, source=source)
    assert "begin;\n" not in sql_text(1, 2, transactions=False, source=source)
    with pytest.raises(InvalidArgument, match="no way up from version 2 to 1"):
        sql_text(2, 1, source=source)


def run_text(dsn: str, text: str) -> None:
    """Run a text as psql does: statement by statement."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in split_statements(text):
            connection.execute(statement.encode())


def test_statements_are_split_outside_of_quotes_and_comments_only() -> None:
    script = "select ';' /* ; */; -- ;\nselect $a$ ; $a$, \"x;\", E'\\';'; do $$ begin; end $$;\n-- the end;"
    assert [statement.split()[0] for statement in split_statements(script)] == ["select", "--", "do"]


def test_what_has_not_changed_is_applied_again_without_a_lock_that_programs_would_wait_for(
    server: EmbeddedServer, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []
    record_files = ledger.record_files

    def look(connection: psycopg.Connection[Any], *arguments: Any) -> None:
        record_files(connection, *arguments)
        # the schema's notes of itself are read by migrators alone; what programs read and write is locked at most like this
        taken.extend(
            connection.execute(
                "select relation::regclass::text, mode from pg_locks where pid = pg_backend_pid() and locktype = 'relation'"
                " and relation >= 16384 and mode not in ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock',"
                " 'ShareUpdateExclusiveLock')"
            )
        )

    monkeypatch.setattr(ledger, "record_files", look)
    with temporary_database(server.dsn, template) as dsn:
        query(dsn, "update jobqueue.schema_object set checksum = 'old' where name = 'functions/send.sql'")
        assert migrate_up(dsn)[0].startswith("applied functions")
    assert taken == []


def test_the_real_schema_survives_down_and_up(server: EmbeddedServer, template: str) -> None:
    with temporary_database(server.dsn, template) as dsn:
        fresh = dump(dsn)
        assert migrate_up(dsn) == []
        migrate_down(dsn, target=0)
        migrate_up(dsn)
        assert dump(dsn) == fresh


def test_the_real_schema_step_by_step_equals_a_fresh_one(server: EmbeddedServer, template: str, empty_dsn: str) -> None:
    for version in range(1, load_files().version + 1):
        migrate_up(empty_dsn, target=version)
    with temporary_database(server.dsn, template) as dsn:
        assert dump(empty_dsn) == dump(make_conninfo(dsn))
