"""Time passes for the rows of the database, not for its clock: the cheap way, for tests that only ask what is due.

All rules of jobqueue compare a time in a row with `now()`. Moving every time in every row one hour into the past is
therefore the same as one hour that passes, for leases, delays, retries, expiry, retention, limits and schedules alike,
and no test has to wait. It takes a few milliseconds; `jobqueue.testing.frozen` takes 0.3 s and moves the clock itself.
"""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql

from jobqueue.app import App
from jobqueue.durations import DurationLike, parse_duration
from jobqueue.testing.freezing import move_if_frozen

# Charts per minute and hour: their times are places in a grid.
_GRIDS = ("statistic", "pace")
_COLUMNS = """
    select c.relname, array_agg(a.attname::text order by a.attnum)
    from pg_class c
    join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
    where c.relnamespace = 'jobqueue'::regnamespace and c.relkind in ('r', 'p') and a.atttypid = 'timestamptz'::regtype
        and c.relname <> all (%s)
    group by c.relname
    order by c.relname
"""


def travel(where: App | psycopg.Connection[Any], time: DurationLike) -> None:
    """Let time pass: `travel(app, "2 hours")` moves every time in the database so far into the past.

    Inside a block of `frozen` it moves the clock instead, as `clock.move` does, and nothing of the following is left out.

    `where`: an app, or a connection whose user owns the schema. `time`: seconds, a duration such as "5 min", or a
    timedelta; time only goes forward. In one transaction. Afterwards a job that was to run in an hour is due, a lease that had
    30 s left has run out, and what ended is two hours older; `drain` then does what a worker would do at that moment.

    What stays: `now()` itself, so that new rows have the real time; throttle and debounce windows and the ticks of cron
    expressions that are computed from now on, which follow the real clock; statistics per minute. Use `frozen` for
    those. Stop workers first: to those that run, time has not passed. Raises ValueError for what is no duration.
    """
    seconds = parse_duration(time)
    if isinstance(where, App):
        with where._lend_blocking(None) as lent:
            _shift(lent, seconds)
    else:
        _shift(where, seconds)


def _shift(connection: psycopg.Connection[Any], seconds: float) -> None:
    with connection.transaction():
        if move_if_frozen(connection, seconds):
            return
        tables = connection.execute(_COLUMNS.encode(), [list(_GRIDS)]).fetchall()
        for table, columns in tables:
            moved = sql.SQL(", ").join(
                sql.SQL("{0} = {0} - %(time)s * interval '1 s'").format(sql.Identifier(column)) for column in columns
            )
            statement = sql.SQL("update jobqueue.{} set {}").format(sql.Identifier(table), moved)
            connection.execute(statement, {"time": seconds})
