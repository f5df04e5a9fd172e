"""What the tests of the examples share: workers that can be killed at any unit of work, and the moment for it."""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random, randrange
from typing import Any
from uuid import UUID

import psycopg
import psycopg.rows
from psycopg import sql

from jobqueue import JobRecord
from jobqueue.database.parentage import die_with_parent
from tests.support.server import rows, value
from tests.support.waiting import wait_until

Connection = psycopg.Connection[tuple[Any, ...]]
EXAMPLES = ("index_repository", "process_document", "import_dataset")
KILLS = 5
BOUND = 10
"""Done units are saved every 10 or 2 seconds, so at most so many are done again after a kill."""

# A process that has imported the examples once and forks a worker in a few milliseconds.
_workers = multiprocessing.get_context("forkserver")
_workers.set_forkserver_preload([f"examples.{name}.app" for name in EXAMPLES])


@contextmanager
def worker(example: str, dsn: str, log: Path, **environment: str) -> Iterator[BaseProcess]:
    """A worker of an example in a process of its own, killed at the end of the block if it still runs."""
    # The process that forks it may be older than what the tests have set since.
    settings = {**os.environ, "JOBQUEUE_DSN": dsn, **environment}
    process = _workers.Process(target=_run_worker, args=(example, str(log), settings))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _run_worker(example: str, log: str, environment: dict[str, str]) -> None:
    if arm := die_with_parent(parent=os.getppid(), with_signal=signal.SIGKILL):
        arm()
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    asyncio.run(importlib.import_module(f"examples.{example}.app").app.run_worker())


def get(connection: Connection, job: UUID) -> JobRecord:
    """The job as it is now."""
    with connection.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        row = cursor.execute("select * from jobqueue.jobs where id = %s", (job,)).fetchone()
    assert row is not None
    return JobRecord.model_validate(row)


def history(connection: Connection, job: UUID) -> list[tuple[Any, ...]]:
    """How each attempt ended, for a test that fails."""
    columns = "attempt, outcome, error_class, error_message, error_detail"
    return rows(connection, f"select {columns} from jobqueue.attempt where job_id = %s order by attempt", (job,))


def ended(connection: Connection, job: UUID) -> JobRecord:
    """Wait until some worker has ended the job."""
    wait_until(lambda: get(connection, job).done, what="the job has ended", timeout=60)
    return get(connection, job)


def completed(example: str, connection: Connection, job: UUID, dsn: str, log: Path) -> JobRecord:
    """Run a worker of an example until the job has ended."""
    with worker(example, dsn, log):
        record = ended(connection, job)
    assert record.status == "completed", (record.error_message, log.read_text())
    return record


class Gate:
    """Stops whoever does the n-th unit of work, until it is opened: a unit is a statement that writes one of the tables.

    Units are counted over all attempts. The statement has not been done when it is stopped. One of a killed worker that was
    on its way to the server still counts: who comes after the n-th is stopped too.
    """

    def __init__(self, connection: Connection, keeper: Connection, tables: Sequence[str]) -> None:
        """Set it up in a database; `keeper`: a connection that is used for nothing else."""
        self._connection = connection
        self._keeper = keeper
        connection.execute("create sequence gate_unit; create table gate (stop bigint); insert into gate values (null)")
        connection.execute("""
            create function pass_gate() returns trigger language plpgsql security definer as $$
            begin
                if nextval('public.gate_unit') >= (select stop from public.gate) then
                    perform pg_advisory_xact_lock(4711);
                end if;
                return null;
            end $$
        """)
        for table in tables:
            name = sql.Identifier(*table.split("."))
            statement = (
                "create trigger gate before insert or update on {} for each statement execute function pass_gate()"
            )
            connection.execute(sql.SQL(statement).format(name))

    @property
    def units(self) -> int:
        """How many units have been begun."""
        return int(value(self._connection, "select case when is_called then last_value else 0 end from gate_unit"))

    @contextmanager
    def closed_at(self, unit: int) -> Iterator[Callable[[], bool]]:
        """Close it at a unit; yields whether somebody stands there."""
        standing = "select exists (select from pg_locks where locktype = 'advisory' and objid = 4711 and not granted)"
        self._keeper.execute("select pg_advisory_lock(4711)")
        self._connection.execute("update gate set stop = %s", (unit,))
        try:
            yield lambda: bool(value(self._connection, standing))
        finally:
            self.open()

    def open(self) -> None:
        """Let everybody through."""
        self._connection.execute("update gate set stop = null")
        self._keeper.execute("select pg_advisory_unlock_all()")


def seeded(what: str) -> Random:
    """A source of chance whose seed pytest shows when the test fails; `EXAMPLES_SEED` repeats a run."""
    seed = int(os.environ.get("EXAMPLES_SEED", randrange(10**6)))
    print(f"{what}: EXAMPLES_SEED={seed}")
    return Random(seed)


def kill_at_random_units(
    example: str, gate: Gate, connection: Connection, job: UUID, dsn: str, log: Path, *, units: int
) -> Iterator[int]:
    """Kill the worker of a job five times, at random units out of as many as an undisturbed run has.

    Yields the number of kills after each of them; then the job waits for the next worker.
    """
    chosen = sorted(seeded(f"{example}: kills").sample(range(1, units + 1), KILLS))
    print(f"killed at units {chosen} of {units}")
    begun = gate.units
    for kills, unit in enumerate(chosen, 1):
        ours = _sessions(connection)
        with gate.closed_at(begun + unit) as somebody_waits, worker(example, dsn, log) as victim:
            _wait_for_victim(victim, somebody_waits, log, unit)
            victim.kill()
            victim.join()
        _wait_for_others_to_leave(connection, ours)
        rescue(connection, job)
        yield kills


def _wait_for_victim(victim: BaseProcess, somebody_waits: Callable[[], bool], log: Path, unit: int) -> None:
    wait_until(
        lambda: somebody_waits() or victim.exitcode is not None, what=f"unit {unit} has been reached", timeout=60
    )
    assert victim.exitcode is None, log.read_text()


def _wait_for_others_to_leave(connection: Connection, ours: set[int]) -> None:
    """The server notices late that a killed worker is gone: what it was doing is done or undone then."""
    wait_until(lambda: _sessions(connection) <= ours, what="the dead worker's connections are gone")


def rescue(connection: Connection, job: UUID) -> None:
    """As if the half minute of the dead worker's lease were over; after the third lost worker somebody retries by hand."""
    connection.execute("update jobqueue.job set lease_until = now() - interval '1 s' where id = %s", (job,))
    connection.execute(
        "update jobqueue.claim_batch set check_at = now() - interval '1 s' where %s = any (job_ids)", (job,)
    )
    connection.execute("select jobqueue.rescue(10)")
    status, error_class = rows(connection, "select status, error_class from jobqueue.jobs where id = %s", (job,))[0]
    if status == "failed":
        assert error_class == "lost"
        connection.execute("select jobqueue.retry(%s, 'three workers were killed')", (job,))
    else:
        assert status == "pending"


def _sessions(connection: Connection) -> set[int]:
    ours = "select pid from pg_stat_activity where datname = current_database() and backend_type = 'client backend'"
    return {pid for (pid,) in rows(connection, ours)}
