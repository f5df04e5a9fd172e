"""The application that the workers run: `jobqueue worker chaos_lab.application`. One handler per kind of job."""

from __future__ import annotations

import asyncio
from typing import Any

from chaos_lab.plan import KINDS
from chaos_lab.recorder import Recorder
from jobqueue import App, Job, PermanentError, Snooze

app = App()
recorder: list[Recorder] = []


async def note(job: Job, what: str) -> None:
    """Record that the handler of this claim began, or came to its end."""
    if not recorder:
        # not at import: it belongs to the worker's event loop
        recorder.append(Recorder())
    await recorder[0].note(str(job.id), str(job.token), what)


async def work(job: Job, payload: dict[str, Any]) -> None:
    """What most jobs do: wait; fail as often as was planned."""
    await note(job, "start")
    await asyncio.sleep(payload["seconds"])
    if job.retry_count < payload["fails"]:
        raise RuntimeError("fails as planned")
    if payload["doomed"]:
        raise PermanentError("fails for good, as planned")
    await note(job, "end")


async def write(job: Job, payload: dict[str, Any]) -> None:
    """Complete the job in a transaction that also writes."""
    await note(job, "start")
    await asyncio.sleep(payload["seconds"])
    async with job.transaction() as connection:
        of_claim = (job.id, job.token)
        await connection.execute("insert into chaos.effect (job_id, token) values (%s, %s)", of_claim)
        await connection.execute("insert into chaos.run (job_id, token, what) values (%s, %s, 'end')", of_claim)


async def doze(job: Job, payload: dict[str, Any]) -> None:
    """Ask to be run again a little later, once."""
    if job.attempt == 1:
        raise Snooze(0.5)
    await work(job, payload)


for name, kind in KINDS.items():
    app.job(name, queue=kind.queue)({"effect": write, "snoozed": doze}.get(name, work))
