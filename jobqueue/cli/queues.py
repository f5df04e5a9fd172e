"""`jobqueue queues`: the queues and their options."""

from __future__ import annotations

import click

from jobqueue.cli.options import dsn_option, output_option
from jobqueue.cli.output import emit_rows

COLUMNS = ("name", "policy", "max_retries", "timeout", "concurrency", "dead_letter", "paused_at", "pause_reason")


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
