"""The processes that are tormented: workers, the API and the senders, started as people start them."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from chaos_lab.history import Answer
from chaos_lab.producer import Orders

SCRIPTS = Path(__file__).resolve().parent.parent
DRAIN_SECONDS = 40.0
ASK_EVERY = 0.25
ASK_SECONDS = 2.0


class Process:
    """A process whose output goes to a file. `start` again after it was killed makes a new one."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self.name = name
        self._command, self._folder = list(command), folder
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("JOBQUEUE_", "COVERAGE_", "PG"))
        }
        path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent)])
        self._environment = {**inherited, "PYTHONPATH": path, **environment}
        self._process: subprocess.Popen[bytes] | None = None
        self.killed = 0

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def ending(self) -> int | None:
        """Its exit code; None while it lives."""
        return None if self._process is None else self._process.poll()

    @property
    def output(self) -> Path:
        """What it printed."""
        return self._folder / f"{self.name}.out"

    def start(self) -> None:
        """Start it."""
        with self.output.open("ab") as out, (self._folder / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=out, stderr=log, cwd=self._folder
            )

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, as the kernel does when memory is short."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self.killed += 1

    def stop(self) -> int | None:
        """Ask it to end; returns its exit code, None if it had to be killed."""
        process = self._process
        if process is None:
            return 0
        if process.poll() is None:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.terminate()
        try:
            return process.wait(DRAIN_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None


def make_worker(number: int, dsn: str, concurrency: int, folder: Path, environment: Mapping[str, str]) -> Process:
    """A worker of the application."""
    command = [sys.executable, "-m", "jobqueue", "worker", "chaos_lab.application", "--concurrency", str(concurrency)]
    return Process(f"worker-{number}", command, {"JOBQUEUE_DSN": dsn, **environment}, folder)


def make_api(dsn: str, port: int, folder: Path) -> Process:
    """The HTTP API."""
    command = [sys.executable, "-m", "jobqueue", "api", "--port", str(port)]
    return Process("api", command, {"JOBQUEUE_DSN": dsn, "JOBQUEUE_API_ACCESS_LOG": "false"}, folder)


def make_producer(orders: Orders, folder: Path) -> Process:
    """The senders."""
    command = [sys.executable, "-m", "chaos_lab.producer", json.dumps(asdict(orders))]
    return Process("producer", command, {}, folder)


def answers_of(producer: Process) -> tuple[set[int], set[int]]:
    """What senders were told: the numbers of accepted and of refused jobs."""
    accepted: set[int] = set()
    refused: set[int] = set()
    with producer.output.open() as lines:
        for line in lines:
            outcome = json.loads(line)
            accepted.update(outcome["accepted"])
            refused.update(outcome["refused"])
    return accepted, refused


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Poller:
    """A client that asks the API for a job again and again, and remembers what it was told."""

    def __init__(self, port: int, job: str) -> None:
        self._port, self._path = port, f"/jobs/{job}"
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="poller", daemon=True)
        self.answers: list[Answer] = []

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()

    def ask(self) -> int:
        """Ask once: the status, or 0."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ASK_SECONDS)
        try:
            connection.request("GET", self._path)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    def _loop(self) -> None:
        while not self._ending.wait(ASK_EVERY):
            self.answers.append(Answer(time.time(), self.ask()))
