"""The results in PostgreSQL: schema `documents`.

Every row is named by the job and by what it is about (a page, a passage), and writing it again replaces it: so a page that
was written but not yet noted as done can be done again without harm. `writes` says how often that happened.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypedDict
from uuid import UUID

from examples.process_document.names import Person
from examples.process_document.text import Merged, Passage
from examples.tables import Pool, Tables

TABLES = Tables("documents", """
create table if not exists documents.document (
    job_id uuid primary key,
    path text not null,
    summary jsonb,
    finished_at timestamptz
);
create table if not exists documents.page (
    job_id uuid not null references documents.document on delete cascade,
    number int not null,
    text text not null,
    problem text,
    writes int not null default 1,
    primary key (job_id, number)
);
create table if not exists documents.body (
    job_id uuid primary key references documents.document on delete cascade,
    text text not null,
    page_starts int[] not null
);
create table if not exists documents.passage (
    job_id uuid not null references documents.document on delete cascade,
    number int not null,
    first_page int not null,
    last_page int not null,
    text text not null,
    primary key (job_id, number)
);
create table if not exists documents.vector (
    job_id uuid not null,
    passage int not null,
    vector real[] not null,
    writes int not null default 1,
    primary key (job_id, passage),
    foreign key (job_id, passage) references documents.passage on delete cascade
);
create table if not exists documents.names (
    job_id uuid not null,
    passage int not null,
    names text[] not null,
    writes int not null default 1,
    primary key (job_id, passage),
    foreign key (job_id, passage) references documents.passage on delete cascade
);
create table if not exists documents.person (
    job_id uuid not null references documents.document on delete cascade,
    name text not null,
    aliases text[] not null,
    passages int[] not null,
    primary key (job_id, name)
);
comment on column documents.page.writes is 'How often it was written: above 1 if a cut-off attempt had written it.';
comment on column documents.page.problem is 'Why it could not be read; its text is empty then.';
""")  # fmt: skip

WRITE_PAGE = """
insert into documents.page as p (job_id, number, text, problem)
values (%s, %s, %s, %s)
on conflict (job_id, number) do update set
    text = excluded.text,
    problem = excluded.problem,
    writes = p.writes + 1"""
WRITE_BODY = """
insert into documents.body (job_id, text, page_starts)
values (%s, %s, %s)
on conflict (job_id) do update set
    text = excluded.text,
    page_starts = excluded.page_starts"""
WRITE_VECTOR = """
insert into documents.vector as v (job_id, passage, vector)
values (%s, %s, %s)
on conflict (job_id, passage) do update set
    vector = excluded.vector,
    writes = v.writes + 1"""
WRITE_NAMES = """
insert into documents.names as n (job_id, passage, names)
values (%s, %s, %s)
on conflict (job_id, passage) do update set
    names = excluded.names,
    writes = n.writes + 1"""
SUMMARY = """
select jsonb_build_object(
    'pages', (select count(*) from documents.page where job_id = %(job)s),
    'unreadable_pages', (select coalesce(jsonb_agg(number order by number) filter (where problem is not null), '[]')
                         from documents.page where job_id = %(job)s),
    'passages', (select count(*) from documents.passage where job_id = %(job)s),
    'vectors', (select count(*) from documents.vector where job_id = %(job)s),
    'names', (select count(*) from documents.person where job_id = %(job)s),
    'mentioned_most', (select coalesce(jsonb_agg(p.name order by p.number), '[]')
                       from (select name, row_number() over (order by cardinality(passages) desc, name) as number
                             from documents.person where job_id = %(job)s limit 5) p))"""


class Summary(TypedDict):
    """What a finished job says about the document."""

    pages: int
    unreadable_pages: list[int]
    passages: int
    vectors: int
    names: int
    mentioned_most: list[str]


@asynccontextmanager
async def open_store(dsn: str, job_id: UUID) -> AsyncIterator[Store]:
    """Open one job's way to the results; creates the tables if there are none."""
    async with TABLES.open(dsn) as pool:
        yield Store(pool, job_id)


