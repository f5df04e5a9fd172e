"""The index in PostgreSQL: schema `code_index`, beside the jobs and none of their business.

A job writes rows of its own, named by its id and the file's position in the commit. Writing a file again replaces it,
so a repeated attempt changes nothing; two jobs never touch each other's rows. `publish` makes them the repository's
index, in the transaction that completes the job: readers of the views `current_file` and `current_symbol` see the old
index or the new one, never half of each.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypedDict
from uuid import UUID

from psycopg import AsyncConnection

from examples.index_repository.files import IndexedFile
from examples.tables import Pool, Tables

TABLES = Tables("code_index", """
create table if not exists code_index.repository (
    id bigint generated always as identity primary key,
    location text not null unique,
    job_id uuid,
    commit_sha text,
    indexed_at timestamptz
);
create table if not exists code_index.file (
    job_id uuid not null,
    position int not null,
    repository_id bigint not null references code_index.repository on delete cascade,
    path text not null,
    blob text not null,
    bytes bigint not null,
    language text,
    lines int,
    skipped text,
    problem text,
    writes int not null default 1,
    indexed_at timestamptz not null default now(),
    primary key (job_id, position)
);
create index if not exists file_of_repository on code_index.file (repository_id);
create table if not exists code_index.symbol (
    job_id uuid not null,
    file_position int not null,
    position int not null,
    kind text not null,
    name text not null,
    qualified_name text not null,
    first_line int not null,
    last_line int not null,
    primary key (job_id, file_position, position),
    foreign key (job_id, file_position) references code_index.file on delete cascade
);
create index if not exists symbol_by_name on code_index.symbol (name);
comment on column code_index.file.writes is 'How often it was written: above 1 if a cut-off attempt had written it.';
create or replace view code_index.current_file as
    select r.location, r.commit_sha, f.*
    from code_index.repository r
    join code_index.file f on f.job_id = r.job_id;
create or replace view code_index.current_symbol as
    select f.location, f.path, s.kind, s.name, s.qualified_name, s.first_line, s.last_line, s.job_id
    from code_index.current_file f
    join code_index.symbol s on s.job_id = f.job_id and s.file_position = f.position;
""")  # fmt: skip

WRITE_FILE = """
insert into code_index.file as f (job_id, position, repository_id, path, blob, bytes, language, lines, skipped, problem)
values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
on conflict (job_id, position) do update set
    language = excluded.language,
    lines = excluded.lines,
    skipped = excluded.skipped,
    problem = excluded.problem,
    writes = f.writes + 1,
    indexed_at = now()"""
WRITE_SYMBOLS = """
insert into code_index.symbol (job_id, file_position, position, kind, name, qualified_name, first_line, last_line)
select %s, %s, number, kind, name, qualified_name, first_line, last_line
from unnest(%s::text[], %s::text[], %s::text[], %s::int[], %s::int[])
    with ordinality as s (kind, name, qualified_name, first_line, last_line, number)"""
TOTALS = """
select count(*) filter (where f.skipped is null),
    count(*) filter (where f.skipped is not null),
    (select count(*) from code_index.symbol s where s.job_id = %(job)s)
from code_index.file f
where f.job_id = %(job)s"""
# A job can be retried for 30 days after it failed: so long it may come back for what it has written.
DELETE_OLDER = """
delete from code_index.file f
where f.repository_id = %(repository)s and f.job_id <> %(job)s
    and (f.job_id = %(former)s or f.indexed_at < now() - interval '30 days')"""


class Totals(TypedDict):
    """What a finished job says about itself."""

    files_indexed: int
    files_skipped: int
    symbols_extracted: int
    commit_sha: str


@asynccontextmanager
async def open_store(dsn: str, job_id: UUID) -> AsyncIterator[Store]:
    """Open one job's way to the index; creates the tables if there are none."""
    async with TABLES.open(dsn) as pool:
        yield Store(pool, job_id)


class Store:
    """The rows of one job."""

    def __init__(self, pool: Pool, job_id: UUID) -> None:
        self._pool = pool
        self._job_id = job_id

    async def begin(self, location: str) -> int:
        """Start afresh and return the repository's id."""
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute("delete from code_index.file where job_id = %s", (self._job_id,))
            await connection.execute(
                "insert into code_index.repository (location) values (%s) on conflict do nothing", (location,)
            )
            found = await connection.execute("select id from code_index.repository where location = %s", (location,))
            return int((await found.fetchall())[0][0])

    async def write(self, repository: int, file: IndexedFile) -> None:
        """Write a file with its symbols, in one transaction and one round trip; what was written of it before goes."""
        entry = file.entry
        place = (self._job_id, entry.position)
        facts = (entry.path, entry.blob, entry.size, file.language, file.lines, file.skipped, file.problem)
        columns = [
            [symbol.kind for symbol in file.symbols],
            [symbol.name for symbol in file.symbols],
            [symbol.qualified_name for symbol in file.symbols],
            [symbol.first_line for symbol in file.symbols],
            [symbol.last_line for symbol in file.symbols],
        ]
        async with self._pool.connection() as connection, connection.pipeline(), connection.transaction():
            await connection.execute(WRITE_FILE, (*place, repository, *facts))
            await connection.execute("delete from code_index.symbol where job_id = %s and file_position = %s", place)
            await connection.execute(WRITE_SYMBOLS, (*place, *columns))

    async def totals(self, commit: str) -> Totals:
        """Count what the job has written, in all its attempts."""
        async with self._pool.connection() as connection:
            found = await connection.execute(TOTALS, {"job": self._job_id})
            indexed, skipped, symbols = (await found.fetchall())[0]
        return Totals(files_indexed=indexed, files_skipped=skipped, symbols_extracted=symbols, commit_sha=commit)


async def publish(connection: AsyncConnection[Any], repository: int, job_id: UUID, commit: str) -> None:
    """Make the job's rows the repository's index, in the connection's transaction; those that they replace go."""
    found = await connection.execute("select job_id from code_index.repository where id = %s for update", (repository,))
    former = (await found.fetchall())[0][0]
    await connection.execute(
        "update code_index.repository set job_id = %s, commit_sha = %s, indexed_at = now() where id = %s",
        (job_id, commit, repository),
    )
    await connection.execute(DELETE_OLDER, {"repository": repository, "job": job_id, "former": former})
