"""Errors of the database as procrastinate knows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from procrastinate import exceptions
from procrastinate.manager import QUEUEING_LOCK_CONSTRAINT

from jobqueue.errors import JobqueueError, from_postgres

SCHEMA_MISSING = (psycopg.errors.UndefinedFunction, psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedTable)


@contextmanager
def as_procrastinate() -> Iterator[None]:
    """Turn errors inside the block into procrastinate's: UniqueViolation for a queueing_lock, else ConnectorException."""
    try:
        yield
    except psycopg.Error as error:
        raise _translated(error) from error
    except JobqueueError as error:
        raise exceptions.ConnectorException(_told(error)) from error


def _translated(error: psycopg.Error) -> exceptions.ConnectorException:
    known = from_postgres(error)
    if known is not None and known.code == "ALREADY_ENQUEUED":
        return exceptions.UniqueViolation(
            constraint_name=QUEUEING_LOCK_CONSTRAINT, queueing_lock=known.details.get("queueing_lock")
        )
    if isinstance(error, psycopg.errors.UniqueViolation):
        return exceptions.UniqueViolation(constraint_name=error.diag.constraint_name or "", queueing_lock=None)
    if isinstance(error, SCHEMA_MISSING) and "jobqueue" in str(error):
        return exceptions.ConnectorException(f"{error}. The schema is missing or old: run `jobqueue migrate up`.")
    return exceptions.ConnectorException(_told(known) if known is not None else None)


def _told(error: JobqueueError) -> str:
    return f"{error.message} {error.hint}" if error.hint else error.message
