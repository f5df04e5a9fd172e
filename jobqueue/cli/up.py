"""`jobqueue up`: everything that one machine needs, in one command."""

from __future__ import annotations

import click

from jobqueue.cli.options import dsn_option


@click.command()
@dsn_option
@click.option("--host", help="Address of the API.  [default: JOBQUEUE_HOST, else 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Its port; 0: any.  [default: JOBQUEUE_PORT, else 8000]")
@click.option("--app", metavar="MODULE[:APP]", help="What the worker runs.  [default: JOBQUEUE_APP; none: no worker]")
def command(dsn: str | None, host: str | None, port: int | None, app: str | None) -> None:
    """Start the embedded server (unless a DSN is set), bring the schema up to date, and run the API and one worker.

    It stays until ctrl-C, which stops all in order; a second ctrl-C makes the worker give its running jobs back.
    """
    from jobqueue.cli.stack import Stack
    from jobqueue.database.dsn import mask_dsn
    from jobqueue.settings import load_settings

    settings = load_settings(dsn=dsn, host=host, port=port, app=app)
    with Stack(settings) as stack:
        for line in stack.open_database():
            click.echo(line, err=True)
        click.echo(f"database: {mask_dsn(stack.dsn) or 'as the PG* variables say'}", err=True)
        address = stack.start_api()
        if settings.app:
            stack.start_worker(settings.app)
            click.echo(f"worker: {settings.app}", err=True)
        else:
            click.echo("no worker: name an application in JOBQUEUE_APP or --app", err=True)
        click.echo(f"API: {address}/openapi.json", err=True)
        if dashboard := stack.dashboard(address):
            click.echo(f"dashboard: {dashboard}", err=True)
        click.echo("ctrl-C stops everything", err=True)
        stack.wait()
    click.echo("stopped", err=True)
