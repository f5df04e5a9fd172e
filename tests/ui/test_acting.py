"""What is done from the dashboard, by forms alone: with a reason, as the caller, refused with words."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import psycopg
import pytest

from tests.api.conftest import serving
from tests.support.api_keys import create_key, forget_keys
from tests.support.server import rows, value
from tests.ui.pages import FORM, OWN, Form, Page, fail_next, job_of, log_in, press, see

Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
async def client(dsn: str, connection: Connection) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the dashboard with the queue `q`."""
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    async with serving(dsn) as client:
        yield client


async def form_of(client: httpx2.AsyncClient, path: str) -> Form:
    """The form of a page that asks."""
    page = await see(client, path)
    (form,) = [found for found in page.forms if found.method == "post" and found.action != "/ui/logout"]
    assert "reason" in form.required
    return form


def send_many(connection: Connection, count: int, options: str) -> None:
    """Send so many jobs to `q`."""
    connection.execute(
        "select count(s.id) from generate_series(1, %s) n "
        "cross join lateral jobqueue.send('q', jsonb_build_object('n', n), %s::jsonb) s",
        (count, options),
    )


def status_of(connection: Connection, job: str) -> str:
    """Its status."""
    return str(rows(connection, "select status from jobqueue.job where id = %s", (job,))[0][0])


async def test_each_action_asks_why_does_it_and_leads_back(client: httpx2.AsyncClient, connection: Connection) -> None:
    job = job_of(connection, '{"run_at": "2099-01-01T00:00:00Z", "display_name": "one"}')
    steps = [
        ("prioritize", "pending", {"priority": "-7"}),
        ("pause", "paused", {}),
        ("resume", "pending", {}),
        ("run_now", "pending", {}),
        ("cancel", "cancelled", {}),
        ("resume", "pending", {}),
        ("fail", "failed", {}),
        ("retry", "pending", {}),
        ("fail", "failed", {}),
        ("restart", "pending", {}),
        ("fail", "failed", {}),
        ("skip", "skipped", {}),
    ]
    for number, (action, expected, filled) in enumerate(steps):
        if action == "fail":
            connection.execute("update jobqueue.job set run_at = now() where run_at > now()")
            assert fail_next(connection) == job
            continue
        page = await see(client, f"/jobs/{job}")
        assert f"/ui/jobs/{job}/{action}" in page.enabled(), (action, page.enabled())
        form = await form_of(client, f"/jobs/{job}/{action}")
        answer = await press(client, form, reason=f"because {number}", **filled)
        assert (answer.status_code, answer.headers["Location"]) == (303, f"/ui/jobs/{job}?done={action}")
        assert status_of(connection, job) == expected, action
        after = await see(client, answer.headers["Location"].removeprefix("/ui"))
        assert f"because {number}" in after.text, "the audit of the job has it"
    assert value(connection, "select priority from jobqueue.job") == -7
    form = await form_of(client, f"/jobs/{job}/delete")
    answer = await press(client, form, reason="gone")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/ui/jobs?done=delete")
    assert "Deleted." in (await see(client, "/jobs?done=delete")).text
    assert value(connection, "select count(*) from jobqueue.job") == 0
    reasons = [found for (found,) in rows(connection, "select reason from jobqueue.audit order by id")]
    assert reasons == [f"because {n}" for n, (action, _, _) in enumerate(steps) if action != "fail"] + ["gone"]


async def test_from_a_list_the_way_leads_back_to_it(client: httpx2.AsyncClient, connection: Connection) -> None:
    job_of(connection, '{"subject": "a b"}')
    page = await see(client, "/jobs?subject=a+b&status=pending")
    (link,) = page.all("a", **{"data-key": "c"})
    form = await form_of(client, str(link["href"]).removeprefix("/ui"))
    answer = await press(client, form, reason="x")
    assert answer.headers["Location"] == "/ui/jobs?status=pending&subject=a+b&done=cancel"
    for elsewhere in ("https://evil.example", "//evil.example/", "/\\evil"):
        form = await form_of(client, f"/jobs/{job_of(connection)}/cancel")
        answer = await press(client, form, reason="x", back=elsewhere)
        assert answer.headers["Location"] == "/ui/?done=cancel", elsewhere


async def test_what_is_refused_is_said_in_the_form(client: httpx2.AsyncClient, connection: Connection) -> None:
    job = job_of(connection)
    form = await form_of(client, f"/jobs/{job}/cancel")
    for reason in ("", "   "):
        answer = await press(client, form, reason=reason)
        assert answer.status_code == 422
        assert "Give a reason" in answer.text
    form = await form_of(client, f"/jobs/{job}/prioritize")
    for priority in ("high", "", "99999999999", "1.5"):
        answer = await press(client, form, reason="why", priority=priority)
        assert answer.status_code == 422
        assert "must be a whole number" in answer.text
        (kept,) = Page(answer.text).all("input", name="reason")
        assert kept["value"] == "why", "what was typed is not lost"
    page = await see(client, f"/jobs/{job}/retry")
    assert "Not now: a job that is pending cannot be retried." in page.text
    answer = await press(client, page.forms[-2] if page.forms[-1].method == "dialog" else page.forms[-1], reason="why")
    assert answer.status_code == 409
    assert "Allowed now: cancel, pause, prioritize." in answer.text
    gone = job_of(connection)
    form = await form_of(client, f"/jobs/{gone}/cancel")
    connection.execute("select jobqueue.cancel(%s, 'quicker'), jobqueue.delete_job(%s, 'quicker')", (gone, gone))
    assert (await press(client, form, reason="too late")).status_code == 404
    assert [status_of(connection, job), value(connection, "select count(*) from jobqueue.job")] == ["pending", 1]


