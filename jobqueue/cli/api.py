"""`jobqueue api`: serve the HTTP API."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any

import click

from jobqueue.cli.options import database_dsn, dsn_option

if TYPE_CHECKING:
    import socket

    from psycopg import Connection


def _octal(ctx: click.Context, parameter: click.Parameter, value: str) -> int:
    try:
        mode = int(value, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.BadParameter("rights are three octal digits, such as 660", ctx=ctx, param=parameter)
    return mode


@click.command()
@dsn_option
@click.option("--host", help="Address to bind to.  [default: JOBQUEUE_HOST, else 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="[default: JOBQUEUE_PORT, else 8000; 0: any free one]")
@click.option("--processes", type=click.IntRange(1, 64), default=1, show_default=True, help="Server processes.")
@click.option("--uds", type=click.Path(), help="Bind to a Unix socket instead.")
@click.option("--uds-mode", default="660", callback=_octal, show_default=True, help="Its rights.")
@click.option("--fd", type=click.IntRange(0), help="Use a socket that is open already; systemd's are found unasked.")
def command(
    dsn: str | None,
    host: str | None,
    port: int | None,
    processes: int,
    uds: str | None,
    uds_mode: int,
    fd: int | None,
) -> None:
    """Serve the HTTP API until SIGTERM or SIGINT.

    Without API keys it is for this machine only: it binds to loopback addresses and Unix sockets, and answers nobody
    else. `jobqueue keys create` opens it. Started by a systemd socket unit it serves on that unit's sockets.
    """
    from jobqueue.api.server import inherited_sockets, remove_socket, serve, socket_of, tcp_sockets, unix_socket
    from jobqueue.database.migrations import check_schema
    from jobqueue.database.pool import connect
    from jobqueue.instrumentation import require_opentelemetry
    from jobqueue.settings import load_settings
    from jobqueue.telemetry.log import configure_logging

    settings = load_settings(dsn=dsn, host=host, port=port)
    configure_logging(settings.log_level, settings.log_format)
    if settings.otel:
        # here, and not first in each of several processes
        require_opentelemetry()
    sockets: list[socket.socket] = [socket_of(fd)] if fd is not None else inherited_sockets()
    for_all = not sockets and uds is None and settings.jwt_key_file is None and not _is_loopback(settings.host)
    database = database_dsn(settings)
    with connect(database, "jobqueue api", timeout=settings.start_timeout) as connection:
        check_schema(connection)
        if for_all:
            _require_keys(connection, settings.host)
    if uds is not None and not sockets:
        sockets = [unix_socket(uds, uds_mode)]
    try:
        sockets = sockets or tcp_sockets(settings.host, settings.port)
        serve(settings, database, sockets, processes)
    finally:
        if uds is not None:
            remove_socket(uds)


def _require_keys(connection: Connection[Any], host: str) -> None:
    from jobqueue.errors import ConfigurationError

    row = connection.execute("select any_keys from jobqueue.api_keys_state()").fetchone()
    if row is None or not row[0]:
        raise ConfigurationError(
            f"there is no API key, so the API does not bind to {host}",
            hint="Create one (jobqueue keys create), or bind to 127.0.0.1, ::1, localhost or a Unix socket (--uds).",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
