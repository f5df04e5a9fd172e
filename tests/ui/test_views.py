"""The views beside jobs, without a browser: whom they show what, forms that act, and the words and drawings in them."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from typing import Any
from xml.etree import ElementTree

import httpx2
import psycopg
import pytest

from jobqueue.api.ui import bulks, charts
from jobqueue.api.ui.expressions import in_words
from jobqueue.api.ui.groups import _in_order
from jobqueue.api.ui.tenants import things
from tests.api.conftest import serving
from tests.sql.engine import Engine
from tests.support.api_keys import bearer, create_key
from tests.ui.seeds import seed

Connection = psycopg.Connection[tuple[Any, ...]]
OWN_PAGE = {"Sec-Fetch-Site": "same-origin"}
ALL = (
    "/",
    "/failures",
    "/queues",
    "/queue?name=ocr",
    "/workers",
    "/schedules",
    "/groups",
    "/bulks",
    "/audit",
    "/system",
)


async def post(client: httpx2.AsyncClient, path: str, **form: str) -> httpx2.Response:
    """Send a form as one of our own pages does."""
    return await client.post("/ui" + path, data=form, headers=OWN_PAGE)


async def test_views_show_a_tenant_its_own_and_what_is_of_all_only_to_those_who_see_all(
    dsn: str, connection: Connection
) -> None:
    seeds = seed(connection, dsn)
    seeds.engine.run("update jobqueue.schedule set tenant = 'secret'")
    stranger = bearer(create_key(connection, tenants=["b"], scopes=["jobs:read", "jobs:act"]))
    everybody = bearer(create_key(connection, tenants=["*"], scopes=["admin"]))
    async with serving(dsn) as client:

        async def get(path: str, who: dict[str, str]) -> tuple[int, str]:
            answer = await client.get("/ui" + path, headers=who)
            return answer.status_code, answer.text

        for path in (*ALL, f"/flows/{seeds.flow}", f"/batches/{seeds.batch}", "/t/acme"):
            status, theirs = await get(path, stranger)
            assert status in {200, 403, 404}, path
            for secret in (
                "Heathen",
                "scan-",
                "UnicodeDecodeError",
                "Import of March",
                "nightly-report",
                "acme",
                "pid 4711",
                "waits for the numbers",
            ):
                assert secret not in theirs.replace("/t/acme", ""), (path, secret)
            status, page = await get(path, everybody)
            assert status == 200, (path, page)
        assert (await get("/system", stranger))[0] == 403
        assert (
            (await get(f"/flows/{seeds.flow}", stranger))[0]
            == (await get(f"/batches/{seeds.batch}", stranger))[0]
            == 404
        )
        assert (await get("/t/acme", stranger))[0] == 403
        assert (await get("/flows/nonsense", everybody))[0] == (await get("/queue?name=none", everybody))[0] == 404
        assert "Needs attention" not in (await get("/", stranger))[1]
        overview = (await get("/", everybody))[1]
        assert "the printer is on fire" in overview
        assert "1,347 completed, 12 failed in the last hour" in overview
        status, refused = await get("/queue/pause?name=ocr", stranger)
        assert (status, "you do not see all" in refused) == (403, True)


async def test_the_system_page_hides_passwords(dsn: str, connection: Connection) -> None:
    async with serving(dsn + " password=hunter2-secret") as client:
        page = (await client.get("/ui/system")).text
        assert "JOBQUEUE_DSN" in page
        assert "hunter2" not in page


async def test_forms_act_with_a_reason_and_lead_back(dsn: str, connection: Connection) -> None:
    engine = Engine(connection, dsn)
    connection.execute("insert into jobqueue.queue (name) values ('a/b.c')")
    engine.claim(1, "a/b.c")
    (worker,) = engine.values("select id from jobqueue.worker")
    async with serving(dsn) as client:
        blank = await post(client, "/queue/pause?name=a/b.c", reason=" ", back="/queues")
        assert (blank.status_code, "Give a reason" in blank.text) == (422, True)
        paused = await post(client, "/queue/pause?name=a/b.c", reason="a fire", back="/queue?name=a/b.c")
        assert (paused.status_code, paused.headers["Location"]) == (303, "/ui/queue?name=a%2Fb.c&done=pause_queue")
        assert engine.value("select pause_reason from jobqueue.queues") == "a fire"
        assert "The queue is paused" in (await client.get(paused.headers["Location"])).text
        away = await post(client, "/queue/resume?name=a/b.c", reason="x", back="//evil.example")
        assert not away.headers["Location"].startswith("//")
        drained = await post(client, f"/worker/drain?name={worker}", reason="an upgrade")
        assert drained.status_code == 303
        for path in ("/queue/pause?name=none", "/queue/pause", "/worker/drain?name=7", "/schedule/pause?name=none"):
            assert (await post(client, path, reason="x")).status_code == 404, path
        foreign = await client.post(
            "/ui/queue/pause?name=a/b.c", data={"reason": "x"}, headers={"Sec-Fetch-Site": "cross-site"}
        )
        assert foreign.status_code == 403
    assert engine.values("select action from jobqueue.audit order by id") == [
        "pause_queue",
        "resume_queue",
        "drain_worker",
    ]


async def test_a_large_group_of_failures_wants_its_number_typed(dsn: str, connection: Connection) -> None:
    engine = Engine(connection, dsn)
    connection.execute("insert into jobqueue.queue (name) values ('q')")
    engine.run(
        "insert into jobqueue.job (queue, job_type, status, completed_at, failed_at, error_class, error_code, error_message) "
        "select 'q', 'q', 'failed', now(), now(), 'transient', 'E', 'number ' || i from generate_series(1, 101) i"
    )
    fingerprint = engine.call("http_fingerprint", "E", "number 1")
    group = f"?job_type=q&error_class=transient&fingerprint={fingerprint}"
    async with serving(dsn) as client:
        inbox = (await client.get("/ui/failures")).text
        assert f"/ui/failures/retry{group}".replace("&", "&amp;") in inbox
        assert "possible for all of them" in (await client.get("/ui/failures/skip" + group)).text
        form = {"reason": "mended", "expected_count": "101", "back": "/failures"}
        untyped = await post(client, "/failures/retry" + group, **form, typed="100")
        assert (untyped.status_code, "Type the number of jobs, 101" in untyped.text) == (422, True)
        grown = await post(client, "/failures/retry" + group, **{**form, "expected_count": "50"}, typed="50")
        assert (grown.status_code, "101 jobs by now" in grown.text) == (409, True)
        done = await post(client, "/failures/retry" + group, **form, typed="101")
        assert done.headers["Location"] == "/ui/failures?done=failures_retry"
        listed = (await client.get("/ui/bulks")).text
        assert "mended" in listed
        assert "retry 101 jobs" in listed
        assert fingerprint in listed
        assert (await client.get("/ui/failures/delete" + group)).status_code == 404
        assert (await client.get("/ui/failures/retry")).status_code == 404
    assert engine.value("select count(*) from jobqueue.job where status = 'pending'") == 101


async def test_the_audit_and_bulk_operations_are_read_page_by_page(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(connection, dsn)
    for n in range(60):
        engine.run(
            "insert into jobqueue.audit (action, target, reason, session_user_name, actor) "
            "values ('pause_queue', %s, 'r', 'x', %s)",
            f"queue-{n}-",
            "ann" if n % 2 else "bob",
        )
    monkeypatch.setattr(bulks, "PER_PAGE", 2)
    job = engine.in_status("failed")
    for action in ("retry", "cancel", "resume"):
        engine.value(
            "select jobqueue.http_bulk(null, '*', 'ann', %s, '', null, null)",
            {"action": action, "reason": f"why {action}", "filter": {"ids": [str(job)]}},
        )
    engine.run("select set_config('jobqueue.tenants', '', false)")
    async with serving(dsn) as client:
        first = (await client.get("/ui/audit?action=pause_queue")).text
        assert ("queue-59-" in first, "queue-9-" in first) == (True, False)
        older = first.split('href="/ui/audit?before=')[1].split('"')[0].replace("&amp;", "&")
        second = (await client.get("/ui/audit?before=" + older)).text
        assert ("queue-59-" in second, "queue-9-" in second) == (False, True)
        assert "queue-58-" not in (await client.get("/ui/audit?actor=ann")).text
        assert "not the id of a job" in (await client.get("/ui/audit?job_id=7")).text
        assert "on record" in (await client.get("/ui/audit?actor=nobody&before=x")).text
        newest = (await client.get("/ui/bulks")).text
        assert ("why resume" in newest, "why retry" in newest, "1 named" in newest) == (True, False, True)
        older = newest.split('href="/ui/bulks?before=')[1].split('"')[0]
        assert "why retry" in (await client.get("/ui/bulks?before=" + older)).text
        found = await client.get(f"/ui/groups?id={job}&kind=batch")
        assert found.headers["Location"] == f"/ui/batches/{job}"


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("0 3 * * 1-5", "at 03:00, Monday to Friday"),
        ("*/10 * * * *", "every 10 minutes"),
        ("* * * * *", "every minute"),
        ("30 8,12,18 * * *", "at 08:30, 12:30 and 18:30"),
        ("15 */2 * * *", "minute 15 of every 2 hours"),
        ("5 * * * *", "minute 5 of every hour"),
        ("0 0 1 jan,jul *", "at 00:00, on day 1 of the month, in January and July"),
        ("0 0 13 * fri", "at 00:00, on day 13 of the month or Friday"),
        ("*/15 * * * * *", "every 15 seconds"),
        ("30 0 3 * * *", "at 03:00:30"),
        ("@weekly", "at 00:00, Sunday"),
        ("0 9 * * 7", "at 09:00, Sunday"),
        ("RRULE:FREQ=WEEKLY;INTERVAL=2;BYDAY=MO,FR;BYHOUR=9", "every 2 weeks on Monday and Friday at 09:00"),
        ("FREQ=MONTHLY;BYDAY=-1FR;BYHOUR=17;BYMINUTE=30;COUNT=3", "every month on the last Friday at 17:30 (count=3)"),
        ("FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=-1", "every year in February on the last day"),
        ("61 nonsense", None),
        ("0 3 * * blue", None),
        ("FREQ=SOMETIMES", None),
        ("1," * 5000 + "1 * * * *", None),
    ],
)
def test_expressions_are_said_in_plain_words_or_not_at_all(expression: str, words: str | None) -> None:
    assert in_words(expression) == words


def test_charts_are_well_formed_and_leave_gaps_where_nobody_looked() -> None:
    start = datetime(2026, 3, 1, tzinfo=UTC)
    times = [start + timedelta(minutes=n) for n in range(5)]
    drawn = ElementTree.fromstring(charts.lines("Ready", times, [charts.Series("ready", [1, 2, None, 29, None])]))
    (line,) = [one for one in drawn.iter("path") if one.get("class") == "line series-ready"]
    assert (line.get("d") or "").count("M") == 2
    assert [one.text for one in drawn.iter("text")][2] == "30"
    bars = ElementTree.fromstring(
        charts.bars(
            "Ended", times, [charts.Series("completed", [3, 0, None, 1, 1]), charts.Series("failed", [1, 0, 0, 0, 2])]
        )
    )
    assert len(list(bars.iter("rect"))) == 5
    assert ElementTree.fromstring(charts.bars("Ended", [], [])).tag == "figure"
    spark = ElementTree.fromstring(charts.sparkline([0] * 59 + [1000], [0] * 59 + [1]))
    assert spark.get("aria-label") == "1,000 completed, 1 failed in the last hour"
    assert all(float(one.get("height") or 0) >= 1 for one in spark.iter("rect")), "one failure among a thousand is seen"
    assert charts.sparkline(None, None) == charts.sparkline([0], [0])
    assert [charts.nice_top(most) for most in (0, 0.004, 7, 10, 4321)] == [1, 0.004, 8, 10, 5000]


def test_jobs_of_a_flow_stand_in_their_order_even_if_some_are_missing() -> None:
    def job(name: str, *parents: str) -> dict[str, Any]:
        return {
            "id": name,
            "status": "blocked",
            "depends_on": [{"id": parent, "on_failure": "wait"} for parent in parents],
        }

    found = _in_order([job("c", "b", "gone"), job("b", "a"), job("a"), job("x", "y"), job("y", "x")])
    assert [(one["id"], one["step"]) for one in found if one["id"] in "abc"] == [("a", 1), ("b", 2), ("c", 3)]
    assert [parent["number"] for parent in next(one for one in found if one["id"] == "c")["parents"]][1] is None


def test_a_thousand_jobs_that_wait_one_for_the_other_are_put_in_order_at_once() -> None:
    """Each edge is looked at once; it is calls that are counted, for nobody else is answered meanwhile."""
    chain = [
        {"id": str(n), "status": "blocked", "depends_on": [{"id": str(n - 1), "on_failure": "wait"}]}
        for n in reversed(range(1000))
    ]
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        found = _in_order(chain)
    finally:
        sys.setprofile(before)
    assert [(job["id"], job["step"]) for job in found] == [(str(n), n + 1) for n in range(1000)]
    assert calls < 20 * len(chain)


def test_what_a_tenant_waits_for_is_named_after_its_subjects() -> None:
    assert things({"unfinished": 3, "subjects": ["document"], "named": 3}) == "3 documents"
    assert things({"unfinished": 1, "subjects": ["document"], "named": 1}) == "1 document"
    assert things({"unfinished": 3, "subjects": ["document"], "named": 2}) == "3 jobs"
    assert things({"unfinished": 2, "subjects": ["box", "bus"], "named": 2}) == "2 jobs"
    assert things({"unfinished": 2, "subjects": ["mail_box"], "named": 2}) == "2 mail boxes"
