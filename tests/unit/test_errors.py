"""Errors: the translation of what a real server raises, and what they carry."""

from __future__ import annotations

import json
import pickle
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from jobqueue import errors
from jobqueue.errors import JobqueueError, from_postgres, translate


def raise_in_postgres(dsn: str, sqlstate: str, detail: str, hint: str = "do that") -> None:
    quoted = detail.replace("'", "''")
    with psycopg.connect(dsn) as connection:
        using = f"errcode = '{sqlstate}', detail = '{quoted}', hint = '{hint}'"
        connection.execute(f"do $$ begin raise exception 'no' using {using}; end $$".encode())


@pytest.mark.parametrize(
    ("sqlstate", "code", "expected", "base", "exit_code"),
    [
        ("JQ400", "INVALID_ARGUMENT", errors.InvalidArgument, errors.BadRequest, 2),
        ("JQ400", "UNKNOWN_OPTION", errors.UnknownOption, errors.BadRequest, 2),
        ("JQ403", "FORBIDDEN", errors.Forbidden, errors.NotAllowed, 1),
        ("JQ404", "JOB_NOT_FOUND", errors.JobNotFound, errors.NotFound, 3),
        ("JQ404", "QUEUE_NOT_FOUND", errors.QueueNotFound, errors.NotFound, 3),
        ("JQ409", "INVALID_TRANSITION", errors.InvalidTransition, errors.ConflictError, 4),
        ("JQ409", "LEASE_LOST", errors.LeaseLost, errors.ConflictError, 4),
        ("JQ409", "CONFLICT", errors.Conflict, errors.ConflictError, 4),
        ("JQ413", "TOO_LARGE", errors.TooLarge, errors.TooLarge, 1),
        ("JQ429", "LIMIT_REACHED", errors.LimitReached, errors.LimitReached, 75),
        # A newer schema's code is still caught by the class of its SQLSTATE, and keeps its name.
        ("JQ409", "SOMETHING_NEW", errors.ConflictError, errors.ConflictError, 4),
        # A code under a foreign SQLSTATE does not mislead either.
        ("JQ404", "LEASE_LOST", errors.NotFound, errors.NotFound, 3),
        ("JQ999", "ODD", JobqueueError, JobqueueError, 1),
    ],
)
def test_every_code_becomes_its_class(
    empty_dsn: str, sqlstate: str, code: str, expected: type, base: type, exit_code: int
) -> None:
    details = {"code": code, "status": "completed", "allowed": []}
    with pytest.raises(base) as caught, translate():
        raise_in_postgres(empty_dsn, sqlstate, json.dumps(details))
    error = caught.value
    assert type(error) is expected
    assert isinstance(error, JobqueueError)
    assert (error.code, error.message, error.hint, error.details) == (code, "no", "do that", details)
    assert error.exit_code == exit_code
    assert isinstance(error.__cause__, psycopg.Error)


@pytest.mark.parametrize("detail", ["plain text", "[1]"])
def test_a_detail_that_is_no_object_is_kept_as_text(empty_dsn: str, detail: str) -> None:
    with pytest.raises(errors.NotFound) as caught, translate():
        raise_in_postgres(empty_dsn, "JQ404", detail)
    assert caught.value.details == {"detail": detail}
    assert caught.value.code == "NOT_FOUND"


def test_other_errors_of_the_database_pass_unchanged(empty_dsn: str) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero) as caught, translate():
        psycopg.connect(empty_dsn).execute("select 1/0")
    assert from_postgres(caught.value) is None


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (errors.MigrationError, 1),
        (errors.TimedOut, 5),
        (errors.DatabaseUnavailable, 69),
        (errors.SchemaOutdated, 75),
        (errors.MigrationBusy, 75),
        (errors.SchemaTooNew, 78),
        (errors.ServerTooOld, 78),
        (errors.ConfigurationError, 78),
    ],
)
def test_exit_codes_of_operational_errors(error: type[JobqueueError], exit_code: int) -> None:
    assert error("x").exit_code == exit_code


@pytest.mark.parametrize(
    ("error", "attribute", "value"),
    [
        (errors.Retry(after="5 min"), "after", 300.0),
        (errors.Retry("again"), "after", None),
        (errors.Snooze(timedelta(hours=1), "later"), "delay", 3600.0),
        (errors.PermanentError("no", code="E1"), "code", "E1"),
        (errors.InvalidInput("no"), "code", "InvalidInput"),
        (errors.QuotaExceeded("no", after=60), "after", 60.0),
        (errors.InvalidTransition("no", hint="h", details={"status": "failed"}), "details", {"status": "failed"}),
    ],
)
def test_errors_survive_the_way_between_processes(error: Any, attribute: str, value: object) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert getattr(copy, attribute) == value == getattr(error, attribute)


def test_error_classes_of_handlers_are_the_closed_list() -> None:
    classes = [errors.PermanentError, errors.InvalidInput, errors.QuotaExceeded]
    assert [error.error_class for error in classes] == ["permanent", "invalid", "quota"]


def test_a_wrong_delay_is_refused_where_it_is_raised() -> None:
    with pytest.raises(ValueError, match="'soon' is not a duration"):
        errors.Snooze("soon")
