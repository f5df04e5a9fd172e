"""Requests for jobs that come together share statements, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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
from tests.support.server import rows, value

Connection = psycopg.Connection[tuple[Any, ...]]


class Statements:
    """The statements that read jobs: how many there were, for how many requests, and a gate before each of them."""

    def __init__(self, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = self.requests = 0
        self.gate = asyncio.Event()
        services = client.app.state.services  # type: ignore[attr-defined]
        self._reads, self._run = services.reads, services.database.rows
        monkeypatch.setattr(services.database, "rows", self._note)

    @property
    def asked(self) -> int:
        """Requests that have come so far: those that statements have taken, and those in line."""
        return self.requests + sum(map(len, self._reads._lines.values()))

    async def _note(self, query: str, parameters: Any, **options: Any) -> Any:
        if "http_read(" in query:
            self.count += 1
            self.requests += len(parameters[2])
            await self.gate.wait()
        return await self._run(query, parameters, **options)


async def until(condition: Callable[[], object]) -> None:
    """Return once the condition holds."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def test_requests_that_come_together_share_statements_and_each_sees_only_its_tenants(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    keys = {tenant: bearer(create_key(connection, tenants=[tenant])) for tenant in ("a", "b")}
    async with serving(dsn, patience=60) as client:
        jobs = {
            tenant: (await client.post("/jobs", json={"queue": "q"}, headers=keys[tenant])).json()["id"]
            for tenant in keys
        }
        etag = (await client.get(f"/jobs/{jobs['a']}", headers=keys["a"])).headers["ETag"]
        statements = Statements(client, monkeypatch)
        asked = [(reader, owner) for _ in range(20) for reader in keys for owner in keys]
        answering = asyncio.gather(*(client.get(f"/jobs/{jobs[o]}", headers=keys[r]) for r, o in asked))
        await until(lambda: statements.asked == len(asked))
        statements.gate.set()
        answers = await answering
        # as many as fill the statements, and one for each that was already on its way
        assert statements.count <= len(asked) / MOST_TOGETHER + STATEMENTS + 1
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


def spoil(connection: Connection, job: str, what: str) -> None:
    """Whoever reads this job meets an error."""
    (body,) = rows(connection, "select prosrc from pg_proc where proname = 'http_queue_position'")[0]
    spoilt = body.replace("begin", f"begin if _id = '{job}' then {what}; end if;", 1)
    connection.execute(
        "create or replace function jobqueue.http_queue_position(_id uuid) returns int language plpgsql stable "
        f"security definer set search_path = pg_catalog, jobqueue, pg_temp as $x${spoilt}$x$".encode()
    )


async def test_a_request_that_fails_fails_alone(client: httpx2.AsyncClient, connection: Connection) -> None:
    good, bad = [await send(client, subject=f"s{n}") for n in range(2)]
    spoil(connection, bad, "raise 'spoilt'")
    answers = await asyncio.gather(*(client.get(f"/jobs/{job}") for job in (good, bad, good)))
    assert [answer.status_code for answer in answers] == [200, 500, 200]


async def test_a_job_that_takes_too_long_to_read_takes_nobody_elses_time(dsn: str, connection: Connection) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    async with serving(dsn) as client:
        good, slow = [await send(client, subject=f"s{n}") for n in range(2)]
        spoil(connection, slow, "raise query_canceled")
        answers = await asyncio.gather(*(client.get(f"/jobs/{job}") for job in (good, slow, good)))
        assert [answer.status_code for answer in answers] == [200, 504, 200]


async def test_a_request_that_does_not_come_to_its_turn_in_time_is_503_and_the_others_are_answered(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    async with serving(dsn, {"api_statement_timeout": 120}, patience=0.3) as client:
        job = value(connection, "select id::text from jobqueue.send('q')")
        reads = client.app.state.services.reads  # type: ignore[attr-defined]
        turns = MOST_TOGETHER * STATEMENTS
        async with asyncio.timeout(60):  # until the connections are there: nobody is to wait for one below
            while {
                a.status_code for a in await asyncio.gather(*[client.get(f"/jobs/{job}") for _ in range(turns)])
            } != {200}:
                pass
        async with await psycopg.AsyncConnection.connect(dsn) as holder:
            await holder.execute("lock table jobqueue.job in access exclusive mode")
            statements = Statements(client, monkeypatch)
            statements.gate.set()
            waiting = [asyncio.create_task(client.get(f"/jobs/{job}")) for _ in range(turns + 5)]
            # The statements take as many as they can; all others are refused while these go on.
            await until(lambda: sum(task.done() for task in waiting) == turns + 5 - statements.requests)
            refused = [task.result().status_code for task in waiting if task.done()]
            assert 5 <= len(refused) < turns + 5
            assert set(refused) == {503}
            await holder.rollback()
        codes = sorted([answer.status_code for answer in await asyncio.gather(*waiting)])
        assert codes == [200] * (turns + 5 - len(refused)) + refused
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
