"""What a server is started with, and how it is reached: command line, environment, port, password, conninfo."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from jobqueue.database.binaries import Binaries, EmbeddedServerError
from jobqueue.database.cluster import SUPERUSER, Home, PidFile

_ANSWER_TIMEOUT = 5


def environment() -> dict[str, str]:
    """Our environment without what PostgreSQL's programs would take as settings; locale C, time zone UTC."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))}
    return {**inherited, "LC_ALL": "C", "TZ": "UTC"}


def access_settings(socket_dir: Path, address: str, port: int) -> dict[str, str]:
    """The settings that say where the server listens; an empty address means no TCP."""
    # The setting is a list of folders, in which only quotes protect a comma or a space.
    quoted = '"' + str(socket_dir).replace('"', '""') + '"'
    return {
        "unix_socket_directories": quoted,
        "unix_socket_permissions": "0700",
        "listen_addresses": address,
        "port": str(port),
    }


def server_command(binaries: Binaries, data: Path, settings: Mapping[str, str]) -> list[str]:
    """The postmaster's command line."""
    command = [str(binaries.bin_dir / "postgres"), "-D", str(data)]
    return command + [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]


def choose_port(home: Home, *, remembered: bool) -> int:
    """A free TCP port of 127.0.0.1; the one of the last start if it is free and `remembered`.

    Raises:
        EmbeddedServerError: none is free.
    """
    last = 0
    if remembered:
        with contextlib.suppress(OSError, ValueError):
            last = int(home.port_file.read_text())
    port = _free_port(last) or _free_port(0)
    if port is None:
        raise EmbeddedServerError("no free TCP port on 127.0.0.1")
    return port


def socket_dsn(pid_file: PidFile) -> str:
    """The conninfo through the socket."""
    return make_conninfo(host=str(pid_file.socket_dir), port=pid_file.port, user=SUPERUSER, dbname="postgres")


def tcp_dsn(home: Home, pid_file: PidFile) -> str:
    """The conninfo through 127.0.0.1; libpq reads the password from the file that it names."""
    passfile = str(home.passfile)
    return make_conninfo(host="127.0.0.1", port=pid_file.port, user=SUPERUSER, dbname="postgres", passfile=passfile)


def server_version(dsn: str) -> str | None:
    """The version of the server that answers there, without Debian's addition; None if nobody answers."""
    try:
        with psycopg.connect(dsn, connect_timeout=_ANSWER_TIMEOUT, autocommit=True) as connection:
            row = connection.execute("show server_version").fetchone()
    except psycopg.OperationalError as error:
        # A full server is alive, and that matters more than its version.
        return "unknown" if "too many clients" in str(error) else None
    return str(row[0]).split()[0] if row else None


def prepare_tcp(home: Home, dsn: str, pid_file: PidFile) -> None:
    """Give the superuser a password if there is none yet, and remember the port."""
    if not home.passfile.exists():
        password = secrets.token_urlsafe(24)
        with psycopg.connect(dsn, autocommit=True) as connection:
            # The server gets, and may log, only the verifier.
            verifier = connection.pgconn.encrypt_password(password.encode(), SUPERUSER.encode(), b"scram-sha-256")
            connection.execute(sql.SQL("alter role postgres password {}").format(sql.Literal(verifier.decode())))
        _write_private(home.passfile, f"127.0.0.1:*:*:{SUPERUSER}:{password}\n")
    _write_private(home.port_file, f"{pid_file.port}\n")


def _free_port(wanted: int) -> int | None:
    """The wanted port if nobody listens on it (0: any); None if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return None
        return int(probe.getsockname()[1])


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, complete or not at all."""
    new = path.with_name(f"{path.name}.new-{os.getpid()}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    new.rename(path)
