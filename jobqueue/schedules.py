"""Schedules from Python: `app.schedule("nightly", report, "0 3 * * *", time_zone="Europe/Berlin")`.

The database keeps them and sends their jobs, at every tick once, with any number of workers. So a schedule may be made
again whenever the program starts: with the same expression and zone it keeps its place and what it has missed.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, AbstractContextManager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jobqueue import client
from jobqueue.options import options_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import AsyncConnection, Connection

    from jobqueue.client import AnyConnection

SCHEDULE = """
    select jobqueue.schedule(%s::text, %s::text, %s::text, %s::text::jsonb, %s::text::jsonb || %s::text::jsonb)
"""
PREVIEW = "select tick from jobqueue.preview_schedule(%s::text, %s::text, %s::int, %s::timestamptz)"


class Schedules:
    """The part of `App` that makes schedules."""

    if TYPE_CHECKING:

        def _prepare(
            self, name: str | Callable[..., Any], payload: Any, queue: str | None, options: dict[str, Any]
        ) -> tuple[str, str, str]: ...
        def _lend(self, connection: Any) -> AbstractAsyncContextManager[AsyncConnection[Any]]: ...
        def _lend_blocking(self, connection: Any) -> AbstractContextManager[Connection[Any]]: ...

    async def schedule(
        self,
        name: str,
        handler: str | Callable[..., Any],
        expression: str,
        payload: Any = None,
        *,
        queue: str | None = None,
        time_zone: str | None = None,
        missed: str | None = None,
        connection: Any = None,
        **options: Any,
    ) -> datetime | None:
        """Send a job at every tick of `expression`, and return the next tick; a schedule of this name is replaced.

        `handler`: its name, or its function; another name only together with `queue`. `expression`: cron with 5 fields,
        or 6 with seconds first, or lines of RFC 5545 (`RRULE:FREQ=DAILY;BYHOUR=9`). `time_zone`: of the IANA database
        (default UTC). `missed`: which ticks to make up for when no worker ran for over a minute: "skip" (default),
        "once" (the last one) or "all" (the last 100). `connection`, `options`: as of `send`, but no `id`.

        Every job has `metadata["schedule"]`, with the schedule's name and the tick. The options of the handler are kept
        as they are now. Returns None for a rule that had its last tick before it was made again. Raises InvalidArgument
        for an expression that cannot be read or never happens, Conflict if the name is another tenant's, and as `send`.
        """
        parameters = self._schedule_parameters(name, handler, expression, payload, queue, time_zone, missed, options)
        async with self._lend(connection) as lent:
            next_tick: datetime | None = await _only(lent, SCHEDULE, parameters)
        return next_tick

    def schedule_sync(
        self,
        name: str,
        handler: str | Callable[..., Any],
        expression: str,
        payload: Any = None,
        *,
        queue: str | None = None,
        time_zone: str | None = None,
        missed: str | None = None,
        connection: Any = None,
        **options: Any,
    ) -> datetime | None:
        """The blocking form of `schedule`."""
        parameters = self._schedule_parameters(name, handler, expression, payload, queue, time_zone, missed, options)
        with self._lend_blocking(connection) as lent:
            next_tick: datetime | None = client.blocking(_only(lent, SCHEDULE, parameters))
        return next_tick

    async def unschedule(self, name: str, *, connection: Any = None) -> bool:
        """Remove a schedule and return whether there was one; the jobs that it has sent stay."""
        async with self._lend(connection) as lent:
            return bool(await _only(lent, "select jobqueue.unschedule(%s::text)", (name,)))

    def unschedule_sync(self, name: str, *, connection: Any = None) -> bool:
        """The blocking form of `unschedule`."""
        with self._lend_blocking(connection) as lent:
            return bool(client.blocking(_only(lent, "select jobqueue.unschedule(%s::text)", (name,))))

    async def preview_schedule(
        self, expression: str, time_zone: str | None = None, count: int = 5, *, after: datetime | None = None
    ) -> list[datetime]:
        """Return the next ticks of an expression; nothing is stored.

        `time_zone`: default UTC. `count`: 1 to 1,000, default 5; fewer come back if it happens less often. `after`: an
        aware time (default: now). Raises InvalidArgument.
        """
        async with self._lend(None) as lent:
            rows = await client.fetch(lent, PREVIEW, (expression, time_zone, count, after))
        return [tick for (tick,) in rows]

    def _schedule_parameters(
        self,
        name: str,
        handler: str | Callable[..., Any],
        expression: str,
        payload: Any,
        queue: str | None,
        time_zone: str | None,
        missed: str | None,
        options: dict[str, Any],
    ) -> tuple[str, ...]:
        where, text, chosen = self._prepare(handler, payload, queue, options)
        own = {"time_zone": time_zone, "missed": missed}
        more = options_text({key: value for key, value in own.items() if value is not None})
        return name, where, expression, text, chosen, more


async def _only(connection: AnyConnection, query: str, parameters: tuple[str, ...]) -> Any:
    return (await client.fetch(connection, query, parameters))[0][0]
