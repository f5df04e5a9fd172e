"""The lease: beats, orders, and a worker that stops by itself when it cannot beat."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from jobqueue.worker import lease as module
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
    lease = worker.lease(dsn, interval=600, lease=1200)
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
    connection.execute("update jobqueue.queue set lease = '1 hour'")
    ends = "select lease_until from jobqueue.job where id = %s"
    before = value(connection, ends, (forgotten,))
    lease.beat_now()
    wait_until(lambda: lease_left(connection, listed) > 1800, what="the lease is extended")
    assert value(connection, ends, (forgotten,)) == before


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


class Clock:
    """A clock that the test moves; it counts how often somebody looked."""

    def __init__(self) -> None:
        self.now = 100.0
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return self.now


def test_a_silent_peer_fences_the_worker_before_its_leases_end_and_the_next_beat_frees_it(
    worker: Worker, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "elapsed_clock", clock)
    with relay(dsn) as between:
        lease = worker.lease(between.dsn, interval=0.1, lease=3.0, margin=1.0, beat_timeout=0.5)
        lease.start()
        wait_until(worker.heard, what="the first beat")
        between.flowing.clear()
        clock.now += 1.9
        looks = clock.looks
        wait_until(lambda: clock.looks > looks + 10, what="both threads have looked")
        assert worker.fences == []
        clock.now += 0.2
        wait_until(lambda: worker.fences == [True], what="the fence, with 0.9 s of the leases left")
        assert lease.fenced is True
        between.flowing.set()
        wait_until(lambda: worker.fences == [True, False], what="the fence is lifted")
        assert worker.fences[-1] is lease.fenced
        lease.stop()


def test_the_time_that_connecting_took_does_not_count_against_the_beat_that_follows(
    worker: Worker, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "elapsed_clock", clock)
    lease = worker.lease(dsn, lease=10.0)
    connect = lease._connect

    def connect_slowly() -> psycopg.Connection[Any]:
        clock.now += 4.0
        return connect()

    monkeypatch.setattr(lease, "_connect", connect_slowly)
    assert lease._beat_safely()
    assert lease.silent_for == 0.0
    lease._disconnect()


def test_after_a_beat_that_took_long_the_next_one_comes_sooner(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a lease of 10 s, fenced after 6.7 s, would be fenced between two beats that both arrived."""
    clock = Clock()
    monkeypatch.setattr(module, "elapsed_clock", clock)
    lease = worker.lease("", interval=5.0, lease=10.0)
    began = clock.now
    clock.now += 3.0
    assert lease._pause_since(began) == 2.0
    clock.now += 30.0
    assert lease._pause_since(began) == 0.5


def test_stop_does_not_wait_for_a_silent_peer(worker: Worker, dsn: str) -> None:
    with relay(dsn) as between:
        lease = worker.lease(between.dsn, interval=0.05, lease=3600, beat_timeout=600)
        lease.start()
        wait_until(worker.heard, what="the first beat")
        between.flowing.clear()
        wait_until(lambda: lease._beat_began is not None, what="a beat that hangs")
        stopping = threading.Thread(target=lease.stop, daemon=True)
        stopping.start()
        wait_until(lambda: not stopping.is_alive(), what="it has stopped, long before the beat may have taken too long")


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


def test_the_server_gives_up_a_beat_that_waits_for_a_row_lock(
    worker: Worker, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.claim()
    monkeypatch.setattr(module, "elapsed_clock", Clock())  # here the client's patience never ends
    lease = worker.lease(dsn, interval=0.05, beat_timeout=0.5)
    errors = list[Exception]()
    by_server = (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable)
    monkeypatch.setattr(lease, "_note_failure", errors.append)
    with psycopg.connect(dsn) as other:
        other.execute("select from jobqueue.worker for update")
        other.execute("select from jobqueue.job for update")
        lease.start()
        # What the server has ended leaves nothing behind that waits for the lock, which is still held.
        wait_until(
            lambda: sum(isinstance(error, by_server) for error in errors) >= 3, what="three attempts are given up"
        )
        before = worker.beats()
    wait_until(lambda: worker.beats() > before, what="a beat after the lock is gone")
    lease.stop()
