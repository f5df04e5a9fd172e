"""`jobqueue import-procrastinate`: move what waits in procrastinate's own tables here."""

from __future__ import annotations

from dataclasses import asdict

import click

from jobqueue.cli.options import database_dsn, dsn_option, output_option
from jobqueue.cli.output import emit_object


@click.command()
@dsn_option
@click.option("--source", metavar="DSN", help="Where procrastinate's tables are.  [default: the same database]")
@click.option("--schema", metavar="NAME", help="Their schema.  [default: found on the search path]")
@click.option("--batch", type=click.IntRange(1, 10_000), default=1000, show_default=True, help="Jobs per transaction.")
@click.option("--dry-run", is_flag=True, help="Only count.")
@output_option
def command(dsn: str | None, source: str | None, schema: str | None, batch: int, dry_run: bool, output: str) -> None:
    """Move the waiting jobs and the periodic state of a procrastinate installation here.

    Stop its workers first. Moved jobs are noted as cancelled there. It may be stopped and run again at any time: no job
    is moved twice. Jobs that run, and those that have ended, are not moved.
    """
    from jobqueue.cli.session import open_connection
    from jobqueue.procrastinate.importer import Importer
    from jobqueue.settings import load_settings

    settings = load_settings(dsn=dsn)
    target = database_dsn(settings)
    open_connection(settings, target, pooler=settings.pooler).close()
    importer = Importer(
        target, source, schema=schema, batch=batch, progress=lambda moved: click.echo(f"{moved} jobs moved", err=True)
    )
    emit_object(asdict(importer.run(dry_run=dry_run)), output)
