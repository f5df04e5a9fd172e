"""Two that meet on one job, or on jobs that belong together: nothing is lost, and nobody who has to go on waits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from tests.sql.engine import WORKER, Engine
from tests.sql.test_flows import fail, send_flow
from tests.sql.test_maintain import maintain
from tests.support.waiting import wait_until

MOVE_INTO_PAST = "update jobqueue.job set completed_at = now() - interval '60 d' where id = %s"


def test_maintenance_goes_on_while_somebody_holds_a_child_of_what_is_to_end(engine: Engine) -> None:
    """A transaction that a person leaves open must not keep lost jobs from being rescued, nor anything else."""
    child = {"ref": "c", "on_failure": "fail", "queue": "children"}
    old = send_flow(engine, {"ref": "p"}, {**child, "depends_on": ["p"]})
    fail(engine, old["p"])
    engine.run(MOVE_INTO_PAST, old["p"])
    late = send_flow(engine, {"ref": "p", "options": {"expires_in": 1}}, {**child, "depends_on": ["p"]})
    engine.run("update jobqueue.job set expires_at = now() - interval '1 s' where id = %s", late["p"])
    lost = send_flow(
        engine, {"ref": "p", "queue": "lost", "options": {"max_retries": 0}}, {**child, "depends_on": ["p"]}
    )
    plain = engine.send("lost")
    expiring = engine.send("expiring", expires_in=1)
    engine.run("update jobqueue.job set expires_at = now() - interval '1 s' where id = %s", expiring)
    claims = {claim.id: claim for claim in engine.claim(2, "lost")}
    assert set(claims) == {lost["p"], plain}
    engine.lose_lease(*claims)
    children = [old["c"], late["c"], lost["c"]]
    engine.run("set statement_timeout = '60 s'")
    with psycopg.connect(engine.dsn) as person:
        person.execute("select from jobqueue.job where id = any (%s) for update", [children])
        assert maintain(engine, "retention", "expire", "rescue").keys() == {"retention", "expire", "rescue"}
        assert [engine.status(job) for job in (plain, expiring)] == ["pending", "failed"]
        assert [engine.status(job) for job in (old["p"], late["p"], lost["p"])] == ["failed", "pending", "processing"]
    engine.run("update jobqueue.claim_batch set check_at = now() - interval '1 s'")
    maintain(engine, "retention", "expire", "rescue")
    assert [engine.status(job) for job in (late["p"], lost["p"], late["c"], lost["c"])] == ["failed"] * 4
    assert engine.rows("select from jobqueue.job where id = %s", old["p"]) == []


def test_a_running_job_that_no_note_of_a_claim_names_is_found_by_retention_and_rescued(engine: Engine) -> None:
    claim = engine.claimed()
    maintain(engine, "retention")
    assert engine.count("claim_batch") == 1, "its lease holds"
    engine.run("delete from jobqueue.claim_batch")
    engine.run("update jobqueue.job set lease_until = now() - interval '2 min'")
    maintain(engine, "retention")
    assert maintain(engine, "rescue") == {"rescue": 1}
    assert engine.status(claim.id) == "pending"


def test_a_note_of_a_claim_goes_only_with_the_ends_of_its_own_worker(engine: Engine) -> None:
    """A crash of the server may take back the last numbers of notes, and give them to others."""
    engine.claimed()
    settle = "select * from jobqueue.settle(%s, '{}', '{}', null, null, array(select id from jobqueue.claim_batch))"
    for worker, left in ((UUID(int=1), 1), (WORKER, 0)):
        engine.rows(settle, worker)
        assert engine.count("claim_batch") == left


def test_all_of_a_batch_goes_back_though_the_end_of_one_appoints_another_as_its_witness(engine: Engine) -> None:
    batch = engine.call("create_batch", Jsonb({}))
    jobs = sorted(engine.send(batch=str(batch)) for _ in range(15))
    claims = {claim.id: claim for claim in engine.claim(20)}
    engine.run("update jobqueue.job set settle_flags = settle_flags | 4 where id = %s", jobs[0])
    engine.call("close_batch", batch)
    engine.call("cancel", jobs[0], "not needed")
    tokens = [claims[job].token for job in jobs]
    assert engine.value("select jobqueue.release_many(%s, %s)", jobs, tokens) == 15
    assert [engine.status(job) for job in jobs] == ["cancelled"] + ["pending"] * 14


def test_purging_leaves_nothing_of_a_flow_that_goes_on_after_a_bad_end(engine: Engine) -> None:
    first = [{"ref": "a"}, *({"ref": f"x{n}"} for n in range(20))]
    send_flow(engine, *first, {"ref": "b", "depends_on": ["a"], "on_failure": "run"})
    purged = engine.row("select * from jobqueue.purge_queue('q', 'over')")
    assert (purged["cancelled"], purged["deleted"], engine.count()) == (22, 22, 0)


def test_a_debounced_payload_is_not_dropped_because_the_job_of_the_next_slot_starts_just_now(engine: Engine) -> None:
    options: dict[str, Any] = {"debounce_seconds": 3600, "merge_payload": True}
    send = "select * from jobqueue.send('q', %s, %s)"
    engine.rows(send, {"n": 0}, options)
    later = engine.row(send, {"n": 1}, options)["id"]
    sender = engine.another()
    with psycopg.connect(engine.dsn) as person, ThreadPoolExecutor(1) as pool:
        worker = Engine(person, engine.dsn)
        worker.call("run_now", later, "no more to come")
        assert {claim.id for claim in worker.claim(2)} >= {later}
        sending = pool.submit(sender.row, send, {"n": 2}, options)
        waits = "select exists (select from pg_locks where not granted and pid = %s)"
        wait_until(lambda: engine.value(waits, sender.connection.info.backend_pid), what="the sender waits")
        person.commit()
        sent = sending.result(60)
    assert sent["created"], "not dropped"
    assert engine.job(sent["id"])["payload"] == {"n": 2}
    assert engine.job(later)["payload"] == {"n": 1}


def test_schedules_go_on_while_an_open_transaction_holds_the_key_of_one(engine: Engine) -> None:
    schedule = "select jobqueue.schedule(%s, 'q', '0 0 1 1 *', '{}', %s)"  # no other tick comes meanwhile
    engine.value(schedule, "held", {"singleton_key": "k"})
    engine.value(schedule, "free", {})
    engine.run("update jobqueue.schedule set next_at = date_trunc('minute', now())")
    engine.run("set statement_timeout = '60 s'")
    with psycopg.connect(engine.dsn) as person:
        Engine(person, engine.dsn).send(singleton_key="k")
        assert engine.row("select sent from jobqueue.run_schedules()") == {"sent": 1}
        person.rollback()
    engine.run("update jobqueue.schedule set retry_at = now() where retry_at is not null")
    assert engine.row("select sent from jobqueue.run_schedules()") == {"sent": 1}


def test_a_queue_is_not_deleted_while_jobs_of_others_wait_for_one_of_its_ended_jobs(engine: Engine) -> None:
    """Without its queue the parent could be retried, but nobody would ever run it."""
    ids = send_flow(engine, {"ref": "p", "queue": "parents"}, {"ref": "c", "queue": "children", "depends_on": ["p"]})
    fail(engine, ids["p"])
    refusal = engine.refused(engine.call, "delete_queue", "parents")
    assert (refusal.sqlstate, refusal.code, refusal.detail["jobs"]) == ("JQ409", "CONFLICT", 1)
    assert engine.call("retry", ids["p"], "again") == "pending"
    assert [claim.id for claim in engine.claim(1, "parents")] == [ids["p"]]


def test_a_failed_head_that_is_kept_for_no_time_holds_its_key_as_long_as_others_wait_for_it(engine: Engine) -> None:
    engine.call("create_queue", "fifo", Jsonb({"policy": "key_strict_fifo", "keep_ended": 0}))
    head, next_one = (engine.send("fifo", singleton_key="k") for _ in range(2))
    fail(engine, head)
    assert engine.claim(2, "fifo") == [], "the key waits for its head"
    engine.run("update jobqueue.admission_line set stage = 0, line = '', rank = 0, seq = jobqueue.next_ready()")
    maintain(engine, "retention")  # also while its followers have just come
    assert engine.status(head) == "failed"
    assert engine.call("skip", head, "go on") == "skipped"
    assert [claim.id for claim in engine.claim(2, "fifo")] == [next_one]
    assert engine.rows("select from jobqueue.job where id = %s", head) == []


def test_a_slot_lasts_as_long_as_it_says_though_its_job_is_kept_for_no_time(engine: Engine) -> None:
    options = {"throttle_seconds": 3600, "keep_completed": 0}
    claim = engine.claimed(throttle_seconds=3600, keep_completed=0)
    engine.call("complete", claim.id, claim.token)
    again = engine.row("select * from jobqueue.send('q', '{}', %s)", options)
    assert (again["id"], again["created"], again["reason"]) == (claim.id, False, "throttled")
    maintain(engine, "retention")
    assert not engine.row("select * from jobqueue.send('q', '{}', %s)", options)["created"]
    engine.run("update jobqueue.job set held_key = replace(held_key, split_part(held_key, ':', 3), '1')")
    maintain(engine, "retention")
    assert engine.count() == 0


def test_a_job_whose_end_fails_does_not_keep_the_others_from_being_rescued(engine: Engine) -> None:
    jobs = [engine.send(max_retries=0) for _ in range(2)]
    engine.claim(2)
    engine.lose_lease(*jobs)
    engine.run("create function public.no() returns trigger language plpgsql as 'begin raise ''no''; end'")
    refuses = f"new.job_id = '{jobs[0]}'"
    engine.run(
        f"create trigger no before insert on jobqueue.attempt for each row when ({refuses}) execute function public.no()"
    )
    assert maintain(engine, "rescue") == {"rescue": 1}
    assert [engine.status(job) for job in jobs] == ["processing", "failed"]


def test_a_worker_goes_on_beating_and_reporting_while_somebody_holds_one_of_its_jobs(engine: Engine) -> None:
    """Its reports must keep neither its leases back, nor the reports and the ends of its other jobs."""
    jobs = [engine.send() for _ in range(2)]
    claims = engine.claim(2)
    beats = [{"id": str(claim.id), "token": str(claim.token)} for claim in claims]
    reports = [{**beat, "pct": 40} for beat in beats]
    beat = "select * from jobqueue.heartbeat(%s, %s)"
    engine.rows(beat, WORKER, Jsonb(beats))
    engine.run("update jobqueue.job set lease_until = now() + interval '1 s'")
    engine.run("set statement_timeout = '60 s'")
    reporter = engine.another()
    reporter.run("set statement_timeout = '60 s'")
    with psycopg.connect(engine.dsn) as person:
        person.execute("select from jobqueue.job where id = %s for update", [jobs[0]])
        with reporter.undone():
            assert reporter.rows(beat, WORKER, Jsonb(reports)) == []
            assert [reporter.job(job)["progress_pct"] for job in jobs] == [0, 40]
            # a report is under way, and yet the worker itself can be written
            assert engine.rows(beat, WORKER, Jsonb(beats)) == []
        assert reporter.rows(beat, WORKER, Jsonb(reports)) == []
        soon = "select count(*) from jobqueue.job where lease_until > now() + interval '20 s'"
        assert engine.value(soon) == 1, "all but the one that is held"
        engine.call("complete", jobs[1], claims[1].token)
    reporter.rows(beat, WORKER, Jsonb(reports))
    assert [engine.job(job)["progress_pct"] for job in jobs] == [40, 100]


def test_a_worker_waits_with_its_beat_for_somebody_who_changes_a_queue(engine: Engine) -> None:
    """How long a report may wait (0.2 s) is not how long the leases may."""
    claim = engine.claimed()
    worker = engine.another()
    beats = [{"id": str(claim.id), "token": str(claim.token), "pct": 40}]
    with psycopg.connect(engine.dsn) as person, ThreadPoolExecutor(1) as pool:
        person.execute("lock table jobqueue.queue in access exclusive mode")
        beating = pool.submit(worker.rows, "select * from jobqueue.heartbeat(%s, %s)", WORKER, Jsonb(beats))
        waited = "select coalesce(max(now() - waitstart) > interval '0.25 s', false) from pg_locks where pid = %s"
        wait_until(
            lambda: beating.done() or engine.value(waited, worker.connection.info.backend_pid), what="the beat waits"
        )
        person.rollback()
        assert beating.result(60) == []
    assert engine.job(claim.id)["progress_pct"] == 40
