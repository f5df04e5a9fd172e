"""What the pages of the dashboard ask the database: right, each in one bounded call, and nobody else's."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

from tests.sql.engine import PERMANENT, Engine

API = "jobqueue_api"


def page(engine: Engine, function: str, *arguments: Any, tenants: str = "*") -> Any:
    """The answer of a page's call, as the API makes it for a caller with these tenants."""
    with engine.undone():
        return json.loads(engine.call(function, API, tenants, *arguments))


def failed(engine: Engine, n: int, queue: str = "q", tenant: str = "default", ago: str = "1 min", **said: str) -> None:
    """Failed jobs, each with a number of its own in the message; `{n}` in it is the number."""
    engine.run(
        "insert into jobqueue.job "
        "(queue, job_type, tenant, status, completed_at, failed_at, error_class, error_code, error_message) "
        "select %s, %s, %s, 'failed', now() - %s::interval, now() - %s::interval, %s, %s, replace(%s, '{n}', i::text) "
        "from generate_series(1, %s) i",
        queue,
        said.get("job_type", "ocr"),
        tenant,
        ago,
        ago,
        said.get("error_class", "transient"),
        said.get("code", "TimeoutError"),
        said.get("message", "page {n} of 'x{n}.pdf' took too long"),
        n,
    )


def test_messages_that_differ_in_numbers_ids_and_quoted_words_are_one_failure(engine: Engine) -> None:
    for one, other, same in (
        ('page 7 of "a.pdf" took 3.5 s', 'page 81 of "b.pdf" took 12.0 s', True),
        ("no row 0198c5a0-1c2d-7e3f-8a4b-5c6d7e8f9a0b", "no row 0198c5a0-1c2d-7e3f-8a4b-5c6d7e8f9a0c", True),
        ("at 0x7ffe12 in deadbeefdeadbeef01", "at 0x1 in 00112233445566778899aa", True),
        ("the same\nwith another second line 1", "the same\nwith quite another one", True),
        ("no answer", "no question", False),
        ("a" * 400 + "1", "a" * 400 + "b", True),
    ):
        prints = [engine.call("http_fingerprint", "E", message) for message in (one, other)]
        assert (prints[0] == prints[1]) is same, (one, other)
        assert engine.call("http_fingerprint", "F", one) != prints[0], "another code is another failure"
    assert engine.call("http_message_shape", "page 7 of 'a.pdf'") == "page # of #"


def test_failures_are_grouped_and_counted_by_hour_day_and_week(engine: Engine) -> None:
    engine.run("insert into jobqueue.queue (name) values ('q'), ('r')")
    failed(engine, 3, ago="10 min")
    failed(engine, 2, queue="r", ago="5 h", tenant="b")
    failed(engine, 4, ago="3 d")
    failed(engine, 1, ago="8 d")
    failed(engine, 5, error_class="quota", code="OVER", message="credits are used up", ago="2 min")
    inbox = page(engine, "http_failures", {}, 10_000, 100)
    quota, slow = inbox["groups"]
    assert not inbox["capped"]
    assert (quota["error_class"], quota["hour"], quota["day"], quota["week"]) == ("quota", 5, 5, 5)
    assert (slow["hour"], slow["day"], slow["week"], slow["tenants"], slow["queues"]) == (3, 5, 9, 2, ["q", "r"])
    assert slow["sample"].endswith(".pdf' took too long")
    assert engine.status(UUID(slow["sample_id"])) == "failed"
    assert slow["first_at"] < slow["last_at"]

    assert [g["week"] for g in page(engine, "http_failures", {}, 10_000, 100, tenants="b")["groups"]] == [2]
    assert page(engine, "http_failures", {}, 10_000, 100, tenants="nobody")["groups"] == []
    for wanted, counts in (
        ({"queue": "r"}, [2]),
        ({"tenant": "b"}, [2]),
        ({"error_class": "quota"}, [5]),
        ({"job_type": "x"}, []),
    ):
        assert [g["week"] for g in page(engine, "http_failures", wanted, 10_000, 100)["groups"]] == counts


