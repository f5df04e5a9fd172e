"""Jobs for the worker that is measured, and what the database says of them afterwards."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.children import Child, run_together
from benchmarks.payloads import QUEUE, payload
from benchmarks.places import Connection, connect, value
from jobqueue import App

CHUNK = 5000
RATE = """
select count(*) / greatest(extract(epoch from max(completed_at) - min(started_at)), 1e-6)::float8
from jobqueue.job where started_at >= %s
"""
NOW = "select clock_timestamp()"
LEFT = "select count(*) from jobqueue.job where status <> 'completed' or attempt <> 1"


class JobsLost(RuntimeError):
    """Not every job was completed by its first attempt: the measurement is worth nothing."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a measured worker is set up; see worker_process.py."""

    dsn: str
    until_idle: bool = True
    concurrency: int | None = None
    tuned: bool = False
    batch: int = 0
    latency: bool = False
    profile: str | None = None


@dataclass(frozen=True, slots=True)
class Drained:
    """`rate`: jobs per second from the first claim to the last completion, by the database's clock. `cpu`: the workers'
    processor time in µs per job."""

    rate: float
    cpu: float


def send(app: App, connection: Connection, jobs: int) -> None:
    """Send jobs with send_many, 5,000 per call."""
    for start in range(0, jobs, CHUNK):
        payloads = [payload(i) for i in range(start, min(start + CHUNK, jobs))]
        app.send_many_sync(QUEUE, payloads, queue=QUEUE, connection=connection)


def start_worker(options: WorkerOptions) -> Child:
    """Start a worker process and let it begin."""
    child = Child("worker_process", asdict(options))
    try:
        child.wait_ready()
        child.tell("go")
    except BaseException:
        child.__exit__(None, None, None)
        raise
    return child


def drain(options: WorkerOptions, jobs: int, processes: int = 1) -> Drained:
    """Let worker processes finish what waits. Raises JobsLost, ChildFailed."""
    with connect(options.dsn) as connection:
        began = value(connection, NOW)
        answers = run_together("worker_process", [asdict(options)] * processes, timeout=120 + jobs / 500)
        left = value(connection, LEFT)
        if left:
            raise JobsLost(f"{left} of {jobs} jobs were not completed by their first attempt")
        return Drained(rate_since(connection, began), sum(answer["cpu"] for answer in answers) / jobs * 1e6)


def rate_since(connection: Connection, began: Any) -> float:
    """Jobs per second of what was claimed since a moment."""
    return float(value(connection, RATE, (began,)))
