"""Leases: a heartbeat keeps what it lists, a lost lease is rescued, a poison job ends."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import WORKER, Claim, Engine, new_token


def beat(engine: Engine, *jobs: Claim, **more: Any) -> list[tuple[Any, str]]:
    """One heartbeat that lists jobs; the commands it brings."""
    listed = [{"id": str(job.id), "token": str(job.token), **more} for job in jobs]
    return [
        (row["id"], row["command"])
        for row in engine.rows("select * from jobqueue.heartbeat(%s, %s)", WORKER, Jsonb(listed))
    ]


def test_a_heartbeat_extends_the_leases_of_exactly_what_it_lists(engine: Engine) -> None:
    kept, left = engine.claimed(), engine.claimed(lease=60)
    engine.run("update jobqueue.job set lease_until = now() + interval '1 s'")
    before = engine.job(left.id)
    assert beat(engine, kept) == []
    row = engine.job(kept.id)
    assert row["lease_until"] - row["heartbeat_at"] == timedelta(seconds=30)
    assert engine.job(left.id) == before
    beat(engine, left)
    assert engine.job(left.id)["lease_until"] - engine.job(left.id)["heartbeat_at"] == timedelta(seconds=60)


def test_a_heartbeat_alone_is_no_change_that_a_poller_sees(engine: Engine) -> None:
    claim = engine.claimed()
    version = engine.job(claim.id)["version"]
    beat(engine, claim)
    assert engine.job(claim.id)["version"] == version


def test_alive_means_a_heartbeat_under_ten_seconds_ago(engine: Engine) -> None:
    claim = engine.claimed()
    engine.run("update jobqueue.job set started_at = now() - interval '11 s'")
    assert engine.view(claim.id)["alive"] is False
    beat(engine, claim)
    assert engine.view(claim.id)["alive"] is True


def test_a_heartbeat_says_which_claims_are_lost(engine: Engine) -> None:
    mine, stale = engine.claimed(), engine.claimed()
    engine.call("cancel", stale.id, "now", force=True)
    assert beat(engine, mine, stale) == [(stale.id, "lost")]
    assert beat(engine, Claim(mine.id, new_token(), {})) == [(mine.id, "lost")]


def test_a_heartbeat_brings_what_is_asked_of_jobs(engine: Engine) -> None:
    first, second = engine.claimed(), engine.claimed()
    engine.call("checkpoint", second.id, second.token, "safe")
    engine.call("cancel", first.id, "stop")
    engine.call("pause", second.id, "later")
    assert sorted(beat(engine, first, second)) == sorted([(first.id, "cancel"), (second.id, "pause")])
    assert engine.call("acknowledge", first.id, first.token) == "cancelled"
    assert engine.call("acknowledge", second.id, second.token) == "paused"
    assert engine.view(first.id)["status_reason"] == "stop"
    assert (engine.view(second.id)["pause_reason"], engine.view(second.id)["status_reason"]) == ("later", "later")


def test_nothing_can_be_acknowledged_that_was_not_asked(engine: Engine) -> None:
    claim = engine.claimed()
    assert engine.refused(lambda: engine.call("acknowledge", claim.id, claim.token)).code == "CONFLICT"


def test_a_worker_hears_that_it_shall_drain(engine: Engine) -> None:
    beat(engine)
    engine.call("drain_worker", WORKER, "maintenance")
    assert beat(engine) == [(None, "drain")]
    assert engine.value("select state from jobqueue.workers") == "draining"
    engine.call("stop_worker", WORKER)
    assert engine.value("select state from jobqueue.workers") == "stopped"
    assert engine.refused(lambda: engine.call("drain_worker", WORKER, "again")).sqlstate == "JQ404"


def test_workers_say_who_they_are(engine: Engine) -> None:
    info = {
        "name": "w1",
        "hostname": "h",
        "pid": 7,
        "version": "1",
        "queues": ["q"],
        "job_types": None,
        "concurrency": 5,
    }
    engine.call("register_worker", WORKER, info)
    row = engine.row("select * from jobqueue.workers")
    assert (row["name"], row["hostname"], row["pid"], row["queues"], row["concurrency"]) == ("w1", "h", 7, ["q"], 5)


def test_a_heartbeat_stores_progress(engine: Engine) -> None:
    claim = engine.claimed()
    beat(engine, claim, pct=40, message="half way", data={"done": 4, "total": 10, "mode": "smart"})
    row = engine.view(claim.id)
    assert (row["progress_pct"], row["progress_message"], row["progress_done"], row["progress_total"]) == (
        40,
        "half way",
        4,
        10,
    )
    assert row["metadata"] == {"mode": "smart"}
    beat(engine, claim, message="still there")
    assert engine.view(claim.id)["progress_pct"] == 40


@pytest.mark.parametrize("bad", [{"pct": "x"}, {"started": 1}, {"data": [1]}, {"message": {}}, {"data": {"done": "x"}}])
def test_a_malformed_heartbeat_is_refused_and_extends_nothing(engine: Engine, bad: dict[str, Any]) -> None:
    claim = engine.claimed()
    before = engine.job(claim.id)
    assert engine.refused(lambda: beat(engine, claim, **bad)).sqlstate == "JQ400"
    assert engine.job(claim.id) == before


def test_a_started_job_that_lost_its_worker_runs_again_at_once_and_a_retry_is_spent(engine: Engine) -> None:
    claim = engine.claimed()
    assert engine.call("rescue", 10) == 0
    engine.lose_worker(claim.id)
    row = engine.job(claim.id)
    assert (row["status"], row["retry_count"], row["lost_count"], row["error_class"]) == ("pending", 1, 1, "lost")
    assert row["ready_seq"] is not None
    (again,) = engine.claim()
    assert (again.id, again.row["attempt"]) == (claim.id, 2)
    assert engine.refused(lambda: engine.call("complete", claim.id, claim.token)).code == "LEASE_LOST"


def test_a_job_that_was_only_prefetched_spends_nothing_but_is_watched_from_now_on(engine: Engine) -> None:
    jobs = [engine.send() for _ in range(2)]
    engine.prefetch(2, start=1)
    engine.lose_lease(*jobs)
    assert engine.call("rescue", 10) == 2
    started, prefetched = engine.job(jobs[0]), engine.job(jobs[1])
    assert (started["retry_count"], prefetched["retry_count"]) == (1, 0)
    assert (prefetched["status"], prefetched["lost_count"], prefetched["error_class"]) == ("pending", 0, None)
    (row,) = engine.prefetch(1, start=0, suspects=1)
    assert engine.job(row["id"])["handler_started"] is True


def test_a_heartbeat_tells_that_a_prefetched_job_has_started(engine: Engine) -> None:
    job = engine.send()
    (row,) = engine.prefetch(1, start=0)
    claim = Claim(job, row["claim_token"], row)
    beat(engine, claim, started=False)
    assert engine.job(job)["handler_started"] is False
    beat(engine, claim, started=True)
    assert engine.job(job)["handler_started"] is True


def test_a_claim_whose_answer_never_arrived_spends_nothing(engine: Engine) -> None:
    engine.call("register_worker", WORKER, {"name": "w", "hostname": "h"})
    claim = engine.claimed()
    engine.run("update jobqueue.job set started_at = now() - interval '31 s'")
    beat(engine)
    engine.lose_worker(claim.id)
    assert engine.job(claim.id)["retry_count"] == 0


def test_the_jobs_own_lease_decides_not_the_note_of_its_claim(engine: Engine) -> None:
    kept, lost = [engine.send() for _ in range(2)]
    claims = {claim.id: claim for claim in engine.claim(2)}
    engine.lose_lease(kept, lost)
    beat(engine, claims[kept])
    assert engine.call("rescue", 10) == 1
    assert (engine.status(kept), engine.status(lost)) == ("processing", "pending")
    assert engine.count("claim_batch") == 1
    engine.lose_worker(kept)


def test_notes_of_ended_claims_do_not_pile_up_in_front_of_a_lost_job(engine: Engine) -> None:
    for _ in range(30):
        claim = engine.claimed()
        engine.call("complete", claim.id, claim.token)
    engine.run("update jobqueue.claim_batch set check_at = now() - interval '1 h'")
    lost = engine.claimed()
    engine.lose_lease(lost.id)
    assert engine.call("rescue", 2) == 1
    assert engine.status(lost.id) == "pending"
    assert engine.count("claim_batch") == 0


@pytest.mark.parametrize(("action", "status"), [("cancel", "cancelled"), ("pause", "paused")])
def test_a_lost_job_of_which_something_was_asked_ends_as_asked(engine: Engine, action: str, status: str) -> None:
    claim = engine.claimed()
    engine.call("checkpoint", claim.id, claim.token, "safe")
    engine.call(action, claim.id, "asked before")
    engine.lose_worker(claim.id)
    assert engine.status(claim.id) == status


def test_the_lease_is_at_least_ten_seconds(engine: Engine) -> None:
    assert engine.refused(lambda: engine.send(lease=9)).sqlstate == "JQ400"
    engine.send(lease=10)


def test_a_heartbeat_of_an_unknown_worker_registers_it(engine: Engine) -> None:
    worker = uuid4()
    engine.rows("select * from jobqueue.heartbeat(%s)", worker)
    assert engine.values("select id from jobqueue.workers") == [worker]
    assert engine.refused(lambda: engine.rows("select * from jobqueue.heartbeat(null)")).sqlstate == "JQ400"
