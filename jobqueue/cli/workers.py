"""`jobqueue workers`: the processes that run jobs."""

from __future__ import annotations

from uuid import UUID

import click

from jobqueue.cli.options import dsn_option, output_option, reason_option
from jobqueue.cli.output import emit_rows

COLUMNS = ("id", "name", "state", "queues", "running", "stuck", "concurrency", "started_at", "heartbeat_at")


@click.group()
def group() -> None:
    """The processes that run jobs."""


@group.command("list")
@dsn_option
@click.option("--all", "everyone", is_flag=True, help="Also those that stopped within a day.")
@output_option
def list_(dsn: str | None, everyone: bool, output: str) -> None:
    """Print the workers, the newest first."""
    from jobqueue.cli.session import rows_of, session

    query = "select * from jobqueue.workers where %s or state <> 'stopped' order by started_at desc, id"
    with session(dsn) as connection:
        rows = rows_of(connection, query, (everyone,))
    emit_rows(rows, COLUMNS, output)


@group.command()
@click.argument("worker", type=click.UUID, metavar="ID")
@dsn_option
@reason_option
def drain(worker: UUID, dsn: str | None, reason: str) -> None:
    """Ask a worker to finish what it has and to stop. It hears of it with its next heartbeat, within 5 s."""
    from jobqueue.cli.session import as_actor, rows_of, session

    with session(dsn) as connection, as_actor(connection):
        rows_of(connection, "select jobqueue.drain_worker(%s, %s)", (worker, reason))
    click.echo(f"worker {worker} was asked to drain", err=True)
