"""An application for tests that start real worker processes."""

from __future__ import annotations

import asyncio
import os

from jobqueue import App, Job

app = App()
not_an_app = 1


@app.job("greet")
async def greet(payload: dict[str, str]) -> dict[str, str]:
    return {"greeting": f"Hello {payload['name']}"}


@app.job("sleep")
async def sleep(job: Job) -> None:
    await job.progress(pct=1)
    await asyncio.sleep(60)


@app.job("nap")
async def nap(job: Job) -> str:
    await job.progress(pct=1)
    await asyncio.sleep(1)
    return "rested"


@app.job("count", executor="process")
def count(job: Job, payload: dict[str, int]) -> dict[str, int]:
    for number in range(payload["to"]):
        job.sync.progress(number + 1, payload["to"])
    job.stats["counted"] = payload["to"]
    return {"pid": os.getpid()}


@app.job("die", executor="process", max_retries=0)
def die() -> None:
    os._exit(7)
