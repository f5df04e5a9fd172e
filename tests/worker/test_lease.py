"""The lease: beats, orders, and a worker that stops by itself when it cannot beat."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from jobqueue.worker.lease import Lease
from tests.support.relay import relay
from tests.support.server import rows, value
from tests.support.waiting import wait_until

Connection = psycopg.Connection[tuple[Any, ...]]


class Worker:
    """A worker's side of the lease: what it holds, and what it was told."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.id = uuid4()
        self.jobs: list[tuple[UUID, UUID, bool]] = []
        self.orders: list[tuple[str | None, str]] = []
        self.fences: list[bool] = []

    def lease(self, dsn: str, **options: Any) -> Lease:
        return Lease(dsn, self.id, lambda: list(self.jobs), self.orders.extend, self.fences.append, **options)

    def claim(self) -> UUID:
        value(self.connection, "select id from jobqueue.send('letters')")
        claimed = rows(self.connection, "select id, claim_token from jobqueue.claim('{letters}', %s, 1)", (self.id,))
        ((id, token),) = claimed
        self.jobs.append((id, token, True))
        assert isinstance(id, UUID)
        return id

    def beats(self) -> Any:
        return value(self.connection, "select heartbeat_at from jobqueue.worker where id = %s", (self.id,))

    def heard(self) -> bool:
        return bool(rows(self.connection, "select from jobqueue.worker where id = %s", (self.id,)))

    def backend(self) -> int | None:
        found = rows(
            self.connection,
            "select pid from pg_stat_activity where application_name = 'jobqueue heartbeat'"
            " and datname = current_database()",
        )
        return found[0][0] if found else None


@pytest.fixture
def worker(connection: Connection) -> Worker:
    return Worker(connection)


@pytest.fixture
def lease(worker: Worker, dsn: str) -> Iterator[Lease]:
    """A lease that beats at once and then only when it is told to."""
    lease = worker.lease(dsn, interval=60)
    lease.start()
    wait_until(worker.heard, what="the first beat")
    yield lease
    lease.stop()


def lease_left(connection: Connection, id: UUID) -> Any:
    return value(connection, "select lease_until - now() from jobqueue.job where id = %s", (id,)).total_seconds()


def test_a_beat_extends_exactly_the_leases_of_the_jobs_it_lists(
    worker: Worker, lease: Lease, connection: Connection
) -> None:
    listed, forgotten = worker.claim(), worker.claim()
    worker.jobs.pop()
    connection.execute("update jobqueue.job set lease_until = now() + interval '9 s'")
    lease.beat_now()
    wait_until(lambda: lease_left(connection, listed) > 20, what="the lease is extended")
    assert lease_left(connection, forgotten) < 10


def test_the_orders_of_a_beat_are_delivered(worker: Worker, lease: Lease, connection: Connection) -> None:
    cancelled = worker.claim()
    worker.jobs.append((lost := uuid4(), uuid4(), False))
    value(connection, "select jobqueue.cancel(%s, 'not wanted')", (cancelled,))
    value(connection, "select jobqueue.drain_worker(%s, 'update')", (worker.id,))
    lease.beat_now()
    wait_until(lambda: len(worker.orders) >= 3, what="three orders")
    assert set(worker.orders) == {(str(cancelled), "cancel"), (str(lost), "lost"), (None, "drain")}


def test_beats_go_on_at_the_interval(worker: Worker, dsn: str) -> None:
    lease = worker.lease(dsn, interval=0.05)
    lease.start()
    wait_until(worker.heard, what="the first beat")
    first = worker.beats()
    wait_until(lambda: (worker.beats() - first).total_seconds() > 0.2, what="more beats")
    lease.stop()
    last = worker.beats()
    assert not any(thread.name.startswith("jobqueue-") for thread in threading.enumerate())
    assert worker.beats() == last


def test_it_survives_its_backend_and_is_not_fenced_by_that(
    worker: Worker, lease: Lease, connection: Connection
) -> None:
    pid, before = worker.backend(), worker.beats()
    assert value(connection, "select pg_terminate_backend(%s)", (pid,))
    lease.beat_now()
    wait_until(lambda: worker.backend() not in (None, pid), what="another backend")
    wait_until(lambda: worker.beats() > before, what="another beat")
    assert worker.fences == []


def test_a_silent_peer_fences_the_worker_before_its_leases_end_and_the_next_beat_frees_it(
    worker: Worker, dsn: str
) -> None:
    with relay(dsn) as between:
        lease = worker.lease(between.dsn, interval=0.1, lease=3.0, margin=1.0, beat_timeout=0.5)
        lease.start()
        wait_until(worker.heard, what="the first beat")
        between.flowing.clear()
        began = time.monotonic()
        wait_until(lambda: worker.fences == [True], what="the fence")
        assert 1.0 < time.monotonic() - began < 3.0
        assert lease.fenced is True
        between.flowing.set()
        wait_until(lambda: worker.fences == [True, False], what="the fence is lifted")
        assert worker.fences[-1] is lease.fenced
        lease.stop()


def test_stop_does_not_wait_for_a_silent_peer(worker: Worker, dsn: str) -> None:
    with relay(dsn) as between:
        lease = worker.lease(between.dsn, interval=0.05, beat_timeout=30)
        lease.start()
        wait_until(worker.heard, what="the first beat")
        between.flowing.clear()
        wait_until(lambda: lease._beat_began is not None, what="a beat that hangs")
        began = time.monotonic()
        lease.stop()
        assert time.monotonic() - began < 5


def test_a_worker_that_never_reaches_the_database_is_fenced(worker: Worker) -> None:
    lease = worker.lease("host=127.0.0.1 port=1 dbname=nowhere", interval=0.1, lease=0.6, margin=0.2)
    lease.start()
    wait_until(lambda: worker.fences == [True], what="the fence")
    lease.stop()


def test_nothing_that_the_worker_does_wrong_ends_the_beats(worker: Worker, dsn: str) -> None:
    calls: list[int] = []

    def held() -> list[Any]:
        calls.append(1)
        if len(calls) < 3:
            raise RuntimeError("dictionary changed size during iteration")
        return []

    lease = Lease(dsn, worker.id, held, worker.orders.extend, worker.fences.append, interval=0.05)
    lease.start()
    wait_until(lambda: len(calls) > 4 and worker.heard(), what="beats after errors")
    lease.stop()


def test_the_server_gives_up_a_beat_that_waits_for_a_row_lock(worker: Worker, dsn: str, connection: Connection) -> None:
    worker.claim()
    lease = worker.lease(dsn, interval=0.05, beat_timeout=0.5)
    with psycopg.connect(dsn) as other:
        other.execute("select from jobqueue.worker for update")
        other.execute("select from jobqueue.job for update")
        lease.start()
        waiting = "select count(*) from pg_stat_activity where application_name = 'jobqueue heartbeat'"
        deadline = time.monotonic() + 3
        most = 0
        while time.monotonic() < deadline:
            most = max(most, value(connection, waiting))
        assert most <= 3, "each attempt left a backend behind that waits for the lock"
    wait_until(lambda: lease.silent_for < 0.5, what="a beat after the lock is gone")
    lease.stop()
