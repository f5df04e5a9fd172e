"""The units of deploy/systemd under a real systemd: ready, credentials, sandbox, watchdog, drain, sockets that stay open."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import click
import psycopg
from psycopg.conninfo import conninfo_to_dict

from compatibility.manager import ROOT, UNITS, Manager, manager
from jobqueue.database.embedded import EmbeddedServer
from jobqueue.database.ephemeral import make_ephemeral_home
from jobqueue.database.migrations import migrate_up

DEPLOY = ROOT / "deploy" / "systemd"
WORKER, API, SOCKET = "jobqueue-worker@lab.service", "jobqueue-api.service", "jobqueue-api.socket"
WATCHDOG = 4
STOP = 3
"""Seconds that systemd gives a unit to stop, unless it asks for more."""
DRAIN = 8
EXPOSURE = 15

# What differs from the units as they are shipped: where Python looks, where the output goes, and shorter times.
OUTPUT = "StandardOutput=append:/run/output/%n\nStandardError=append:/run/output/%n\n"
IMPORTS = (
    "Environment=PYTHONPATH=/opt/jobqueue/source:/opt/jobqueue/source/scripts:/opt/jobqueue/site\n"
    "Environment=LD_LIBRARY_PATH=/opt/python/lib\n"
)
WORKER_TIMES = f"WatchdogSec={WATCHDOG}\nTimeoutStopSec={STOP}\nRestartSec=0.2\n"


class Check:
    """One run of all checks, and the faults found."""

    def __init__(self, connection: psycopg.Connection[tuple[object, ...]], systemd: Manager, port: int) -> None:
        self.faults: list[str] = []
        self._db, self._systemd, self._port = connection, systemd, port

    def run(self) -> list[str]:
        """Check everything, one after another."""
        for check in (
            self.verified,
            self.exposed,
            self.ready,
            self.confined,
            self.watched,
            self.drained,
            self.open_socket,
        ):
            began = time.monotonic()
            try:
                click.echo(f"{check.__name__}: {check()} ({time.monotonic() - began:.1f} s)")
            except Exception as error:
                # What follows needs it.
                self.faults.append(
                    f"{check.__name__}: {type(error).__name__}: {error}\n{self._systemd.output(WORKER)[-2000:]}"
                )
                break
        return self.faults

    def verified(self) -> str:
        """systemd-analyze finds nothing to complain about, in these units or in what they name."""
        names = [f"{UNITS}/{path.name}" for path in sorted(DEPLOY.iterdir()) if path.suffix in (".service", ".socket")]
        done = self._systemd.run("systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", *names)
        assert (done.returncode, done.stderr.strip()) == (0, "")
        return f"{len(names)} units"

    def exposed(self) -> str:
        """The sandbox is as tight as it should be."""
        found = []
        for unit in ("jobqueue-worker@.service", API):
            command = ("systemd-analyze", "security", "--offline=yes", f"--threshold={EXPOSURE}", str(DEPLOY / unit))
            done = self._systemd.run(*command)
            assert done.returncode == 0, done.stdout[-300:]
            found.append(next(line for line in done.stdout.splitlines() if "Overall exposure" in line).strip("→ "))
        return "; ".join(found)

    def ready(self) -> str:
        """Type=notify: `start` returns when the worker works, with the connection string of the credential."""
        self._systemd.systemctl("start", WORKER)
        state = self._systemd.show(WORKER, "ActiveState", "SubState", "StatusText", "NotifyAccess")
        assert (state["ActiveState"], state["SubState"]) == ("active", "running"), state
        assert state["StatusText"], "no STATUS= was seen"
        job = self._send(0.0)
        self._until(lambda: self._status(job) == "completed", "a job is done")
        environ = self._systemd.run("cat", f"/proc/{self._main(WORKER)}/environ").stdout
        assert "postgresql://" not in environ, "the connection string is in the environment"
        return state["StatusText"]

    def confined(self) -> str:
        """The sandbox is really there."""
        status = self._systemd.status_of(WORKER)
        uid = int(status["Uid"].split()[0])
        assert (status["Seccomp"], status["NoNewPrivs"], int(status["CapEff"], 16)) == ("2", "1", 0), status
        assert uid >= 61184, f"not a dynamic user: {uid}"
        return f"uid {uid}, seccomp filter, no capabilities"

    def watched(self) -> str:
        """A worker that has stopped is ended by the watchdog and started again; its job runs again."""
        before = self._main(WORKER)
        self._systemd.run("kill", "-STOP", before)
        self._until(lambda: self._main(WORKER) not in (before, "0"), "another process")
        self._systemd.wait(WORKER, {"ActiveState": "active", "SubState": "running"})
        restarts = self._systemd.show(WORKER, "NRestarts")["NRestarts"]
        assert restarts == "1", restarts
        text = self._systemd.output(WORKER)
        assert "Fatal Python error: Aborted" in text, "no stacks were written"
        job = self._send(0.0)
        self._until(lambda: self._status(job) == "completed", "a job is done")
        return f"restarts {restarts}, stacks written"

    def drained(self) -> str:
        """`stop` lets a short job finish, beyond TimeoutStopSec, and gives a long one back without spending a retry."""
        short, long = self._send(STOP + 2.0), self._send(600.0)
        self._until(lambda: self._runs(short) and self._runs(long), "both run")
        began = time.monotonic()
        self._systemd.systemctl("stop", WORKER)
        took = time.monotonic() - began
        result = self._systemd.show(WORKER, "Result", "ActiveState")
        assert result == {"Result": "success", "ActiveState": "inactive"}, result
        assert took > STOP, took
        assert self._status(short) == "completed", self._status(short)
        row = self._db.execute("select status, retry_count from jobqueue.jobs where id = %s", [long]).fetchone()
        assert row == ("pending", 0), row
        return f"stopped after {took:.1f} s with TimeoutStopSec={STOP}"

    def open_socket(self) -> str:
        """The first connection starts the API, and a restart refuses nobody."""
        self._systemd.systemctl("start", SOCKET)
        assert self._systemd.show(API, "ActiveState")["ActiveState"] == "inactive"
        assert self._get() == 200
        self._systemd.wait(API, {"ActiveState": "active", "SubState": "running"})
        answers, stop = Counter[object](), threading.Event()
        threads = [threading.Thread(target=self._ask, args=(answers, stop)) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(2):
                before = self._main(API)
                self._systemd.systemctl("restart", API)
                assert self._main(API) != before
        finally:
            stop.set()
            for thread in threads:
                thread.join(timeout=60)
        assert set(answers) == {200}, answers
        return f"{answers[200]} requests over two restarts, all answered"

    def _ask(self, answers: Counter[object], stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                answer: object = self._get()
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            answers[answer] += 1
            stop.wait(0.02)

    def _get(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request("GET", "/livez", headers={"Connection": "close"})
            return connection.getresponse().status
        finally:
            connection.close()

    def _main(self, unit: str) -> str:
        return self._systemd.show(unit, "MainPID")["MainPID"]

    def _send(self, seconds: float) -> object:
        row = self._db.execute(
            "select id from jobqueue.send('nap', jsonb_build_object('seconds', %s::float8))", [seconds]
        ).fetchone()
        assert row is not None
        return row[0]

    def _status(self, job: object) -> object:
        row = self._db.execute("select status from jobqueue.jobs where id = %s", [job]).fetchone()
        return row and row[0]

    def _runs(self, job: object) -> bool:
        row = self._db.execute("select progress_pct from jobqueue.jobs where id = %s", [job]).fetchone()
        return row == (1,)

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within a minute: {what}")
            time.sleep(0.05)


def run() -> list[str]:
    """Install the units, start them, and return the faults found."""
    server = EmbeddedServer(make_ephemeral_home(), ephemeral=True, tcp=True)
    server.start()
    try:
        migrate_up(server.dsn)
        port = _free_port()
        etc = {
            "jobqueue.env": f"JOBQUEUE_APP=compatibility.lab:app\nJOBQUEUE_DRAIN_TIMEOUT={DRAIN}\n",
            "credentials/database-url": _url(server.tcp_dsn),
        }
        with psycopg.connect(server.dsn, autocommit=True) as connection, manager(_units(port), etc) as systemd:
            return Check(connection, systemd, port).run()
    finally:
        server.stop()


def _units(port: int) -> dict[str, str]:
    units = {path.name: path.read_text() for path in DEPLOY.iterdir() if path.suffix in (".service", ".socket")}
    units["jobqueue-worker@.service.d/lab.conf"] = "[Service]\n" + OUTPUT + IMPORTS + WORKER_TIMES
    units["jobqueue-api.service.d/lab.conf"] = "[Service]\n" + OUTPUT + IMPORTS
    units["jobqueue-api.socket.d/lab.conf"] = f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{port}\n"
    return units


def _url(dsn: str) -> str:
    """The server's address with its password, as an operator would write it."""
    given = conninfo_to_dict(dsn)
    password = Path(str(given["passfile"])).read_text().strip().rpartition(":")[2]
    return f"postgresql://{given['user']}:{quote(password)}@{given['host']}:{given['port']}/{given['dbname']}\n"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
