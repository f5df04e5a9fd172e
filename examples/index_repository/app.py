"""The job `index_repository`: four stages, and nothing done twice after a worker was killed.

```
resolve   which commit; kept, so that every attempt reads the same one
list      its files
index     one file after the other: read, parse, write; finished ones are remembered 10 at a time
finish    count, publish and complete, in one transaction
```
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

from pydantic import BaseModel, Field

from examples.index_repository.files import index_file
from examples.index_repository.git import Checkout, Entry, checkout
from examples.index_repository.store import Store, Totals, open_store, publish
from jobqueue import App, Job

QUEUE = "indexing"
MAX_FILE_BYTES = 1_000_000

# Shares in the overall percentage: the files are nearly all of the work, from 10 % to 95 %.
STAGES = [
    {"name": "resolve", "weight": 1},
    {"name": "list", "weight": 1},
    {"name": "index", "weight": 17},
    {"name": "finish", "weight": 1},
]

app = App()


class IndexRepository(BaseModel):
    """What to index."""

    path: str = Field(min_length=1)
    """The top folder of a git repository on the worker's machine, or a URL."""
    ref: str = Field(default="HEAD", pattern=r"^[^-\s:][^\s:]*$")
    """A branch, a tag or a commit."""
    max_file_bytes: int = Field(default=MAX_FILE_BYTES, gt=0)
    """Larger files are skipped."""


@app.job(
    "index_repository",
    queue=QUEUE,
    label="Indexing: {payload.path}",
    stages=STAGES,
    pausable=True,
    max_retries=3,
    retry_delay=5,
)
async def index_repository(job: Job, payload: IndexRepository) -> Totals:
    """Index a repository at a commit; returns, and keeps as stats, what was found.

    Raises InvalidInput if there is no such repository or ref. A file that cannot be parsed is no error: it is noted.
    """
    dsn = await asyncio.to_thread(app.resolve_dsn)
    async with open_store(dsn, job.id) as store:
        # The checkout ends before the job does: a temporary copy is gone when the job is completed.
        async with AsyncExitStack() as stack:
            source, repository = await _resolve(job, payload, store, stack)
            entries = await _list(job, source)
            async with job.stage("index"):
                await _index(job, payload, store, source, repository, entries)
        async with job.stage("finish"):
            totals = await store.totals(source.commit)
            found = f"{totals['files_indexed']} files, {totals['symbols_extracted']} symbols"
            await job.progress(message=f"Indexed {found}")
        job.stats.update(totals)
        async with job.transaction(totals) as connection:
            await publish(connection, repository, job.id, source.commit)
    return totals


async def _resolve(job: Job, payload: IndexRepository, store: Store, stack: AsyncExitStack) -> tuple[Checkout, int]:
    async with job.stage("resolve") as stage:
        kept: dict[str, Any] = stage.output or {}
        source = await stack.enter_async_context(
            checkout(payload.path, payload.ref, pinned=kept.get("commit"), workspace=f"index-repository-{job.id}")
        )
        if not stage.done:
            kept = {"commit": source.commit, "repository": await store.begin(source.location)}
            await stage.save(kept)
    return source, kept["repository"]


async def _list(job: Job, source: Checkout) -> list[Entry]:
    async with job.stage("list") as stage:
        entries = await source.entries()
        if not stage.done:
            await job.estimate(len(entries), stage="index")
            await stage.save({"files": len(entries)})
    return entries


async def _index(
    job: Job, payload: IndexRepository, store: Store, source: Checkout, repository: int, entries: list[Entry]
) -> None:
    message = "Indexing file {number}/{total}"
    with source.blobs() as blobs:
        async for entry in job.remaining(entries, key=lambda entry: entry.position, message=message):
            await job.progress(substage=entry.path)
            # In a thread, so that the worker's other jobs go on while a parser is busy.
            file = await asyncio.to_thread(index_file, entry, blobs, payload.max_file_bytes)
            await store.write(repository, file)
