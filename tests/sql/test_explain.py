"""explain says why a job is not running, or why it ended as it did, who did it, and what to do."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from tests.sql.engine import PERMANENT, STATUSES, TRANSIENT, WORKER, Engine, new_token


def explain(engine: Engine, job: UUID) -> dict[str, str]:
    """Details by reason, in order."""
    rows = engine.rows("select * from jobqueue.explain(%s)", job)
    assert all(row["reason"] and row["detail"] and row["what_to_do"] for row in rows), rows
    return {row["reason"]: row["detail"] for row in rows}


def worker(engine: Engine, **info: Any) -> UUID:
    """Register a live worker; without queues and job_types it serves all."""
    engine.call("register_worker", WORKER, {"name": "press", "hostname": "h", "pid": 7, "concurrency": 2, **info})
    return WORKER


def reasons(engine: Engine, job: UUID) -> list[str]:
    return list(explain(engine, job))


@pytest.mark.parametrize("status", STATUSES)
def test_every_status_has_an_explanation(engine: Engine, status: str) -> None:
    first = reasons(engine, engine.in_status(status))[0]
    assert first == ("no_worker" if status == "pending" else status)


def test_an_unknown_job_is_not_found(engine: Engine) -> None:
    assert engine.refused(explain, engine, new_token()).code == "JOB_NOT_FOUND"


def test_a_ready_job_waits_for_a_worker_that_serves_its_queue(engine: Engine) -> None:
    job = engine.send()
    assert reasons(engine, job) == ["no_worker", "ready"]
    worker(engine, queues=["other"])
    assert reasons(engine, job) == ["no_worker", "ready"]
    worker(engine, queues=["other", "q"], job_types=["another"])
    found = explain(engine, job)
    assert list(found) == ["no_handler", "ready"]
    assert 'job_type "q"' in found["no_handler"]
    worker(engine, job_types=["q"])
    assert reasons(engine, job) == ["ready"]
    engine.run("update jobqueue.worker set running = 2")
    assert reasons(engine, job) == ["workers_busy", "ready"]


@pytest.mark.parametrize("gone", ["lost", "draining", "stopped"])
def test_a_worker_that_is_gone_does_not_count(engine: Engine, gone: str) -> None:
    job = engine.send()
    worker(engine)
    if gone == "lost":
        engine.run("update jobqueue.worker set heartbeat_at = now() - interval '31 s'")
    elif gone == "draining":
        engine.call("drain_worker", WORKER, "r")
    else:
        engine.call("stop_worker", WORKER)
    assert reasons(engine, job)[0] == "no_worker"


def test_pauses_come_first_with_who_and_why(engine: Engine) -> None:
    job = engine.send()
    with engine.connection.transaction():
        engine.run("select set_config('jobqueue.actor', 'anna', true)")
        engine.call("pause_queue", "q", "the disk is full")
        engine.call("pause_job_type", "q", "a bad release")
        engine.call("pause_tenant", "default", "unpaid")
    found = explain(engine, job)
    assert list(found)[:3] == ["queue_paused", "job_type_paused", "tenant_paused"]
    for reason, why in (("queue_paused", "the disk is full"), ("job_type_paused", "a bad release")):
        assert f"by anna: {why}." in found[reason]
    assert "unpaid" in found["tenant_paused"]


def test_a_job_waits_until_its_time_or_for_its_retry(engine: Engine) -> None:
    worker(engine)
    later = engine.send(delay=3600)
    assert reasons(engine, later) == ["waits_until"]
    assert "in 1 h 0 min" in explain(engine, later)["waits_until"]
    claim = engine.claimed()
    engine.fail(claim, TRANSIENT)
    found = explain(engine, claim.id)
    assert list(found) == ["waits_for_retry"]
    assert "retry 1 of 3, after ConnectionError (no answer)" in found["waits_for_retry"]


def test_the_place_in_the_line_counts_jobs_of_all_tenants_as_a_number(engine: Engine) -> None:
    worker(engine)
    others = [engine.send(tenant="secret", priority=priority) for priority in (5, 0)]
    job = engine.send(tenant="mine")
    behind = engine.send(tenant="secret", priority=-1)
    with engine.acting_as("jobqueue_api", "mine"):
        found = explain(engine, job)
    assert found["jobs_ahead"].startswith("2 ready jobs stand before it")
    assert not [other for other in (*others, behind) if str(other) in str(found)]
    assert "secret" not in str(found)


def test_the_count_of_jobs_ahead_ends_at_ten_thousand(engine: Engine) -> None:
    engine.run(
        "insert into jobqueue.job (queue, job_type, ready_seq) "
        "select 'q', 'q', jobqueue.next_ready() from generate_series(1, 10500)"
    )
    job = engine.send()
    assert explain(engine, job)["jobs_ahead"].startswith("10,000 or more ready jobs stand before it")


def test_a_time_of_expiry_is_told(engine: Engine) -> None:
    assert reasons(engine, engine.send(expires_in=60))[-1] == "expires"


def test_a_running_job_names_its_worker_its_life_and_what_was_asked(engine: Engine) -> None:
    worker(engine)
    claim = engine.claimed()
    engine.call("progress", claim.id, claim.token, 40, "page 4")
    found = explain(engine, claim.id)
    assert list(found) == ["processing"]
    for part in ("Attempt 1 runs", str(WORKER), "press, h, pid 7", "40 %", "page 4", "lease until"):
        assert part in found["processing"]
    with engine.acting_as("jobqueue_api", "default"):
        assert "press" not in explain(engine, claim.id)["processing"], "machines are nothing for single tenants"
    engine.call("cancel", claim.id, "wrong file")
    found = explain(engine, claim.id)
    assert list(found) == ["cancel_requested", "processing"]
    assert "asked to cancel it: wrong file." in found["cancel_requested"]
    engine.run("update jobqueue.job set started_at = now() - interval '11 s', heartbeat_at = null")
    assert reasons(engine, claim.id) == ["cancel_requested", "not_alive", "processing"]


def test_a_paused_or_cancelled_job_names_who_did_it_and_why(engine: Engine) -> None:
    job = engine.send()
    user = engine.value("select session_user")
    engine.call("pause", job, "wait for the lawyer")
    assert f"by {user}: wait for the lawyer." in explain(engine, job)["paused"]
    with engine.connection.transaction():
        engine.run("select set_config('jobqueue.actor', 'anna', true)")
        engine.call("cancel", job, "no longer needed")
    assert f"Cancelled by anna (login {user})" in explain(engine, job)["cancelled"]
    assert "no longer needed" in explain(engine, job)["cancelled"]


def test_a_failed_job_tells_its_error_and_what_is_left_of_its_retries(engine: Engine) -> None:
    claim = engine.claimed()
    engine.fail(claim, {"class": "invalid", "code": "BadPage", "message": "page 3 is empty"})
    detail = explain(engine, claim.id)["failed"]
    assert "invalid, BadPage: page 3 is empty. 1 attempt, 0 of 3 retries spent" in detail
    assert "errors of class invalid are not retried" in detail


def test_an_expired_job_says_so(engine: Engine) -> None:
    job = engine.send(expires_in=60)
    engine.run("update jobqueue.job set expires_at = now()")
    engine.call("expire", 10)
    assert "no worker took it in time" in explain(engine, job)["failed"]


def test_a_lost_job_says_so(engine: Engine) -> None:
    job = engine.send()
    for _ in range(3):
        engine.claim()
        engine.lose_worker(job)
    assert "three workers in a row were lost" in explain(engine, job)["failed"]


def test_dead_letters_and_originals_name_each_other(engine: Engine) -> None:
    engine.call("create_queue", "q", {"dead_letter": "dead"})
    job = engine.in_status("failed")
    copy = engine.value("select id from jobqueue.job where dead_letter_of = %s", job)
    assert str(copy) in explain(engine, job)["dead_letter"]
    assert str(job) in explain(engine, copy)["dead_letter_of"]


def test_the_holder_of_a_key_that_keeps_a_job_out_is_named(engine: Engine) -> None:
    claim = engine.claimed(singleton_key="k")
    engine.fail(claim, PERMANENT)
    assert reasons(engine, claim.id) == ["failed"]
    holder = engine.send(singleton_key="k")
    assert str(holder) in explain(engine, claim.id)["key_taken"]


def test_a_holder_of_another_tenant_stays_unnamed(engine: Engine) -> None:
    engine.call("create_queue", "q", {"policy": "exclusive"})
    claim = engine.claimed(tenant="mine")
    engine.fail(claim, PERMANENT)
    holder = engine.send(tenant="secret")
    with engine.acting_as("jobqueue_api", "mine"):
        found = explain(engine, claim.id)
    assert "another tenant" in found["key_taken"]
    assert str(holder) not in str(found)


def test_another_tenants_job_is_not_explained(engine: Engine) -> None:
    job = engine.send(tenant="secret")
    for tenants in (None, "mine"):
        with engine.acting_as("jobqueue_api", tenants):
            assert engine.refused(explain, engine, job).code == "JOB_NOT_FOUND"
    with engine.acting_as("jobqueue_support_readonly"):
        assert reasons(engine, job)
