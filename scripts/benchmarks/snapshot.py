"""P5: a REPEATABLE READ snapshot is held from the start, so nothing that is consumed can be cleaned up.

One worker lives through all rounds of send and drain. What a claim touches is counted in buffers: over 1,000 jobs at
the beginning and over 1,000 jobs at the end. The raw limit has the same rounds and claims from the front of its index.
"""

from __future__ import annotations

import time

from benchmarks import raw, statements
from benchmarks.children import STOP
from benchmarks.payloads import QUEUE
from benchmarks.places import Connection, Place, connect, describe_server, value
from benchmarks.report import Bar, Report, Row
from benchmarks.workers import NOW, WorkerOptions, rate_since, send, start_worker
from jobqueue import App

PROBE = 1000
RAW_BATCH = 500
UNFINISHED = (
    "select exists (select from jobqueue.job where queue = %s and lease_until is not null or ready_seq is not null)"
)
DONE = "select coalesce(sum(rows), 0)::bigint from pg_stat_statements where query like '%%jobqueue.claim_%%'"


def run(place: Place, *, jobs: int, runs: int, rounds: int) -> Report:
    """Measure `runs` times: `jobs` jobs in `rounds` rounds under a held snapshot."""
    buffers: list[tuple[float, float]] = []
    rates: list[list[float]] = []
    raw_rates: list[list[float]] = []
    for _ in range(runs):
        first, last, measured = _measure(place, jobs, rounds)
        buffers.append((first, last))
        rates.append(measured)
        raw_rates.append(_measure_raw(place, jobs, rounds))
    report = Report("snapshot", {"jobs": jobs, "runs": runs, "rounds": rounds, **describe_server(place.dsn)})
    report.rows = [
        Row(f"buffers per claimed job after {PROBE:,}", "buffers", [first for first, _ in buffers]),
        Row(
            f"buffers per claimed job after {jobs:,}", "buffers",
            [last for _, last in buffers], [first for first, _ in buffers], (Bar(1.5, at_most=True),),
            "limit: those at the beginning",
        ),
        Row(
            f"throughput of round {rounds} beside round 1", "jobs/s",
            [one[-1] for one in rates], [one[0] for one in rates], (Bar(0.8),), "limit: round 1",
        ),
        Row(
            f"raw, throughput of round {rounds} beside round 1", "jobs/s",
            [one[-1] for one in raw_rates], [one[0] for one in raw_rates], note="limit: round 1",
        ),
    ]  # fmt: skip
    report.facts["round_rates"] = [[round(rate) for rate in one] for one in rates]
    return report


def _hold_snapshot(holder: Connection) -> None:
    holder.execute("begin isolation level repeatable read")
    holder.execute("select pg_current_xact_id()")


def _measure(place: Place, jobs: int, rounds: int) -> tuple[float, float, list[float]]:
    """Return the buffers per job at the beginning and at the end, and the jobs per second of every round."""
    size = max(1, jobs // rounds)
    with place.database() as dsn, connect(dsn) as connection, connect(dsn) as holder:
        statements.prepare(connection)
        _hold_snapshot(holder)
        app = App(dsn)
        with start_worker(WorkerOptions(dsn, until_idle=False)) as worker:
            _round(app, connection, PROBE)
            first = _probe(app, connection)
            measured = [_round(app, connection, size) for _ in range(rounds)]
            last = _probe(app, connection)
            worker.tell(STOP)
            worker.result(timeout=90)
    return first, last, measured


def _probe(app: App, connection: Connection) -> float:
    statements.reset(connection)
    _round(app, connection, PROBE)
    found = statements.claims(connection)
    return found.buffers / max(found.jobs, 1.0)


def _round(app: App, connection: Connection, jobs: int) -> float:
    """Send jobs in one transaction, so that all are there at once, and wait until the worker has done them."""
    began = value(connection, NOW)
    with connection.transaction():
        send(app, connection, jobs)
    deadline = time.monotonic() + 120 + jobs / 200
    while value(connection, UNFINISHED, (QUEUE,)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{jobs} jobs were not done in time")
        time.sleep(0.2)
    return rate_since(connection, began)


def _measure_raw(place: Place, jobs: int, rounds: int) -> list[float]:
    size = max(1, jobs // rounds)
    rates = []
    with place.database() as dsn, connect(dsn) as connection, connect(dsn) as holder:
        raw.create(connection)
        raw.read_plainly(connection)
        _hold_snapshot(holder)
        for _ in range(rounds):
            raw.fill(connection, size)
            began = time.perf_counter()
            raw.drain(connection, RAW_BATCH)
            rates.append(size / (time.perf_counter() - began))
    return rates
