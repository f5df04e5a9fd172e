"""Options that many commands share, and how a command comes to its settings and its database."""

from __future__ import annotations

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