async def test_a_running_job_is_asked_or_cut_off(client: httpx2.AsyncClient, connection: Connection) -> None:
    job = job_of(connection)
    connection.execute("select * from jobqueue.claim(array['q'], gen_random_uuid(), 1)")
    form = await form_of(client, f"/jobs/{job}/cancel")
    assert (await press(client, form, reason="stop")).status_code == 303
    assert status_of(connection, job) == "processing"
    assert "cancel asked of the worker" in (await see(client, f"/jobs/{job}")).text
    form = await form_of(client, f"/jobs/{job}/cancel")
    assert (await press(client, form, reason="stop now", force="1")).status_code == 303
    assert status_of(connection, job) == "cancelled"


async def test_many_jobs_at_once_are_counted_named_and_typed_first(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    jobs = [job_of(connection, '{"subject": "batch"}') for _ in range(3)]
    fail_next(connection)
    page = await see(client, f"/bulk?action=cancel&id={jobs[0]}&id={jobs[1]}&back=/jobs?subject=batch")
    assert "Cancel 2 jobs?" in page.text
    assert "1 would be done" in page.text
    assert "1 are refused" in page.text
    form = await form_of(client, f"/bulk?action=cancel&id={jobs[0]}&id={jobs[1]}&back=/jobs?subject=batch")
    assert (await press(client, form, reason="")).status_code == 422
    answer = await press(client, form, reason="both")
    assert answer.headers["Location"] == "/ui/jobs?subject=batch&done=bulk&counts=done%3A1%2Crefused%3A1"
    assert "1 done, 1 refused." in (await see(client, answer.headers["Location"].removeprefix("/ui"))).text
    assert [status_of(connection, job) for job in jobs] == ["failed", "cancelled", "pending"]
    send_many(connection, 120, '{"subject": "many"}')
    # a form that was open while its jobs went
    form = await form_of(client, f"/bulk?action=cancel&id={jobs[2]}")
    await client.post(f"/jobs/{jobs[2]}/cancel", json={"reason": "no more"})
    await client.delete(f"/jobs/{jobs[2]}")
    answer = await press(client, form, reason="all")
    assert "Nothing was done" in (await see(client, answer.headers["Location"].removeprefix("/ui"))).text
    path = "/bulk?action=cancel&everything=1&subject=many&status=pending"
    form = await form_of(client, path)
    assert "typed" in form.required
    for typed in ("", "119", "many"):
        answer = await press(client, form, reason="all", typed=typed)
        assert answer.status_code == 422
        assert "Type the number of jobs, 120, to go on." in answer.text
    send_many(connection, 30, '{"subject": "many"}')
    answer = await press(client, form, reason="all", typed="120")
    assert answer.status_code == 409, "thirty more came meanwhile"
    assert "Cancel 150 jobs?" in Page(answer.text).text
    (form,) = [found for found in Page(answer.text).forms if found.action == "/ui/bulk"]
    answer = await press(client, form, typed="150")
    assert answer.headers["Location"] == "/ui/jobs?done=bulk&counts=done%3A150"
    assert value(connection, "select count(*) from jobqueue.job where subject = 'many' and status = 'cancelled'") == 150
    for query, status in (
        ("action=cancel", 422),
        ("action=explode&everything=1", 422),
        ("action=cancel&everything=1&status=all", 422),
        ("action=cancel&id=nonsense", 422),
        ("action=cancel&everything=1&tenant=other", 200),
    ):
        assert (await client.get(f"/ui/bulk?{query}")).status_code == status, query


async def test_a_large_one_becomes_a_job_and_a_reader_does_nothing(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    send_many(connection, 600, '{"tenant": "acme"}')
    job = str(value(connection, "select id::text from jobqueue.job limit 1"))
    reader = create_key(connection, tenants=["acme"], scopes=["jobs:read"])
    actor = create_key(connection, tenants=["acme"], scopes=["jobs:read", "jobs:act"], subject="anna", quota_writes=1)
    other = create_key(connection, tenants=["other"], scopes=["jobs:read", "jobs:act"])
    forget_keys(client)
    await log_in(client, actor)
    bulk = await form_of(client, "/bulk?action=cancel&everything=1&status=pending")
    acting = await form_of(client, f"/jobs/{job}/cancel")
    filled = {"reason": "too many", "typed": "600"}
    for key, statuses in ((reader, (403, 403)), (other, (404, 409))):
        await log_in(client, key)
        answer = await press(client, acting, reason="mine")
        assert answer.status_code == statuses[0], "a request made by hand"
        answer = await press(client, bulk, **{**filled, "expected": "0", "typed": ""})
        assert answer.status_code in {statuses[1], 303}, answer.status_code
    assert value(connection, "select count(*) from jobqueue.job where status = 'pending'") == 600
    client.cookies.clear()
    assert (await press(client, acting, reason="nobody")).headers["Location"] == "/ui/login"
    await log_in(client, actor)
    answer = await press(client, bulk, **filled)
    assert answer.headers["Location"] == "/ui/jobs?done=bulk_begun", answer.text[-800:]
    (found,) = rows(
        connection,
        "select actor, reason, cardinality(ids), ended_at from jobqueue.bulk_operation where cardinality(ids) > 0",
    )
    assert found == ("anna", "too many", 600, None)
    answer = await press(client, acting, reason="over the quota")
    assert answer.status_code == 429, "an action costs a write of the hour's quota; pages cost nothing"
    await see(client, "/jobs")
    posted = json.dumps(rows(connection, "select count(*) from jobqueue.audit where actor = 'anna'"))
    assert posted == "[[0]]"
    assert (await client.post("/ui/bulk", content="action=cancel", headers={**OWN, **FORM})).status_code in {422, 429}
