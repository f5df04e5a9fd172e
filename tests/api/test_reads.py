"""Requests for jobs that come together share statements, and nothing else."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import httpx2
import psycopg
import pytest
from starlette.routing import Match, Route

from jobqueue.api.paths import Paths
from jobqueue.api.reads import MOST_TOGETHER, STATEMENTS, WHOLE, Form
from tests.api.conftest import send, serving
from tests.support.api_keys import bearer, create_key
from tests.support.server import rows

Connection = psycopg.Connection[tuple[Any, ...]]


def noting(client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The statements that the application runs from now on."""
    database = client.app.state.services.database  # type: ignore[attr-defined]
    run, noted = database.rows, list[str]()

    async def note(query: str, *arguments: Any, **options: Any) -> Any:
        noted.append(query)
        return await run(query, *arguments, **options)

    monkeypatch.setattr(database, "rows", note)
    return noted


async def test_requests_that_come_together_share_statements_and_each_sees_only_its_tenants(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    keys = {tenant: bearer(create_key(connection, tenants=[tenant])) for tenant in ("a", "b")}
    async with serving(dsn) as client:
        jobs = {
            tenant: (await client.post("/jobs", json={"queue": "q"}, headers=keys[tenant])).json()["id"]
            for tenant in keys
        }
        etag = (await client.get(f"/jobs/{jobs['a']}", headers=keys["a"])).headers["ETag"]
        noted = noting(client, monkeypatch)
        asked = [(reader, owner) for _ in range(20) for reader in keys for owner in keys]
        answers = await asyncio.gather(*(client.get(f"/jobs/{jobs[o]}", headers=keys[r]) for r, o in asked))
        reads = [query for query in noted if "http_read(" in query]
        # as many as fill the statements, and one for each that was already on its way
        assert len(reads) <= len(asked) / MOST_TOGETHER + STATEMENTS + 1, len(reads)
        for (reader, owner), answer in zip(asked, answers, strict=True):
            if reader == owner:
                assert (answer.status_code, answer.json()["id"]) == (200, jobs[owner])
            else:
                assert answer.status_code == 404, (reader, owner)
        # what a request has, wants and may see is its own too
        known, some, unknown = await asyncio.gather(
            client.get(f"/jobs/{jobs['a']}", headers={**keys["a"], "If-None-Match": f'"x", {etag}'}),
            client.get(f"/jobs/{jobs['a']}?fields=status", headers=keys["a"]),
            client.get(f"/jobs/{uuid4()}", headers=keys["a"]),
        )
        # a pending job's ETag changes every 10 s
        assert (known.status_code, known.content) == (304, b"") or known.headers["ETag"] != etag
        assert (some.json(), unknown.status_code) == ({"status": "pending"}, 404)


async def test_a_request_that_fails_fails_alone(client: httpx2.AsyncClient, connection: Connection) -> None:
    good, bad = [await send(client, subject=f"s{n}") for n in range(2)]
    (body,) = rows(connection, "select prosrc from pg_proc where proname = 'http_queue_position'")[0]
    spoilt = body.replace("begin", f"begin if _id = '{bad}' then raise 'spoilt'; end if;", 1)
    connection.execute(
        "create or replace function jobqueue.http_queue_position(_id uuid) returns int language plpgsql stable "
        f"security definer set search_path = pg_catalog, jobqueue, pg_temp as $x${spoilt}$x$".encode()
    )
    answers = await asyncio.gather(*(client.get(f"/jobs/{job}") for job in (good, bad, good)))
    assert [answer.status_code for answer in answers] == [200, 500, 200]


async def test_a_job_that_takes_too_long_to_read_takes_nobody_elses_time(dsn: str, connection: Connection) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    async with serving(dsn, {"api_statement_timeout": 0.5}) as client:
        good, slow = [await send(client, subject=f"s{n}") for n in range(2)]
        (body,) = rows(connection, "select prosrc from pg_proc where proname = 'http_queue_position'")[0]
        spoilt = body.replace("begin", f"begin if _id = '{slow}' then perform pg_sleep(60); end if;", 1)
        connection.execute(
            "create or replace function jobqueue.http_queue_position(_id uuid) returns int language plpgsql stable "
            f"security definer set search_path = pg_catalog, jobqueue, pg_temp as $x${spoilt}$x$".encode()
        )
        answers = await asyncio.gather(*(client.get(f"/jobs/{job}") for job in (good, slow, good)))
        assert [answer.status_code for answer in answers] == [200, 504, 200]


async def test_a_request_that_does_not_come_to_its_turn_in_time_is_503_and_the_others_are_answered(
    dsn: str, connection: Connection
) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    async with serving(dsn, patience=0.3) as client:
        job = await send(client)
        reads = client.app.state.services.reads  # type: ignore[attr-defined]
        turns = MOST_TOGETHER * STATEMENTS
        async with await psycopg.AsyncConnection.connect(dsn) as holder:
            await holder.execute("lock table jobqueue.job in access exclusive mode")
            waiting = [asyncio.create_task(client.get(f"/jobs/{job}")) for _ in range(turns + 5)]
            done, _ = await asyncio.wait(waiting, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            assert [task.result().status_code for task in done] == [503] * len(done) != []
            await holder.rollback()
        codes = sorted([answer.status_code for answer in await asyncio.gather(*waiting)])
        assert codes == [200] * turns + [503] * 5
        # nothing is left behind, and another form has a line of its own
        assert (await reads.read(job, ["*"], "*", WHOLE)).body is None
        assert (await reads.read(job, None, "nobody", Form(("id",)))).version is None


@pytest.mark.parametrize(
    ("path", "route", "parameters"),
    [
        ("/jobs", "/jobs", {}),
        ("/jobs/active", "/jobs/active", {}),
        ("/jobs/7", "/jobs/{id}", {"id": "7"}),
        ("/jobs/active/events", "/jobs/{id}/events", {"id": "active"}),
        ("/tenants/a b/jobs/7", "/tenants/{tenant}/jobs/{id}", {"tenant": "a b", "id": "7"}),
        ("/tenants/jobs/jobs", "/tenants/{tenant}/jobs", {"tenant": "jobs"}),
        ("/jobs/", None, {}),
        ("/jobs//events", None, {}),
        ("/jobs/7/", None, {}),
        ("/jobs/7\n", "/jobs/{id}", {"id": "7\n"}),
        ("/nowhere", None, {}),
        ("/", None, {}),
    ],
)
def test_a_path_is_found_by_its_words_and_fixed_words_win(
    path: str, route: str | None, parameters: dict[str, str]
) -> None:
    async def endpoint(scope: Any, receive: Any, send: Any) -> None: ...

    known = ["/jobs/{id}", "/jobs", "/jobs/active", "/jobs/{id}/events"]
    known += ["/tenants/{tenant}/jobs", "/tenants/{tenant}/jobs/{id}"]
    match, found = Paths([Route(one, type("E", (), {"__call__": endpoint})()) for one in known]).matches(
        {"type": "http", "path": path, "root_path": ""}
    )
    if route is None:
        assert match is Match.NONE
    else:
        assert (match, found["route"].path, found["path_params"]) == (Match.FULL, route, parameters)
