"""A procrastinate application that other processes can import."""

from __future__ import annotations

import os
import time

import procrastinate

from jobqueue.procrastinate import JobqueueConnector, options

app = procrastinate.App(connector=JobqueueConnector(os.environ.get("JOBQUEUE_DSN", "dbname=none")))


def make(dsn: str) -> procrastinate.App:
    """The application on a database of one's own."""
    app.connector = app.job_manager.connector = JobqueueConnector(dsn, min_size=1)
    return app


@app.task(name="spin")
@options(executor="process")
def spin() -> None:
    """Never looks at anything."""
    while True:
        time.sleep(0.05)


@app.task(name="in_process", pass_context=True, retry=1)
@options(executor="process", label="Process of {payload.who}")
def in_process(context: procrastinate.JobContext, who: str) -> dict[str, object]:
    """Fails once, then says where it ran."""
    if context.job.attempts == 0:
        raise ConnectionError("not yet")
    return {"pid": os.getpid(), "who": who, "task": context.task.name}


@app.task(name="limited")
@options(executor="process", max_runtime=0.2, max_retries=0)
def limited() -> None:
    """Takes longer than it may."""
    time.sleep(600)


@app.task(name="add", queue="sums")
async def add(a: int, b: int) -> int:
    """Adds."""
    return a + b
