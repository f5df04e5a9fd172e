"""What people do with jobs: allowed by status, with a reason, audited once."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

from tests.sql.engine import PERMANENT, STATUSES, TRANSIENT, Engine

ALLOWED = {
    "blocked": {"cancel", "prioritize"},
    "pending": {"cancel", "pause", "prioritize"},
    "processing": {"cancel"},
    "paused": {"resume", "cancel"},
    "failed": {"retry", "restart", "skip", "delete"},
    "cancelled": {"resume", "delete"},
    "completed": {"delete"},
    "skipped": {"delete"},
}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "cancel": ("cancel", {}),
    "pause": ("pause", {}),
    "resume": ("resume", {}),
    "retry": ("retry", {}),
    "restart": ("retry", {"from_start": True}),
    "skip": ("skip", {}),
    "run_now": ("run_now", {}),
    "prioritize": ("prioritize", {"priority": 77}),
    "delete": ("delete_job", {}),
}
# an action on a job that is where it leads changes nothing and says so
ALREADY = {
    ("paused", "pause"),
    ("cancelled", "cancel"),
    ("skipped", "skip"),
    ("pending", "resume"),
    ("blocked", "resume"),
    ("pending", "run_now"),
}


def act(engine: Engine, action: str, job: Any, reason: str | None = "because") -> Any:
    """Do something with a job."""
    function, named = CALLS[action]
    return engine.call(function, job, reason=reason, **named)


@pytest.mark.parametrize("status", STATUSES)
def test_actions_are_allowed_by_status(engine: Engine, status: str) -> None:
    job = engine.in_status(status)
    rows = engine.rows("select * from jobqueue.actions(%s)", job)
    assert {row["action"] for row in rows} == set(CALLS)
    assert (
        {row["action"] for row in rows if row["allowed"]} == ALLOWED[status] == set(engine.call("allowed_actions", job))
    )
    assert all((row["reason"] is None) == row["allowed"] for row in rows)
    before = engine.job(job)
    audited = engine.audit(job)
    for action in CALLS:
        with engine.undone():
            if action in ALLOWED[status]:
                act(engine, action, job)
                assert [line["action"] for line in engine.audit(job)[len(audited) :]] == [action]
            elif (status, action) in ALREADY:
                assert act(engine, action, job) == status
                assert engine.job(job) == before
                assert engine.audit(job) == audited
            else:
                refusal = engine.refused(act, engine, action, job)
                assert (refusal.sqlstate, refusal.code) == ("JQ409", "INVALID_TRANSITION")
                assert refusal.detail["status"] == status
                assert set(refusal.detail["allowed"]) == ALLOWED[status]


@pytest.mark.parametrize("action", CALLS)
@pytest.mark.parametrize("reason", [None, "", " \t\n", "x" * 2001])
def test_a_blank_or_endless_reason_is_refused(engine: Engine, action: str, reason: str | None) -> None:
    job = engine.in_status("failed" if action in ("retry", "restart", "skip", "delete") else "pending")
    before = engine.job(job)
    refusal = engine.refused(lambda: act(engine, action, job, reason))
    assert (refusal.sqlstate, refusal.code) == ("JQ400", "INVALID_ARGUMENT")
    assert engine.job(job) == before


@pytest.mark.parametrize("action", CALLS)
def test_an_unknown_job_is_404(engine: Engine, action: str) -> None:
    refusal = engine.refused(lambda: act(engine, action, uuid4()))
    assert (refusal.sqlstate, refusal.code) == ("JQ404", "JOB_NOT_FOUND")


def test_actions_are_audited_with_who_did_them(engine: Engine) -> None:
    job = engine.send(tenant="a")
    engine.run("set jobqueue.actor = 'ann@example'")
    engine.call("pause", job, "  too busy ")
    (line,) = engine.audit(job)
    assert (line["action"], line["reason"], line["actor"], line["tenant"]) == ("pause", "too busy", "ann@example", "a")
    assert (line["from_status"], line["to_status"]) == ("pending", "paused")
    assert line["session_user_name"] == engine.value("select session_user::text")


@pytest.mark.parametrize("action", ["cancel", "pause", "restart", "retry", "skip", "prioritize"])
def test_a_repeated_action_changes_nothing_and_is_audited_once(engine: Engine, action: str) -> None:
    job = engine.in_status("failed" if action in ("retry", "restart", "skip") else "pending")
    first = act(engine, action, job)
    after = engine.job(job)
    assert act(engine, action, job) == first
    assert engine.job(job) == after
    assert len(engine.audit(job)) == 1


@pytest.mark.parametrize("action", ["cancel", "pause"])
def test_cancel_and_pause_of_a_running_job_are_requests(engine: Engine, action: str) -> None:
    claim = engine.claimed()
    engine.call("checkpoint", claim.id, claim.token, "safe")
    listener = engine.another()
    listener.run("listen jobqueue_jobs")
    assert act(engine, action, claim.id) == "processing"
    assert act(engine, action, claim.id) == "processing"
    row = engine.view(claim.id)
    assert (row["status"], row["requested_action"], row["status_reason"]) == ("processing", action, "because")
    assert len(engine.audit(claim.id)) == 1
    (order,) = listener.connection.notifies(timeout=60, stop_after=1)
    assert order.payload == f'[["{claim.id}", {row["version"]}]]'
    assert engine.call("acknowledge", claim.id, claim.token) == {"cancel": "cancelled", "pause": "paused"}[action]
    assert engine.view(claim.id)["status_reason"] == "because"


def test_a_request_to_pause_can_become_one_to_cancel_but_not_the_other_way_round(engine: Engine) -> None:
    claim = engine.claimed()
    engine.call("checkpoint", claim.id, claim.token, "safe")
    act(engine, "pause", claim.id)
    act(engine, "cancel", claim.id)
    assert engine.view(claim.id)["requested_action"] == "cancel"
    assert "being cancelled" in engine.refused(lambda: act(engine, "pause", claim.id)).message


def test_a_running_job_is_paused_only_if_its_type_or_last_checkpoint_allows_it(engine: Engine) -> None:
    claim = engine.claimed()
    assert (
        "neither its job_type nor its last checkpoint" in engine.refused(lambda: act(engine, "pause", claim.id)).message
    )
    engine.call("checkpoint", claim.id, claim.token, "risky", pause_safe=False)
    assert engine.view(claim.id)["pausable"] is False
    engine.run("insert into jobqueue.job_type (name, pausable) values ('q', true)")
    assert engine.view(claim.id)["pausable"] is True
    assert act(engine, "pause", claim.id) == "processing"


def test_a_forced_cancel_takes_effect_at_once_and_makes_the_token_stale(engine: Engine) -> None:
    claim = engine.claimed()
    act(engine, "cancel", claim.id)
    assert engine.call("cancel", claim.id, "at once", force=True) == "cancelled"
    assert engine.refused(lambda: engine.call("complete", claim.id, claim.token)).code == "LEASE_LOST"
    assert [line["details"] for line in engine.audit(claim.id)] == [None, {"force": True}]
    assert [a["outcome"] for a in engine.attempts(claim.id)] == ["cancelled"]


def test_a_manual_retry_runs_at_once_with_the_budget_the_job_was_sent_with(engine: Engine) -> None:
    claim = engine.claimed(max_retries=2)
    for _ in range(2):
        engine.fail(claim, TRANSIENT, "0 s")
        (claim,) = engine.claim()
    assert engine.fail(claim) == "failed"
    assert engine.call("retry", claim.id, "fixed") == "pending"
    row = engine.view(claim.id)
    assert (row["retry_count"], row["max_retries"]) == (3, 5)
    assert (row["completed_at"], row["error_code"]) == (None, "ConnectionError")
    assert [c.id for c in engine.claim()] == [claim.id]


def test_a_restart_drops_the_checkpoint_and_the_outputs_of_stages(engine: Engine) -> None:
    claim = engine.claimed(stages=["a", "b"])
    engine.call("stage", claim.id, claim.token, "a", "completed", {"output": {"x": 1}})
    engine.call("checkpoint", claim.id, claim.token, "a", {"n": 1})
    engine.fail(claim, PERMANENT)
    act(engine, "restart", claim.id)
    row = engine.view(claim.id)
    assert (row["checkpoint_stage"], row["completed_stages"], row["progress_pct"]) == (None, 0, 0)
    assert engine.rows("select distinct status, output from jobqueue.stages") == [{"status": "pending", "output": None}]


def test_a_plain_retry_of_a_restarted_job_is_not_a_restart_of_a_retried_one(engine: Engine) -> None:
    claim = engine.claimed()
    engine.call("mark_done", claim.id, claim.token, ["k"])
    engine.fail(claim, PERMANENT)
    act(engine, "retry", claim.id)
    assert engine.refused(lambda: act(engine, "restart", claim.id)).sqlstate == "JQ409"


def test_pause_and_resume_count_and_keep_their_times(engine: Engine) -> None:
    job = engine.send()
    for n in range(1, 4):
        act(engine, "pause", job)
        assert engine.claim() == []
        assert act(engine, "resume", job) == "pending"
        row = engine.view(job)
        assert (row["resume_count"], row["pause_reason"]) == (n, "because")
        assert row["paused_at"] <= row["resumed_at"]
    assert [c.id for c in engine.claim()] == [job]


def test_a_resumed_job_still_waits_for_its_time(engine: Engine) -> None:
    job = engine.send(delay=3600)
    act(engine, "pause", job)
    act(engine, "resume", job)
    assert engine.claim() == []
    assert act(engine, "run_now", job) == "pending"
    assert [c.id for c in engine.claim()] == [job]


def test_a_resumed_cancelled_job_does_not_expire(engine: Engine) -> None:
    job = engine.send(expires_in=60)
    act(engine, "cancel", job)
    assert engine.job(job)["expires_at"] is None
    act(engine, "resume", job)
    engine.run("update jobqueue.job set expires_at = now() where expires_at is not null")
    assert engine.call("expire", 10) == 0


def test_a_job_with_unfinished_parents_goes_back_to_blocked(engine: Engine) -> None:
    job = engine.in_status("blocked")
    act(engine, "cancel", job)
    assert act(engine, "resume", job) == "blocked"


def test_prioritize_gives_a_new_place_in_the_line(engine: Engine) -> None:
    first, second = engine.send(), engine.send()
    engine.call("prioritize", second, 5, "urgent")
    engine.call("prioritize", first, 5, "this too")
    assert [c.id for c in engine.claim(2)] == [second, first]
    assert engine.audit(second)[0]["details"] == {"from": 0, "to": 5}


def test_delete_takes_what_hangs_on_the_job_but_not_its_audit(engine: Engine) -> None:
    job = engine.in_status("failed")
    assert act(engine, "delete", job) == "failed"
    assert engine.count() == engine.count("attempt") == 0
    assert [line["action"] for line in engine.audit(job)] == ["delete"]
