"""Time stands still in a database, and moves when a test says so: `with frozen(app, at="2026-03-29T00:30Z") as clock:`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg

from jobqueue.app import App
from jobqueue.durations import DurationLike, parse_duration
from jobqueue.testing import rewriting

NOW = "select jobqueue_testing.clock_timestamp()"
SET = """
    insert into jobqueue_testing.clock (stands_at) values (%s)
    on conflict (one) do update set stands_at = excluded.stands_at,
        runs_since = case when clock.runs_since is not null then clock_timestamp() end
"""
MOVE = "update jobqueue_testing.clock set stands_at = stands_at + make_interval(secs => %s)"
RUN = "update jobqueue_testing.clock set runs_since = clock_timestamp() where runs_since is null"
STOP = "update jobqueue_testing.clock set stands_at = jobqueue_testing.clock_timestamp(), runs_since = null"
READ = "select stands_at, runs_since from jobqueue_testing.clock"
RESTORE = "insert into jobqueue_testing.clock (stands_at, runs_since) values (%s, %s)"
REMOVE = "delete from jobqueue_testing.clock"
# Steps of maintenance remember when they are due, which is far ahead once the clock has been put back.
MAINTENANCE_IS_DUE = """
    update jobqueue.maintenance set next_at = jobqueue.now_minus('0 s') where next_at > jobqueue.now_minus('0 s') + every
"""


class Clock:
    """The clock of one database; made by `frozen`. All times are aware, and come out in UTC."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    @property
    def now(self) -> datetime:
        """What the clock shows."""
        row = self._connection.execute(NOW).fetchone()
        assert row is not None
        shown: datetime = row[0]
        return shown.astimezone(UTC)

    def move(self, time: DurationLike) -> datetime:
        """Let time pass: seconds, a duration such as "2 hours", or a timedelta. Returns the new time.

        Raises ValueError for what is no duration, and for a negative one.
        """
        self._connection.execute(MOVE, (parse_duration(time),))
        return self.now

    def set(self, at: datetime | str) -> datetime:
        """Put the clock to a time: an aware datetime, or ISO 8601 with an offset ("2026-03-29T02:30+01:00").

        It may be put back too; the times in rows stay what they are. Returns the new time in UTC. Raises ValueError for
        a time without an offset.
        """
        with self._connection.transaction():
            self._connection.execute(SET, (as_time(at),))
            self._connection.execute(MAINTENANCE_IS_DUE)
        return self.now

    def run(self) -> None:
        """Let the clock go on from where it is, as fast as the real one: for tests with a worker that stays."""
        self._connection.execute(RUN)

    def stop(self) -> None:
        """Let it stand still again, where it is now."""
        self._connection.execute(STOP)


@contextlib.contextmanager
def frozen(where: App | str, at: datetime | str | None = None) -> Iterator[Clock]:
    """Stop the clock of a test's database: inside the block every rule of jobqueue reads the clock that comes back.

    `where`: an app, or a conninfo, of a user who owns the schema. `at`: an aware datetime, or ISO 8601 with an offset
    (default: now). It counts in every session of the database, also in those that are open, and for workers, the API
    and psql alike: times of new rows, ids, delays, retries, leases, throttling, schedules, limits, retention,
    statistics, expiry of keys and quotas. At the end of the block everything is as it was before, and the real time
    counts; rows keep the times that they have.

    What goes on by itself: the clock of Python (so `timeout` and `max_runtime` of handlers that run), `now()` in your
    own statements (`jobqueue_testing.now()` is the one that stands), and how long something of the server has taken.
    Never for a database in production: until the block ends its functions are other ones, also if the process is
    killed (`unfreeze` puts them back). Raises Conflict while an open transaction has used a table or a view of jobqueue,
    ValueError for a time without an offset.
    """
    begins = None if at is None else as_time(at)
    with psycopg.connect(_dsn_of(where), autocommit=True) as connection:
        inner = rewriting.is_installed(connection)
        if not inner:
            rewriting.install(connection)
        before = connection.execute(READ).fetchone()
        clock = Clock(connection)
        try:
            clock.set(begins or clock.now)
            clock.stop()
            yield clock
        finally:
            _put_back(connection, before, uninstall=not inner)


def unfreeze(where: App | str) -> None:
    """Give a database its own clock back, after a process that had frozen it was killed. Without effect otherwise."""
    with psycopg.connect(_dsn_of(where), autocommit=True) as connection:
        if rewriting.is_installed(connection):
            _put_back(connection, None, uninstall=True)


def move_if_frozen(connection: psycopg.Connection[Any], seconds: float) -> bool:
    """Let time pass by the clock of tests, and return whether the database has one that counts."""
    if not rewriting.is_installed(connection):
        return False
    return connection.execute(MOVE, (seconds,)).rowcount == 1


def as_time(at: datetime | str) -> datetime:
    """Return an aware time. Raises ValueError."""
    read = datetime.fromisoformat(at) if isinstance(at, str) else at
    if read.utcoffset() is None:
        raise ValueError(f"{at} has no offset: write {read.isoformat()}Z for UTC")
    return read


def _put_back(connection: psycopg.Connection[Any], before: tuple[Any, ...] | None, *, uninstall: bool) -> None:
    with connection.transaction():
        connection.execute(REMOVE)
        if before is not None:
            connection.execute(RESTORE, before)
        if uninstall:
            rewriting.uninstall(connection)
        connection.execute(MAINTENANCE_IS_DUE)


def _dsn_of(where: App | str) -> str:
    return where.resolve_dsn() if isinstance(where, App) else where
