"""Clients in plain SQL that send, claim, report and complete without a pause, and note what went wrong and what waited."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import psycopg

QUEUE = "load"
PAUSE = 0.005
"""Seconds between two rounds of a client: the machine is to be busy, not the whole of it."""


@dataclass(slots=True)
class Findings:
    """What the clients saw."""

    errors: list[str] = field(default_factory=list)
    longest: dict[str, float] = field(default_factory=dict)
    """Seconds of the slowest call, by function."""
    calls: Counter[str] = field(default_factory=Counter)
    sent: set[UUID] = field(default_factory=set)
    completed: set[UUID] = field(default_factory=set)

    def slowest(self) -> tuple[str, float]:
        """The function that made somebody wait longest, and how long."""
        return max(self.longest.items(), key=lambda pair: pair[1], default=("", 0.0))


class Clients:
    """Senders, claimers and pollers, each a thread with a connection of its own."""

    def __init__(self, dsn: str) -> None:
        self.findings = Findings()
        self._dsn = dsn
        self._stop = threading.Event()
        self._lock = threading.Lock()
        kinds: list[Callable[[psycopg.Connection[Any]], Iterator[None]]] = [
            self._sender, self._sender, self._claimer, self._claimer, self._poller
        ]  # fmt: skip
        self._threads = [threading.Thread(target=self._run, args=(kind,), daemon=True) for kind in kinds]

    def start(self) -> None:
        """Let them work."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> Findings:
        """End them and return what they saw."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=60)
        return self.findings

    def _run(self, kind: Callable[[psycopg.Connection[Any]], Iterator[None]]) -> None:
        try:
            with psycopg.connect(self._dsn, autocommit=True) as connection:
                for _ in kind(connection):
                    if self._stop.wait(PAUSE):
                        return
        except Exception as error:
            with self._lock:
                self.findings.errors.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    def _call(
        self, connection: psycopg.Connection[Any], name: str, query: str, parameters: tuple[Any, ...]
    ) -> list[tuple[Any, ...]]:
        began = time.monotonic()
        try:
            return connection.execute(query.encode(), parameters).fetchall()
        except psycopg.Error as error:
            with self._lock:
                self.findings.errors.append(f"{name}: {error.sqlstate} {' '.join(str(error).split())}")
            return []
        finally:
            took = time.monotonic() - began
            with self._lock:
                self.findings.calls[name] += 1
                self.findings.longest[name] = max(took, self.findings.longest.get(name, 0.0))

    def _sender(self, connection: psycopg.Connection[Any]) -> Iterator[None]:
        while True:
            rows = self._call(connection, "send", "select id from jobqueue.send(%s, '{}')", (QUEUE,))
            with self._lock:
                self.findings.sent.update(row[0] for row in rows)
            yield

    def _claimer(self, connection: psycopg.Connection[Any]) -> Iterator[None]:
        worker = uuid4()
        claim = "select id, claim_token from jobqueue.claim(array[%s], %s, 5)"
        while True:
            for number, (id, token) in enumerate(self._call(connection, "claim", claim, (QUEUE, worker))):
                self._call(connection, "progress", "select jobqueue.progress(%s, %s, 50)", (id, token))
                if number == 4:
                    self._call(connection, "release", "select jobqueue.release(%s, %s)", (id, token))
                    continue
                done = self._call(connection, "complete", "select jobqueue.complete(%s, %s)", (id, token))
                if done:
                    with self._lock:
                        self.findings.completed.add(id)
            self._call(connection, "heartbeat", "select * from jobqueue.heartbeat(%s)", (worker,))
            yield

    def _poller(self, connection: psycopg.Connection[Any]) -> Iterator[None]:
        while True:
            with self._lock:
                known = next(iter(self.findings.sent), None)
            self._call(connection, "read", "select id, status, progress_pct from jobqueue.jobs where id = %s", (known,))
            yield


@contextmanager
def under_load(dsn: str, warm_up: int) -> Iterator[Clients]:
    """Clients that work until the end of the block, which begins when `warm_up` jobs are done."""
    clients = Clients(dsn)
    clients.start()
    try:
        deadline = time.monotonic() + 60
        while len(clients.findings.completed) < warm_up and not clients.findings.errors:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the load did not get going: {clients.findings}")
            time.sleep(0.01)
        yield clients
    finally:
        clients.stop()