class Store:
    """The rows of one job."""

    def __init__(self, pool: Pool, job_id: UUID) -> None:
        self._pool = pool
        self._job_id = job_id

    async def begin(self, path: str) -> None:
        """Start afresh: what was written before goes."""
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute("delete from documents.document where job_id = %s", (self._job_id,))
            await connection.execute(
                "insert into documents.document (job_id, path) values (%s, %s)", (self._job_id, path)
            )

    async def write_page(self, number: int, text: str, problem: str | None) -> None:
        """Write a page, or why it could not be read."""
        # PostgreSQL has no NUL in texts; PDF files do.
        await self._write(WRITE_PAGE, number, text.replace("\0", ""), problem)

    async def problems(self, first: int, last: int) -> list[str]:
        """Return why pages in a range could not be read."""
        problem = (
            "select problem from documents.page "
            "where job_id = %s and number between %s and %s and problem is not null order by number"
        )
        return [row[0] for row in await self._rows(problem, first, last)]

    async def pages(self) -> list[str]:
        """Return the text of all pages, in order."""
        return [row[0] for row in await self._rows("select text from documents.page where job_id = %s order by number")]

    async def write_body(self, merged: Merged) -> None:
        """Write the document as one text."""
        await self._write(WRITE_BODY, merged.text, list(merged.page_starts))

    async def body(self) -> Merged:
        """Return the document as one text."""
        ((text, starts),) = await self._rows("select text, page_starts from documents.body where job_id = %s")
        return Merged(text, tuple(starts))

    async def write_passages(self, passages: Sequence[Passage]) -> None:
        """Write all passages; what was there before goes."""
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute("delete from documents.passage where job_id = %s", (self._job_id,))
            async with connection.cursor() as cursor:
                await cursor.executemany(
                    "insert into documents.passage (job_id, number, first_page, last_page, text) values (%s, %s, %s, %s, %s)",
                    [(self._job_id, p.number, p.first_page, p.last_page, p.text) for p in passages],
                )

    async def passages(self) -> list[Passage]:
        """Return the passages, in order."""
        query = "select number, first_page, last_page, text from documents.passage where job_id = %s order by number"
        return [Passage(*row) for row in await self._rows(query)]

    async def write_vector(self, passage: int, vector: Sequence[float]) -> None:
        """Write the vector of a passage."""
        await self._write(WRITE_VECTOR, passage, list(vector))

    async def write_names(self, passage: int, names: Sequence[str]) -> None:
        """Write the names in a passage."""
        await self._write(WRITE_NAMES, passage, list(names))

    async def names(self) -> dict[str, set[int]]:
        """Return each name with the passages that have it."""
        query = "select name, array_agg(passage) from documents.names, unnest(names) as name where job_id = %s group by name"
        return {name: set(passages) for name, passages in await self._rows(query)}

    async def write_people(self, people: Sequence[Person]) -> None:
        """Write who is in the document; what was there before goes."""
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute("delete from documents.person where job_id = %s", (self._job_id,))
            async with connection.cursor() as cursor:
                await cursor.executemany(
                    "insert into documents.person (job_id, name, aliases, passages) values (%s, %s, %s, %s)",
                    [(self._job_id, p.name, list(p.aliases), list(p.passages)) for p in people],
                )

    async def finish(self) -> Summary:
        """Put the summary together, keep it with the document and return it."""
        query = (
            f"update documents.document set summary = ({SUMMARY}), finished_at = now() "
            "where job_id = %(job)s returning summary"
        )
        async with self._pool.connection() as connection:
            found = await connection.execute(query, {"job": self._job_id})
            summary: Summary = (await found.fetchall())[0][0]
        return summary

    async def _write(self, statement: str, *values: Any) -> None:
        async with self._pool.connection() as connection:
            await connection.execute(statement, (self._job_id, *values))

    async def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        async with self._pool.connection() as connection:
            return await (await connection.execute(query, (self._job_id, *values))).fetchall()
