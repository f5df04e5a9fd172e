"""When a pending job is expected to end: in `GET /jobs/{id}` as jobqueue.estimate knows it, and not in lists."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import httpx2
import psycopg

from tests.api.conftest import send
from tests.support.server import value

Connection = psycopg.Connection[tuple[Any, ...]]
HISTORY = "insert into jobqueue.estimate (job_type, stage, runs, seconds) values ('q', '', 5, 60)"
WORKER = "select jobqueue.register_worker(gen_random_uuid(), '{\"concurrency\": 2}')"


async def test_a_pending_job_says_when_it_is_expected_to_end_as_soon_as_that_is_known(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    _, _, third = [await send(client) for _ in range(3)]
    unknown = (await client.get(f"/jobs/{third}")).json()
    assert (unknown["estimated_completion"], unknown["queue_position"]) == (None, 3)
    make_known(connection)
    expected = value(connection, "select ends_at from jobqueue.estimate(%s)", (third,))
    for path in (f"/jobs/{third}", f"/jobs/{third}?include=stages", f"/admin/jobs/{third}"):
        shown = (await client.get(path)).json()
        # two jobs ahead, two slots, a minute each: one minute to wait and one to run
        assert abs((datetime.fromisoformat(shown["estimated_completion"]) - expected).total_seconds()) < 30, path
        assert shown["queue_position"] == 3
    assert 90 < (expected - value(connection, "select now()")).total_seconds() < 150
    (only,) = (await client.get(f"/jobs/{third}?fields=estimated_completion")).json().values()
    assert only is not None
    (listed,) = (await client.get(f"/jobs?ids={third}")).json()["data"]
    assert (listed["estimated_completion"], listed["queue_position"]) == (None, 3), "a list does not count the line"


def make_known(connection: Connection) -> None:
    """A history of minutes, and a worker with two slots."""
    connection.execute(HISTORY)
    connection.execute(WORKER)
