"""Upgrades under load: from each schema of the past to that of today, while SQL clients of the time go on working.

What must hold: no client sees an error, none waits longer than a second, every job that was sent is there, and what was
not done yet is done by a worker of today.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psycopg

from compatibility.load import QUEUE, Findings, under_load
from compatibility.releases import Release
from jobqueue import App
from jobqueue.database.migrations import migrate_up
from jobqueue.database.schema_files import program_version
from tests.support.databases import create_database, drop_database
from tests.support.server import make_conninfo

LONGEST_WAIT = 1.0
WARM_UP = 50
GO_ON = 1.0
"""Seconds that the clients go on after the upgrade."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One upgrade."""

    release: Release
    seconds: float
    findings: Findings
    lost: int
    undone: int

    def faults(self) -> list[str]:
        """What should not have been; nothing if all is well."""
        function, waited = self.findings.slowest()
        faults = (
            [f"{len(self.findings.errors)} errors, the first: {self.findings.errors[0]}"]
            if self.findings.errors
            else []
        )
        if waited > LONGEST_WAIT:
            faults.append(f"{function} waited {waited:.2f} s")
        if self.lost:
            faults.append(f"{self.lost} jobs are gone")
        if self.undone:
            faults.append(f"{self.undone} jobs were not done afterwards")
        return faults

    def line(self) -> str:
        """The upgrade in one line."""
        function, waited = self.findings.slowest()
        start = f"{self.release.version:04} ({self.release.commit}) -> {program_version():04}"
        what = f"{sum(self.findings.calls.values())} calls, longest {waited:.2f} s ({function}), {len(self.findings.sent)} sent"
        return f"{start}: {self.seconds:.1f} s, {what}" + "".join(f"\n    {fault}" for fault in self.faults())


def upgrade(server_dsn: str, release: Release) -> Outcome:
    """Make a database as it was, put it under load, and bring it to today."""
    name = create_database(server_dsn, "template0")
    try:
        dsn = make_conninfo(server_dsn, dbname=name)
        with tempfile.TemporaryDirectory() as folder:
            migrate_up(dsn, source=release.unpack(Path(folder)))
        with under_load(dsn, WARM_UP) as clients:
            began = time.monotonic()
            migrate_up(dsn)
            seconds = time.monotonic() - began
            time.sleep(GO_ON)
        return _look_after(dsn, Outcome(release, seconds, clients.findings, 0, 0))
    finally:
        drop_database(server_dsn, name)


def _look_after(dsn: str, outcome: Outcome) -> Outcome:
    """Let a worker of today do what is left, and count."""
    asyncio.run(_work_off(dsn))
    with psycopg.connect(dsn) as connection:
        rows = connection.execute("select id, status from jobqueue.jobs where queue = %s", [QUEUE]).fetchall()
    there = dict(rows)
    lost = sum(id not in there for id in outcome.findings.sent)
    undone = sum(status != "completed" for status in there.values())
    return Outcome(outcome.release, outcome.seconds, outcome.findings, lost, undone)


async def _work_off(dsn: str) -> None:
    app = App(dsn)

    @app.job(QUEUE)
    async def handle() -> None: ...

    # A claimer may have held jobs when it stopped: they are given back first.
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        await connection.execute(
            "select jobqueue.release(id, claim_token) from jobqueue.job where status = 'processing' and queue = %s",
            [QUEUE],
        )
    await app.run_worker(until_idle=True)
    await app.close()
