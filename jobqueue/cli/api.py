"""`jobqueue api`: serve the HTTP API."""

from __future__ import annotations

import ipaddress
import os
import signal
from typing import TYPE_CHECKING, Any

import click

from jobqueue.cli.options import database_dsn, dsn_option

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from jobqueue.settings import Settings

DRAIN_SECONDS = 10
"""Time for requests under way at shutdown; long polls end at once."""


@click.command()
@dsn_option
@click.option("--host", help="Address to bind to.  [default: JOBQUEUE_HOST, else 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="[default: JOBQUEUE_PORT, else 8000; 0: any free one]")
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes.")
@click.option("--uds", type=click.Path(), help="Bind to a Unix socket instead.")
@click.option("--fd", type=click.IntRange(0), help="Use a socket that is open already (systemd: 3).")
def command(dsn: str | None, host: str | None, port: int | None, workers: int, uds: str | None, fd: int | None) -> None:
    """Serve the HTTP API until SIGTERM or SIGINT.

    Without API keys it is for this machine only: it binds to loopback addresses and Unix sockets.
    """
    from jobqueue.database.migrations import check_schema
    from jobqueue.database.pool import connect
    from jobqueue.settings import load_settings

    settings = load_settings(dsn=dsn, host=host, port=port)
    if uds is None and fd is None:
        _require_loopback(settings.host)
    database = database_dsn(settings)
    with connect(database, "jobqueue api", timeout=settings.start_timeout) as connection:
        check_schema(connection)
    _serve(settings, database, workers, {"uds": uds, "fd": fd})


def _serve(settings: Settings, dsn: str, workers: int, places: dict[str, Any]) -> None:
    import uvicorn

    application: Any = "jobqueue.cli.api:worker_application"
    if workers == 1:
        from jobqueue.api import create_app

        application = create_app(settings, dsn=dsn)
    else:
        # Each process makes its own application, and reads what was given here from its environment.
        os.environ["JOBQUEUE_DSN"] = dsn
    uvicorn.run(
        application,
        factory=workers > 1,
        host=settings.host,
        port=settings.port,
        workers=workers,
        lifespan="on",
        ws="none",
        log_level=settings.log_level,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        **places,
    )


def worker_application() -> Starlette:
    """Make the application of one of several processes; it ends with the process that started it, even by SIGKILL."""
    from jobqueue.api import create_app
    from jobqueue.database.parentage import die_with_parent

    if arm := die_with_parent(parent=os.getppid(), with_signal=signal.SIGTERM):
        arm()
    return create_app()


def _require_loopback(host: str) -> None:
    from jobqueue.errors import ConfigurationError

    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if not is_loopback:
        raise ConfigurationError(
            f"there is no API key, so the API does not bind to {host}",
            hint="Bind to 127.0.0.1, ::1, localhost or a Unix socket (--uds).",
        )
