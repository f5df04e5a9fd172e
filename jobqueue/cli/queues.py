"""`jobqueue queues`: the queues and their options."""

from __future__ import annotations

import click

from jobqueue.cli.options import dsn_option, output_option, reason_option
from jobqueue.cli.output import emit_rows, to_json
from jobqueue.cli.send import parse_options

COLUMNS = ("name", "policy", "max_retries", "timeout", "concurrency", "dead_letter", "paused_at", "pause_reason")

_queue = click.argument("queue")


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
@_queue
@dsn_option
@click.option("--option", "pairs", multiple=True, metavar="KEY=VALUE", help="Any option of create_queue; repeatable.")
def create(queue: str, dsn: str | None, pairs: tuple[str, ...]) -> None:
    """Make a queue, for example with `--option concurrency=4 --option 'timeout=1 h'`."""
    from jobqueue.cli.session import as_actor, rows_of, session

    options = to_json(parse_options(pairs))
    with session(dsn) as connection, as_actor(connection):
        rows_of(connection, "select jobqueue.create_queue(%s, %s::text::jsonb)", (queue, options))
    click.echo(f"created queue {queue}", err=True)


@group.command()
@_queue
@dsn_option
@reason_option
def pause(queue: str, dsn: str | None, reason: str) -> None:
    """Start none of its jobs until it is resumed; those that run go on."""
    from jobqueue.cli.session import as_actor, rows_of, session

    with session(dsn) as connection, as_actor(connection):
        rows_of(connection, "select jobqueue.pause_queue(%s, %s)", (queue, reason))
    click.echo(f"paused queue {queue}", err=True)


@group.command()
@_queue
@dsn_option
@reason_option
def resume(queue: str, dsn: str | None, reason: str) -> None:
    """Start its jobs again."""
    from jobqueue.cli.session import as_actor, rows_of, session

    with session(dsn) as connection, as_actor(connection):
        rows_of(connection, "select jobqueue.resume_queue(%s, %s)", (queue, reason))
    click.echo(f"resumed queue {queue}", err=True)
