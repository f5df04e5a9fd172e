"""P9, the other half: from `job.progress()` in a handler to the client of a stream.

A worker and the client are in this process, so that one clock measures; the API is a process of its own. One job reports,
more slowly than a worker merges reports (a quarter of a second, over all of its jobs): that wait is meant.
"""

from __future__ import annotations

import asyncio
import json
import random
import time

from benchmarks.children import STOP, Child
from benchmarks.http import POOL, free_port
from benchmarks.latency import quantiles
from benchmarks.payloads import QUEUE, payload
from jobqueue import App, Job

JOBS = 1
REPORT_SECONDS = (0.27, 0.4)
MOST_SECONDS = 30.0


def measure(dsn: str, seconds: float) -> dict[str, float]:
    """Return p50, p99 and max in ms over so many seconds, at most 30."""
    with Child("http_server", {"dsn": dsn, "bare": False, "port": (port := free_port()), "pool_size": POOL}) as child:
        child.wait_ready()
        delays = asyncio.run(_measure(dsn, port, min(seconds, MOST_SECONDS)))
        child.tell(STOP)
    return quantiles(delays)


async def _measure(dsn: str, port: int, seconds: float) -> list[float]:
    app, over, delays = App(dsn), asyncio.Event(), list[float]()

    @app.job(QUEUE)
    async def report(job: Job) -> None:
        number = 0
        while not over.is_set():
            number += 1
            await job.progress(number, 1_000_000, repr(time.perf_counter()))
            await asyncio.sleep(random.uniform(*REPORT_SECONDS))

    sent = await app.send_many(report, [payload(i) for i in range(JOBS)])
    worker = await app.make_worker([QUEUE], JOBS)
    running = asyncio.create_task(worker.run())
    try:
        async with asyncio.timeout(MOST_SECONDS + 60):
            async with asyncio.TaskGroup() as readers:
                reading = [readers.create_task(_read(port, str(job.id), delays)) for job in sent]
                # Connections, plans, watches.
                await asyncio.sleep(2.0)
                delays.clear()
                await asyncio.sleep(seconds)
                found = list(delays)
                for task in reading:
                    task.cancel()
    finally:
        over.set()
        worker.drain()
        async with asyncio.timeout(90):
            await running
        await app.close()
    return found


async def _read(port: int, job_id: str, delays: list[float]) -> None:
    """Note how old each new report is when it arrives."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    last = None
    try:
        while line := await reader.readline():
            if not line.startswith(b"data:"):
                continue
            arrived, said = time.perf_counter(), json.loads(line[5:]).get("progress_message")
            if said is not None and said != last:
                delays.append(arrived - float(said))
                last = said
    finally:
        writer.close()
