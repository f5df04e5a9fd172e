"""Completing: once, by the claim that holds the job, with an outcome per job."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import TRANSIENT, WORKER, Claim, Engine, new_token


def complete_many(engine: Engine, results: list[dict[str, Any]]) -> list[str]:
    """The outcomes."""
    return engine.values("select outcome from jobqueue.complete_many(%s)", Jsonb(results))


def named(claim: Claim, **more: Any) -> dict[str, Any]:
    """An element of complete_many."""
    return {"id": str(claim.id), "token": str(claim.token), **more}


def test_a_completed_job_has_its_result_and_100_percent(engine: Engine) -> None:
    claim = engine.claimed()
    assert engine.call("complete", claim.id, claim.token, {"files": 3}, {"ms": 5}) == "ok"
    row = engine.view(claim.id)
    assert (row["status"], row["result"], row["stats"], row["progress_pct"]) == (
        "completed",
        {"files": 3},
        {"ms": 5},
        100,
    )
    assert row["completed_at"] is not None
    assert row["alive"] is None


def test_completing_again_with_the_same_token_is_already_done(engine: Engine) -> None:
    claim = engine.claimed()
    engine.call("complete", claim.id, claim.token, {"n": 1})
    before = engine.job(claim.id)
    assert engine.call("complete", claim.id, claim.token, {"n": 2}) == "already"
    assert engine.job(claim.id) == before


def test_within_one_transaction_the_second_completion_is_already_done_too(engine: Engine) -> None:
    with engine.connection.transaction():
        claim = engine.claimed()
        assert engine.call("complete", claim.id, claim.token) == "ok"
        assert engine.call("complete", claim.id, claim.token) == "already"
        assert complete_many(engine, [named(claim)]) == ["already"]


def test_completion_clears_the_error_of_the_attempt_before(engine: Engine) -> None:
    claim = engine.claimed()
    engine.fail(claim, TRANSIENT, "0 s")
    (again,) = engine.claim()
    assert engine.job(claim.id)["error_code"] == "ConnectionError"
    engine.call("complete", again.id, again.token)
    row = engine.job(claim.id)
    assert (row["error_class"], row["error_code"], row["error_message"]) == (None, None, None)
    assert [
        a["outcome"]
        for a in engine.rows("select * from jobqueue.attempts where job_id = %s order by attempt", claim.id)
    ] == [
        "failed",
        "completed",
    ]


def test_a_stale_token_raises_and_the_callers_transaction_rolls_back(engine: Engine) -> None:
    claim = engine.claimed()
    engine.call("release", claim.id, claim.token)
    (again,) = engine.claim()

    def handler() -> None:
        with engine.connection.transaction():
            engine.send("effects")
            engine.call("complete", claim.id, claim.token)

    refusal = engine.refused(handler)
    assert (refusal.sqlstate, refusal.code) == ("JQ409", "LEASE_LOST")
    assert engine.value("select count(*) from jobqueue.job where queue = 'effects'") == 0
    assert engine.job(claim.id)["claim_token"] == again.token


def test_completing_an_unknown_job_is_404(engine: Engine) -> None:
    assert engine.refused(lambda: engine.call("complete", uuid4(), new_token())).code == "JOB_NOT_FOUND"


def test_complete_many_answers_per_job_in_order(engine: Engine) -> None:
    claims = [engine.claimed() for _ in range(3)]
    engine.call("complete", claims[1].id, claims[1].token)
    stale = {"id": str(claims[2].id), "token": str(new_token())}
    unknown = {"id": str(uuid4()), "token": str(new_token())}
    outcomes = complete_many(
        engine, [stale, named(claims[1]), unknown, named(claims[0], result={"n": 0}), named(claims[2])]
    )
    assert outcomes == ["lost", "already", "lost", "ok", "ok"]
    assert engine.job(claims[0].id)["result"] == {"n": 0}


def test_a_job_named_twice_in_one_call_is_settled_once_with_its_first_result(engine: Engine) -> None:
    claim = engine.claimed()
    assert complete_many(engine, [named(claim, result=1), named(claim, result=2)]) == ["ok", "ok"]
    row = engine.job(claim.id)
    assert (row["result"], row["version"]) == (1, 3)


@pytest.mark.parametrize("bad", [{"id": "x", "token": "y"}, {"id": None}, 7, {"id": "{" + "0" * 32, "token": "0" * 32}])
def test_a_malformed_element_refuses_complete_many_and_is_named(engine: Engine, bad: object) -> None:
    claim = engine.claimed()
    refusal = engine.refused(lambda: complete_many(engine, [named(claim), bad]))  # type: ignore[list-item]
    assert (refusal.sqlstate, refusal.detail["index"]) == ("JQ400", 1)
    assert engine.status(claim.id) == "processing"


def test_a_result_that_is_too_large_ends_the_attempt_as_failed(engine: Engine) -> None:
    first, second = engine.claimed(), engine.claimed()
    large = "x" * (8 * 1024 * 1024)
    assert engine.call("complete", first.id, first.token, Jsonb(large)) == "failed"
    assert complete_many(engine, [named(second, result=large)]) == ["failed"]
    for claim in (first, second):
        row = engine.job(claim.id)
        assert (row["status"], row["error_class"], row["error_code"]) == ("failed", "permanent", "RESULT_TOO_LARGE")


def test_a_completion_that_arrives_first_wins_over_a_request_to_cancel(engine: Engine) -> None:
    claim = engine.claimed()
    assert engine.call("cancel", claim.id, "no need") == "processing"
    assert engine.call("complete", claim.id, claim.token) == "ok"
    row = engine.job(claim.id)
    assert (row["status"], row["requested_action"]) == ("completed", None)


def test_stats_are_merged_and_must_be_an_object(engine: Engine) -> None:
    claim = engine.claimed()
    assert engine.refused(lambda: engine.call("complete", claim.id, claim.token, None, Jsonb([1]))).sqlstate == "JQ400"
    engine.run("""update jobqueue.job set stats = '{"a": 1, "b": 1}'""")
    engine.call("complete", claim.id, claim.token, None, {"b": 2})
    assert engine.job(claim.id)["stats"] == {"a": 1, "b": 2}


STALE = {
    "complete": "select jobqueue.complete(%s, %s)",
    "fail": "select jobqueue.fail(%s, %s, '{}')",
    "snooze": "select jobqueue.snooze(%s, %s, '1 s')",
    "release": "select jobqueue.release(%s, %s)",
    "acknowledge": "select jobqueue.acknowledge(%s, %s)",
    "progress": "select jobqueue.progress(%s, %s, 50)",
    "stage": "select jobqueue.stage(%s, %s, 's', 'in_progress')",
    "checkpoint": "select jobqueue.checkpoint(%s, %s, 's')",
    "mark_done": "select jobqueue.mark_done(%s, %s, '{k}')",
}


@pytest.mark.parametrize("verb", STALE)
def test_a_stale_token_is_refused_and_changes_nothing(engine: Engine, verb: str) -> None:
    claim = engine.claimed()
    engine.call("release", claim.id, claim.token)
    for holder in ("nobody", "another claim"):
        if holder == "another claim":
            engine.claim()
        before = engine.job(claim.id)
        for token in (claim.token, new_token(), None):
            refusal = engine.refused(engine.run, STALE[verb], claim.id, token)
            assert (refusal.sqlstate, refusal.code) == ("JQ409", "LEASE_LOST")
        assert engine.job(claim.id) == before
    assert [engine.count(t) for t in ("stage", "checkpoint", "done_key")] == [0, 0, 0]
    assert len(engine.attempts(claim.id)) == 1


def test_settle_reports_only_what_was_refused_and_drops_the_notes_of_its_claims(engine: Engine) -> None:
    jobs = [engine.send() for _ in range(3)]
    rows = engine.prefetch(3, start=3)
    refused = engine.rows(
        "select * from jobqueue.settle(%s, %s, %s, null, null, %s)",
        WORKER,
        jobs,
        [rows[0]["claim_token"], new_token(), rows[2]["claim_token"]],
        [rows[0]["claim_id"]],
    )
    assert [(row["id"], row["outcome"]) for row in refused] == [(jobs[1], "lost")]
    assert [engine.status(job) for job in jobs] == ["completed", "processing", "completed"]
    assert engine.count("claim_batch") == 0


def test_settling_nothing_is_fine(engine: Engine) -> None:
    assert engine.rows("select * from jobqueue.settle(%s, '{}', '{}', null, null, null)", WORKER) == []
    assert complete_many(engine, []) == []
