"""Follow one job until it ends: every version of it, heard of by LISTEN, with a poll every second as the floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from jobqueue.cli.options import database_dsn
from jobqueue.cli.session import open_connection
from jobqueue.errors import TimedOut

if TYPE_CHECKING:
    from psycopg import Connection

    from jobqueue.records import JobRecord
    from jobqueue.settings import Settings

POLL_SECONDS = 1.0
WATCH_SECONDS = 60.0


def follow(
    settings: Settings,
    job_id: UUID | str,
    *,
    timeout: float | None = None,
    check: Callable[[], None] | None = None,
) -> Iterator[JobRecord]:
    """Yield the job as it is now and after every change; the last one has ended.

    A lost connection is opened again. `timeout`: seconds to follow at most, None: for ever. `check` is called at every
    poll and may raise. Raises JobNotFound, TimedOut, and the errors of `session`.
    """
    import psycopg

    from jobqueue.client import as_job_id

    known_id = as_job_id(job_id)
    deadline = None if timeout is None else time.monotonic() + timeout
    # Through a transaction pooler nobody would hear anything: then the poll alone has to do.
    listens = bool(settings.listen_dsn) or not settings.pooler
    shown: int | None = None
    while True:
        dsn = database_dsn(settings, direct=True)
        with open_connection(settings, dsn, pooler=not listens) as connection:
            try:
                for record in _versions(connection, known_id, listens, deadline, check):
                    if record.version != shown:
                        shown = record.version
                        yield record
                return
            except psycopg.OperationalError:
                if not connection.closed:
                    raise
                click.echo("jobqueue: the connection was lost; opening it again", err=True)


def end_of(
    settings: Settings, job_id: UUID | str, *, timeout: float | None = None, show: Callable[[JobRecord], None]
) -> JobRecord:
    """Follow a job to its end, show every version, and return the last one. Errors as of `follow`."""
    record = None
    for record in follow(settings, job_id, timeout=timeout):
        show(record)
    assert record is not None
    return record


def exit_code_of(record: JobRecord) -> int:
    """0 if the job was completed, 1 for every other end."""
    return 0 if record.status == "completed" else 1


def _versions(
    connection: Connection[Any],
    job_id: UUID,
    listens: bool,
    deadline: float | None,
    check: Callable[[], None] | None,
) -> Iterator[JobRecord]:
    from jobqueue.client import blocking, get

    # First listen, then look: a change between the two would be missed the other way round.
    if listens:
        connection.execute("listen jobqueue_jobs")
    watch_again = 0.0
    while True:
        if listens and time.monotonic() >= watch_again:
            listens = _watch(connection, job_id)
            watch_again = time.monotonic() + WATCH_SECONDS / 2
        record = blocking(get(connection, job_id))
        yield record
        if record.done:
            return
        if check is not None:
            check()
        if deadline is not None and time.monotonic() >= deadline:
            raise TimedOut(f"job {job_id} is still {record.status}", hint="It goes on; wait for it again.")
        _wait_for_change(connection, job_id, deadline)


def _watch(connection: Connection[Any], job_id: UUID) -> bool:
    """Ask senders to notify of this job; False if this role may not."""
    from psycopg.errors import InsufficientPrivilege

    try:
        connection.execute(
            "select jobqueue.watch('job:' || %s::text, make_interval(secs => %s))", (job_id, WATCH_SECONDS)
        )
    except InsufficientPrivilege:
        return False
    return True


def _wait_for_change(connection: Connection[Any], job_id: UUID, deadline: float | None) -> None:
    end = time.monotonic() + POLL_SECONDS
    if deadline is not None:
        end = min(end, deadline)
    with closing(connection.notifies(timeout=max(end - time.monotonic(), 0.0))) as notifications:
        for notification in notifications:
            # Other people's jobs arrive on the same channel, and must not push our poll ahead for ever.
            if str(job_id) in notification.payload or time.monotonic() >= end:
                return
