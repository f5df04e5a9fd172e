"""The command line. A command's module is imported when it runs, so that `jobqueue --help` stays quick.

To add a command: one line in `COMMANDS`, and a click command or group under that name.
"""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from jobqueue.errors import DatabaseUnavailable, JobqueueError, from_postgres


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """Where a command lives (`module:object`) and the line that `jobqueue --help` shows for it."""

    target: str
    help: str

    def load(self) -> click.Command:
        """Import the command."""
        module, _, name = self.target.partition(":")
        command = getattr(importlib.import_module(module), name)
        if not isinstance(command, click.Command):
            raise TypeError(f"{self.target} is not a click command")
        return command


COMMANDS: Mapping[str, LazyCommand] = {
    "up": LazyCommand("jobqueue.cli.up:command", "Start all on this machine: database, schema, API, one worker."),
    "worker": LazyCommand("jobqueue.cli.worker:command", "Run the jobs of an application."),
    "api": LazyCommand("jobqueue.cli.api:command", "Serve the HTTP API."),
    "send": LazyCommand("jobqueue.cli.send:command", "Add a job."),
    "jobs": LazyCommand("jobqueue.cli.jobs:group", "Look at jobs, wait for them, act on them."),
    "queues": LazyCommand("jobqueue.cli.queues:group", "The queues and their options."),
    "schedules": LazyCommand("jobqueue.cli.schedules:group", "What sends jobs at their times."),
    "workers": LazyCommand("jobqueue.cli.workers:group", "The processes that run jobs."),
    "keys": LazyCommand("jobqueue.cli.keys:group", "Who may use the HTTP API."),
    "top": LazyCommand("jobqueue.cli.top:command", "Watch queues, workers and what needs attention."),
    "health": LazyCommand("jobqueue.cli.health:health", "Say how it goes."),
    "doctor": LazyCommand("jobqueue.cli.health:doctor", "Say what is wrong, and what to do."),
    "psql": LazyCommand("jobqueue.cli.psql:command", "Open psql on the database."),
    "import-procrastinate": LazyCommand(
        "jobqueue.cli.import_procrastinate:command", "Move the waiting jobs of a procrastinate installation here."
    ),
    "migrate": LazyCommand("jobqueue.cli.migrate:group", "Bring the database's schema up to date, or back."),
    "server": LazyCommand("jobqueue.cli.server:group", "Start, find and stop the embedded PostgreSQL server."),
    "config": LazyCommand("jobqueue.cli.config:group", "Show the settings in use and where they come from."),
}


class Main(click.Group):
    """The root group: lazy commands, and one place where errors become messages and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = COMMANDS.get(cmd_name)
        return command.load() if command else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            exit_code = report(error)
            if exit_code is None:
                raise
            raise click.exceptions.Exit(exit_code) from error


def report(error: Exception) -> int | None:
    """Print an error that people can act on to stderr and return its exit code; None for any other error."""
    known = error if isinstance(error, JobqueueError) else _of_the_database(error)
    if known is None:
        return None
    click.echo(f"jobqueue: {known.message}", err=True)
    if known.hint:
        click.echo(f"  hint: {known.hint}", err=True)
    return known.exit_code


def _of_the_database(error: Exception) -> JobqueueError | None:
    # Not imported here: a command that has not loaded psycopg cannot have raised its errors.
    psycopg = sys.modules.get("psycopg")
    if psycopg is None or not isinstance(error, psycopg.Error):
        return None
    if translated := from_postgres(error):
        return translated
    reason = error.diag.message_primary or " ".join(str(error).split())
    # Without an SQLSTATE the failure is the connection's; with class 08, 53 or 57 the server's.
    if isinstance(error, psycopg.OperationalError) and (error.sqlstate or "08")[:2] in {"08", "53", "57"}:
        return DatabaseUnavailable(f"the database cannot be used: {reason}")
    return JobqueueError(f"the database refused: {reason}", hint=error.diag.message_hint)


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="jobqueue", prog_name="jobqueue")
def main() -> None:
    """A job queue that lives in the Postgres you already run.

    Exit codes: 0 ok, 1 failed, 2 usage, 3 not found, 4 illegal transition, 5 time-out, 69 no database, 75 try again
    (schema older than the program), 78 configuration, or a schema newer than the program.
    """
