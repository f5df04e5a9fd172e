"""An application for tests that start real worker processes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from jobqueue import App, Job

app = App()
not_an_app = 1


@app.job("greet")
async def greet(payload: dict[str, str]) -> dict[str, str]:
    return {"greeting": f"Hello {payload['name']}"}


@app.job("sleep")
async def sleep(job: Job) -> None:
    await job.progress(pct=1)
    await asyncio.sleep(600)


@app.job("nap")
async def nap(job: Job, payload: dict[str, str]) -> str:
    await job.progress(pct=1)
    while not Path(payload["alarm"]).exists():
        await asyncio.sleep(0.01)
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
