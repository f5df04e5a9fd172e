"""The list of jobs and a job, as a browser without scripts sees them: for everybody, and whatever is stored."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import httpx2
import psycopg
import pytest

from jobqueue.api.ui import visit
from jobqueue.api.ui.navigation import NAVIGATION
from jobqueue.api.ui.rendering import NOTHING, took
from tests.api.conftest import serving
from tests.support.api_keys import create_key, forget_keys
from tests.ui.pages import POLICY, Page, fail_next, job_of, log_in, see

Connection = psycopg.Connection[tuple[Any, ...]]
UNKNOWN = "0198c5a0-1c2d-7e3f-8a4b-5c6d7e8f9a0b"


@pytest.fixture
async def client(dsn: str, connection: Connection) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the dashboard with the queue `q`."""
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    async with serving(dsn) as client:
        yield client


def shown(page: Page) -> list[str]:
    """The ids of the rows of a list, in order."""
    return [str(found["value"]) for found in page.all("input", type="checkbox", name="id")]


async def test_every_page_is_whole_strict_and_finds_its_files(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    job = job_of(connection)
    files: set[str] = set()
    for path in ("/login", "/jobs", f"/jobs/{job}", f"/jobs/{job}/cancel", f"/bulk?action=cancel&id={job}", "/none"):
        answer = await client.get("/ui" + path)
        assert answer.headers["Content-Security-Policy"] == POLICY, path
        assert answer.headers.get_list("Referrer-Policy") == ["same-origin"], "else browsers send Origin: null"
        assert answer.headers.get_list("X-Content-Type-Options") == ["nosniff"]
        assert answer.headers["Cache-Control"] == "no-store"
        page = Page(answer.text)
        assert page.all("html", lang="en")
        assert len(page.all("main", id="main")) == len(page.all("h1")) == len(page.all("title")) == 1, path
        for _, attributes in page.elements:
            assert not {"style", "onclick", "onload"} & attributes.keys()
        labels = {found.get("for") for found in page.all("label")}
        for found in page.all("input"):
            hidden = found.get("type") == "hidden" or "hidden" in found
            named = "aria-label" in found or found.get("id") in labels or found.get("id") in {"everything", "keys-on"}
            assert hidden or named, (path, found)
        for table in page.all("table"):
            assert len(page.all("caption")) >= 1, table
        assert all(found.get("scope") in {"col", "row"} for found in page.all("th")), path
        assert all("aria-label" in found for found in page.all("progress"))
        files |= {str(found["src"]) for found in page.all("script")} | {
            str(found["href"]) for found in page.all("link")
        }
        part = await client.get("/ui" + path, headers={"HX-Request": "true"})
        assert part.text.startswith("<title>"), "what app.js reads again is the main part only"
        assert "<html" not in part.text
        assert "HX-Request" in part.headers["Vary"]
    assert len(files) == 6
    for file in files:
        answer = await client.get(file)
        assert answer.status_code == 200, file
        assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    other = next(file for file in files if file.endswith("app.js")).replace("/ui/static/", "/ui/static/0")
    assert (await client.get(other)).status_code == 404, "another hash is another file"
    assert (await client.post(next(iter(files)))).status_code == 405
    assert (await client.get("/ui")).headers["Location"] == "/ui/"


async def test_who_sees_what(client: httpx2.AsyncClient, connection: Connection) -> None:
    """Everybody sees their tenants only; who may not act sees why, on each page that can be acted on."""
    ours = job_of(connection, '{"tenant": "acme", "display_name": "our job"}')
    theirs = job_of(connection, '{"tenant": "other", "display_name": "their job"}')
    reader = create_key(connection, tenants=["acme"], scopes=["jobs:read"])
    actor = create_key(connection, tenants=["acme"], scopes=["jobs:read", "jobs:act"])
    metrics = create_key(connection, tenants=["acme"], scopes=["metrics"])
    forget_keys(client)
    for path in ("/jobs", f"/jobs/{ours}", f"/jobs/{ours}/cancel", f"/bulk?action=cancel&id={ours}", "/none"):
        answer = await client.get("/ui" + path)
        assert (answer.status_code, answer.headers["Location"]) == (303, f"/ui/login?next={quote(path, safe='')}")
    for key, may_act in ((reader, False), (actor, True)):
        await log_in(client, key)
        page = await see(client, "/jobs?status=all")
        assert shown(page) == [ours]
        assert ("your key lacks the scope jobs:act" in page.text) != may_act
        assert bool(page.enabled()) == may_act
        page = await see(client, f"/jobs/{ours}")
        assert "our job" in page.text
        assert ("your key lacks the scope jobs:act" in page.text) != may_act
        assert bool(page.enabled()) == may_act
        for path in (f"/jobs/{ours}/cancel", f"/bulk?action=cancel&id={ours}"):
            page = await see(client, path, 200 if may_act else 403)
            assert may_act or "needs the scope jobs:act" in page.text
        await see(client, f"/jobs/{theirs}", 404)
        await see(client, f"/jobs/{theirs}/cancel", 404 if may_act else 403)
        await see(client, "/jobs?tenant=other", 403)
        assert "their job" not in (await see(client, f"/jobs?status=all&subject={theirs}")).text
    for malformed in (UNKNOWN, "x", f"{ours}0", "%00", "a%2Fb"):
        assert (await client.get(f"/ui/jobs/{malformed}")).status_code == 404
    await see(client, f"/jobs/{ours}/explode", 404)
    await log_in(client, metrics)
    page = await see(client, "/jobs", 403)
    assert not page.all("nav"), "who may see nothing is shown no way there"


async def test_markup_in_any_field_stays_text(client: httpx2.AsyncClient, connection: Connection) -> None:
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    value = json.dumps({evil: evil})
    options = {
        **dict.fromkeys(("display_name", "subject", "created_by", "singleton_key", "group", "job_type"), evil),
        "metadata": {evil: evil},
    }
    options["tenant"] = evil.replace(",", "")
    done = job_of(connection, json.dumps(options), payload=value)
    row = connection.execute("select claim_token from jobqueue.claim(array['q'], gen_random_uuid(), 1)").fetchone()
    assert row is not None
    connection.execute("select jobqueue.stage(%s, %s, %s, 'in_progress', '{\"of\": 2}')", (done, row[0], evil))
    connection.execute("select jobqueue.progress(%s, %s, 10, %s, null)", (done, row[0], evil))
    connection.execute("select jobqueue.checkpoint(%s, %s, %s, %s)", (done, row[0], evil, value))
    error = json.dumps({"class": "permanent", "code": evil, "message": evil, "detail": evil})
    connection.execute("select jobqueue.fail(%s, %s, %s)", (done, row[0], error))
    connection.execute("select set_config('jobqueue.actor', %s, false)", (evil,))
    connection.execute("select jobqueue.prioritize(%s, 5, %s)", (job_of(connection), evil))
    connection.execute("select jobqueue.retry(%s, %s)", (done, evil))
    connection.execute("select jobqueue.cancel(%s, %s)", (done, evil))
    encoded = quote(evil, safe="")
    for path in (
        "/jobs?status=all",
        f"/jobs?status=all&subject={encoded}&queue={encoded}&error={encoded}",
        f"/jobs?q={encoded}",
        f"/jobs?status={encoded}",
        f"/jobs/{done}",
        f"/jobs/{done}/resume?back={encoded}",
        f"/bulk?action=delete&id={done}&back={encoded}",
        f"/bulk?action={encoded}&id={done}",
        f"/jobs?done={encoded}&counts={encoded}",
        f"/login?next={encoded}",
        f"/{encoded}",
    ):
        answer = await client.get("/ui" + path)
        assert answer.status_code < 500, (path, answer.text[-500:])
        page = Page(answer.text)
        assert len(page.all("script")) == 3, path
        assert all(found.get("src") != "x" for found in page.all("img")), path
        assert "49" not in page.words, "a template in a value is a value"
    assert (await see(client, f"/jobs/{done}")).text.count("<script>alert(1)</script>") > 12, "it is all there, as text"


async def test_a_list_by_status_and_filter_page_by_page(client: httpx2.AsyncClient, connection: Connection) -> None:
    connection.execute("insert into jobqueue.queue (name) values ('other')")
    first = fail_next_of(connection)
    for n in range(53):
        job_of(connection, json.dumps({"display_name": f"job {n}", "subject": f"document:{n % 2}"}))
    other = job_of(connection, '{"job_type": "OCR", "tenant": "acme"}', queue="other")
    page = await see(client, "/jobs")
    assert len(shown(page)) == 50
    assert first not in shown(page), "what is unfinished is shown first"
    assert shown(page)[0] == other, "the newest first"
    assert "54 unfinished jobs" in page.text
    (older,) = page.all("a", rel="next")
    rest = await see(client, str(older["href"]).removeprefix("/ui"))
    assert len(shown(rest)) == 4
    assert not set(shown(rest)) & set(shown(page))
    assert "Newest" in rest.text
    tabs = {str(found["href"]): found for found in page.all("a") if "/ui/jobs" in str(found.get("href"))}
    assert tabs["/ui/jobs"]["aria-current"] == "page"
    assert "Unfinished 54" in page.text
    assert "Failed 1" in page.text
    assert "All 55" in page.text
    failed = await see(client, "/jobs?status=failed")
    assert shown(failed) == [first]
    assert "ValueError: no pages" in failed.text
    for query, count in (
        ("status=all", 50),
        ("queue=other", 1),
        ("job_type=OCR", 1),
        ("tenant=acme", 1),
        ("subject=document:1", 26),
        ("subject=document:1&queue=other", 0),
        ("status=failed,pending&queue=q", 50),
        ("status=failed&error=permanent", 1),
        ("status=failed&error=ValueError", 1),
        ("status=failed&error=TIMEOUT", 0),
        ("created_before=2020-01-01T00:00:00Z", 0),
    ):
        assert len(shown(await see(client, f"/jobs?{query}"))) == count, query
    page = await see(client, "/jobs?status=failed&queue=q&subject=x")
    chips = {str(found.get("aria-label")): found["href"] for found in page.all("a") if "aria-label" in found}
    assert chips["Drop queue: q"] == "/ui/jobs?status=failed&subject=x"
    assert "No failed jobs match these filters." in page.text
    for query in ("status=wrong", "after=nonsense", f"after=2026-01-01T00:00:00~{first}", "created_after=yesterdayish"):
        assert (await client.get(f"/ui/jobs?{query}")).status_code in {400, 422}, query


def fail_next_of(connection: Connection) -> str:
    """A failed job with a code."""
    job = job_of(connection)
    fail_next(connection, '{"class": "permanent", "code": "ValueError", "message": "no pages"}')
    return job


async def test_what_is_typed_into_the_box_becomes_an_address(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    job = job_of(connection)
    for typed, location in (
        (job, f"/ui/jobs/{job}"),
        (f"  {job.upper()} ", f"/ui/jobs/{job}"),
        (f"id:{job}", f"/ui/jobs/{job}"),
        ("queue:q type:OCR", "/ui/jobs?status=failed&queue=q&job_type=OCR"),
        ("status:paused error:timeout", "/ui/jobs?status=paused&error=timeout"),
        ('subject:"a b" tenant:x', "/ui/jobs?status=failed&subject=a+b&tenant=x"),
        ("cancelled", "/ui/jobs?status=cancelled"),
        ("unfinished", "/ui/jobs?status=unfinished"),
    ):
        answer = await client.get("/ui/jobs", params={"q": typed, "status": "failed"})
        assert (answer.status_code, answer.headers["Location"]) == (303, location), typed
    for typed, said in (
        ("needle", "It is not clear what"),
        ("que:q", 'There is no word before a colon "que"'),
        ("id:7", "is not the id of a job"),
        ("queue:", "is"),
    ):
        page = await see(client, f"/jobs?q={quote(typed)}")
        (box,) = page.all("input", type="search")
        assert (box["value"], box["aria-invalid"]) == (typed, "true")
        assert said in page.text


async def test_a_job_tells_all_that_is_known(client: httpx2.AsyncClient, connection: Connection) -> None:
    payload = '{"big": 12345678901234567890123, "exact": 1.10}'
    options = '{"display_name": "Processing: A.pdf", "subject": "document:1", "max_retries": 1, "retry_delay": 0}'
    job = job_of(connection, options, payload=payload)
    page = await see(client, f"/jobs/{job}")
    assert "Why is it not running?" in page.text
    assert "worker" in page.text
    detail = json.dumps({"class": "transient", "code": "OSError", "message": "disk", "detail": "Traceback: line 1"})
    fail_next(connection, detail)
    connection.execute("update jobqueue.job set run_at = now() - interval '1 s', wait_until = null, ready_seq = 1")
    row = connection.execute("select claim_token from jobqueue.claim(array['q'], gen_random_uuid(), 1)").fetchone()
    assert row is not None
    connection.execute("select jobqueue.stage(%s, %s, 'scan', 'in_progress', '{\"of\": 3}')", (job, row[0]))
    connection.execute("select jobqueue.progress(%s, %s, 40, 'Processing chunk 2/5', null)", (job, row[0]))
    connection.execute(
        "select jobqueue.checkpoint(%s, %s, 'scan', '{\"page\": 7}', pause_safe => false)", (job, row[0])
    )
    page = await see(client, f"/jobs/{job}")
    for text in (
        "Processing: A.pdf",
        "What is it doing?",
        "alive",
        "Processing chunk 2/5",
        "scan",
        "Last checkpoint",
        "1 of 1",
    ):
        assert text in page.text, text
    assert page.all("progress")[0]["value"] == "40"
    assert '"big": 12345678901234567890123' in page.text, "no digit is lost"
    assert '"exact": 1.10' in page.text
    assert "Traceback: line 1" in page.text
    assert "attempt 1: failed" in page.text
    assert "neither its job_type nor its last checkpoint says that it can be paused" in page.text
    enabled = [link.rsplit("/", 1)[1] for link in page.enabled()]
    assert enabled == ["cancel"]
    disabled = [found for found in page.all("button") if "disabled" in found]
    assert len(disabled) == 8, "what is not possible is there, with its reason"
    for copied in (job, f"jobqueue jobs get {job}", f"select * from jobqueue.jobs where id = '{job}';"):
        assert page.all("button", **{"data-copy": copied}), copied
    assert any("http://test/jobs/" in str(found.get("data-copy")) for found in page.all("button"))
    child = connection.execute(
        "select jobqueue.send_flow(jsonb_build_array(jsonb_build_object('queue', 'q', 'ref', 'child', 'depends_on', "
        "jsonb_build_array(jsonb_build_object('id', %s::text)))))::text", (job,)
    )  # fmt: skip
    assert child.fetchone() is not None
    assert "Is waited for by" in (await see(client, f"/jobs/{job}")).text
    connection.execute(
        "update jobqueue.job set payload = jsonb_build_object('x', repeat(md5('1'), 4000)) where id = %s", (job,)
    )
    assert "Payload" in (await see(client, f"/jobs/{job}")).text
    # one that would be a thousand times its size, laid out, is shown as it is
    connection.execute(
        "update jobqueue.job set payload = (repeat('[', 90) || repeat('0,', 200000) || '0' || repeat(']', 90))::jsonb "
        "where id = %s",
        (job,),
    )
    page = await see(client, f"/jobs/{job}")
    assert f"{'[' * 90}0, 0, 0, " in page.text


async def test_a_job_says_how_long_it_waited_and_how_long_each_attempt_took(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    job = job_of(connection)
    assert not {"Waited", "Took"} & set((await see(client, f"/jobs/{job}")).words), "it has not begun"
    row = connection.execute("select claim_token from jobqueue.claim(array['q'], gen_random_uuid(), 1)").fetchone()
    assert row is not None
    connection.execute("select jobqueue.complete(%s, %s)", (job, row[0]))
    times = "started_at = run_at + interval '42 s', completed_at = run_at + interval '103 s'"
    connection.execute(f"update jobqueue.job set {times} where id = %s".encode(), (job,))
    connection.execute("update jobqueue.attempt set started_at = ended_at - interval '61 s' where job_id = %s", (job,))
    page = await see(client, f"/jobs/{job}")
    words = [word for word in page.words if word in {"Waited", "42 s", "Took", "1 min 1 s"}]
    assert words == ["Waited", "42 s", "Took", "1 min 1 s", "Took", "1 min 1 s"]
    assert "8 actions are not possible now" in page.text
    assert "Nothing." not in page.words


@pytest.mark.parametrize(
    ("began", "ended", "said"),
    [
        ("2026-11-22T10:00:00Z", "2026-11-22T10:00:00.012Z", "12 ms"),
        ("2026-11-22T10:00:00Z", "2026-11-22T11:00:01.5+01:00", "1.5 s"),
        ("2026-11-22T10:00:01Z", "2026-11-22T10:00:00Z", "0 ms"),
        (None, "2026-11-22T10:00:00Z", NOTHING),
    ],
)
def test_durations_are_said_in_the_unit_that_fits(began: str | None, ended: str, said: str) -> None:
    assert took(began, ended) == said


async def test_a_job_with_thousands_of_stages_and_attempts_has_a_page_of_usual_size(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    job = job_of(connection)
    connection.execute(
        "insert into jobqueue.stage (job_id, tenant, name, position, status) "
        "select %s, 'default', 's' || n, n, case when n <= 1500 then 'completed' else 'pending' end "
        "from generate_series(1, 3000) n",
        (job,),
    )
    connection.execute(
        "insert into jobqueue.attempt (job_id, tenant, attempt, outcome, started_at, ended_at, error_class, error_code, "
        "error_message, error_detail) "
        "select %s, 'default', n, 'failed', now(), now(), 'transient', 'E', 'no', repeat('x', 2000) "
        "from generate_series(1, 3000) n",
        (job,),
    )
    answer = await client.get(f"/ui/jobs/{job}")
    page = Page(answer.text)
    assert len(answer.text) < 200_000
    assert "1,500 of 3,000 done; 1,492 to 1,591 are shown" in page.text, "the first that is not done is in sight"
    assert "The latest 100 of 3,000 attempts" in page.text
    assert answer.text.count("<summary>Traceback") == 10


async def test_times_that_only_postgres_knows_break_no_page(client: httpx2.AsyncClient, connection: Connection) -> None:
    """Sending refuses them; by hand the table takes any time."""
    job = job_of(connection)
    for run_at in ("10000-01-01", "20000-01-01", "0044-03-15 12:00 BC"):
        connection.execute("update jobqueue.job set run_at = %s where id = %s", (run_at, job))
        assert run_at[:9] in (await see(client, f"/jobs/{job}")).text
        assert shown(await see(client, "/jobs")) == [job], run_at


async def test_a_page_is_shown_though_the_database_was_restarted(
    client: httpx2.AsyncClient, connection: Connection
) -> None:
    job = job_of(connection)
    for path in (f"/ui/jobs/{job}", "/readyz", "/metrics"):
        await client.get("/jobs/stats")
        connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where application_name = 'jobqueue api' and datname = current_database()"
        )
        answer = await client.get(path)
        assert answer.status_code == 200, (path, answer.text)
    assert "jobqueue_database_up 1" in answer.text


async def test_a_slow_database_is_told_and_not_waited_for(
    client: httpx2.AsyncClient, connection: Connection, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock stands for ten million jobs: no statement of a page ends while it is held."""
    job = job_of(connection)
    monkeypatch.setattr(visit, "READ_SECONDS", 0.1)
    with psycopg.connect(dsn) as blocking:
        blocking.execute("lock table jobqueue.job in access exclusive mode")
        page = await see(client, "/jobs?queue=q")
        assert "Looking through all jobs takes longer than 3 s." in page.text
        assert "The number of jobs by status is not shown" in page.text
        page = await see(client, f"/jobs/{job}", 504)
        assert "was given up. Narrow it" in page.text
    assert shown(await see(client, "/jobs?queue=q")) == [job]


async def test_the_navigation_leads_somewhere(client: httpx2.AsyncClient) -> None:
    for section in NAVIGATION:
        page = await see(client, section.path)
        current = {str(found["href"]) for found in page.all("a", **{"aria-current": "page"})}
        assert "/ui" + section.path in current
