"""`jobqueue migrate`: the database's schema."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from jobqueue.cli.options import database_dsn, dsn_option, output_option
from jobqueue.cli.output import emit_rows

if TYPE_CHECKING:
    from jobqueue.settings import Settings

TRY_AGAIN = 75


@click.group()
def group() -> None:
    """The database's schema. Nothing but these commands, `jobqueue up` and scripts/run changes it.

    They use JOBQUEUE_LISTEN_DSN if it is set, since a transaction pooler cannot hold the migration lock.
    """


@group.command()
@dsn_option
@click.option("--target", type=int, metavar="VERSION", help="The version to stop at.  [default: the newest]")
@output_option
def up(dsn: str | None, target: int | None, output: str) -> None:
    """Apply the steps that the database lacks. Safe to run twice, by several at a time, and to kill."""
    from jobqueue.database.migrations import migrate_up

    settings = _settings(dsn)
    _emit(migrate_up(_database(settings, dsn), target=target, timeout=settings.start_timeout), output)


@group.command()
@dsn_option
@click.option("--target", type=int, required=True, metavar="VERSION", help="The version to go back to; 0 removes all.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_option
def down(dsn: str | None, target: int, yes: bool, output: str) -> None:
    """Undo the steps above VERSION, newest first. What they hold, jobs included, is lost."""
    from jobqueue.database.migrations import migrate_down

    _require_consent(yes, target)
    settings = _settings(dsn)
    _emit(migrate_down(_database(settings, dsn), target=target, timeout=settings.start_timeout), output)


@group.command()
@dsn_option
@click.option("--check", is_flag=True, help="Exit with 75 unless everything is applied.")
@output_option
def status(dsn: str | None, check: bool, output: str) -> None:
    """Print every step and whether it is applied, then functions, views, roles and comments that are out of date."""
    from jobqueue.database import migrations

    settings = _settings(dsn)
    steps = migrations.status(_database(settings, dsn), timeout=settings.start_timeout)
    emit_rows([asdict(step) for step in steps], ("name", "state", "applied_at", "applied_by", "duration"), output)
    if check and any(step.state != "applied" for step in steps):
        raise click.exceptions.Exit(TRY_AGAIN)


@group.command()
@click.option("--from", "from_version", type=int, metavar="VERSION", help="Where to begin.  [default: 0; down: newest]")
@click.option("--to", "to_version", type=int, metavar="VERSION", help="Where to end.  [default: newest; down: 0]")
@click.option("--down", is_flag=True, help="The way back.")
@click.option("--transactions/--no-transactions", default=True, help="With begin and commit.  [default: with]")
def sql(from_version: int | None, to_version: int | None, down: bool, transactions: bool) -> None:
    """Print the SQL between two versions, for review or another migration tool. Nothing is executed."""
    from jobqueue.database.migrations import sql_text
    from jobqueue.database.schema_files import program_version

    start = from_version if from_version is not None else program_version() if down else 0
    click.echo(sql_text(start, to_version, down, transactions=transactions), nl=False)


def _settings(dsn: str | None) -> Settings:
    from jobqueue.settings import load_settings

    return load_settings(dsn=dsn)


def _database(settings: Settings, flag: str | None) -> str:
    # A DSN given by hand is meant; only the configured one may be a pooler's.
    return database_dsn(settings, direct=flag is None)


def _emit(done: list[str], output: str) -> None:
    if not done:
        click.echo("nothing to do: the schema is where it should be", err=True)
    if output == "table":
        for line in done:
            click.echo(line)
    else:
        emit_rows([{"done": line} for line in done], ("done",), output)


def _require_consent(yes: bool, target: int) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("data will be lost: give --yes to go on without being asked")
    click.confirm(f"Undo every step above version {target}? What they hold is lost", abort=True, err=True)
