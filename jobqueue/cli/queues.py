"""`jobqueue queues`: the queues and their options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, LiteralString

import click

from jobqueue.cli.jobs import parse_json
from jobqueue.cli.options import dsn_option, output_option, reason_option
from jobqueue.cli.output import emit_object, emit_rows, to_json
from jobqueue.cli.send import parse_options

COLUMNS = ("name", "policy", "max_retries", "timeout", "dead_letter", "warn_backlog", "paused_at", "pause_reason")

STATS: LiteralString = """
    select * from jobqueue.queue_stats(%s::text, jobqueue.now_minus(make_interval(secs => %s)), null, make_interval(secs => %s))
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


@group.command()
@click.argument("dead_letter")
@dsn_option
@click.option("--preview", is_flag=True, help="Only say what would go where.")
@click.option("--destination", metavar="QUEUE", help="Send new jobs there instead of the originals back.")
@click.option("--source", metavar="QUEUE", help="Only what failed in this queue.")
@click.option("--payload", metavar="JSON", help="Only what contains this.")
@click.option("--created-before", metavar="TIME", help="RFC 3339 with an offset, such as 2030-01-31T12:00:00Z.")
@click.option("--id", "ids", type=click.UUID, multiple=True, help="This copy or original; may be repeated.")
@click.option("--max-jobs", type=click.IntRange(1, 100_000), help="How many at most, oldest first.  [default: 1000]")
@output_option
def redrive(dead_letter: str, dsn: str | None, preview: bool, output: str, **options: Any) -> None:
    """Send the waiting jobs of a dead letter queue back to where they failed."""
    from jobqueue.cli.session import rows_of, session

    options["payload"] = parse_json("payload", options["payload"])
    text = to_json({name: value for name, value in options.items() if value not in (None, ())})
    if not preview:
        emit_object(_call(dsn, "select * from jobqueue.redrive(%s, %s::text::jsonb)", dead_letter, text), output)
        return
    with session(dsn) as connection:
        rows = rows_of(connection, "select * from jobqueue.preview_redrive(%s, %s::text::jsonb)", (dead_letter, text))
    emit_rows(rows, ("destination", "originals", "new_jobs"), output)


@group.command("blocked-keys")
@_queue
@dsn_option
@output_option
def blocked_keys(queue: str, dsn: str | None, output: str) -> None:
    """Print the keys of a key_strict_fifo queue whose first job does not run, oldest first."""
    from jobqueue.cli.session import rows_of, session

    with session(dsn) as connection:
        rows = rows_of(connection, "select * from jobqueue.blocked_keys(%s)", (queue,))
    emit_rows(rows, ("singleton_key", "tenant", "job_id", "status", "since", "waiting"), output)


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
