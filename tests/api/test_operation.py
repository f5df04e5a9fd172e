"""The server process: sockets, systemd, several processes, time-outs, and how it ends."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest

from jobqueue.api.authenticators import TRUSTED_SECONDS
from jobqueue.api.server import address_of, inherited_sockets, remove_socket, socket_of, tcp_sockets, unix_socket
from jobqueue.cli.api import _require_keys
from jobqueue.errors import ConfigurationError
from tests.api.conftest import serving
from tests.support.api_keys import bearer, create_key
from tests.support.command import REPOSITORY, environment
from tests.support.waiting import wait_until

Connection = psycopg.Connection[tuple[Any, ...]]
UNKNOWN = "0198c5a0-1c2d-7e3f-8a4b-5c6d7e8f9a0b"
UNITS = [REPOSITORY / "deploy" / "systemd" / f"jobqueue-api.{kind}" for kind in ("service", "socket")]
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
# What systemd does before it runs a service that has a socket: the socket is descriptor 3.
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.execve(sys.argv[2], sys.argv[2:], {**os.environ, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"})
"""


@contextmanager
def command(dsn: str, *arguments: str, fd: int | None = None, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """`jobqueue api` as a process of its own; `fd`: a socket that systemd would have opened."""
    program = [sys.executable, "-m", "jobqueue", "api", *arguments]
    given = environment(dsn, JOBQUEUE_LOG_LEVEL="warning", **variables)
    if fd is not None:
        program = [sys.executable, "-S", "-c", ACTIVATE, str(fd), *program]
    process = subprocess.Popen(program, env=given, cwd=REPOSITORY, pass_fds=[fd] if fd is not None else [])
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


def ready(base: str) -> bool:
    """Whether the server at an address is ready."""
    try:
        return httpx2.get(f"{base}/readyz", timeout=10).status_code == 200
    except httpx2.TransportError:
        return False


# -- Real processes ---------------------------------------------------------------------------------------------------


def test_it_serves_on_systemds_socket_says_when_it_is_ready_and_ends_while_a_stream_is_open(
    dsn: str, connection: Connection, tmp_path: Path
) -> None:
    connection.execute("select jobqueue.create_queue('q')")
    (job,) = connection.execute("select id::text from jobqueue.send('q')").fetchone() or ("",)
    notify = tmp_path / "notify"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        socket.create_server(("127.0.0.1", 0)) as listening,
    ):
        manager.bind(str(notify))
        manager.settimeout(60)
        base = address_of(listening)
        variables = {"NOTIFY_SOCKET": str(notify), "WATCHDOG_USEC": "2000000"}
        with command(dsn, fd=listening.fileno(), **variables) as process:
            heard = b""
            while b"READY=1" not in heard or b"WATCHDOG=1" not in heard:
                heard += manager.recv(4096) + b"\n"
            with (
                httpx2.Client(base_url=base, timeout=60) as client,
                client.stream("GET", f"/jobs/{job}/events") as stream,
            ):
                lines = stream.iter_lines()
                assert any(line.startswith("data:") for line in lines)
                process.send_signal(signal.SIGTERM)
                assert list(lines) is not None
                process.wait(timeout=60)  # the stream would have lasted for an hour
        # the socket is systemd's: the next instance goes on with it
        assert listening.getsockname()[1] > 0


def test_two_processes_share_a_quota_and_both_know_a_revocation_within_a_second(
    dsn: str, connection: Connection
) -> None:
    key = create_key(connection, quota_reads=30)
    connection.execute("select jobqueue.create_queue('q')")
    (job,) = connection.execute("select id::text from jobqueue.send('q')").fetchone() or ("",)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    with command(dsn, "--processes", "2", "--port", str(port)):
        wait_until(lambda: ready(base), what="the server is ready", timeout=180)

        def get(_: int) -> int:
            # a connection of its own, so that either process may get it
            with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as client:
                client.request("GET", f"/jobs/{job}", headers=bearer(key))
                return client.getresponse().status

        with ThreadPoolExecutor(4) as threads:
            assert Counter(threads.map(get, range(50))) == {200: 30, 429: 20}
            connection.execute("select jobqueue.revoke_api_key(%s, 'leaked')", (key.id,))
            assert TRUSTED_SECONDS <= 1
            wait_until(lambda: set(threads.map(get, range(8))) == {401}, what="a revoked key is let in nowhere")


