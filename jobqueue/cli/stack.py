"""Everything on one machine: database, API, one worker.

```
start:  embedded server (unless a DSN is set)  ─►  schema  ─►  API  ─►  worker
stop:   worker drains  ─►  API  ─►  embedded server (only if it was started here)
```

API and worker are processes of their own, the same ones that `jobqueue api` and `jobqueue worker` start. A signal from
the terminal reaches this process only, and it stops them in order; a second one makes the worker give its jobs back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

import click

from jobqueue.cli.options import database_dsn
from jobqueue.errors import JobqueueError

if TYPE_CHECKING:
    from jobqueue.database.embedded import EmbeddedServer
    from jobqueue.settings import Settings

STOP_GRACE = 10.0
"""Seconds beyond the drain time-out before a process that was asked to stop is killed."""
POLL = 0.05
LOG_LINES = 20


class ServiceEnded(JobqueueError):
    """The API or the worker ended by itself; the message has the end of its log if there is one."""

    code = "SERVICE_ENDED"


@dataclass(frozen=True, slots=True)
class Service:
    """One child process."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path | None
    """Where its output goes; None: to our stderr."""


class Stack:
    """Database, API and worker; a context manager that stops what it started.

    `logs`: a folder for the output of API and worker (None: our stderr). `directory`: where they run, and where the
    worker's app is imported from (None: here).
    """

    def __init__(self, settings: Settings, *, logs: Path | None = None, directory: Path | None = None) -> None:
        self.settings = settings
        self.dsn = ""
        self.signals = 0
        self._logs = logs
        self._directory = directory or Path.cwd()
        self._server: EmbeddedServer | None = None
        self._services: list[Service] = []
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> Stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stop()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]

    def open_database(self) -> list[str]:
        """Start the embedded server unless a DSN is set, bring the schema up to date, and return what was done for it.

        Raises DatabaseUnavailable, MigrationError, SchemaTooNew.
        """
        from jobqueue.database.embedded import EmbeddedServer, default_data_dir
        from jobqueue.database.migrations import migrate_up
        from jobqueue.settings import resolve_dsn

        if resolve_dsn(self.settings) is None:
            server = EmbeddedServer(self.settings.data_dir or default_data_dir())
            if not server.status().running:
                self._server = server
        self.dsn = database_dsn(self.settings)
        return migrate_up(database_dsn(self.settings, direct=True), timeout=self.settings.start_timeout)

    def start_api(self) -> str:
        """Start the API and return its address once it listens: on the settings' port, or a free one if that is busy.

        Raises ServiceEnded if it cannot be started.
        """
        host = self.settings.host
        port = free_port(host, self.settings.port)
        if self.settings.port not in (0, port):
            click.echo(f"port {self.settings.port} of {host} is busy: the API takes {port}", err=True)
        self._start("api", ["api"], {"JOBQUEUE_HOST": host, "JOBQUEUE_PORT": str(port)})
        deadline = time.monotonic() + self.settings.start_timeout
        while not _answers(host, port):
            self.check()
            if time.monotonic() > deadline:
                raise ServiceEnded(f"the API does not answer on {host}:{port}", hint=self._where_logs())
            time.sleep(POLL)
        shown = f"[{host}]" if ":" in host else host
        return f"http://{shown}:{port}{self.settings.api_prefix}"

    def dashboard(self, address: str) -> str | None:
        """The dashboard's address under the API's, or None if this API serves none."""
        page = f"{address}/ui/"
        try:
            with urllib.request.urlopen(page, timeout=5.0) as answer:  # noqa: S310
                return page if answer.status == 200 else None
        except OSError:
            return None

    def start_worker(self, app: str) -> None:
        """Start one worker of `pkg.module[:app]`; `check` tells whether it lives."""
        self._start("worker", ["worker", app], {})

    def check(self) -> None:
        """Do nothing while all is well. Raises ServiceEnded if a process ended, KeyboardInterrupt after a signal."""
        if self.signals:
            raise KeyboardInterrupt
        for service in self._services:
            code = service.process.poll()
            if code is not None:
                raise _service_ended(service, code)

    def wait(self) -> None:
        """Return after SIGINT or SIGTERM. Raises ServiceEnded if a process ends before."""
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                self.check()
                time.sleep(POLL)

    def _start(self, name: str, arguments: list[str], variables: Mapping[str, str]) -> None:
        from jobqueue.database.parentage import die_with_parent

        log = self._logs / f"{name}.log" if self._logs else None
        with _output(log) as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "jobqueue", *arguments],
                cwd=self._directory,
                env={**os.environ, **self._database_variables(), **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent(with_signal=signal.SIGTERM),
            )
        self._services.append(Service(name, process, log))

    def _database_variables(self) -> dict[str, str]:
        # Empty: the children find libpq's own variables as we did.
        return {"JOBQUEUE_DSN": self.dsn} if self.dsn else {}

    def _where_logs(self) -> str | None:
        return f"Its log is in {self._logs}." if self._logs else None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1

    def _stop(self) -> None:
        for service in reversed(self._services):
            self._stop_service(service)
        if self._server is not None:
            self._server.stop()

    def _stop_service(self, service: Service) -> None:
        process, seen = service.process, self.signals
        deadline = time.monotonic() + self.settings.drain_timeout + STOP_GRACE
        if process.poll() is None:
            process.terminate()
        while process.poll() is None:
            if self.signals > seen:
                seen = self.signals
                process.terminate()
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(POLL)


def free_port(host: str, wanted: int) -> int:
    """Return `wanted` if nobody listens on it, else a free port. Raises OSError if the host is none of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in (wanted, 0):
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                if port == 0:
                    raise
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("the loop returns or raises")


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _output(log: Path | None) -> Iterator[int]:
    if log is None:
        yield sys.stderr.fileno()
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        yield file.fileno()


def _service_ended(service: Service, code: int) -> ServiceEnded:
    hint = None
    if service.log is not None:
        lines = service.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        hint = "\n".join([f"{service.log} ends with:", *(f"    {line}" for line in lines)])
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return ServiceEnded(f"the {service.name} {how}", hint=hint, details={"exit_code": code})
