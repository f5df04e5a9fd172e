"""Lists of the dashboard that are longer than a page, or longer than anybody looks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import psycopg
import pytest

from tests.api.conftest import serving
from tests.ui.pages import Page, see

Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the dashboard."""
    async with serving(dsn) as client:
        yield client


def following(page: Page) -> str | None:
    """Where the button to the next page leads."""
    found = page.all("a", rel="next")
    return str(found[0]["href"]).removeprefix("/ui") if found else None


async def test_thousands_of_queues_are_shown_two_hundred_at_a_time(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    connection.execute(
        "insert into jobqueue.queue (name) select 'q' || to_char(n, 'FM0000') from generate_series(1, 450) n"
    )
    names: list[str] = []
    path: str | None = "/queues"
    pages = 0
    while path is not None:
        page = await see(client, path)
        names += [str(row["id"]).removeprefix("queue-") for row in page.all("tr") if "id" in row]
        path, pages = following(page), pages + 1
    assert (names, pages) == ([f"q{n:04}" for n in range(1, 451)], 3)


async def test_a_list_that_has_looked_at_enough_offers_to_look_further_back(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    connection.execute("create or replace function jobqueue.look_back() returns int language sql as 'select 200'")
    connection.execute(
        "insert into jobqueue.job (queue, job_type, status, progress_pct, created_at, completed_at) "
        "select case n when 300 then 'rare' else 'busy' end, 'x', 'completed', 100, now() - n * interval '1 min', now() "
        "from generate_series(1, 400) n"
    )
    page = await see(client, "/jobs?status=all&queue=rare")
    assert "Looked through the jobs sent since" in page.text
    assert "None of the jobs looked at match these filters." in page.text
    path = following(page)
    assert path is not None
    page = await see(client, path)
    assert len(page.all("input", type="checkbox", name="id")) == 1
