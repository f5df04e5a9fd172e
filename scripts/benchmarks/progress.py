"""P9: what the progress of many jobs of one worker costs the database while somebody watches all of them, and how old
a report is when a stream's client has it (stream_delay.py)."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from benchmarks import statements, stream_delay
from benchmarks.payloads import QUEUE, payload
from benchmarks.places import Connection, Place, connect, describe_server, value
from benchmarks.report import Bar, Report, Row
from jobqueue import App, Job

REPORT_EVERY = 0.1
"""Seconds between two reports of a handler; they are coalesced to four a second."""
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
class Measured:
    """Per second: reports of handlers, commits that could notify, notifications heard; ms of the server per commit."""

    reports: float
    commits: float
    heard: float
    milliseconds: float


def run(place: Place, *, jobs: int, runs: int, seconds: float) -> Report:
    """Measure `runs` times, each for so many seconds."""
    measured, delays = [], []
    for _ in range(runs):
        with place.database() as dsn:
            delays.append(stream_delay.measure(dsn, 2 * seconds))
        with place.database() as dsn, connect(dsn) as connection:
            statements.prepare(connection)
            measured.append(asyncio.run(_measure(dsn, connection, jobs, seconds)))
    report = Report("progress", {"jobs": jobs, "runs": runs, "seconds": seconds, **describe_server(place.dsn)})
    report.rows = [
        Row("reports of handlers", "1/s", [one.reports for one in measured]),
        Row(
            "notifying commits of the worker", "1/s", [one.commits for one in measured], bars=(Bar(10, True, "median"),)
        ),
        Row("notifications heard", "1/s", [one.heard for one in measured], note="one for up to 120 jobs"),
        Row("server time of a commit", "ms", [one.milliseconds for one in measured]),
        Row("job.progress() to a stream's client, p50", "ms", [one["p50"] for one in delays]),
        Row("the same, p99", "ms", [one["p99"] for one in delays], bars=(Bar(50, True, "median"),)),
    ]
    return report


async def _measure(dsn: str, connection: Connection, jobs: int, seconds: float) -> Measured:
    app = App(dsn)
    over = asyncio.Event()
    reports = 0

    @app.job(QUEUE)
    async def count(job: Job) -> None:
        nonlocal reports
        done = 0
        while not over.is_set():
            await job.progress(done, 1_000_000, f"item {done}")
            reports += 1
            done += 1
            await asyncio.sleep(REPORT_EVERY)

    await app.send_many(count, [payload(i) for i in range(jobs)])
    worker = await app.make_worker([QUEUE], jobs)
    running = asyncio.create_task(worker.run())
    try:
        async with asyncio.timeout(60):
            while value(connection, MESSAGES) < jobs:
                await asyncio.sleep(0.2)
        # On connections of their own, so that nothing is read while the clock runs.
        connection.execute("select jobqueue.watch('all', '10 min')")
        connection.execute("listen jobqueue_jobs")
        statements.reset(connection)
        began, first = time.monotonic(), reports
        await asyncio.sleep(seconds)
        took, said = time.monotonic() - began, reports - first
        with connect(dsn) as reader:
            row = reader.execute(COMMITS.encode(), prepare=False).fetchone()
        assert row is not None
        heard = len(list(connection.notifies(timeout=1)))
    finally:
        over.set()
        worker.drain()
        async with asyncio.timeout(90):
            await running
        await app.close()
    calls, milliseconds = float(row[0]), float(row[1])
    return Measured(said / took, calls / took, heard / took, milliseconds / max(calls, 1))
