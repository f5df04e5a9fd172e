"""The job `process_document`: seven stages, and no page or passage done twice after a worker was killed.

```
text                  the pages, 25 at a time; each page is noted as done
Merging OCR results   one text, without running heads and hyphens
chunking              passages of 120 words that overlap
embedding             a vector for each passage; each one is noted as done
entities              the names in each passage; each one is noted as done
aliases               who is meant by which name
result                what was found, in a few figures
```

After each stage comes a checkpoint: there the job can be paused. A checkpoint refers to the PDF file with its SHA-256: if
another file lies there when the job goes on, what was read before is worth nothing, and the job starts afresh.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import PurePath
from typing import Any, Literal

from pydantic import BaseModel, Field

from examples.process_document.names import find_names, resolve
from examples.process_document.pdf import PageUnreadable, Pdf
from examples.process_document.store import Store, Summary, open_store
from examples.process_document.text import merge, split
from examples.process_document.vectors import embed
from jobqueue import App, Job, NullJob

QUEUE = "documents"
MERGING = "Merging OCR results"

# Shares in the overall percentage: reading, embedding and finding names are nearly all of the work.
STAGES = [
    {"name": "text", "weight": 40},
    {"name": MERGING, "weight": 3},
    {"name": "chunking", "weight": 2},
    {"name": "embedding", "weight": 30},
    {"name": "entities", "weight": 20},
    {"name": "aliases", "weight": 3},
    {"name": "result", "weight": 2},
]

app = App()


class ProcessDocument(BaseModel):
    """What to process."""

    path: str = Field(min_length=1)
    """A PDF file on the worker's machine."""
    mode: Literal["smart", "strict"] = "smart"
    """smart: pages that cannot be read are left out and named in the result; strict: the job fails and names them."""
    pages_per_chunk: int = Field(default=25, ge=1, le=1000)
    """How many pages are read before the next line of progress."""


def name_for_people(payload: ProcessDocument, metadata: dict[str, Any]) -> str:
    """Return, for example, `Processing: The Man Who Sold the World.pdf (Smart Mode)`."""
    return f"Processing: {PurePath(payload.path).name} ({payload.mode.title()} Mode)"


def classify(error: BaseException) -> Literal["invalid"] | None:
    """A damaged page is damaged in the next attempt too; the rules of jobqueue would try again."""
    return "invalid" if isinstance(error.__cause__, PageUnreadable) else None


@app.job(
    "process_document",
    queue=QUEUE,
    label=name_for_people,
    stages=STAGES,
    classify=classify,
    max_retries=3,
    retry_delay=5,
)
async def process_document(job: Job | None, payload: ProcessDocument) -> Summary:
    """Process a document; returns, and keeps as stats, what was found.

    Without a job (`await process_document(None, payload)`) it does the same and reports to nobody. Raises InvalidInput if
    there is no such PDF; ChunkFailed in strict mode if a page cannot be read.
    """
    job = job or NullJob(payload.model_dump())
    dsn = await asyncio.to_thread(app.resolve_dsn)
    async with open_store(dsn, job.id) as store:
        if job.last_checkpoint is None:
            await store.begin(payload.path)
            await job.checkpoint("begun", reference=payload.path)
        await _stage(job, payload, "text", lambda: _read(job, payload, store))
        await _stage(job, payload, MERGING, lambda: _merge(store))
        await _stage(job, payload, "chunking", lambda: _split(job, store))
        await _stage(job, payload, "embedding", lambda: _embed(job, store))
        await _stage(job, payload, "entities", lambda: _find_names(job, store))
        await _stage(job, payload, "aliases", lambda: _resolve(store))
        summary: Summary = await _stage(job, payload, "result", store.finish)
    job.stats.update(summary)
    return summary


async def _stage(job: Job, payload: ProcessDocument, name: str, work: Callable[[], Awaitable[Any]]) -> Any:
    """Do a stage, unless an earlier attempt has; returns what was kept of it."""
    async with job.stage(name) as stage:
        if not stage.done:
            await stage.save(await work())
    if not stage.done:
        await job.checkpoint(name, reference=payload.path)
    return stage.output


async def _read(job: Job, payload: ProcessDocument, store: Store) -> dict[str, int]:
    pdf = await asyncio.to_thread(Pdf, payload.path)
    await job.estimate(pdf.page_count, stage="text")
    size = payload.pages_per_chunk
    chunks = job.chunks(-(-pdf.page_count // size))
    async for index in chunks:
        pages = size * index + 1, min(size * (index + 1), pdf.page_count)
        async with chunks.chunk(index, pages, keep_going=payload.mode == "smart"):
            await _read_pages(job, pdf, store, *pages)
    return {"pages": pdf.page_count}


async def _read_pages(job: Job, pdf: Pdf, store: Store, first: int, last: int) -> None:
    # What people see is how many chunks are done, so this loop reports nothing of its own.
    async for number in job.remaining(range(first, last + 1), key=lambda number: f"page:{number}", report=False):
        await job.progress(substage=f"page {number}")
        text, problem = "", None
        try:
            # In a thread, so that the worker's other jobs go on while the parser is busy.
            text = await asyncio.to_thread(pdf.text, number)
        except PageUnreadable as error:
            problem = str(error)
        await store.write_page(number, text, problem)
    if problems := await store.problems(first, last):
        raise PageUnreadable("; ".join(problems))


async def _merge(store: Store) -> dict[str, int]:
    merged = await asyncio.to_thread(merge, await store.pages())
    await store.write_body(merged)
    return {"characters": len(merged.text)}


async def _split(job: Job, store: Store) -> dict[str, int]:
    passages = await asyncio.to_thread(split, await store.body())
    await store.write_passages(passages)
    for stage in ("embedding", "entities"):
        await job.estimate(len(passages), stage=stage)
    return {"passages": len(passages)}


async def _embed(job: Job, store: Store) -> dict[str, int]:
    passages = await store.passages()
    message = "Embedding chunk {number} of {total}"
    async for passage in job.remaining(passages, key=lambda passage: f"embedding:{passage.number}", message=message):
        await store.write_vector(passage.number, await asyncio.to_thread(embed, passage.text))
    return {"vectors": len(passages)}


async def _find_names(job: Job, store: Store) -> dict[str, int]:
    passages = await store.passages()
    message = "Finding names in chunk {number} of {total}"
    async for passage in job.remaining(passages, key=lambda passage: f"entities:{passage.number}", message=message):
        await store.write_names(passage.number, find_names(passage.text))
    return {"passages": len(passages)}


async def _resolve(store: Store) -> dict[str, int]:
    people = resolve(await store.names())
    await store.write_people(people)
    return {"names": len(people)}
