"""Failing: retries with backoff, classes that are not retried, and a history that keeps every reason."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import PERMANENT, TRANSIENT, Claim, Engine


def waits(engine: Engine, claim: Claim) -> float:
    """For how many seconds a job waits for its retry, from the end of its attempt."""
    row = engine.job(claim.id)
    return float((row["wait_until"] - row["updated_at"]).total_seconds())


def test_a_transient_failure_is_retried_three_times_then_the_job_has_failed(engine: Engine) -> None:
    job = engine.send()
    for n in range(1, 4):
        (claim,) = engine.claim()
        assert engine.fail(claim, {**TRANSIENT, "message": f"reason {n}"}) == "pending"
        assert engine.job(job)["retry_count"] == n
        engine.make_due(job)
    (claim,) = engine.claim()
    assert engine.fail(claim, {**TRANSIENT, "message": "reason 4"}) == "failed"
    row = engine.job(job)
    assert (row["retry_count"], row["error_message"], row["attempt"]) == (3, "reason 4", 4)
    assert [a["error_message"] for a in engine.attempts(job)] == ["reason 1", "reason 2", "reason 3", "reason 4"]
    assert [a["attempt"] for a in engine.attempts(job)] == [1, 2, 3, 4]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 30])
def test_the_nth_retry_waits_one_to_two_times_60_s_doubled_and_at_most_30_minutes(engine: Engine, n: int) -> None:
    low, high = min(60 * 2 ** (n - 1), 1800), min(120 * 2 ** (n - 1), 1800)
    claim = engine.claimed(max_retries=99)
    engine.run("update jobqueue.job set retry_count = %s", n - 1)
    seen = []
    for _ in range(20):
        with engine.undone():
            engine.fail(claim)
            seen.append(waits(engine, claim))
    assert all(low <= waited <= high for waited in seen)
    assert low == high or len(set(seen)) > 1


def test_backoff_can_be_turned_off_and_delays_changed_per_job(engine: Engine) -> None:
    claim = engine.claimed(retry_delay=10, retry_backoff=False)
    engine.fail(claim)
    assert waits(engine, claim) == 10
    claim = engine.claimed(retry_delay="PT100S", retry_delay_max=101)
    engine.fail(claim)
    assert 100 <= waits(engine, claim) <= 101


def test_an_absurd_delay_is_bounded_and_never_keeps_a_failure_from_being_stored(engine: Engine) -> None:
    claim = engine.claimed(retry_delay="1000 years", retry_delay_max=None, max_retries=99)
    engine.run("update jobqueue.job set retry_count = 40")
    assert engine.fail(claim) == "pending"


def test_retry_in_decides_the_delay_and_makes_any_class_retryable(engine: Engine) -> None:
    claim = engine.claimed()
    assert engine.fail(claim, PERMANENT, "90 s") == "pending"
    assert waits(engine, claim) == 90


@pytest.mark.parametrize("kind", ["permanent", "quota", "invalid"])
def test_permanent_quota_and_invalid_failures_are_not_retried(engine: Engine, kind: str) -> None:
    claim = engine.claimed()
    assert engine.fail(claim, {"class": kind, "code": "X"}) == "failed"
    row = engine.job(claim.id)
    assert (row["error_class"], row["retry_count"], row["progress_pct"]) == (kind, 0, 0)
    assert row["completed_at"] == row["failed_at"] is not None


def test_an_error_without_a_class_is_transient(engine: Engine) -> None:
    claim = engine.claimed()
    engine.fail(claim, {"message": "?"})
    row = engine.job(claim.id)
    assert (row["error_class"], row["error_code"]) == ("transient", "ERROR")


@pytest.mark.parametrize("error", [Jsonb({"class": "weird"}), Jsonb([1]), Jsonb("text"), None])
def test_an_error_outside_the_closed_set_is_refused(engine: Engine, error: Jsonb | None) -> None:
    claim = engine.claimed()
    assert engine.refused(lambda: engine.call("fail", claim.id, claim.token, error)).sqlstate == "JQ400"
    assert engine.status(claim.id) == "processing"


def test_texts_of_errors_are_cut_so_that_failing_always_succeeds(engine: Engine) -> None:
    claim = engine.claimed()
    engine.fail(claim, {"class": "permanent", "code": "c" * 9999, "message": "m" * 9999, "detail": "d" * 99999})
    (attempt,) = engine.attempts(claim.id)
    assert len(attempt["error_message"]) == 2000
    assert len(attempt["error_detail"]) == 64000
    assert len(attempt["error_code"]) == 200


def test_a_time_out_is_named_in_the_history(engine: Engine) -> None:
    claim = engine.claimed()
    engine.fail(claim, {"class": "transient", "code": "TIMEOUT", "message": "15 min without a sign of life"})
    assert engine.attempts(claim.id)[0]["outcome"] == "timed_out"


def test_a_job_that_loses_its_third_worker_in_a_row_has_failed(engine: Engine) -> None:
    job = engine.send(max_retries=10)
    for n in range(1, 4):
        engine.claim()
        engine.lose_worker(job)
        assert engine.status(job) == ("failed" if n == 3 else "pending")
    row = engine.job(job)
    assert (row["error_class"], row["error_code"]) == ("lost", "LOST")
    assert [a["outcome"] for a in engine.attempts(job)] == ["lost"] * 3


def test_any_other_end_of_an_attempt_resets_the_count_of_lost_workers(engine: Engine) -> None:
    job = engine.send(max_retries=10)
    for _ in range(2):
        engine.claim()
        engine.lose_worker(job)
    (claim,) = engine.claim()
    engine.fail(claim, TRANSIENT, "0 s")
    for _ in range(2):
        engine.claim()
        engine.lose_worker(job)
    assert engine.status(job) == "pending"


@pytest.mark.parametrize(("action", "status"), [("cancel", "cancelled"), ("pause", "paused")])
def test_an_attempt_that_fails_while_something_was_asked_ends_as_asked(
    engine: Engine, action: str, status: str
) -> None:
    claim = engine.claimed()
    engine.call("checkpoint", claim.id, claim.token, "safe")
    engine.call(action, claim.id, "because I say so")
    assert engine.fail(claim) == status
    row = engine.view(claim.id)
    assert (row["status_reason"], row["requested_action"]) == ("because I say so", None)
    assert row["error_code"] == "ConnectionError"


def test_a_failure_without_a_retry_left_fails_whatever_was_asked(engine: Engine) -> None:
    claim = engine.claimed(max_retries=0)
    engine.call("cancel", claim.id, "stop")
    assert engine.fail(claim) == "failed"


def test_snooze_and_release_spend_no_retry(engine: Engine) -> None:
    claim = engine.claimed()
    assert engine.call("snooze", claim.id, claim.token, timedelta(minutes=5)) == "pending"
    assert waits(engine, claim) == 300
    engine.make_due(claim.id)
    (claim,) = engine.claim()
    assert engine.call("release", claim.id, claim.token) == "pending"
    row = engine.job(claim.id)
    assert (row["retry_count"], row["attempt"], row["error_class"]) == (0, 2, None)
    assert [a["outcome"] for a in engine.attempts(claim.id)] == ["snoozed", "released"]


@pytest.mark.parametrize("delay", ["-1 s", "2000 years", None])
def test_snooze_and_retry_in_are_bounded(engine: Engine, delay: str | None) -> None:
    claim = engine.claimed()
    snooze = "select jobqueue.snooze(%s, %s, %s::interval)"
    assert engine.refused(lambda: engine.run(snooze, claim.id, claim.token, delay)).sqlstate == "JQ400"
    if delay:
        assert engine.refused(lambda: engine.fail(claim, TRANSIENT, delay)).sqlstate == "JQ400"
    assert engine.status(claim.id) == "processing"


def test_fail_many_passes_over_stale_claims(engine: Engine) -> None:
    claims = [engine.claimed() for _ in range(2)]
    engine.call("complete", claims[0].id, claims[0].token)
    failures: list[dict[str, Any]] = [
        {"id": str(c.id), "token": str(c.token), "error": TRANSIENT, "retry_in": 7} for c in claims
    ]
    rows = engine.rows("select * from jobqueue.fail_many(%s)", Jsonb(failures))
    assert {row["id"]: (row["outcome"], row["status"]) for row in rows} == {
        claims[0].id: ("lost", None),
        claims[1].id: ("ok", "pending"),
    }
    assert waits(engine, claims[1]) == 7


def test_release_many_gives_back_what_is_still_held(engine: Engine) -> None:
    claims = [engine.claimed() for _ in range(3)]
    engine.call("complete", claims[1].id, claims[1].token)
    assert engine.call("release_many", [c.id for c in claims], [c.token for c in claims]) == 2
    assert [engine.status(c.id) for c in claims] == ["pending", "completed", "pending"]


def test_a_failed_job_stays_and_has_a_copy_in_the_dead_letter_queue_of_its_queue(engine: Engine) -> None:
    engine.run("insert into jobqueue.queue (name, dead_letter) values ('q', 'dead')")
    claim = engine.claimed()
    engine.fail(claim)
    assert engine.count() == 1
    engine.make_due(claim.id)
    engine.fail(engine.claim()[0], PERMANENT)
    (copy,) = engine.rows("select * from jobqueue.job where dead_letter_of = %s", claim.id)
    assert (copy["queue"], copy["status"], engine.status(claim.id)) == ("dead", "pending", "failed")


@pytest.mark.parametrize(
    "trap",
    [
        "insert into jobqueue.setting values ('create_queues', 'false')",
        "insert into jobqueue.setting values ('max_payload_bytes', '10')",
        "set jobqueue.tenants = 'another'",
    ],
)
def test_a_dead_letter_never_keeps_a_failure_from_being_stored(engine: Engine, trap: str) -> None:
    claim = engine.claimed(payload={"x": "y" * 200000}, dead_letter="dead")
    engine.run(trap)
    assert engine.fail(claim, PERMANENT) == "failed"
    assert engine.value("select count(*) from jobqueue.job where dead_letter_of = %s", claim.id) == 1


@pytest.mark.parametrize("action", ["retry", "skip"])
def test_retry_or_skip_of_the_original_cancels_its_waiting_copy(engine: Engine, action: str) -> None:
    claim = engine.claimed(dead_letter="dead")
    engine.fail(claim, PERMANENT)
    engine.call(action, claim.id, "handled")
    assert engine.values("select status from jobqueue.job where dead_letter_of = %s", claim.id) == ["cancelled"]
