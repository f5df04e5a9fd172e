"""P9: how old a report is when a stream's client has it, and what the reports cost the database while all jobs are watched.

The worker and the streams' clients are in this process, so that one clock measures; the API is a process of its own
(stream_delay.py reads it). Each job reports at random moments around its rate; a report that was merged with a later
one is not counted among the delays, as nobody ever sees it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from benchmarks import statements, stream_delay
from benchmarks.latency import quantiles
from benchmarks.payloads import QUEUE, payload
from benchmarks.places import Connection, Place, connect, describe_server, value
from benchmarks.report import Bar, Report, Row
from jobqueue import App, Job

MOST_STREAMS = 20
"""Clients that read along; with more jobs, the other jobs are watched without one."""
WARM_UP_SECONDS = 2.0
# Every statement that could notify of a change of a job. Heartbeats that bring no report are among them: an upper bound.
COMMITS = """
select coalesce(sum(s.calls), 0)::float8, coalesce(sum(s.total_exec_time), 0)::float8
from pg_stat_statements s
where s.dbid = (select oid from pg_database where datname = current_database()) and s.toplevel
    and s.query ~ 'jobqueue\\.(heartbeat|progress|stage|checkpoint)\\('
    and s.query not like '%%pg_stat_statements%%'
"""
MESSAGES = "select count(*)::float8 from jobqueue.job where progress_message is not null"


@dataclass(frozen=True, slots=True)
class Load:
    """So many jobs, each reporting so many times a second. `bars`: for the commits a second, and for p99 in ms."""

    jobs: int
    rate: float
    commits: float | None = None
    delay: float | None = None

    def __str__(self) -> str:
        return f"{self.jobs:,} {'job' if self.jobs == 1 else 'jobs'}, {self.rate:g}/s each"


@dataclass(frozen=True, slots=True)
class Measured:
    """Per second: reports of handlers, commits that could notify, notifications heard; ms of the server per commit.

    `delays`: seconds from `job.progress()` to a stream's client.
    """

    reports: float
    commits: float
    heard: float
    milliseconds: float
    delays: list[float]


def loads(jobs: int) -> list[Load]:
    """One job, ten, and `jobs`; and as many that report more often than anything can be written."""
    few = [Load(1, 3, delay=50), Load(10, 1.5, delay=50)]
    return [*few, Load(jobs, 1, commits=10), Load(jobs, 10, commits=10)]


def run(place: Place, *, jobs: int, runs: int, seconds: float) -> Report:
    """Measure each load `runs` times, each for so many seconds."""
    report = Report("progress", {"jobs": jobs, "runs": runs, "seconds": seconds, **describe_server(place.dsn)})
    for load in loads(jobs):
        measured = []
        for _ in range(runs):
            with place.database() as dsn, connect(dsn) as connection:
                statements.prepare(connection)
                measured.append(_measure_one(dsn, connection, load, seconds))
        report.rows += _rows(load, measured)
    return report


def _rows(load: Load, measured: list[Measured]) -> list[Row]:
    delays = [quantiles(one.delays) for one in measured]
    commit_bars = (Bar(load.commits, True, "median"),) if load.commits is not None else ()
    delay_bars = (Bar(load.delay, True, "median"),) if load.delay is not None else ()
    note = f"{measured[0].reports:.0f} reports, {measured[0].heard:.0f} notifications a second"
    return [
        Row(f"{load}: notifying commits", "1/s", [one.commits for one in measured], bars=commit_bars, note=note),
        Row(f"{load}: server time of a commit", "ms", [one.milliseconds for one in measured]),
        Row(f"{load}: to a stream's client, p50", "ms", [one["p50"] for one in delays]),
        Row(f"{load}: the same, p99", "ms", [one["p99"] for one in delays], bars=delay_bars),
    ]


def _measure_one(dsn: str, connection: Connection, load: Load, seconds: float) -> Measured:
    with stream_delay.api(dsn) as port:
        return asyncio.run(_measure(dsn, connection, load, seconds, port))


async def _measure(dsn: str, connection: Connection, load: Load, seconds: float, port: int) -> Measured:
    said, delays = [0], list[float]()
    async with _worker(dsn, load, said) as ids:
        async with asyncio.timeout(60):
            while value(connection, MESSAGES) < load.jobs:
                await asyncio.sleep(0.2)
        # On connections of their own, so that nothing is read while the clock runs.
        connection.execute("select jobqueue.watch('all', '10 min')")
        connection.execute("listen jobqueue_jobs")
        async with asyncio.TaskGroup() as readers:
            reading = [readers.create_task(stream_delay.read(port, id, delays)) for id in ids[:MOST_STREAMS]]
            await asyncio.sleep(WARM_UP_SECONDS)
            statements.reset(connection)
            began, first = time.monotonic(), said[0]
            delays.clear()
            await asyncio.sleep(seconds)
            took, reports, found = time.monotonic() - began, said[0] - first, list(delays)
            with connect(dsn) as reader:
                row = reader.execute(COMMITS.encode(), prepare=False).fetchone()
            for task in reading:
                task.cancel()
        assert row is not None
        heard = len(list(connection.notifies(timeout=0.1)))
    calls, milliseconds = float(row[0]), float(row[1])
    return Measured(reports / took, calls / took, heard / took, milliseconds / max(calls, 1), found)


@asynccontextmanager
async def _worker(dsn: str, load: Load, said: list[int]) -> AsyncIterator[list[str]]:
    """A worker whose jobs report until the block ends; yields their ids. `said[0]` counts the reports."""
    app, over = App(dsn), asyncio.Event()

    @app.job(QUEUE)
    async def report(job: Job) -> None:
        number = 0
        await asyncio.sleep(random.uniform(0, 1 / load.rate))
        while not over.is_set():
            number += 1
            said[0] += 1
            await job.progress(number, 1_000_000, repr(time.perf_counter()))
            await asyncio.sleep(random.uniform(0.5, 1.5) / load.rate)

    sent = await app.send_many(report, [payload(i) for i in range(load.jobs)])
    worker = await app.make_worker([QUEUE], load.jobs)
    running = asyncio.create_task(worker.run())
    try:
        yield [str(job.id) for job in sent]
    finally:
        over.set()
        worker.drain()
        async with asyncio.timeout(90):
            await running
        await app.close()
