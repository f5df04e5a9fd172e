"""P6: many finished jobs in the table beside an empty one, on one server in one run.

Both databases do the same in turns, so that what the machine does besides meets both. The finished jobs were sent two
hours ago and earlier: what `GET /jobs/active` looks at is the last hour.
"""

from __future__ import annotations

import http.client
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID, uuid4

from benchmarks.children import STOP, Child
from benchmarks.http import POOL, free_port
from benchmarks.payloads import QUEUE, payload
from benchmarks.places import Connection, Place, connect, describe_server, value
from benchmarks.report import Bar, Report, Row
from jobqueue import App

T = TypeVar("T")

BAR = (Bar(1.3, at_most=True),)
CHUNK = 250_000
PERSON = "user-7"
CLAIM = "select id, claim_token from jobqueue.claim(%s, %s, 1)"
COMPLETE = "select jobqueue.complete(%s, %s)"
FEW = 200
"""Finished jobs of the empty table: there must be something to read."""
INDEXES = """
select c.relname, pg_get_indexdef(i.indexrelid) from pg_index i join pg_class c on c.oid = i.indexrelid
where i.indrelid = 'jobqueue.job'::regclass and c.relname in ('job_list', 'job_creator', 'job_subject') order by 1
"""
"""Those of which a finished job has an entry; the primary key grows at its end anyway."""
# Finished at their first attempt, spread over thirty days, five tenants, a hundred people.
FINISHED = """
insert into jobqueue.job (id, created_at, queue, job_type, tenant, payload, subject, created_by, run_at, status, version,
    attempt, progress_pct, worker_id, started_at, completed_at, updated_at, result)
select (lpad(to_hex((extract(epoch from x.at) * 1000)::bigint), 12, '0') || '7' || lpad(to_hex(n & 4095), 3, '0') || '8'
        || substr(lpad(to_hex(hashint8extended(n, 7)), 16, '0'), 2))::uuid,
    x.at, %(queue)s, %(queue)s, 'tenant-' || n %% 5, jsonb_build_object('document', n, 'language', 'en'), 'document:' || n,
    'user-' || n %% 100, x.at, 'completed', 4, 1, 100, %(worker)s, x.at + interval '1 s', x.at + interval '30 s',
    x.at + interval '30 s', '{"pages": 12}'
from generate_series(%(first)s::bigint, %(last)s::bigint) n
cross join lateral (
    select now() - interval '2 h' - interval '30 days' * (1 - n::float8 / %(jobs)s) as at) x
"""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two databases, with an API of its own. `old`: ids of finished jobs."""

    connection: Connection
    app: App
    api: http.client.HTTPConnection
    old: list[UUID]


def run(place: Place, *, jobs: int, runs: int, turns: int) -> Report:
    """Measure `runs` times `turns` turns of every call on each side; the figures of a run are medians."""
    found: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    with place.database() as full_dsn, place.database() as empty_dsn, ExitStack() as stack:
        sides = [stack.enter_context(_side(dsn, count)) for dsn, count in ((full_dsn, jobs), (empty_dsn, FEW))]
        size = float(value(sides[0].connection, "select pg_total_relation_size('jobqueue.job')::float8 / 1e9"))
        for _ in range(runs):
            for figures, side in zip(zip(*_run(sides, turns), strict=True), (0, 1), strict=True):
                for name, figure in figures:
                    found[name][side].append(figure)
    report = Report("history", {"jobs": jobs, "runs": runs, "turns": turns, **describe_server(place.dsn)})
    for name, (full, empty) in found.items():
        report.rows.append(Row(name, "ms", full, empty, BAR, "limit: the empty table"))
    report.rows.append(Row("size of the table with its indexes", "GB", [size]))
    return report


def _run(sides: list[Side], turns: int) -> Iterator[tuple[tuple[str, float], ...]]:
    """Yield, for every call, its name with the median of one run for each side."""
    taken: list[dict[str, list[float]]] = [defaultdict(list), defaultdict(list)]
    for turn in range(turns + 5):
        for side, times in zip(sides, taken, strict=True):
            for name, seconds in _turn(side, turn):
                # the first ones open, plan and read what is cold for both
                if turn >= 5:
                    times[name].append(seconds * 1000)
    for name in taken[0]:
        yield tuple((name, statistics.median(times[name])) for times in taken)


def _turn(side: Side, turn: int) -> Iterator[tuple[str, float]]:
    """Do each call once."""
    worker, connection = uuid4(), side.connection
    sent, seconds = _timed(lambda: side.app.send_sync(QUEUE, payload(turn), queue=QUEUE, connection=connection))
    yield "send", seconds
    yield "GET /jobs/{id}, just sent", _get(side, f"/jobs/{sent.id}")
    rows, seconds = _timed(lambda: connection.execute(CLAIM.encode(), ([QUEUE], worker)).fetchall())
    yield "claim", seconds
    yield "complete", _timed(lambda: connection.execute(COMPLETE.encode(), rows[0]))[1]
    yield "GET /jobs/{id}, finished", _get(side, f"/jobs/{random.choice(side.old)}")
    yield "GET /jobs/active, everybody's", _get(side, "/jobs/active?limit=20")
    yield "GET /jobs/active, a person's", _get(side, f"/jobs/active?limit=20&created_by={PERSON}")


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    found = call()
    return found, time.perf_counter() - began


def _get(side: Side, path: str) -> float:
    def ask() -> int:
        side.api.request("GET", path)
        answer = side.api.getresponse()
        answer.read()
        return answer.status

    try:
        status, seconds = _timed(ask)
    except http.client.RemoteDisconnected:
        # idle for longer than the server keeps a connection, on a busy machine
        side.api.close()
        status, seconds = _timed(ask)
    if status != 200:
        raise RuntimeError(f"GET {path} answered {status}")
    return seconds


@contextmanager
def _side(dsn: str, jobs: int) -> Iterator[Side]:
    """A database with so many finished jobs."""
    with connect(dsn) as connection, ExitStack() as stack:
        connection.execute("select jobqueue.create_queue(%s, '{}')", (QUEUE,))
        _fill(connection, jobs)
        # a sample of pages, as a person would look at one job and another
        old = [
            job_id
            for (job_id,) in connection.execute(SAMPLE.encode(), (max(0.001, min(100.0, 1e5 / jobs)),)).fetchall()
        ]
        port = free_port()
        child = stack.enter_context(Child("http_server", {"dsn": dsn, "bare": False, "port": port, "pool_size": POOL}))
        child.wait_ready()
        stack.callback(child.tell, STOP)
        api = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        stack.callback(api.close)
        yield Side(connection, App(dsn), api, old)


SAMPLE = "select id from jobqueue.job tablesample system (%s)"


def _fill(connection: Connection, jobs: int) -> None:
    """Insert the finished jobs; the indexes that they fill are made afterwards, at once."""
    connection.execute("set maintenance_work_mem = '1GB'")
    indexes = connection.execute(INDEXES.encode()).fetchall()
    for name, _ in indexes:
        connection.execute(f"drop index jobqueue.{name}".encode())
    for first in range(1, jobs + 1, CHUNK):
        last = min(first + CHUNK - 1, jobs)
        connection.execute(
            FINISHED.encode(), {"queue": QUEUE, "worker": uuid4(), "first": first, "last": last, "jobs": jobs}
        )
    for _, definition in indexes:
        connection.execute(definition.encode())
    connection.execute("vacuum (analyze) jobqueue.job")
    connection.execute("checkpoint")