def test_a_group_of_failures_is_counted_retried_and_skipped_as_a_whole(engine: Engine) -> None:
    ours = [engine.in_status("failed") for _ in range(3)]
    failed(engine, 2, job_type="q", error_class="permanent", code="Other", message="x")
    group = next(
        g for g in page(engine, "http_failures", {}, 10_000, 100)["groups"] if g["error_code"] == PERMANENT["code"]
    )
    named = {name: group[name] for name in ("job_type", "error_class", "fingerprint")}

    def act(**body: Any) -> Any:
        found = engine.value(
            "select jobqueue.http_failure_bulk(null, '*', 'ann', %s, 10000)", {**named, "reason": "mended", **body}
        )
        engine.run("select set_config('jobqueue.tenants', '', false)")
        return json.loads(found)

    assert act(action="retry", dry_run=True)["counts"] == {"done": 3}
    refusal = engine.refused(act, action="retry", expected_count=1)
    assert (refusal.sqlstate, refusal.code) == ("JQ409", "CONFLICT")
    done = act(action="retry", expected_count=3)
    assert (done["counts"], done["status"], {engine.status(job) for job in ours}) == (
        {"done": 3},
        "completed",
        {"pending"},
    )
    assert engine.audit(ours[0])[-1]["actor"] == "ann"
    assert act(action="skip", dry_run=True)["total"] == 0, "they have not failed any more"


