"""Tracking in SQL: percentages within stages, history that ends, damaged checkpoints, one notification per flush."""

from __future__ import annotations

from uuid import UUID

import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import PERMANENT, WORKER, Claim, Engine


def count(engine: Engine, claim: Claim, done: int, total: int) -> int:
    """Report done of total; the percentage that people see then."""
    engine.call("progress", claim.id, claim.token, None, None, {"done": done, "total": total})
    return int(engine.view(claim.id)["progress_pct"])


def begin(engine: Engine, claim: Claim, stage: str, status: str = "in_progress", **detail: object) -> None:
    """Begin (or end) a stage."""
    engine.call("stage", claim.id, claim.token, stage, status, detail or None)


def test_the_percentage_follows_from_done_and_total_rounded_down(engine: Engine) -> None:
    claim = engine.claimed()
    assert count(engine, claim, 10, 17) == 58
    assert count(engine, claim, 5, 17) == 29
    assert count(engine, claim, 0, 0) == 29
    assert count(engine, claim, 20, 17) == 100


def test_within_a_stage_done_and_total_count_by_the_weight_of_the_stage(engine: Engine) -> None:
    stages = [{"name": "scan"}, {"name": "ocr", "weight": 5}, {"name": "merge", "weight": 4}]
    claim = engine.claimed(stages=stages)
    begin(engine, claim, "scan")
    assert count(engine, claim, 1, 2) == 5
    begin(engine, claim, "scan", "completed")
    assert engine.view(claim.id)["progress_pct"] == 10
    begin(engine, claim, "ocr")
    assert [count(engine, claim, done, 100) for done in (0, 50, 100)] == [10, 35, 60]
    # Never back within the whole, and what is said outright counts.
    assert count(engine, claim, 1, 100) == 60
    engine.call("progress", claim.id, claim.token, 42)
    assert engine.view(claim.id)["progress_pct"] == 42
    begin(engine, claim, "ocr", "completed")
    begin(engine, claim, "merge")
    assert count(engine, claim, 4, 4) == 99


def test_a_stage_of_a_number_that_was_only_said_counts_by_its_share(engine: Engine) -> None:
    claim = engine.claimed()
    begin(engine, claim, "first", of=4)
    assert count(engine, claim, 1, 2) == 12
    begin(engine, claim, "first", "completed")
    # Between stages counts are the whole job's again.
    assert count(engine, claim, 9, 10) == 90


def test_a_later_attempt_takes_nothing_back(engine: Engine) -> None:
    claim = engine.claimed()
    assert count(engine, claim, 80, 100) == 80
    engine.fail(claim, retry_in="0")
    (claim,) = engine.claim()
    assert count(engine, claim, 1, 100) == 80
    assert count(engine, claim, 81, 100) == 81


def test_the_history_of_stages_goes_30_days_after_the_end_of_the_job(engine: Engine) -> None:
    engine.call("create_queue", "q", {"keep_completed": None, "keep_ended": None})
    jobs = {}
    for name, age in (("old", 31), ("new", 29), ("failed", 31), ("running", 400)):
        claim = engine.claimed(stages=["a", "b"])
        begin(engine, claim, "a", "completed")
        jobs[name] = claim.id
        if name == "failed":
            engine.fail(claim, PERMANENT)
        elif name != "running":
            engine.call("complete", claim.id, claim.token)
        if name != "running":
            engine.run(
                "update jobqueue.job set completed_at = now() - %s::interval where id = %s", f"{age} days", claim.id
            )
    assert engine.row("select * from jobqueue.maintain(null, '{stage_history}')")["done"] == 4
    kept = {UUID(str(job)) for job in engine.values("select distinct job_id from jobqueue.stages")}
    assert kept == {jobs["new"], jobs["running"]}
    assert engine.status(jobs["old"]) == "completed"
    engine.run("insert into jobqueue.setting values ('stage_history', 'null')")
    assert engine.row("select * from jobqueue.remove_stage_history(null, 100)") == {"removed": 0, "next_from": None}
    engine.run("update jobqueue.setting set value = '\"1 day\"' where name = 'stage_history'")
    assert engine.row("select * from jobqueue.remove_stage_history(null, 1)")["next_from"] is not None
    assert engine.row("select * from jobqueue.remove_stage_history(null, 100)")["next_from"] is None
    assert set(engine.values("select distinct job_id from jobqueue.stages")) == {jobs["running"]}


