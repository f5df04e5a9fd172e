"""Sending: in the caller's transaction, with the defaults of job, job_type and queue, and never in silence."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import PERMANENT, Engine


def test_a_sent_job_is_pending_with_the_defaults_of_the_product(engine: Engine) -> None:
    job = engine.view(engine.send("indexing", {"path": "."}))
    assert (job["queue"], job["job_type"], job["status"], job["tenant"]) == (
        "indexing",
        "indexing",
        "pending",
        "default",
    )
    assert (job["priority"], job["max_retries"], job["progress_pct"], job["attempt"], job["version"]) == (0, 3, 0, 0, 1)
    assert job["payload"] == {"path": "."}
    assert job["alive"] is None
    assert job["completed_at"] is None


def test_a_queue_has_the_defaults_of_the_product(engine: Engine) -> None:
    engine.send("q")
    queue = engine.row("select * from jobqueue.queues")
    assert queue["retry_delay"] == timedelta(seconds=60)
    assert queue["retry_delay_max"] == timedelta(minutes=30)
    assert queue["timeout"] == timedelta(minutes=15)
    assert queue["lease"] == timedelta(seconds=30)
    assert (queue["keep_completed"], queue["keep_ended"]) == (timedelta(days=7), timedelta(days=30))
    assert (queue["max_runtime"], queue["expires_in"], queue["policy"]) == (None, None, "standard")


def test_send_joins_the_transaction_of_the_caller(engine: Engine) -> None:
    with engine.undone():
        engine.send()
        assert engine.another().count() == 0
    assert engine.count() == 0


def test_ids_sort_by_time_and_are_version_7(engine: Engine) -> None:
    jobs = [engine.send() for _ in range(20)]
    assert {job.version for job in jobs} == {7}
    stamps = [job.int >> 80 for job in jobs]
    assert stamps == sorted(stamps)


def test_an_unknown_queue_is_created_unless_a_setting_forbids_it(engine: Engine) -> None:
    engine.send("new")
    engine.run("insert into jobqueue.setting values ('create_queues', 'false')")
    refusal = engine.refused(lambda: engine.send("other"))
    assert (refusal.sqlstate, refusal.code, refusal.detail) == (
        "JQ404",
        "QUEUE_NOT_FOUND",
        {"code": "QUEUE_NOT_FOUND", "queue": "other"},
    )
    nearly = engine.refused(lambda: engine.send("nwe"))
    assert (nearly.detail["nearest"], nearly.hint) == (
        "new",
        'Did you mean "new"? Create it with jobqueue.create_queue.',
    )
    engine.send("new")
    assert engine.values("select name from jobqueue.queue") == ["new"]


def test_options_are_stored_with_the_job(engine: Engine) -> None:
    job = engine.view(
        engine.send(
            job_type="ocr",
            priority=5,
            tenant="a",
            subject="document:42",
            display_name="OCR",
            metadata={"pages": 3},
            created_by="ann",
            max_retries=7,
            group="g",
        )
    )
    assert (job["job_type"], job["priority"], job["tenant"], job["subject"]) == ("ocr", 5, "a", "document:42")
    assert (job["display_name"], job["metadata"], job["created_by"]) == ("OCR", {"pages": 3}, "ann")
    assert (job["max_retries"], job["group_key"]) == (7, "g")


def test_a_delayed_job_waits_until_its_time_has_come(engine: Engine) -> None:
    job = engine.send(delay="PT1H")
    assert engine.job(job)["run_at"] - engine.job(job)["created_at"] == timedelta(hours=1)
    assert engine.claim() == []
    engine.make_due(job)
    assert [claim.id for claim in engine.claim()] == [job]


def test_run_at_is_a_time_with_an_offset(engine: Engine) -> None:
    job = engine.send(run_at="2099-01-31T13:00:00+01:00")
    assert engine.view(job)["run_at"] == datetime(2099, 1, 31, 12, tzinfo=UTC)
    past = engine.send(run_at="2001-01-01T00:00:00Z")
    assert [claim.id for claim in engine.claim(5)] == [past]


def test_a_job_type_brings_its_options_and_the_call_overrides_them(engine: Engine) -> None:
    kind = {
        "name": "ocr",
        "queue": "q",
        "label": "OCR: {payload.file} ({metadata.mode})",
        "options": {"priority": 3, "max_retries": 9, "timeout": "1 min"},
        "stages": ["scan", {"name": "merge", "weight": 3}],
        "pausable": True,
    }
    engine.call("register_job_types", Jsonb([kind]))
    job = engine.send("q", {"file": "a.pdf"}, job_type="ocr", max_retries=1, metadata={"mode": "smart"})
    row = engine.view(job)
    assert (row["priority"], row["max_retries"], row["pausable"], row["total_stages"]) == (3, 1, True, 2)
    assert row["display_name"] == "OCR: a.pdf (smart)"
    stages = engine.rows("select name, position, weight, status from jobqueue.stages where job_id = %s order by 2", job)
    assert [(s["name"], s["weight"], s["status"]) for s in stages] == [("scan", 1, "pending"), ("merge", 3, "pending")]
    assert engine.claim()[0].row["timeout"] == 60


def test_a_job_type_of_the_name_of_the_queue_is_applied_without_options(engine: Engine) -> None:
    engine.call("register_job_types", Jsonb([{"name": "q", "options": {"priority": 4}}]))
    many = engine.rows("select * from jobqueue.send_many('q', '[{}]')")
    assert [engine.job(engine.send())["priority"], engine.job(many[0]["id"])["priority"]] == [4, 4]


def test_changed_queue_options_reach_waiting_jobs_that_did_not_override_them(engine: Engine) -> None:
    plain, own = engine.send(), engine.send(lease=20, max_retries=1)
    engine.run("update jobqueue.queue set lease = '99 s', max_retries = 8")
    assert (engine.view(plain)["max_retries"], engine.view(own)["max_retries"]) == (8, 1)
    leases = {c.id: (c.row["lease_until"] - c.row["started_at"]).total_seconds() for c in engine.claim(2)}
    assert leases == {plain: 99, own: 20}


def test_the_caller_may_choose_the_id_and_a_second_send_of_it_says_so(engine: Engine) -> None:
    chosen = uuid4()
    assert engine.send(id=str(chosen)) == chosen
    again = engine.row("select * from jobqueue.send('q', '{}', %s)", {"id": str(chosen), "priority": 9})
    assert again == {"id": chosen, "created": False, "reason": "duplicate_id"}
    assert engine.job(chosen)["priority"] == 0


def test_an_id_of_another_tenant_is_refused_without_details(engine: Engine) -> None:
    chosen = engine.send(tenant="a")
    refusal = engine.refused(lambda: engine.send(tenant="b", id=str(chosen)))
    assert (refusal.sqlstate, refusal.code, refusal.detail) == ("JQ409", "CONFLICT", {"code": "CONFLICT"})
    assert str(chosen) not in refusal.message


def test_sending_for_a_tenant_that_is_not_the_sessions_is_refused(engine: Engine) -> None:
    engine.run("set jobqueue.tenants = 'a,b'")
    engine.send(tenant="b")
    for options in ({"tenant": "c"}, {}):
        refusal = engine.refused(engine.send, **options)
        assert (refusal.sqlstate, refusal.code) == ("JQ403", "FORBIDDEN")
    refusal = engine.refused(lambda: engine.rows("select * from jobqueue.send_many('q', '[{}]')"))
    assert (refusal.sqlstate, refusal.detail["index"]) == ("JQ403", 0)
    assert engine.count() == 1


def test_send_many_answers_per_element_in_order(engine: Engine) -> None:
    known = engine.send()
    jobs = [{"payload": {"n": 0}}, {"options": {"id": str(known)}}, {"payload": {"n": 2}, "options": {"priority": 1}}]
    rows = engine.rows("select * from jobqueue.send_many('q', %s)", Jsonb(jobs))
    assert [(row["created"], row["reason"]) for row in rows] == [(True, None), (False, "duplicate_id"), (True, None)]
    assert rows[1]["id"] == known
    assert [engine.job(rows[i]["id"])["payload"] for i in (0, 2)] == [{"n": 0}, {"n": 2}]


def test_plain_jobs_of_send_many_stand_in_the_line_in_order(engine: Engine) -> None:
    rows = engine.rows("select * from jobqueue.send_many('q', %s)", Jsonb([{"payload": {"n": n}} for n in range(50)]))
    claims = engine.claim(50)
    assert [claim.id for claim in claims] == [row["id"] for row in rows]
    assert [claim.row["payload"]["n"] for claim in claims] == list(range(50))


@pytest.mark.parametrize("bad", [{"options": {"priority": "high"}}, {"options": []}, {"extra": 1}, 7, None])
def test_one_invalid_element_refuses_all_of_send_many_and_is_named(engine: Engine, bad: object) -> None:
    refusal = engine.refused(
        lambda: engine.rows("select * from jobqueue.send_many('q', %s)", Jsonb([{"payload": 1}, {"payload": 2}, bad]))
    )
    assert refusal.sqlstate == "JQ400"
    assert refusal.detail["index"] == 2
    assert engine.count() == 0


def test_send_many_of_nothing_sends_nothing(engine: Engine) -> None:
    assert engine.rows("select * from jobqueue.send_many('q', '[]')") == []


def test_a_job_kept_for_no_time_goes_at_its_completion(engine: Engine) -> None:
    claim = engine.claimed(keep_completed=0)
    assert engine.call("complete", claim.id, claim.token) == "ok"
    assert engine.count() == 0


def test_a_queue_that_keeps_nothing_applies_to_plain_sends_too(engine: Engine) -> None:
    engine.run("insert into jobqueue.queue (name, keep_completed) values ('q', '0')")
    claim = engine.claimed()
    engine.call("complete", claim.id, claim.token)
    assert engine.count() == 0


def test_a_sender_notifies_only_if_somebody_waits(engine: Engine) -> None:
    engine.send()
    listener, idle = engine.another(), engine.another()
    listener.run("listen jobqueue_ready")
    engine.run("select jobqueue.send('q')")
    listener.run("notify jobqueue_ready, 'end'")
    assert [n.payload for n in listener.connection.notifies(timeout=60, stop_after=1)] == ["end"]
    idle.value("select pg_advisory_lock_shared(27249, number)::text from jobqueue.queue where name = 'q'")
    engine.run("select jobqueue.send('q')")
    assert [n.payload for n in listener.connection.notifies(timeout=60, stop_after=1)] == ["q"]


def test_a_client_without_a_session_waits_with_watch(engine: Engine) -> None:
    engine.send()
    listener = engine.another()
    listener.run("listen jobqueue_ready")
    engine.call("watch", "queue:q")
    engine.send()
    assert [n.payload for n in listener.connection.notifies(timeout=60, stop_after=1)] == ["q"]


def test_a_send_in_a_longer_transaction_always_notifies(engine: Engine) -> None:
    engine.send()
    listener = engine.another()
    listener.run("listen jobqueue_ready")
    with engine.connection.transaction():
        engine.value("select pg_sleep(0.01)::text")
        engine.send()
    assert [n.payload for n in listener.connection.notifies(timeout=60, stop_after=1)] == ["q"]


def test_changes_are_published_with_id_and_version_when_somebody_watches(engine: Engine) -> None:
    watched, other = engine.claimed(), engine.claimed()
    listener = engine.another()
    listener.run("listen jobqueue_jobs")
    engine.call("progress", other.id, other.token, 1)
    engine.call("watch", f"job:{watched.id}")
    engine.call("progress", other.id, other.token, 2)
    engine.call("progress", watched.id, watched.token, 3)
    (notice,) = listener.connection.notifies(timeout=60, stop_after=1)
    assert notice.payload == f'[["{watched.id}", {engine.job(watched.id)["version"]}]]'


def test_a_tenant_is_watched_and_so_is_everything(engine: Engine) -> None:
    listener = engine.another()
    listener.run("listen jobqueue_jobs")
    engine.call("watch", "tenant:a", timedelta(seconds=30))
    for tenant in ("b", "a"):
        claim = engine.claimed(tenant=tenant)
    (notice,) = listener.connection.notifies(timeout=60, stop_after=1)
    assert str(claim.id) in notice.payload
    engine.call("watch", "all")
    claim = engine.claimed(tenant="b")
    (notice,) = listener.connection.notifies(timeout=60, stop_after=1)
    assert str(claim.id) in notice.payload


def test_the_dead_letter_of_a_job_is_an_exact_copy_with_its_own_life(engine: Engine) -> None:
    claim = engine.claimed(
        payload={"a": None}, metadata={"kept": None, "n": 1}, tenant="t", subject="s", dead_letter="dead", priority=4
    )
    engine.fail(claim, PERMANENT)
    (copy,) = engine.rows("select * from jobqueue.jobs where dead_letter_of = %s", claim.id)
    assert (copy["queue"], copy["status"], copy["job_type"], copy["tenant"]) == ("dead", "pending", "q", "t")
    assert (copy["payload"], copy["metadata"]) == ({"a": None}, {"kept": None, "n": 1})
    assert (copy["subject"], copy["priority"], copy["retry_count"], copy["error_class"]) == ("s", 4, 0, None)
    assert [c.id for c in engine.claim(queue="dead")] == [copy["id"]]
    assert UUID(str(copy["id"])) != claim.id
