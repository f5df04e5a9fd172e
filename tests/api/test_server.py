"""Probes, an outage of the database, and the command with a real server."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
import uvicorn
from click.testing import CliRunner

from jobqueue.api import server
from jobqueue.cli.api import command
from jobqueue.database.embedded import EmbeddedServer
from jobqueue.database.migrations import migrate_up
from jobqueue.errors import ConfigurationError, SchemaOutdated
from jobqueue.settings import load_settings
from tests.api.conftest import keep_alive, send, serving, start_job
from tests.support.server import chosen_binaries, value
from tests.support.waiting import wait_until

Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
def own_server() -> Iterator[EmbeddedServer]:
    """A server that a test may stop and start again."""
    # Not tmp_path: for root that is 0700, and the server does not run as root.
    home = Path(tempfile.mkdtemp(prefix="jobqueue-test-", dir="/var/tmp"))
    home.chmod(0o711)
    server = EmbeddedServer(home, bin_dir=chosen_binaries())
    try:
        server.start()
        migrate_up(server.dsn)
        yield server
    finally:
        server.stop()
        shutil.rmtree(home)


async def test_the_probes_answer(client: httpx2.AsyncClient) -> None:
    for path in ("/livez", "/readyz"):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_a_newer_schema_is_not_ready(client: httpx2.AsyncClient, connection: Connection) -> None:
    connection.execute("insert into jobqueue.schema_migration (version, name, checksum) values (9999, 'later', 'x')")
    answer = await client.get("/readyz")
    assert answer.status_code == 503
    assert "9999" in answer.json()["error"]["details"]["reason"]


async def test_without_the_schema_it_does_not_start(empty_dsn: str) -> None:
    with pytest.raises(SchemaOutdated):
        async with serving(empty_dsn):
            pass


async def test_a_server_without_a_lifespan_may_use_it(dsn: str, connection: Connection) -> None:
    from jobqueue.api import create_app
    from jobqueue.settings import load_settings

    app = create_app(load_settings(dsn=dsn))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        assert (await client.get("/readyz")).status_code == 200
    await app.state.services.database.close()


async def test_the_database_away_is_503_and_it_recovers_by_itself(own_server: EmbeddedServer) -> None:
    with psycopg.connect(own_server.dsn, autocommit=True) as connection:
        job_id = value(connection, "select id::text from jobqueue.send('q')")
    async with serving(own_server.dsn, patience=0.5) as client:
        deadline = time.monotonic() + 60
        while (await client.get(f"/jobs/{job_id}")).status_code != 200:
            assert time.monotonic() < deadline, "it never was ready"
        own_server.stop()
        for answer in (await client.get(f"/jobs/{job_id}"), await client.post("/jobs", json={"queue": "q"})):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "UNAVAILABLE")
            assert int(answer.headers["Retry-After"]) >= 1
        assert (await client.get("/livez")).status_code == 200
        deadline = time.monotonic() + 60
        while (await client.get("/readyz")).status_code == 200:
            assert time.monotonic() < deadline
        own_server.start()
        deadline = time.monotonic() + 60
        while (await client.get(f"/jobs/{job_id}")).status_code != 200:
            assert time.monotonic() < deadline, "it does not come back"
            await asyncio.sleep(0.05)
        hub = client.app.state.services.hub  # type: ignore[attr-defined]
        while not hub.listening:
            assert time.monotonic() < deadline, "it does not listen again"
            await asyncio.sleep(0.05)


async def test_connections_that_died_while_idle_cost_readers_and_writers_nothing(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    job_id = await send(client)
    # as many connections as there can be
    await asyncio.gather(*(client.get("/queues") for _ in range(8)))

    def end_connections() -> None:
        connection.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where datname = current_database() and application_name = 'jobqueue api'"
        )

    end_connections()
    assert (await client.get(f"/jobs/{job_id}")).status_code == 200
    end_connections()
    assert (await client.post("/jobs", json={"queue": "q"})).status_code == 202
    assert value(connection, "select count(*) from jobqueue.job") == 2, "sent once"
    end_connections()
    assert (await client.post(f"/jobs/{job_id}/cancel")).status_code == 200
    end_connections()
    assert (await client.delete(f"/jobs/{job_id}")).status_code == 204


def test_a_child_may_be_silent_for_half_a_minute_and_never_as_long_as_systemd_waits_for_its_parent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[uvicorn.Config] = []

    class Processes:
        def __init__(self, config: uvicorn.Config, sockets: list[socket.socket]) -> None:
            given.append(config)

        def run(self) -> None: ...

    monkeypatch.setattr(server, "_Processes", Processes)
    monkeypatch.setenv("JOBQUEUE_DSN", "dbname=none")
    server.serve(load_settings(), "dbname=none", [], processes=2)
    assert [config.timeout_worker_healthcheck for config in given] == [30]
    assert [server.child_patience(seconds) for seconds in (300.0, 60.0, 20.0, 1.0)] == [30, 30, 10, 1]


async def test_a_login_user_bound_by_no_policy_is_refused(dsn: str, connection: Connection) -> None:
    connection.execute("create role api_bypass login bypassrls")
    try:
        with pytest.raises(ConfigurationError, match="jobqueue_api"):
            async with serving(dsn + " user=api_bypass"):
                pass
    finally:
        connection.execute("drop role api_bypass")


async def test_a_plain_login_user_with_the_role_is_enough(dsn: str, connection: Connection) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    connection.execute("create role api_login login in role jobqueue_api")
    try:
        async with serving(dsn + " user=api_login") as client:
            job_id = await send(client)
            assert (await client.get(f"/jobs/{job_id}?wait=0.1")).status_code == 200
            assert (await client.get("/readyz")).status_code == 200
    finally:
        connection.execute("drop role api_login")


def test_the_command_binds_to_this_machine_only(dsn: str) -> None:
    result = CliRunner().invoke(command, ["--host", "0.0.0.0", "--dsn", dsn])
    assert isinstance(result.exception, ConfigurationError)


def _ready(client: httpx2.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx2.TransportError:
        return False


@pytest.mark.parametrize("workers", [1, 2])
def test_the_command_serves_and_stops_at_once_with_requests_waiting(
    dsn: str, connection: Connection, tmp_path: Path, workers: int
) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JOBQUEUE_DSN": dsn, "JOBQUEUE_LOG_LEVEL": "warning"}
    arguments = ["--port", str(port), "--processes", str(workers)]
    process = subprocess.Popen(
        [sys.executable, "-c", "from jobqueue.cli.api import command; command()", *arguments], env=environment
    )
    base = f"http://127.0.0.1:{port}"
    try:
        with httpx2.Client(base_url=base, timeout=60) as client:
            wait_until(lambda: _ready(client), what="the server is ready", timeout=180)
            job_id = client.post("/jobs", json={"queue": "q"}).json()["jobId"]
            start_job(connection)
            keep_alive(connection)
            read = client.get(f"/jobs/{job_id}")
            assert "Server" not in read.headers
            took = _stop_while_waiting(base, job_id, read.headers["ETag"], process, connection)
            assert took < 20, "the request would have waited for 30 s"
    finally:
        process.terminate()
        process.wait(timeout=60)


def _stop_while_waiting(
    base: str, job_id: str, etag: str, process: subprocess.Popen[bytes], connection: Connection
) -> float:
    """Send SIGTERM while a request waits; how many seconds the process took to end. The request is answered 304."""
    from concurrent.futures import ThreadPoolExecutor

    def wait() -> int:
        with httpx2.Client(base_url=base, timeout=60) as client:
            return client.get(f"/jobs/{job_id}?wait=30", headers={"If-None-Match": etag}).status_code

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(wait)
        wait_until(
            lambda: connection.execute("select 1 from jobqueue.watch where topic = %s", (f"job:{job_id}",)).fetchone(),
            what="the request waits",
        )
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        took = time.monotonic() - began
        assert answer.result(timeout=60) == 304
    return took


def test_the_command_serves_on_a_unix_socket(dsn: str, connection: Connection, tmp_path: Path) -> None:
    path = str(tmp_path / "api.sock")
    environment = {**os.environ, "JOBQUEUE_DSN": dsn, "JOBQUEUE_LOG_LEVEL": "warning"}
    process = subprocess.Popen(
        [sys.executable, "-c", "from jobqueue.cli.api import command; command()", "--uds", path], env=environment
    )
    try:
        with httpx2.Client(transport=httpx2.HTTPTransport(uds=path), base_url="http://unix", timeout=60) as client:
            wait_until(lambda: _ready(client), what="the server is ready", timeout=180)
            assert client.get("/jobs/x").status_code == 404
    finally:
        process.terminate()
        process.wait(timeout=60)