def test_a_job_with_a_damaged_checkpoint_begins_afresh_and_its_history_says_so(engine: Engine) -> None:
    claim = engine.claimed(stages=["scan", "ocr"])
    begin(engine, claim, "scan", "completed", output={"pages": 4})
    engine.call("mark_done", claim.id, claim.token, ["1", "2"])
    engine.call("checkpoint", claim.id, claim.token, "scanned", reference="/x", hash="ab" * 32)
    engine.fail(claim, retry_in="0")
    (claim,) = engine.claim()
    why = "its file does not match its hash"
    assert engine.call("reject_checkpoint", claim.id, claim.token, why) == "scanned"
    seen = engine.view(claim.id)
    assert seen["progress_message"] == f'The checkpoint "scanned" cannot be used: {why}. Starting afresh.'
    assert (seen["progress_pct"], seen["completed_stages"], seen["checkpoint_stage"]) == (0, 0, None)
    assert seen["metadata"]["checkpoint_rejected"]["attempt"] == 2
    (line,) = engine.audit(claim.id)
    assert (line["action"], line["reason"]) == ("reject_checkpoint", f"{why}; the job starts afresh")
    assert engine.values("select jobqueue.done_keys(%s)", claim.id) == []
    assert engine.call("stage_output", claim.id, claim.token, "scan") is None
    assert engine.rows("select * from jobqueue.last_checkpoint(%s, %s)", claim.id, claim.token) == []
    # The history of checkpoints keeps what there was.
    assert engine.values("select stage from jobqueue.checkpoints") == ["scanned"]
    assert engine.refused(engine.call, "reject_checkpoint", claim.id, claim.token, " ").sqlstate == "JQ400"
    assert engine.refused(engine.call, "reject_checkpoint", claim.id, WORKER, why).code == "LEASE_LOST"


@pytest.mark.slow
def test_a_hundred_thousand_done_keys_leave_the_job_s_row_as_it_is(engine: Engine) -> None:
    claim = engine.claimed()
    size = engine.value("select pg_column_size(j) from jobqueue.job j")
    for start in range(0, 100_000, 20_000):
        keys = [f"page {n}" for n in range(start, start + 20_000)]
        assert engine.call("mark_done", claim.id, claim.token, keys) == 20_000
    assert engine.call("mark_done", claim.id, claim.token, ["page 99999", "one more"]) == 1
    assert engine.value("select count(*) from jobqueue.done_keys(%s)", claim.id) == 100_001
    # the sign of life is eight bytes
    assert engine.value("select pg_column_size(j) from jobqueue.job j") <= size + 8
    assert engine.value("select max(pg_column_size(d)) from jobqueue.done_key d") < 200


def test_the_reports_of_a_flush_are_one_notification_in_one_transaction(engine: Engine) -> None:
    claims = [engine.claimed(f"q{n}") for n in range(30)]
    listener = engine.another().connection
    listener.execute("listen jobqueue_jobs")
    engine.call("watch", "all")
    reports = [{"id": str(claim.id), "token": str(claim.token), "pct": 5} for claim in claims]
    engine.rows("select * from jobqueue.heartbeat(%s, %s)", WORKER, Jsonb(reports))
    notes = list(listener.notifies(timeout=60, stop_after=1))
    assert len(notes) == 1
    assert all(str(claim.id) in notes[0].payload for claim in claims)
    # The same again tells nobody anything: what is heard next is another change.
    engine.rows("select * from jobqueue.heartbeat(%s, %s)", WORKER, Jsonb(reports))
    engine.call("progress", claims[0].id, claims[0].token, 6)
    (note,) = listener.notifies(timeout=60, stop_after=1)
    assert str(claims[0].id) in note.payload
    assert str(claims[1].id) not in note.payload


@pytest.mark.parametrize("status", ["failed", "cancelled", "paused", "completed"])
def test_no_end_of_an_attempt_keeps_an_estimate_of_its_end(engine: Engine, status: str) -> None:
    claim = engine.claimed()
    engine.run("update jobqueue.job set started_at = now() - interval '10 s'")
    count(engine, claim, 1, 10)
    assert engine.view(claim.id)["estimated_completion"] is not None
    if status == "completed":
        engine.call("complete", claim.id, claim.token)
    elif status == "failed":
        engine.fail(claim, PERMANENT)
    else:
        engine.call("checkpoint", claim.id, claim.token, "safe")
        engine.call("pause" if status == "paused" else "cancel", claim.id, "a test")
        engine.call("acknowledge", claim.id, claim.token)
    assert engine.status(claim.id) == status
    assert engine.view(claim.id)["estimated_completion"] is None
