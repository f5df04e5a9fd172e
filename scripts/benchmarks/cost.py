"""P7: the write-ahead log of a job over its life, statements per job when busy, statements of an idle worker."""

from __future__ import annotations

import time
from collections import defaultdict

from benchmarks import statements
from benchmarks.children import STOP
from benchmarks.payloads import QUEUE, payload
from benchmarks.places import Connection, Place, connect, describe_server
from benchmarks.report import Bar, Report, Row
from benchmarks.statements import Wal
from benchmarks.workers import WorkerOptions, drain, send, start_worker
from jobqueue import App

SETTLING_SECONDS = 5.0
"""An idle worker arms itself and looks again after 50 ms, 250 ms and 1 s; what it does from then on is its upkeep."""
WAL_BAR = (Bar(1500, at_most=True, of="median"),)


def run(place: Place, *, jobs: int, runs: int, idle_seconds: float) -> Report:
    """Measure `runs` times; each phase begins right after a checkpoint, where full-page images are most."""
    wal: dict[str, list[Wal]] = defaultdict(list)
    busy: list[float] = []
    idle: list[float] = []
    for _ in range(runs):
        with place.database() as dsn, connect(dsn) as connection:
            statements.prepare(connection)
            app = App(dsn)
            wal["single sends"].append(_send_singly(app, connection, min(jobs, 2000)))
            wal["claim and complete after single sends"].append(_drain(dsn, connection, min(jobs, 2000))[0])
            wal["bulk sends"].append(_send_bulk(app, connection, jobs))
            drained, calls = _drain(dsn, connection, jobs)
            wal["claim and complete"].append(drained)
            busy.append(calls)
            idle.append(_idle(dsn, connection, idle_seconds))
    report = Report("cost", {"jobs": jobs, "runs": runs, "idle_seconds": idle_seconds, **describe_server(place.dsn)})
    report.rows += _wal_rows(wal)
    report.rows.append(Row("statements per job, busy worker", "1/job", busy, bars=(Bar(0.1, True, "median"),)))
    report.rows.append(Row("statements of an idle worker", "1/s", idle, bars=(Bar(1.0, True, "median"),)))
    return report


def _wal_rows(wal: dict[str, list[Wal]]) -> list[Row]:
    rows = []
    for name, parts in wal.items():
        full = [part.bytes for part in parts]
        rows.append(Row(name, "WAL B/job", [part.bytes - part.full_pages for part in parts], note=_with(full)))
    for name, send_name, end_name in (
        ("life of a job, sent alone", "single sends", "claim and complete after single sends"),
        ("life of a job, sent in bulk", "bulk sends", "claim and complete"),
    ):
        lives = list(zip(wal[send_name], wal[end_name], strict=True))
        bare = [a.bytes - a.full_pages + b.bytes - b.full_pages for a, b in lives]
        full = [a.bytes + b.bytes for a, b in lives]
        rows.append(Row(name, "WAL B/job", bare, bars=WAL_BAR))
        rows.append(Row(f"{name}, with full-page images", "WAL B/job", full))
    return rows


def _with(full: list[float]) -> str:
    return f"{sorted(full)[len(full) // 2]:.0f} with full-page images"


def _send_singly(app: App, connection: Connection, jobs: int) -> Wal:
    connection.execute("checkpoint")
    begin = statements.wal_position(connection)
    for i in range(jobs):
        app.send_sync(QUEUE, payload(i), queue=QUEUE, connection=connection)
    return _per_job(statements.wal_since(connection, begin), jobs)


def _send_bulk(app: App, connection: Connection, jobs: int) -> Wal:
    connection.execute("checkpoint")
    begin = statements.wal_position(connection)
    send(app, connection, jobs)
    return _per_job(statements.wal_since(connection, begin), jobs)


def _drain(dsn: str, connection: Connection, jobs: int) -> tuple[Wal, float]:
    """Return the log per job, and the statements per job of the worker's whole life, its start and end included."""
    connection.execute("checkpoint")
    begin = statements.wal_position(connection)
    statements.reset(connection)
    drain(WorkerOptions(dsn), jobs)
    calls = statements.calls(connection)
    return _per_job(statements.wal_since(connection, begin), jobs), calls / jobs


def _idle(dsn: str, connection: Connection, seconds: float) -> float:
    with start_worker(WorkerOptions(dsn, until_idle=False)) as worker:
        time.sleep(SETTLING_SECONDS)
        statements.reset(connection)
        time.sleep(seconds)
        calls = statements.calls(connection)
        worker.tell(STOP)
        worker.result(timeout=90)
    return calls / seconds


def _per_job(wal: Wal, jobs: int) -> Wal:
    return Wal(wal.bytes / jobs, wal.full_pages / jobs)
