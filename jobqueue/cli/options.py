"""Options that many commands share, and how a command comes to its settings and its database."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from jobqueue.cli.output import FORMATS

if TYPE_CHECKING:
    from jobqueue.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])


def dsn_option(command: F) -> F:
    """Add `--dsn`, given to the command as `dsn` (None: not given)."""
    return click.option(
        "--dsn",
        metavar="DSN",
        help="The database.  [default: JOBQUEUE_DSN, else libpq's PG* variables, else the embedded server]",
    )(command)


def output_option(command: F) -> F:
    """Add `-o/--output`, given to the command as `output`."""
    return click.option(
        "-o", "--output", type=click.Choice(FORMATS), default="table", show_default=True, help="Format on stdout."
    )(command)


def reason_option(command: F) -> F:
    """Add `--reason`, given to the command as `reason`: asked for on a terminal, else its absence is a usage error."""
    return click.option(
        "-r",
        "--reason",
        callback=_ask_reason,
        metavar="TEXT",
        help="Why; the audit keeps it.  [asked on a terminal]",
    )(command)


def _ask_reason(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None or ctx.resilient_parsing:
        return value
    if sys.stdin.isatty() and sys.stderr.isatty():
        return str(click.prompt("Reason, for those who read the audit later", err=True))
    raise click.MissingParameter(
        "say in a few words why; it is kept in the audit", ctx=ctx, param=parameter, param_hint="--reason"
    )


def database_dsn(settings: Settings, *, direct: bool = False) -> str:
    """Return the DSN to connect to; without any, the embedded server is started and its DSN returned.

    `direct`: not through a pooler if `JOBQUEUE_LISTEN_DSN` names a direct connection, for session locks and LISTEN.
    Raises DatabaseUnavailable if the embedded server cannot be started.
    """
    from jobqueue.errors import DatabaseUnavailable
    from jobqueue.settings import resolve_dsn

    if direct and settings.listen_dsn:
        return settings.listen_dsn
    dsn = resolve_dsn(settings)
    if dsn is not None:
        return dsn
    from jobqueue.database.embedded import EmbeddedServer, EmbeddedServerError, default_data_dir

    try:
        return EmbeddedServer(settings.data_dir or default_data_dir()).start(timeout=settings.start_timeout)
    except EmbeddedServerError as error:
        raise DatabaseUnavailable(
            f"no database is named, and the embedded server does not start: {error}",
            hint="Set JOBQUEUE_DSN to use a server of your own.",
        ) from error
