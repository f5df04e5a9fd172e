"""The datasets in PostgreSQL (schema `imports`), and the folder of the files that they were made of.

Rows are named by the job and their batch: writing a batch again replaces it. A dataset appears in one piece, in the
transaction that completes its job; who reads `imports.dataset_row` never sees half of one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any
from uuid import UUID

from psycopg import AsyncConnection

from examples.import_dataset.kinds import common_kind
from examples.import_dataset.sheet import Batch
from examples.tables import Pool, Tables
from jobqueue import InvalidInput

TABLES = Tables("imports", """
create table if not exists imports.upload (
    id uuid primary key default gen_random_uuid(),
    name text not null,
    content bytea not null,
    uploaded_by text not null,
    uploaded_at timestamptz not null default now()
);
create table if not exists imports.batch (
    job_id uuid not null,
    number int not null,
    first_row int not null,
    row_count int not null,
    rejected text[] not null,
    kinds jsonb not null,
    filled int[] not null,
    writes int not null default 1,
    primary key (job_id, number)
);
create table if not exists imports.row (
    job_id uuid not null,
    batch int not null,
    position int not null,
    cells text[] not null,
    primary key (job_id, batch, position),
    foreign key (job_id, batch) references imports.batch on delete cascade
);
create table if not exists imports.dataset (
    job_id uuid primary key,
    tenant text not null,
    name text not null,
    digest text not null,
    path text not null,
    columns jsonb not null,
    row_count int not null,
    created_by text,
    created_at timestamptz not null default now(),
    unique (tenant, digest)
);
create or replace view imports.dataset_row as
    select d.job_id as dataset, d.tenant, d.name, r.batch, r.position, r.cells
    from imports.dataset d
    join imports.row r on r.job_id = d.job_id;
comment on column imports.batch.writes is 'How often it was written: above 1 if a cut-off attempt had written it.';
""")  # fmt: skip

WRITE_BATCH = """
insert into imports.batch as b (job_id, number, first_row, row_count, rejected, kinds, filled)
values (%s, %s, %s, %s, %s, %s, %s)
on conflict (job_id, number) do update set
    first_row = excluded.first_row,
    row_count = excluded.row_count,
    rejected = excluded.rejected,
    kinds = excluded.kinds,
    filled = excluded.filled,
    writes = b.writes + 1"""
WRITE_ROWS = """
insert into imports.row (job_id, batch, position, cells)
select %s, %s, number, array(select jsonb_array_elements_text(cells))
from jsonb_array_elements(%s::jsonb) with ordinality as r (cells, number)"""
PUBLISH = """
insert into imports.dataset (job_id, tenant, name, digest, path, columns, row_count, created_by)
values (%s, %s, %s, %s, %s, %s, %s, %s)
on conflict (tenant, digest) do nothing
returning job_id"""


@dataclass(frozen=True, slots=True)
class Upload:
    """A file as a user gave it."""

    name: str
    content: bytes
    uploaded_by: str


@dataclass(frozen=True, slots=True)
class Columns:
    """What the rows of a dataset have in common."""

    row_count: int
    rejected: list[str]
    """Why rows were left out."""
    columns: list[dict[str, Any]]
    """`{"name", "kind", "filled"}` for each column."""


def folder() -> Path:
    """Return where the files are kept: `DATASET_FOLDER`, else `~/.local/share/import_dataset`."""
    return Path(os.environ.get("DATASET_FOLDER") or Path.home() / ".local" / "share" / "import_dataset")


def store_file(name: str, digest: str, content: bytes) -> Path:
    """Keep a file under its SHA-256 and return the path. Blocking. A file that is there is whole: it is renamed into place."""
    path = folder() / digest[:2] / f"{digest}{PurePath(name).suffix.lower()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
    return path


@asynccontextmanager
async def open_store(dsn: str, job_id: UUID) -> AsyncIterator[Store]:
    """Open one job's way to the datasets; creates the tables if there are none."""
    async with TABLES.open(dsn) as pool:
        yield Store(pool, job_id)


class Store:
    """The rows of one job."""

    def __init__(self, pool: Pool, job_id: UUID) -> None:
        self._pool = pool
        self._job_id = job_id

    async def upload(self, upload: UUID) -> Upload:
        """Return an upload. Raises InvalidInput if there is none."""
        found = await self._rows("select name, content, uploaded_by from imports.upload where id = %s", upload)
        if not found:
            raise InvalidInput(f"there is no upload {upload}")
        return Upload(*found[0])

    async def dataset_of(self, tenant: str, digest: str) -> UUID | None:
        """Return the dataset that was made of the same file, if there is one."""
        query = "select job_id from imports.dataset where tenant = %s and digest = %s"
        found = await self._rows(query, tenant, digest)
        return found[0][0] if found else None

    async def write(self, batch: Batch) -> None:
        """Write a batch with its rows; what was written of it before goes."""
        place = (self._job_id, batch.number)
        facts = (batch.first_row, len(batch.rows), batch.rejected, json.dumps(batch.kinds()), batch.filled())
        async with self._pool.connection() as connection, connection.pipeline(), connection.transaction():
            await connection.execute(WRITE_BATCH, (*place, *facts))
            await connection.execute("delete from imports.row where job_id = %s and batch = %s", place)
            await connection.execute(WRITE_ROWS, (*place, json.dumps(batch.rows)))

    async def columns(self, names: list[str]) -> Columns:
        """Return what all batches say together."""
        query = "select row_count, rejected, kinds, filled from imports.batch where job_id = %s order by number"
        batches = await self._rows(query, self._job_id)
        columns = []
        for position, name in enumerate(names):
            # A batch without rows knows nothing about its columns.
            kinds = {kind for _, _, kinds, _ in batches if kinds for kind in kinds[position]}
            filled = sum(filled[position] for _, _, _, filled in batches if filled)
            columns.append({"name": name, "kind": common_kind(kinds), "filled": filled})
        rejected = [text for _, texts, _, _ in batches for text in texts]
        return Columns(sum(count for count, *_ in batches), rejected, columns)

    async def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        async with self._pool.connection() as connection:
            return await (await connection.execute(query, values)).fetchall()


async def publish(
    connection: AsyncConnection[Any], job_id: UUID, tenant: str, upload: Upload, digest: str, path: str, found: Columns
) -> UUID:
    """Make the job's rows a dataset, in the connection's transaction, and return it.

    If somebody else has published the same file meanwhile, the job's rows go and theirs is returned.
    """
    columns = json.dumps(found.columns)
    values = (job_id, tenant, upload.name, digest, path, columns, found.row_count, upload.uploaded_by)
    if not await (await connection.execute(PUBLISH, values)).fetchall():
        await connection.execute("delete from imports.batch where job_id = %s", (job_id,))
    query = "select job_id from imports.dataset where tenant = %s and digest = %s"
    ((dataset,),) = await (await connection.execute(query, (tenant, digest))).fetchall()
    return UUID(str(dataset))
