"""systemd: the messages of a real worker process, and the unit as systemd itself judges it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobqueue.telemetry.systemd import Notifier
from tests.support.server import value
from tests.support.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy" / "systemd"
UNIT = DEPLOY / "jobqueue-worker@.service"
Connection = psycopg.Connection[tuple[Any, ...]]

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


class Manager:
    """The service manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(address)
        self.messages: list[dict[str, str]] = []

    def heard(self, name: str) -> list[str]:
        """All values of a variable so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                lines = self.socket.recv(65536).decode().splitlines()
                self.messages.append(dict(line.partition("=")[::2] for line in lines))
        return [message[name] for message in self.messages if name in message]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.socket.close()


@contextlib.contextmanager
def worker_process(dsn: str, *arguments: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """A real `jobqueue worker`; killed at the end if it has not ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jobqueue", "worker", *(arguments or ("tests.support.worker_app",))],
        cwd=REPOSITORY,
        env={**os.environ, "JOBQUEUE_DSN": dsn, **environ},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def status(connection: Connection, id: Any) -> Any:
    return value(connection, "select status from jobqueue.jobs where id = %s", (id,))


def runs(connection: Connection, id: Any) -> bool:
    """Whether the handler has reported; a job that is only `processing` may still wait inside the worker."""
    return bool(value(connection, "select progress_pct from jobqueue.jobs where id = %s", (id,)) == 1)


def send(connection: Connection, queue: str, payload: str = "{}") -> Any:
    # job_type and queue have the same name in the application
    return value(connection, "select id from jobqueue.send(%s, %s)", (queue, payload))


# -- messages


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_messages_reach_both_kinds_of_sockets(tmp_path: Path, abstract: bool) -> None:
    name = f"jobqueue-test-{os.getpid()}-{time.monotonic_ns()}"
    manager = Manager(f"\0{name}" if abstract else str(tmp_path / name))
    notifier = Notifier({"NOTIFY_SOCKET": f"@{name}" if abstract else str(tmp_path / name)})
    assert notifier.ready("all\nwell")
    assert notifier.extend_timeout(2.5)
    assert notifier.reloading()
    assert manager.heard("READY") == ["1"]
    assert manager.heard("STATUS") == ["all well"]
    assert manager.heard("EXTEND_TIMEOUT_USEC") == ["2500000"]
    assert int(manager.heard("MONOTONIC_USEC")[0]) > 0
    manager.socket.close()


def test_without_systemd_nothing_happens() -> None:
    notifier = Notifier({})
    assert not notifier.active
    assert not notifier.ready()
    assert notifier.watchdog_seconds is None


def test_a_manager_that_went_away_is_no_error(tmp_path: Path) -> None:
    assert not Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()


def test_the_watchdog_is_for_the_process_that_it_names() -> None:
    environ = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "30000000"}
    assert Notifier(environ).watchdog_seconds == 30
    assert Notifier({**environ, "WATCHDOG_PID": str(os.getpid())}).watchdog_seconds == 30
    assert Notifier({**environ, "WATCHDOG_PID": "1"}).watchdog_seconds is None
    assert Notifier({**environ, "WATCHDOG_USEC": "soon"}).watchdog_seconds is None


# -- a real worker


def test_a_worker_says_that_it_is_ready_lives_and_stops(
    dsn: str, connection: Connection, manager: Manager, tmp_path: Path
) -> None:
    environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
    with worker_process(dsn, **environ) as process:
        wait_until(lambda: manager.heard("READY") == ["1"], what="READY")
        wait_until(lambda: len(manager.heard("WATCHDOG")) > 3, what="the watchdog is fed")
        alarm = tmp_path / "alarm"
        greeting, nap = send(connection, "greet", '{"name": "Ada"}'), send(connection, "nap", f'{{"alarm": "{alarm}"}}')
        wait_until(lambda: status(connection, greeting) == "completed", what="a job is done")
        wait_until(lambda: runs(connection, nap), what="a handler runs")
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: "1" in manager.heard("STOPPING"), what="STOPPING")
        wait_until(lambda: manager.heard("EXTEND_TIMEOUT_USEC"), what="it asks for the time that the handler needs")
        alarm.touch()
        assert process.wait(timeout=60) == 0
        assert status(connection, nap) == "completed"


