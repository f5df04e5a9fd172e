"""Exit codes that scripts rely on: usage, no database, a schema that does not fit."""

from __future__ import annotations

from uuid import uuid4

import psycopg
import pytest

from tests.support.command import run, run_process

NOWHERE = "host=127.0.0.1 port=1 user=nobody password=secret"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--nonsense",),
        ("nonsense",),
        ("jobs", "nonsense"),
        ("jobs", "list", "--status", "running"),
        ("jobs", "list", "--limit", "0"),
        ("jobs", "prioritize", str(uuid4()), "high", "-r", "x"),
        ("send",),
        ("send", "q", "{not json"),
        ("send", "q", "--option", "priority"),
        ("send", "q", "--delay", "soon"),
        ("workers", "drain", "not-a-uuid", "-r", "x"),
        ("jobs", "list", "-o", "xml"),
    ],
)
def test_wrong_usage_is_2_before_any_database_is_asked(arguments: tuple[str, ...]) -> None:
    done = run(*arguments, dsn=NOWHERE, JOBQUEUE_START_TIMEOUT="0")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Usage: " in done.stderr


@pytest.mark.parametrize("action", ["retry", "cancel", "skip", "pause", "resume", "run-now", "delete"])
def test_an_action_without_a_reason_is_a_usage_error_where_nobody_can_be_asked(action: str) -> None:
    done = run("jobs", action, uuid4(), dsn=NOWHERE)
    assert done.returncode == 2
    assert "--reason" in done.stderr


def test_no_database_is_69_within_the_start_timeout_and_hides_the_password() -> None:
    done = run_process("jobs", "list", dsn=NOWHERE, JOBQUEUE_START_TIMEOUT="1")
    assert (done.returncode, done.stdout) == (69, "")
    assert "no database at host=127.0.0.1 port=1" in done.stderr
    assert "secret" not in done.stderr


def test_a_bad_setting_is_78(dsn: str) -> None:
    assert run("jobs", "list", dsn=dsn, JOBQUEUE_PORT="many").returncode == 78


@pytest.mark.parametrize("arguments", [("jobs", "list"), ("send", "q"), ("jobs", "wait", uuid4()), ("queues", "list")])
def test_a_database_without_the_schema_is_75_with_the_command_to_run(
    empty_dsn: str, arguments: tuple[str, ...]
) -> None:
    done = run(*arguments, dsn=empty_dsn)
    assert (done.returncode, done.stdout) == (75, "")
    assert "jobqueue migrate up" in done.stderr


def test_a_newer_schema_is_78(dsn: str, connection: psycopg.Connection[tuple[object, ...]]) -> None:
    connection.execute("insert into jobqueue.schema_migration (version, name, checksum) values (9999, 'later', 'x')")
    done = run_process("jobs", "list", dsn=dsn)
    assert (done.returncode, done.stdout) == (78, "")
    assert "9999" in done.stderr


def test_the_dsn_flag_wins_over_the_environment(dsn: str) -> None:
    done = run_process("queues", "list", "--dsn", dsn, "-o", "json", dsn=NOWHERE)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
