"""The job `import_dataset`: six stages, whose weights make the percentages that people see.

```
validate         10   it is a CSV or Excel file with a header
duplicate check  20   the same file has not been imported yet; otherwise that dataset is the result
store            40   the file is kept under its SHA-256
parse            70   batch after batch of rows is read and written; each one is noted as done
dataset          90   the kind of each column
publish         100   the dataset appears and the job is completed, in one transaction
```
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any, TypedDict
from uuid import UUID

from psycopg import AsyncConnection
from pydantic import BaseModel, Field

from examples.import_dataset.sheet import Batch, Layout, read_batches, recognize
from examples.import_dataset.store import Columns, Store, Upload, open_store, publish, store_file
from jobqueue import App, Job

QUEUE = "imports"
STAGES = [
    {"name": "validate", "weight": 10},
    {"name": "duplicate check", "weight": 10},
    {"name": "store", "weight": 20},
    {"name": "parse", "weight": 30},
    {"name": "dataset", "weight": 20},
    {"name": "publish", "weight": 10},
]
AFTER_THE_CHECK = ("store", "parse", "dataset", "publish")
BATCH_ROWS = 500

INSERT_UPLOAD = "insert into imports.upload (name, content, uploaded_by) values (%s, %s, %s) returning id"

app = App()


class ImportDataset(BaseModel):
    """What to import."""

    upload: UUID
    """The id in `imports.upload`."""
    name: str = Field(min_length=1)
    """The file's name, for people."""
    batch_rows: int = Field(default=BATCH_ROWS, ge=1, le=10_000)
    """How many rows are written at a time."""


class Imported(TypedDict):
    """What a finished job says."""

    dataset: str
    duplicate: bool
    """Whether the dataset was there before."""
    rows: int
    rejected: list[str]
    """Why rows were left out."""


async def receive(
    connection: AsyncConnection[Any],
    name: str,
    content: bytes,
    user: str,
    *,
    tenant: str = "default",
    batch_rows: int = BATCH_ROWS,
) -> UUID:
    """Take an upload and return the id of the job that imports it. Either both are stored, or none.

    The tables must be there (`async with TABLES.open(dsn)`).
    """
    async with connection.transaction():
        found = await connection.execute(INSERT_UPLOAD, (name, content, user))
        ((upload,),) = await found.fetchall()
        sent = await app.send(
            import_dataset,
            ImportDataset(upload=upload, name=name, batch_rows=batch_rows),
            connection=connection,
            tenant=tenant,
            created_by=user,
            subject=f"upload:{upload}",
        )
    assert sent.id is not None
    return sent.id


@app.job(
    "import_dataset",
    queue=QUEUE,
    label="Import: {payload.name}",
    stages=STAGES,
    pausable=True,
    max_retries=3,
    retry_delay=5,
)
async def import_dataset(job: Job, payload: ImportDataset) -> Imported:
    """Import an upload; returns the dataset. Raises InvalidInput if the file cannot be used."""
    dsn = await asyncio.to_thread(app.resolve_dsn)
    async with open_store(dsn, job.id) as store:
        upload = await store.upload(payload.upload)
        digest = hashlib.sha256(upload.content).hexdigest()
        async with job.stage("validate"):
            layout = await asyncio.to_thread(recognize, upload.name, upload.content)
        async with job.stage("duplicate check"):
            same = await store.dataset_of(job.tenant, digest)
        if same is not None:
            return await _end_as_duplicate(job, same)
        async with job.stage("store"):
            path = str(await asyncio.to_thread(store_file, upload.name, digest, upload.content))
        async with job.stage("parse"):
            await _parse(job, store, upload, layout, payload.batch_rows)
        async with job.stage("dataset"):
            found = await store.columns(layout.columns)
        return await _publish(job, upload, digest, path, found)


async def _parse(job: Job, store: Store, upload: Upload, layout: Layout, size: int) -> None:
    async for batch in job.remaining(_batches(upload, layout, size), key=lambda batch: f"batch:{batch.number}"):
        last = batch.first_row + len(batch.rows) - 1
        await job.progress(message=f"Parsing rows {batch.first_row:,} to {last:,}", substage=f"batch {batch.number}")
        await store.write(batch)


async def _batches(upload: Upload, layout: Layout, size: int) -> AsyncIterator[Batch]:
    batches = read_batches(upload.name, upload.content, layout, size)
    # In a thread, so that the worker's other jobs go on meanwhile.
    while (batch := await asyncio.to_thread(next, batches, None)) is not None:
        yield batch


async def _publish(job: Job, upload: Upload, digest: str, path: str, found: Columns) -> Imported:
    result = Imported(dataset=str(job.id), duplicate=False, rows=found.row_count, rejected=found.rejected)
    job.stats.update(asdict(found))
    async with job.transaction(lambda: result) as connection:
        dataset = await publish(connection, job.id, job.tenant, upload, digest, path, found)
        result["dataset"], result["duplicate"] = str(dataset), dataset != job.id
        # In the same transaction: nobody sees all stages completed and the job not.
        await connection.execute("select jobqueue.stage(%s, %s, 'publish', 'completed')", (job.id, job.token))
    return result


async def _end_as_duplicate(job: Job, dataset: UUID) -> Imported:
    result = Imported(dataset=str(dataset), duplicate=True, rows=0, rejected=[])
    async with job.transaction(result) as connection:
        for stage in AFTER_THE_CHECK:
            await connection.execute("select jobqueue.stage(%s, %s, %s, 'skipped')", (job.id, job.token, stage))
    return result
