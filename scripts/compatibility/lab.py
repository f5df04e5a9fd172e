"""The application that the units run."""

from __future__ import annotations

import asyncio

from jobqueue import App, Job

app = App()


@app.job("nap")
async def nap(job: Job, payload: dict[str, float]) -> str:
    """Sleep, having said that it began."""
    await job.progress(pct=1)
    await asyncio.sleep(payload["seconds"])
    return "rested"
