"""One scenario: a place, the processes on it, what is done to them, and what is known afterwards."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg

from chaos_lab import records
from chaos_lab.history import History, Injection
from chaos_lab.place import Place
from chaos_lab.plan import FINAL, make_plan
from chaos_lab.processes import Poller, Process, answers_of, free_port, make_api, make_producer, make_worker
from chaos_lab.producer import Orders
from chaos_lab.proxy import Proxy
from chaos_lab.recovery import RECOVERY_SECONDS

START_SECONDS = 180.0
LOOK_SECONDS = 1.0
WORKER_IDS = "select id::text from jobqueue.worker where pid = %s"


class Stuck(RuntimeError):
    """Nothing ended for a long time: the run is over, and its history says what was left."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large a run is. `rate`: jobs sent per second. `warm`: seconds before the first injection. `calm`: seconds after
    each. `rounds`: how often what can be repeated is. `patience`: seconds without any end until it is given up."""

    jobs: int
    seed: int
    workers: int
    concurrency: int
    rate: float
    lease: float
    warm: float
    calm: float
    rounds: int
    patience: float = 120.0


class Scene:
    """What faults act on."""

    def __init__(
        self, place: Place, sizes: Sizes, folder: Path, *, proxied: bool = False, faketime: Path | None = None
    ) -> None:
        self.place, self.sizes, self.folder = place, sizes, folder
        self.lease, self.calm, self.rounds, self.seed = sizes.lease, sizes.calm, sizes.rounds, sizes.seed
        self.proxy = Proxy(place.dsn) if proxied else None
        self.plan = make_plan(sizes.seed, sizes.jobs)
        self.workers: list[Process] = []
        self._api_port = free_port()
        self._faketime = faketime
        self._clock = folder / "clock"
        self._injections: list[Injection] = []
        self._complaints: list[str] = []
        asked = next(job for job in self.plan if job.kind == "plain")
        self._poller = Poller(self._api_port, asked.id)

    # -- for faults ------------------------------------------------------------------------------------------------------

    @contextmanager
    def injection(self, what: str, killed: tuple[str, ...] = ()) -> Iterator[None]:
        """What happens in this block is the fault; its end is the end of the cause."""
        began = time.time()
        yield
        self._injections.append(Injection(what, began, time.time(), killed))

    def pause(self, seconds: float) -> None:
        """Let time go by."""
        time.sleep(seconds)

    def ids_of(self, worker: Process) -> tuple[str, ...]:
        """The ids under which a worker process claims."""
        with self.place.connect() as connection:
            return tuple(row[0] for row in connection.execute(WORKER_IDS, (worker.pid,)).fetchall())

    def set_clock(self, offset: str) -> None:
        """Move the clock of the first worker."""
        self._clock.write_text(offset + "\n")

    def wait_for_share(self, share: float) -> None:
        """Wait until that share of the jobs has ended."""
        self._wait(lambda ended, _: ended >= share * len(self.plan))

    # -- life ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start everything; at the end ask it to stop, and note who did not live or did not end in order."""
        with self.place.connect() as connection:
            records.prepare(connection, self.lease)
        dsn = self.proxy.start() if self.proxy is not None else self.place.dsn
        self._make_processes(dsn)
        everybody = [*self.workers, self._api, self._producer]
        try:
            for process in everybody:
                process.start()
            yield
        finally:
            self._poller.stop()
            for process in everybody:
                self._stop(process)
            if self.proxy is not None:
                self.proxy.stop()

    def warm_up(self) -> None:
        """Let it run until its usual rate can be seen. Raises Stuck."""
        self._wait_for_api()
        self._poller.start()
        self._wait(lambda ended, _: ended > 0)
        self.pause(self.sizes.warm)

    def finish(self) -> None:
        """Wait until every job has been sent and has ended. Raises Stuck."""
        self._wait(lambda _, left: left == 0 and self._producer.ending is not None)
        ended = max((injection.ended for injection in self._injections), default=0.0)
        while not any(answer.at > ended and answer.status == 200 for answer in list(self._poller.answers)):
            if time.time() > ended + 2 * RECOVERY_SECONDS:
                return
            self.pause(0.1)

    def history(self) -> History:
        """What is known of it all."""
        history = History(self.lease, planned=self.plan, injections=self._injections)
        history.accepted, history.refused = answers_of(self._producer)
        history.answers = self._poller.answers
        history.survivors = self._complaints
        with self.place.connect() as connection:
            records.read(connection, history)
        return history

    def _make_processes(self, dsn: str) -> None:
        sizes = self.sizes
        for number in range(sizes.workers):
            clocked = self._faketime is not None and number == 0
            environment = self._faked() if clocked else {}
            self.workers.append(make_worker(number, dsn, sizes.concurrency, self.folder, environment))
        self._api = make_api(dsn, self._api_port, self.folder)
        orders = Orders(dsn, sizes.seed, sizes.jobs, sizes.rate, self._api_port)
        self._producer = make_producer(orders, self.folder)

    def _faked(self) -> Mapping[str, str]:
        self.set_clock("+0")
        return {
            "LD_PRELOAD": str(self._faketime),
            "FAKETIME_TIMESTAMP_FILE": str(self._clock),
            "FAKETIME_NO_CACHE": "1",
            # The clock on the wall is moved; the one that only counts cannot be, on any machine.
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }

    def _wait_for_api(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self._poller.ask() != 200:
            if time.monotonic() > deadline:
                raise Stuck("the API does not answer: see api.log")
            time.sleep(0.1)

    def _stop(self, process: Process) -> None:
        ending = process.ending
        if ending is not None and process is not self._producer:
            self._complaints.append(f"{process.name} ended by itself with {ending}")
            return
        if process is self._producer and ending is not None:
            if ending != 0:
                self._complaints.append(f"the senders ended with {ending}")
            return
        code = process.stop()
        # uvicorn ends in order and then by the signal that asked for it
        in_order = (0, -signal.SIGTERM) if process is self._api else (0,)
        if code not in in_order and process is not self._producer:
            said = "did not end when it was asked to" if code is None else f"ended with {code} when it was asked to"
            self._complaints.append(f"{process.name} {said}")

    def _wait(self, done: Callable[[int, int], bool]) -> None:
        """Wait for a condition of (jobs ended, jobs left). Raises Stuck if nothing ends for too long."""
        moved_at, before = time.monotonic(), -1
        while True:
            with suppress(psycopg.OperationalError):
                ended, left = self._counts()
                if done(ended, left):
                    return
                if ended != before:
                    moved_at, before = time.monotonic(), ended
            if time.monotonic() - moved_at > self.sizes.patience:
                raise Stuck(f"{before} jobs have ended, and no more for {self.sizes.patience:g} s")
            time.sleep(LOOK_SECONDS if len(self.plan) > 1000 else 0.1)

    def _counts(self) -> tuple[int, int]:
        with self.place.connect(connect_timeout=5) as connection:
            row = connection.execute(COUNTS, (sorted(FINAL), sorted(FINAL))).fetchone()
            assert row is not None
            return row[0], row[1]


COUNTS = """
select count(*) filter (where status = any (%s)), count(*) filter (where status <> all (%s)) from jobqueue.job
"""
