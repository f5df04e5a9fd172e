"""`jobqueue queues`: the queues and their options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, LiteralString

import click

from jobqueue.cli.options import dsn_option, output_option, reason_option
from jobqueue.cli.output import emit_object, emit_rows, to_json
from jobqueue.cli.send import parse_options

COLUMNS = ("name", "policy", "max_retries", "timeout", "dead_letter", "warn_backlog", "paused_at", "pause_reason")

STATS: LiteralString = """
    select * from jobqueue.queue_stats(%s::text, now() - make_interval(secs => %s), null, make_interval(secs => %s))
"""
STATS_COLUMNS = (
    "begins_at", "sent", "completed", "failed", "retried", "throughput", "wait_p50", "wait_p95", "run_p50", "run_p95",
    "ready", "processing", "oldest_ready_seconds",
)  # fmt: skip

_queue = click.argument("queue")
_options = click.option(
    "--option", "pairs", multiple=True, metavar="KEY=VALUE", help="Any option of a queue; may be repeated."
)


@click.group()
def group() -> None:
    """The queues and their options."""


@group.command("list")
@dsn_option
@output_option
def list_(dsn: str | None, output: str) -> None:
    """Print the queues by name."""
    from jobqueue.cli.session import rows_of, session

    with session(dsn) as connection:
        rows = rows_of(connection, "select * from jobqueue.queues order by name")
    emit_rows(rows, COLUMNS, output)


@group.command()
@click.argument("queue", required=False)
@click.option("--since", default="1 h", show_default=True, help="How far back, such as '6 h' or '7 d'.")
@click.option("--bucket", default="5 min", show_default=True, help="Time per row, in whole minutes.")
@dsn_option
@output_option
def stats(queue: str | None, since: str, bucket: str, dsn: str | None, output: str) -> None:
    """Print how a queue (without a name: all together) does over time; times in seconds, the newest row last.

    `failed` are jobs that ended so, `retried` attempts after which a retry followed. JSON has all columns.
    """
    from jobqueue.cli.session import rows_of, session

    seconds = [_seconds(name, text) for name, text in (("--since", since), ("--bucket", bucket))]
    with session(dsn) as connection:
        rows = rows_of(connection, STATS, (queue, *seconds))
    emit_rows([_rounded(row) for row in rows] if output == "table" else rows, STATS_COLUMNS, output)


@group.command()
@_queue
@dsn_option
@_options
def create(queue: str, dsn: str | None, pairs: tuple[str, ...]) -> None:
    """Make a queue, for example with `--option max_retries=5 --option 'timeout=1 h'`.

    One that is there already stays as it is: exit code 0 if it has these values, 4 if it has others.
    """
    row = _call(dsn, "select jobqueue.create_queue(%s, %s::text::jsonb) as made", queue, _options_of(pairs))
    click.echo(f"created queue {queue}" if row["made"] else f"queue {queue} is there already", err=True)


@group.command()
@_queue
@dsn_option
@_options
def update(queue: str, dsn: str | None, pairs: tuple[str, ...]) -> None:
    """Change options of a queue; null clears one. Waiting jobs follow unless they were sent with their own value."""
    _call(dsn, "select jobqueue.update_queue(%s, %s::text::jsonb)", queue, _options_of(pairs))
    click.echo(f"updated queue {queue}", err=True)


@group.command()
@_queue
@dsn_option
def delete(queue: str, dsn: str | None) -> None:
    """Take a queue away with its ended jobs; refused while it has others, or while something names it."""
    row = _call(dsn, "select jobqueue.delete_queue(%s) as deleted", queue)
    click.echo(f"deleted queue {queue} and {row['deleted']} ended jobs", err=True)


@group.command()
@_queue
@dsn_option
@reason_option
def pause(queue: str, dsn: str | None, reason: str) -> None:
    """Start none of its jobs until it is resumed; those that run go on."""
    _call(dsn, "select jobqueue.pause_queue(%s, %s)", queue, reason)
    click.echo(f"paused queue {queue}", err=True)


@group.command()
@_queue
@dsn_option
@reason_option
def resume(queue: str, dsn: str | None, reason: str) -> None:
    """Start its jobs again."""
    _call(dsn, "select jobqueue.resume_queue(%s, %s)", queue, reason)
    click.echo(f"resumed queue {queue}", err=True)


@group.command()
@_queue
@dsn_option
@reason_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_option
def purge(queue: str, dsn: str | None, reason: str, yes: bool, output: str) -> None:
    """Cancel all that waits in a queue and delete all that has ended; jobs that run are left alone."""
    if not yes:
        click.confirm(f"Cancel and delete all jobs of the queue {queue} that do not run?", abort=True, err=True)
    emit_object(_call(dsn, "select * from jobqueue.purge_queue(%s, %s)", queue, reason), output)


def _options_of(pairs: tuple[str, ...]) -> str:
    options = parse_options(pairs)
    # For `send` this stays text whatever it says; here null is how a queue gets rid of it.
    if options.get("dead_letter") == "null":
        options["dead_letter"] = None
    return to_json(options)


def _seconds(name: str, text: str) -> float:
    from jobqueue.durations import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=name) from None


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Three digits are more than the percentiles are worth."""
    return {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in row.items()}


def _call(dsn: str | None, query: LiteralString, *arguments: str) -> dict[str, Any]:
    from jobqueue.cli.session import as_actor, rows_of, session

    with session(dsn) as connection, as_actor(connection):
        (row,) = rows_of(connection, query, arguments)
    return row
