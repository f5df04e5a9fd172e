"""P4: from before a send to the start of its handler on an idle queue, beside a bare LISTEN/NOTIFY + claim round trip.

Both are measured at the same time: one send to each in turn, evenly spaced, so that neither meets the other's work.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence

from benchmarks import raw
from benchmarks.children import GO, STOP, Child
from benchmarks.payloads import QUEUE, payload
from benchmarks.places import Connection, Place, connect, describe_server, value
from benchmarks.raw_listener import SEND
from benchmarks.report import Bar, Report, Row
from benchmarks.workers import WorkerOptions, start_worker
from jobqueue import App

WARM_UP = 20
"""Sends that do not count: connections, plans and caches."""
ARMED = """
select exists (select from pg_locks l join jobqueue.queue q on q.number = l.objid
    where l.locktype = 'advisory' and l.classid = 27249 and l.granted)
"""
BARS = {"p50": (Bar(1.5, at_most=True),), "p99": (Bar(2.0, at_most=True),), "max": ()}


def run(place: Place, *, jobs: int, runs: int, rate: float) -> Report:
    """Send `jobs` jobs to each side per run, `rate` a second."""
    measured: list[dict[str, float]] = []
    limits: list[dict[str, float]] = []
    for _ in range(runs):
        product, bare = _measure(place, jobs, rate)
        measured.append(quantiles(product))
        limits.append(quantiles(bare))
    report = Report("latency", {"jobs": jobs, "runs": runs, "rate": rate, **describe_server(place.dsn)})
    for name, bars in BARS.items():
        values, bare_values = [one[name] for one in measured], [one[name] for one in limits]
        report.rows.append(Row(f"pickup {name}", "ms", values, bare_values, bars))
    return report


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p99 (nearest rank) and the maximum, in ms."""
    ordered = sorted(seconds)
    at = {name: ordered[math.ceil(part * len(ordered)) - 1] for name, part in (("p50", 0.5), ("p99", 0.99), ("max", 1))}
    return {name: figure * 1000 for name, figure in at.items()}


def _measure(place: Place, jobs: int, rate: float) -> tuple[list[float], list[float]]:
    total = jobs + WARM_UP
    with place.database() as dsn, connect(dsn) as connection:
        raw.create(connection)
        connection.execute("select jobqueue.send(%s, '{\"t\": 0}')", (QUEUE,))
        options = WorkerOptions(dsn, until_idle=False, latency=True)
        with start_worker(options) as worker, Child("raw_listener", {"dsn": dsn, "jobs": total}) as listener:
            listener.wait_ready()
            listener.tell(GO)
            _until(connection, ARMED)
            _send_in_turn(connection, App(dsn), total, rate)
            bare = listener.result(timeout=60)["delays"]
            _until(connection, "select not exists (select from jobqueue.job where status <> 'completed')")
            worker.tell(STOP)
            delays = worker.result(timeout=90)["delays"]
    # The first job only made the queue, before the worker began.
    return delays[1 + WARM_UP :], bare[WARM_UP:]


def _send_in_turn(connection: Connection, app: App, total: int, rate: float) -> None:
    def send(i: int) -> None:
        app.send_sync(QUEUE, payload(i), queue=QUEUE, connection=connection)

    def send_bare(i: int) -> None:
        connection.execute(SEND.encode(), (QUEUE, json.dumps(payload(i)), QUEUE))

    sides: tuple[Callable[[int], None], ...] = (send, send_bare)
    step = 1 / rate / len(sides)
    due = time.perf_counter()
    for i in range(total):
        for side in sides:
            due += step
            time.sleep(max(0.0, due - time.perf_counter()))
            side(i)


def _until(connection: Connection, condition: str, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not value(connection, condition):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:g} s: {condition}")
        time.sleep(0.05)
