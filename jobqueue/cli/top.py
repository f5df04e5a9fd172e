"""`jobqueue top`: queues, workers and what needs attention, drawn anew every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any, LiteralString

import click

from jobqueue.cli.options import dsn_option, output_option
from jobqueue.cli.output import cell, emit_rows, to_json

if TYPE_CHECKING:
    from psycopg import Connection
    from rich.console import RenderableType

# The busiest 30: each asks for the statistics of its last five minutes.
QUEUES: LiteralString = """
    select g.queue, q.paused_at is not null as is_paused, g.ready, g.scheduled, g.blocked, g.processing, g.paused,
        g.failed_jobs as failed, g.oldest_ready_seconds, s.throughput, s.wait_p95, s.run_p50
    from (select * from jobqueue.queue_gauges() order by ready + processing desc, queue limit 30) g
    join jobqueue.queues q on q.name = g.queue
    left join lateral (
        select sum(x.completed) / 300.0::float8 as throughput, max(x.wait_p95) as wait_p95, max(x.run_p50) as run_p50
        from jobqueue.queue_stats(g.queue, jobqueue.now_minus('5 min'), null, '5 min') x) s on true
    order by g.ready + g.processing desc, g.queue
"""
WORKERS: LiteralString = """
    select name, hostname, pid, state, running, concurrency, -jobqueue.seconds_until(heartbeat_at) as beat_age
    from jobqueue.workers where state <> 'stopped' order by running desc, started_at
"""
ATTENTION: LiteralString = "select name, status, detail, what_to_do from jobqueue.health() where status <> 'ok'"

QUEUE_COLUMNS = ("queue", "ready", "scheduled", "processing", "failed", "oldest", "done/s", "wait p95", "run p50")
WORKER_COLUMNS = ("worker", "host", "state", "busy", "heartbeat")
ATTENTION_COLUMNS = ("attention", "detail", "what to do")

Snapshot = Mapping[str, Any]


@click.command()
@dsn_option
@click.option("--every", type=click.FloatRange(0.5, 3600), default=2.0, show_default=True, metavar="SECONDS")
@click.option(
    "--once", is_flag=True, help="One look, without a screen of its own.  [default: if stdout is no terminal]"
)
@output_option
def command(dsn: str | None, every: float, once: bool, output: str) -> None:
    """Watch queues, workers and what needs attention; Ctrl-C ends it.

    `-o jsonl` writes an object for every look, for ever; `-o json` writes one.
    """
    from jobqueue.cli.session import session

    with session(dsn) as connection:
        if output == "jsonl" and not once:
            _stream(connection, dsn, every)
        elif output != "table":
            click.echo(to_json(_look(connection), indent=2 if output == "json" else None))
        elif once or not sys.stdout.isatty():
            _print(_look(connection))
        else:
            _watch(connection, dsn, every)


def _look(connection: Connection[Any]) -> Snapshot:
    from jobqueue.cli.session import rows_of

    return {
        "at": datetime.now(UTC),
        "queues": rows_of(connection, QUEUES),
        "workers": rows_of(connection, WORKERS),
        "attention": rows_of(connection, ATTENTION),
    }


def _looks(connection: Connection[Any], dsn: str | None, every: float) -> Iterator[Snapshot | None]:
    """A look every so often, without end; None while the database is away."""
    from psycopg import OperationalError

    from jobqueue.cli.session import session
    from jobqueue.errors import DatabaseUnavailable

    opened: AbstractContextManager[Connection[Any]] = nullcontext(connection)
    while True:
        try:
            with opened as current:
                while True:
                    yield _look(current)
                    time.sleep(every)
        except (DatabaseUnavailable, OperationalError):
            yield None
        time.sleep(every)
        opened = session(dsn)


def _stream(connection: Connection[Any], dsn: str | None, every: float) -> None:
    for snapshot in _looks(connection, dsn, every):
        if snapshot is not None:
            click.echo(to_json(snapshot))


def _watch(connection: Connection[Any], dsn: str | None, every: float) -> None:
    from rich.live import Live

    with Live(screen=True, auto_refresh=False) as live, _until_interrupted():
        for snapshot in _looks(connection, dsn, every):
            if snapshot is None:
                live.update("The database is away; trying again.", refresh=True)
            else:
                live.update(_screen(snapshot), refresh=True)


@contextmanager
def _until_interrupted() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        return


def _screen(snapshot: Snapshot) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text(_summary(snapshot), style="bold")]
    for columns, rows in _tables(snapshot):
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell(value)) for value in row))
        parts += [Text(), table]
    return Group(*parts)


def _print(snapshot: Snapshot) -> None:
    click.echo(_summary(snapshot))
    for columns, rows in _tables(snapshot):
        click.echo()
        emit_rows([dict(zip(columns, row, strict=True)) for row in rows], columns)


def _summary(snapshot: Snapshot) -> str:
    queues, workers = snapshot["queues"], [row for row in snapshot["workers"] if row["state"] != "lost"]
    busy, slots = (sum(row[name] or 0 for row in workers) for name in ("running", "concurrency"))
    done = sum(row["throughput"] or 0 for row in queues)
    ready = sum(row["ready"] for row in queues)
    return (
        f"{snapshot['at'].isoformat(sep=' ', timespec='seconds')}   {ready:,} ready   {done:,.1f} done/s   "
        f"{len(workers)} workers, {busy:,} of {slots:,} slots busy   {len(snapshot['attention'])} need attention"
    )


def _tables(snapshot: Snapshot) -> Iterator[tuple[Sequence[str], list[tuple[Any, ...]]]]:
    yield QUEUE_COLUMNS, [_queue_line(row) for row in snapshot["queues"]]
    yield (
        WORKER_COLUMNS,
        [
            (
                row["name"] or row["pid"],
                row["hostname"],
                row["state"],
                f"{row['running']}/{'?' if row['concurrency'] is None else row['concurrency']}",
                f"{_seconds(row['beat_age'])} ago",
            )
            for row in snapshot["workers"]
        ],
    )
    if snapshot["attention"]:
        yield ATTENTION_COLUMNS, list(_attention_lines(snapshot["attention"]))


def _attention_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """A line per thing to do, what failed first: without a worker a dozen steps are late for the same reason."""
    ordered = sorted(rows, key=lambda row: row["status"] != "fail")
    for _, same in groupby(ordered, key=lambda row: (row["status"], row["what_to_do"])):
        first, *others = same
        more = f" (and {len(others)} more like it)" if others else ""
        yield f"{first['status']}: {first['name']}", f"{first['detail']}{more}", first["what_to_do"]


def _queue_line(row: Mapping[str, Any]) -> tuple[Any, ...]:
    times = (_seconds(row[name]) for name in ("oldest_ready_seconds", "wait_p95", "run_p50"))
    oldest, wait, run = times
    name = f"{row['queue']} (paused)" if row["is_paused"] else row["queue"]
    counts = (_count(row[column]) for column in ("ready", "scheduled", "processing", "failed"))
    return (name, *counts, oldest, f"{row['throughput'] or 0:.1f}", wait, run)


def _count(number: int) -> str:
    """The database stops counting at 100,000."""
    return f"{number:,}+" if number >= 100_000 else f"{number:,}"


def _seconds(value: float | None) -> str | None:
    if value is None:
        return None
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.0f} h"
