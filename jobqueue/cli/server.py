"""`jobqueue server`: start, find and stop the embedded PostgreSQL server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from jobqueue.database.embedded import EmbeddedServer, EmbeddedServerError, ServerStatus, default_data_dir
from jobqueue.settings import load_settings

NO_DATABASE = 69
"""The exit code of every command that finds no database (sysexits: EX_UNAVAILABLE)."""

_data_dir = click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="The server's folder.  [default: JOBQUEUE_DATA_DIR, else /var/lib/jobqueue or ~/.local/share/jobqueue]",
)


def _directory(given: Path | None) -> Path:
    return load_settings(data_dir=given).data_dir or default_data_dir()


class NoServer(click.ClickException):
    """The server is needed and cannot be had."""

    exit_code = NO_DATABASE


@click.group()
def group() -> None:
    """The embedded PostgreSQL server: for development and tests, no installation needed."""


@group.command()
@_data_dir
@click.option(
    "--tcp", is_flag=True, help="Also listen on a free port of 127.0.0.1; the password is in DATA_DIR/pgpass."
)
def start(data_dir: Path | None, tcp: bool) -> None:
    """Start the server, unless it runs already, and print its DSN. It goes on running after this command."""
    server = EmbeddedServer(_directory(data_dir), tcp=tcp)
    with _errors_as_no_database():
        dsn = server.start()
        status = server.status()
        if tcp:
            click.echo(f"over TCP: {server.tcp_dsn}", err=True)
    click.echo(f"PostgreSQL {status.version} runs as process {status.pid} in {status.data_dir}", err=True)
    click.echo(dsn)


@group.command()
@_data_dir
def stop(data_dir: Path | None) -> None:
    """Stop the server, whoever started it. Its data stay."""
    server = EmbeddedServer(_directory(data_dir))
    try:
        was_running = server.status().running
        server.stop()
    except EmbeddedServerError as error:
        raise click.ClickException(str(error)) from error
    click.echo("stopped" if was_running else "it was not running", err=True)


@group.command()
@_data_dir
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def status(data_dir: Path | None, output: str) -> None:
    """Say whether the server runs, its version and how to reach it. The exit code is 0 in both cases."""
    try:
        state = EmbeddedServer(_directory(data_dir)).status()
    except EmbeddedServerError as error:
        raise click.ClickException(str(error)) from error
    click.echo(_as_json(state) if output == "json" else _as_table(state))


@group.command()
@_data_dir
def dsn(data_dir: Path | None) -> None:
    """Print the running server's DSN; exit code 69 if it does not run."""
    with _errors_as_no_database():
        click.echo(EmbeddedServer(_directory(data_dir)).dsn)


@contextmanager
def _errors_as_no_database() -> Iterator[None]:
    try:
        yield
    except EmbeddedServerError as error:
        raise NoServer(str(error)) from error


def _as_json(state: ServerStatus) -> str:
    return json.dumps({**asdict(state), "data_dir": str(state.data_dir)})


def _as_table(state: ServerStatus) -> str:
    facts = {
        "state": "running" if state.running else "stopped",
        "version": state.version or "-",
        "process": str(state.pid or "-"),
        "dsn": state.dsn or "-",
        "data": str(state.data_dir),
    }
    return "\n".join(f"{name:<8} {fact}" for name, fact in facts.items())