def test_a_second_signal_gives_the_running_jobs_back(dsn: str, connection: Connection) -> None:
    with worker_process(dsn) as process:
        id = send(connection, "sleep")
        wait_until(lambda: runs(connection, id), what="the handler runs")
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        row = connection.execute("select status, retry_count from jobqueue.jobs where id = %s", (id,)).fetchone()
        assert row == ("pending", 0)


def test_quiet_and_dump(dsn: str, connection: Connection) -> None:
    with worker_process(dsn) as process:
        running = send(connection, "sleep")
        wait_until(lambda: runs(connection, running), what="the handler runs")
        process.send_signal(signal.SIGUSR2)
        assert process.stderr is not None
        seen = ""
        while "Current thread" not in seen:
            seen += process.stderr.readline()
        process.send_signal(signal.SIGUSR1)
        while "quiet" not in seen:
            seen += process.stderr.readline()
        assert str(running) in seen
        waiting = send(connection, "greet", '{"name": "Ada"}')
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)  # two of the same kind at once would arrive as one
        assert process.wait(timeout=60) == 0
        assert status(connection, waiting) == "pending"


def test_handlers_in_processes(dsn: str, connection: Connection) -> None:
    with worker_process(dsn) as process:
        counted, died = send(connection, "count", '{"to": 5}'), send(connection, "die")
        wait_until(lambda: status(connection, counted) == "completed", what="the job is done")
        code = "select error_code from jobqueue.jobs where id = %s"
        wait_until(lambda: value(connection, code, (died,)) == "PROCESS_DIED", what="the other attempt has failed")
        found = connection.execute(
            "select (result ->> 'pid')::int <> %s, stats ->> 'counted' from jobqueue.jobs where id = %s",
            (process.pid, counted),
        ).fetchone()
        assert found == (True, "5")


@pytest.mark.parametrize(
    ("application", "message"),
    [
        ("tests.support.nowhere", "there is no module tests.support.nowhere"),
        ("tests.support.worker_app:nothing", "is nothing, not a jobqueue.App"),
        ("tests.support.worker_app:not_an_app", "is a int, not a jobqueue.App"),
    ],
)
def test_a_wrong_application_is_a_configuration_error(dsn: str, application: str, message: str) -> None:
    with worker_process(dsn, application) as process:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 78
        assert message in error


# -- the unit


@needs_systemd
@pytest.mark.parametrize("spoiled", [False, True], ids=["as they are", "with a misspelt key"])
def test_systemd_accepts_the_units(tmp_path: Path, spoiled: bool) -> None:
    for path in (*DEPLOY.glob("*.service"), *DEPLOY.glob("*.socket")):
        text = path.read_text().replace("/opt/jobqueue/bin/jobqueue", "/bin/true")
        if spoiled and path == UNIT:
            text = text.replace("WatchdogSec=", "WatchdogSecs=")
        (tmp_path / path.name).write_text(text)
    units = sorted(str(path) for path in tmp_path.iterdir())
    assert len(units) == 3
    verify = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *units], capture_output=True, text=True
    )
    assert (verify.returncode == 0) == (not spoiled), verify.stderr
    assert bool(verify.stderr.strip()) == spoiled, verify.stderr


@needs_systemd
@pytest.mark.parametrize("name", ["jobqueue-worker@.service", "jobqueue-api.service"])
def test_the_units_are_hardened(name: str) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=15", str(DEPLOY / name)]
    security = subprocess.run(command, capture_output=True, text=True)
    assert security.returncode == 0, security.stdout[-300:] + security.stderr