# -- Sockets ----------------------------------------------------------------------------------------------------------


def test_a_unix_socket_has_its_rights_replaces_a_dead_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    first = unix_socket(str(path), 0o660)
    assert path.stat().st_mode & 0o777 == 0o660
    first.listen()
    with pytest.raises(ConfigurationError, match="somebody serves"):
        unix_socket(str(path), 0o600)
    first.close()
    second = unix_socket(str(path), 0o600)
    assert (path.stat().st_mode & 0o777, address_of(second)) == (0o600, f"unix:{path}")
    second.close()
    remove_socket(str(path))
    remove_socket(str(path))
    path.write_text("something")
    with pytest.raises(ConfigurationError, match="no socket"):
        unix_socket(str(path), 0o660)
    with pytest.raises(ConfigurationError, match="cannot listen"):
        unix_socket(str(tmp_path / "missing" / "api.sock"), 0o660)


def test_a_host_is_bound_on_all_its_addresses_with_one_port() -> None:
    bound = tcp_sockets("localhost", 0)
    assert len({opened.getsockname()[1] for opened in bound}) == 1
    assert address_of(bound[0]).startswith("http://")
    bound[0].listen()
    host, port = bound[0].getsockname()[:2]
    with pytest.raises(ConfigurationError, match="cannot listen"):
        tcp_sockets(host, port)
    with pytest.raises(ConfigurationError):
        tcp_sockets("no-such-host.invalid", 0)
    for opened in bound:
        opened.close()


def test_sockets_are_inherited_only_if_they_are_meant_for_this_process() -> None:
    for given in ({}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"}):
        environ = dict(given)
        assert inherited_sockets(environ) == []
        assert environ == {}
    with open(os.devnull) as file, pytest.raises(ConfigurationError, match="no socket"):
        socket_of(file.fileno())


def test_other_machines_are_served_once_there_is_a_key(connection: Connection) -> None:
    with pytest.raises(ConfigurationError, match="no API key"):
        _require_keys(connection, "0.0.0.0")
    create_key(connection)
    _require_keys(connection, "0.0.0.0")


# -- Time-outs --------------------------------------------------------------------------------------------------------


async def test_a_statement_that_takes_too_long_is_504_once_and_the_connection_lives(
    dsn: str, connection: Connection
) -> None:
    connection.execute(
        "create or replace function jobqueue.http_context(_role text, _tenants text, _read_only boolean) returns void "
        "language sql as $$ insert into jobqueue.setting values ('asked', '1') on conflict (name) do nothing; "
        "select pg_sleep(600) $$"
    )
    async with serving(dsn, {"api_statement_timeout": 1.0}, pool_size=1) as client:
        answer = await asyncio.wait_for(client.get(f"/jobs/{UNKNOWN}"), 60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "TIMED_OUT")
        async with asyncio.timeout(60):
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.01)


async def test_the_time_out_does_not_take_options_away_that_the_connection_string_has(dsn: str) -> None:
    async with serving(dsn + " options='-c work_mem=7MB'", {"api_statement_timeout": 3}) as client:
        database = client.app.state.services.database  # type: ignore[attr-defined]
        shown = "select current_setting('work_mem'), current_setting('statement_timeout')"
        assert await database.rows(shown, ()) == [("7MB", "3s")]


# -- Units ------------------------------------------------------------------------------------------------------------


@needs_systemd
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    program = tmp_path / "jobqueue"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copies = []
    for unit in UNITS:
        copies.append(tmp_path / unit.name)
        copies[-1].write_text(unit.read_text().replace("/opt/jobqueue/bin/jobqueue", str(program)))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *map(str, copies)],
        capture_output=True,
        text=True,
    )
    assert (verified.returncode, verified.stderr) == (0, "")


@needs_systemd
def test_the_service_is_hardened() -> None:
    rated = ["systemd-analyze", "security", "--offline=true", "--threshold=15", str(UNITS[0])]
    assert subprocess.run(rated, capture_output=True).returncode == 0