def test_the_inbox_reads_no_more_the_more_has_failed_and_no_queue_hides_another(engine: Engine) -> None:
    engine.run("insert into jobqueue.queue (name) select 'q' || i from generate_series(1, 20) i")
    failed(engine, 3_000, queue="q1", tenant="loud")
    for i in range(2, 21):
        failed(engine, 1, queue=f"q{i}", message=f"only in {'x' * i}")
    engine.run("analyze jobqueue.job")

    def blocks(tenants: str) -> int:
        with engine.undone():
            engine.run("select jobqueue.http_context('jobqueue_api', %s, true)", tenants)
            (plan,) = engine.value(
                "explain (analyze, buffers, format json) select * from jobqueue.http_failed(null, null, 1000)"
            )
        return int(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"])

    few, few_of_one = blocks("*"), blocks("default")
    failed(engine, 20_000, queue="q1", tenant="loud", ago="2 min")
    assert blocks("*") <= 1.3 * few
    assert blocks("default") <= 1.3 * few_of_one, "a tenant without failures does not read those of others to the end"
    inbox = page(engine, "http_failures", {}, 1_000, 100)
    assert inbox["capped"]
    assert len({queue for group in inbox["groups"] for queue in group["queues"]}) == 20


def test_the_overview_has_every_queue_and_what_needs_attention(engine: Engine) -> None:
    engine.run("insert into jobqueue.queue (name, warn_backlog) values ('empty', null), ('q', 1)")
    for _ in range(3):
        engine.send()
    engine.send(delay=3600)
    engine.claim(1)
    engine.call("pause_queue", "q", "a fire")
    engine.run(
        "insert into jobqueue.statistic (queue, begins_at, minutes, completed, failed) values "
        "('q', date_trunc('minute', now(), 'UTC'), 1, 4, 1), "
        "('q', date_trunc('minute', now() - interval '59 min', 'UTC'), 1, 2, 0), "
        "('q', date_trunc('minute', now() - interval '61 min', 'UTC'), 1, 9, 0)"
    )
    overview = page(engine, "http_overview")
    empty, q = overview["queues"]
    assert {"name": "empty", "ready": 0, "failed": 0, "completed_minutes": None, "workers": 1}.items() <= empty.items()
    assert {"ready": 2, "scheduled": 1, "processing": 1, "workers": 1, "pause_reason": "a fire"}.items() <= q.items()
    assert (q["completed_minutes"][0], q["completed_minutes"][-1], sum(q["completed_minutes"])) == (2, 4, 6)
    assert (len(q["failed_minutes"]), q["failed_minutes"][-1]) == (60, 1)
    assert {"paused: queue q", "backlog: q"} <= {row["name"] for row in overview["health"]}
    assert all(row["status"] != "ok" for row in overview["health"])
    assert page(engine, "http_overview", tenants="a")["health"] is None, "names jobs of all tenants"


def test_workers_show_what_they_run_of_the_callers_tenants(engine: Engine) -> None:
    engine.send(display_name="Reading", tenant="a")
    engine.send(tenant="b")
    engine.claim(2)
    (worker,) = page(engine, "http_workers")
    assert (worker["state"], len(worker["jobs"])) == ("working", 2)
    (worker,) = page(engine, "http_workers", tenants="a")
    assert [job["name"] for job in worker["jobs"]] == ["Reading"]
    assert worker["hostname"] is None, "where workers run is for those who see all tenants"


def test_schedules_show_their_next_three_times(engine: Engine) -> None:
    engine.run("insert into jobqueue.queue (name) values ('q')")
    engine.run("select jobqueue.schedule('night', 'q', '0 3 * * *', '{}', '{\"tenant\": \"a\"}')")
    (night,) = page(engine, "http_schedules", tenants="a")
    assert len(night["ticks"]) == 3
    assert night["ticks"] == sorted(night["ticks"])
    assert page(engine, "http_schedules", tenants="b") == []
    assert page_of_ticks(engine, "b") == []
    engine.call("pause_schedule", "night", "holidays")
    assert page(engine, "http_schedules")[0]["ticks"] == []


def page_of_ticks(engine: Engine, tenants: str) -> Any:
    """Ticks asked for directly by a caller of other tenants."""
    with engine.acting_as(API, tenants):
        return engine.call("http_ticks", "night", 3)


def test_a_batch_lists_its_jobs_failed_ones_first(engine: Engine) -> None:
    batch = engine.call("create_batch", {"tenant": "a"})
    for _ in range(3):
        engine.send(batch=str(batch), tenant="a")
    first, second = engine.claim(2)
    engine.call("complete", first.id, first.token)
    engine.fail(second, PERMANENT)
    jobs = page(engine, "http_batch_jobs", batch, 10, tenants="a")
    assert [job["status"] for job in jobs] == ["failed", "pending", "completed"]
    assert len(page(engine, "http_batch_jobs", batch, 1)) == 1
    assert page(engine, "http_batch_jobs", batch, 10, tenants="b") == []


def test_the_page_of_a_tenant_says_what_it_waits_for(engine: Engine) -> None:
    for i in range(2):
        engine.send(subject=f"document:{i}", tenant="a")
    (running,) = engine.claim(1)
    engine.call("progress", running.id, running.token, 90)
    failed(engine, 1, tenant="a")
    engine.send(tenant="b")
    waits = page(engine, "http_tenant_page", "a", 1)
    assert (waits["unfinished"], waits["progress_pct"], waits["failed"], waits["subjects"], waits["named"]) == (
        2,
        45,
        1,
        ["document"],
        2,
    )
    assert [job["id"] for job in waits["active"]] == [str(running.id)], "one of two, that which runs first"
    assert waits["failures"][0]["allowed_actions"]
    assert page(engine, "http_tenant_page", "a", 1, tenants="b")["unfinished"] == 0, "row policies hold"


def test_the_state_of_the_database_is_for_those_who_see_all_and_hides_secrets(engine: Engine) -> None:
    engine.run("insert into jobqueue.setting values ('webhook_secret', '\"s3cret\"'), ('warn_slow_job', '\"5 min\"')")
    system = page(engine, "http_system")
    assert {"server", "schema", "indexes"} <= {check["name"] for check in system["checks"]}
    assert {"job", "audit"} <= {table["name"] for table in system["tables"]}
    assert {"name": "warn_slow_job", "value": "5 min"} in system["settings"]
    assert "s3cret" not in json.dumps(system)
    refusal = engine.refused(page, engine, "http_system", tenants="a")
    assert refusal.sqlstate == "JQ403"
