"""`jobqueue health` and `jobqueue doctor`: what the functions of the same names say."""

from __future__ import annotations

from typing import LiteralString

import click

from jobqueue.cli.options import dsn_option, output_option
from jobqueue.cli.output import emit_rows


@click.command()
@dsn_option
@output_option
def health(dsn: str | None, output: str) -> None:
    """Say how it goes: workers, leases, maintenance, backlog, pauses. Exit code 1 if something failed."""
    _report(dsn, "select * from jobqueue.health()", output)


@click.command()
@dsn_option
@output_option
def doctor(dsn: str | None, output: str) -> None:
    """Say what is wrong and what to do: health, and the database around it. Exit code 1 if something failed."""
    _report(dsn, "select * from jobqueue.doctor()", output)


def _report(dsn: str | None, query: LiteralString, output: str) -> None:
    from jobqueue.cli.session import rows_of, session

    with session(dsn) as connection:
        rows = rows_of(connection, query)
    emit_rows(rows, ("status", "name", "detail", "what_to_do"), output)
    if any(row["status"] == "fail" for row in rows):
        raise click.exceptions.Exit(1)
