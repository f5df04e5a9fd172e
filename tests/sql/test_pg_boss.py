"""What pg-boss's own tests assert and no other file shows: docs/pg-boss.md names each of these tests."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import PERMANENT, Engine, Row, new_token
from tests.support.waiting import wait_until


def answer(engine: Engine, queue: str = "q", payload: Any = None, **options: Any) -> tuple[Any, str | None]:
    """Send; the id and why nothing was stored (None: it was)."""
    row = engine.row("select * from jobqueue.send(%s, %s, %s)", queue, Jsonb(payload or {}), options)
    assert row["created"] is (row["reason"] is None)
    return row["id"], row["reason"]


def complete(engine: Engine, queue: str = "q") -> UUID:
    """Claim the next job and complete it."""
    (claim,) = engine.claim(1, queue)
    engine.call("complete", claim.id, claim.token)
    return claim.id


def only_slot() -> int:
    """Seconds of a slot in whose middle part we are, so that it does not end while a test runs."""
    now = datetime.now(UTC).timestamp()
    return next(size for size in (86_400, 100_003, 120_011) if 60 < now % size < size - 60)


# throttle and debounce


def test_one_job_per_slot_and_key_and_the_holder_is_named(engine: Engine) -> None:
    slot = only_slot()
    first, _ = answer(engine, throttle_seconds=slot)
    assert answer(engine, throttle_seconds=slot) == (first, "throttled")
    keyed, reason = answer(engine, throttle_seconds=slot, singleton_key="a")
    assert reason is None, "another key has slots of its own"
    assert answer(engine, throttle_seconds=slot, singleton_key="a") == (keyed, "throttled")
    assert answer(engine, throttle_seconds=slot, tenant="other")[1] is None, "and so has another tenant"
    assert answer(engine, "r", throttle_seconds=slot)[1] is None, "and another queue"
    assert answer(engine)[1] is None, "a send that names no slot is not throttled"
    assert engine.refused(answer, engine, throttle_seconds=0).sqlstate == "JQ400"
    assert engine.refused(answer, engine, throttle_seconds=60, debounce_seconds=60).sqlstate == "JQ400"


@pytest.mark.parametrize(("until", "free"), [("window", False), ("ended", True)])
def test_whether_an_ended_job_still_holds_its_slot_is_a_choice(engine: Engine, until: str, free: bool) -> None:
    slot: dict[str, Any] = {"throttle_seconds": only_slot(), "slot_until": until}
    first, _ = answer(engine, **slot)
    (claim,) = engine.claim()
    assert answer(engine, **slot) == (first, "throttled"), "a running job holds its slot in any case"
    engine.call("complete", claim.id, claim.token)
    second, reason = answer(engine, **slot)
    assert (reason is None) is free
    if free:
        engine.call("cancel", second, "not needed")
    else:
        engine.call("delete_job", first, "as if it had not been")
    third, reason = answer(engine, **slot)
    assert reason is None
    engine.call("cancel", third, "a cancelled job holds no slot")
    assert answer(engine, **slot)[1] is None


def test_the_next_slot_takes_the_next_job(engine: Engine) -> None:
    sent: list[datetime] = []

    def two() -> bool:
        found, reason = answer(engine, throttle_seconds=1)
        if reason is None and found is not None:
            sent.append(engine.job(found)["created_at"])
        return len(sent) == 2

    wait_until(two, what="a job in the next second")
    assert math.floor(sent[1].timestamp()) > math.floor(sent[0].timestamp())


def test_a_debounced_job_goes_into_the_next_slot_and_the_one_after_it_is_dropped_or_merged(engine: Engine) -> None:
    size = only_slot()
    slot: dict[str, Any] = {"debounce_seconds": size, "singleton_key": "k"}
    first, _ = answer(engine, payload={"n": 1}, **slot)
    second, reason = answer(engine, payload={"n": 2, "kept": True}, **slot)
    assert reason is None
    now, later = (engine.job(job)["run_at"] for job in (first, second) if job)
    assert now <= datetime.now(UTC)
    assert later.timestamp() == math.ceil(now.timestamp() / size) * size, "it runs when the next slot begins"
    assert answer(engine, payload={"n": 3}, **slot) == (second, "debounced")
    assert engine.job(second)["payload"] == {"n": 2, "kept": True}
    assert answer(engine, payload={"n": 4}, merge_payload=True, **slot) == (second, "debounced")
    assert engine.job(second)["payload"] == {"n": 4, "kept": True}, "merge_payload: the waiting job takes it up"


# policies


@pytest.mark.parametrize("key", [None, "k"])
def test_short_has_one_job_that_has_not_started(engine: Engine, key: str | None) -> None:
    engine.call("create_queue", "q", {"policy": "short", "retry_delay": 3600})
    keyed: dict[str, Any] = {"singleton_key": key} if key else {}
    first, _ = answer(engine, **keyed)
    assert answer(engine, **keyed) == (first, "policy")
    assert answer(engine, singleton_key="other")[1] is None, "each key has a place of its own"
    (claim,) = engine.claim()
    assert claim.id == first
    second, reason = answer(engine, **keyed)
    assert reason is None, "a running job holds nothing"
    engine.fail(claim)
    assert engine.status(claim.id) == "pending"
    assert answer(engine, **keyed) == (second, "policy"), "one that waits for a retry does not count, the second does"
    engine.call("cancel", second, "not needed")
    assert answer(engine, **keyed)[1] is None


@pytest.mark.parametrize("key", [None, "k"])
def test_exclusive_has_one_job_that_has_not_ended(engine: Engine, key: str | None) -> None:
    engine.call("create_queue", "q", {"policy": "exclusive", "retry_delay": 3600})
    keyed: dict[str, Any] = {"singleton_key": key} if key else {}
    first, _ = answer(engine, **keyed)
    assert answer(engine, **keyed) == (first, "policy")
    (claim,) = engine.claim()
    assert answer(engine, **keyed) == (first, "policy"), "while it runs"
    engine.fail(claim)
    assert answer(engine, **keyed) == (first, "policy"), "while it waits for its retry"
    assert first is not None
    engine.make_due(first)
    assert complete(engine) == first
    assert answer(engine, **keyed)[1] is None


def test_a_key_in_a_standard_queue_allows_one_job_that_has_not_ended(engine: Engine) -> None:
    first, _ = answer(engine, singleton_key="k")
    assert answer(engine, singleton_key="k") == (first, "singleton")
    assert answer(engine, singleton_key="l")[1] is None
    complete(engine)
    assert answer(engine, singleton_key="k")[1] is None


def test_a_conflict_that_appears_at_a_resume_or_retry_is_refused_with_the_holder(engine: Engine) -> None:
    engine.call("create_queue", "q", {"policy": "exclusive", "max_retries": 0})
    failed = engine.claimed()
    engine.fail(failed)
    cancelled = engine.send()
    engine.call("cancel", cancelled, "not now")
    holder = engine.send()
    for action, job in (("retry", failed.id), ("resume", cancelled)):
        refusal = engine.refused(engine.call, action, job, "again")
        assert (refusal.code, refusal.detail["holder"]) == ("CONFLICT", str(holder))
    outcomes = engine.rows("select * from jobqueue.bulk('retry', '{\"status\": \"failed\"}', 'again')")
    assert [(row["outcome"], row["jobs"]) for row in outcomes] == [("refused", 1)], "and never fails a whole call"


def test_a_blocked_key_does_not_block_others_and_one_claim_starts_one_job_per_key(engine: Engine) -> None:
    engine.call("create_queue", "q", {"policy": "stately"})
    for key in ("a", "b", "c"):
        answer(engine, singleton_key=key)
    first = engine.claim(2)
    for key in ("a", "b", "c"):
        answer(engine, singleton_key=key)
    (other,) = engine.claim(10)
    assert {claim.row["singleton_key"] for claim in (*first, other)} == {"a", "b", "c"}


# queues


def test_a_queue_may_have_a_path_as_its_name_and_come_again_after_it_was_deleted(engine: Engine) -> None:
    name = "mail/eu-1/out.bound_2"
    assert engine.call("create_queue", name, {"max_retries": 1, "policy": "exclusive"}) is True
    assert answer(engine, name)[1] is None
    engine.call("cancel", engine.value("select id from jobqueue.job"), "to delete its queue")
    assert engine.call("delete_queue", name) == 1
    assert engine.values("select name from jobqueue.queues") == []
    assert engine.call("create_queue", name) is True
    made = engine.row("select policy, max_retries from jobqueue.queues where name = %s", name)
    assert made == {"policy": "standard", "max_retries": 3}, "nothing of the deleted one is left"
    assert [answer(engine, name)[1] for _ in range(2)] == [None, None]


def test_a_queue_inherits_to_its_jobs_and_a_job_says_otherwise(engine: Engine) -> None:
    engine.call("create_queue", "q", {"max_retries": 0, "lease": 60, "timeout": 5, "dead_letter": "dead"})
    usual, own = engine.send(priority=1), engine.send(max_retries=1, timeout=7, lease=90, dead_letter="mine")
    first, second = engine.claim(2)
    assert (first.id, second.id) == (usual, own)
    assert (first.row["timeout"], second.row["timeout"]) == (5, 7)
    length = [claim.row["lease_until"] - claim.row["started_at"] for claim in (first, second)]
    assert length == [timedelta(seconds=60), timedelta(seconds=90)]
    assert engine.fail(first) == "failed"
    assert engine.fail(second, PERMANENT) == "failed"
    copies = engine.rows(
        "select queue, dead_letter_of from jobqueue.jobs where dead_letter_of is not null order by queue"
    )
    assert copies == [{"queue": "dead", "dead_letter_of": usual}, {"queue": "mine", "dead_letter_of": own}]


def test_a_dead_letter_that_is_sent_elsewhere_keeps_key_group_and_priority(engine: Engine) -> None:
    engine.call("create_queue", "in_order", {"policy": "key_strict_fifo"})
    given: dict[str, Any] = {"singleton_key": "k", "group": "g", "tier": "gold", "priority": 4, "subject": "invoice:7"}
    claim = engine.claimed(dead_letter="dead", **given)
    engine.fail(claim, PERMANENT)
    done = engine.row("select * from jobqueue.redrive('dead', '{\"destination\": \"in_order\"}')")
    assert (done["sent"], done["conflicts"]) == (1, 0)
    (again,) = engine.claim(1, "in_order")
    sent = engine.job(again.id)
    assert {**given, "group": sent["group_key"]} == {
        name: sent["group_key" if name == "group" else name] for name in given
    }
    assert (sent["retry_count"], engine.status(claim.id)) == (0, "failed")


# settling


def test_only_a_claimed_job_is_completed_or_failed(engine: Engine) -> None:
    waiting = engine.send()
    for verb, arguments in (("complete", ()), ("fail", ({"class": "transient", "message": "no"},))):
        refusal = engine.refused(engine.call, verb, waiting, new_token(), *arguments)
        assert (refusal.sqlstate, refusal.code) == ("JQ409", "LEASE_LOST")
        assert engine.refused(engine.call, verb, uuid4(), new_token(), *arguments).code == "JOB_NOT_FOUND"
    assert engine.status(waiting) == "pending"
    assert engine.refused(engine.call, "delete_job", waiting, "too early").code == "INVALID_TRANSITION"


def test_a_batch_of_claims_is_settled_as_one_call_with_an_outcome_each(engine: Engine) -> None:
    jobs = [engine.send(payload={"n": n}) for n in range(4)]
    claims = engine.claim(4)
    assert [claim.id for claim in claims] == jobs
    engine.call("cancel", jobs[3], "meanwhile", True)
    given = [{"id": str(c.id), "token": str(c.token), "result": {"n": n}} for n, c in enumerate(claims) if n != 1]
    rows = engine.rows("select * from jobqueue.complete_many(%s)", Jsonb(given))
    assert [row["outcome"] for row in rows] == ["ok", "ok", "lost"]
    assert engine.fail(claims[1], PERMANENT) == "failed"
    assert [engine.status(job) for job in jobs] == ["completed", "failed", "completed", "cancelled"]


def test_a_claim_in_a_transaction_that_rolls_back_was_none(engine: Engine) -> None:
    job = engine.send()
    with engine.undone():
        assert [claim.id for claim in engine.claim()] == [job]
        assert engine.another().claim(worker=uuid4()) == [], "nobody else takes it meanwhile"
    (again,) = engine.claim()
    assert (again.id, again.row["attempt"]) == (job, 1)


def test_every_verb_joins_the_transaction_of_its_caller(engine: Engine) -> None:
    waiting, paused, failed = engine.send(), engine.in_status("paused", "p"), engine.in_status("failed", "f")
    running = engine.claimed("c")
    before = {job: engine.status(job) for job in (waiting, paused, failed, running.id)}
    with engine.undone():
        engine.call("complete", running.id, running.token)
        engine.call("cancel", waiting, "not needed")
        engine.call("resume", paused, "go on")
        engine.call("retry", failed, "again")
        engine.row("select * from jobqueue.upsert('u', '{}', '{\"singleton_key\": \"k\"}')")
        engine.call("create_queue", "made")
        after = [engine.status(job) for job in before]
        assert after == ["cancelled", "pending", "pending", "completed"]
    assert {job: engine.status(job) for job in before} == before
    assert engine.values("select name from jobqueue.queues where name in ('u', 'made')") == []


# waking: pg-boss leaves the workers asleep in each of these cases until they poll


def test_every_way_of_becoming_ready_wakes_idle_workers(engine: Engine) -> None:
    engine.call("create_queue", "q", {"retry_delay": 0, "retry_backoff": False, "dead_letter": "dead"})
    engine.call("create_queue", "dead")
    sleeper = engine.another()
    sleeper.run("listen jobqueue_ready")
    sleeper.run("select pg_advisory_lock_shared(27249, number) from jobqueue.queue")

    def woken() -> list[str]:
        engine.run("select pg_notify('jobqueue_ready', 'end')")
        heard = []
        for note in sleeper.connection.notifies(timeout=60):
            if note.payload == "end":
                break
            heard.append(note.payload)
        return sorted(set(heard))

    claim = engine.claimed()
    woken()
    engine.fail(claim)
    engine.value("select promoted from jobqueue.promote(100)")
    assert woken() == ["q"], "a retry"
    (claim,) = engine.claim()
    engine.fail(claim, PERMANENT)
    assert woken() == ["dead"], "a dead letter"
    engine.row("select * from jobqueue.redrive('dead')")
    assert woken() == ["q"], "a job that is sent back"
    engine.call("cancel", claim.id, "for a moment")
    engine.call("resume", claim.id, "go on")
    assert woken() == ["q"], "one that is taken up again"
    later = engine.send(delay=3600, priority=1)
    assert woken() == [], "one for later wakes nobody"
    engine.make_due(later)
    assert woken() == ["q"], "until it is due"
    moved = engine.send(delay=3600)
    engine.values("select * from jobqueue.update_jobs('q', %s, '{\"delay\": 0}')", {"id": str(moved)})
    assert woken() == ["q"], "or moved"
    (parent,) = engine.claim()
    child = engine.send(depends_on=[str(parent.id)])
    woken()
    engine.call("complete", parent.id, parent.token)
    assert engine.status(child) == "pending"
    assert woken() == ["q"], "one whose parents are done"


# reading


def test_lists_have_bounds_and_pages_survive_a_deleted_anchor(engine: Engine) -> None:
    # by their ids, which below PostgreSQL 18 have an order only from one millisecond to the next
    jobs = sorted(engine.send(payload={"kind": kind}) for kind in ("a", "b", "a", "b", "a"))
    kinds = {job: engine.job(job)["payload"]["kind"] for job in jobs}
    find = "select id from jobqueue.find_jobs('q', %s, %s, %s)"
    assert engine.values(find, {}, 2, None) == jobs[:2]
    engine.call("cancel", jobs[1], "to delete it")
    engine.call("delete_job", jobs[1], "the anchor goes")
    assert engine.values(find, {}, 2, jobs[1]) == jobs[2:4]
    assert engine.values(find, {"payload": {"kind": "a"}}, 1000, None) == [
        job for job in jobs if kinds[job] == "a" and job != jobs[1]
    ]
    assert engine.values(find, {"id": str(jobs[3])}, 1000, None) == [jobs[3]]
    for size in (0, 10_001):
        assert engine.refused(engine.values, find, {}, size, None).detail["option"] == "max_jobs"


def test_what_waits_and_what_is_ready_are_counted_apart(engine: Engine) -> None:
    engine.call("create_queue", "q")
    engine.send()
    engine.send(delay=3600)
    engine.send(depends_on=[str(engine.send())])
    cancelled = engine.send()
    engine.call("cancel", cancelled, "not counted")
    engine.claim(1)
    row: Row = engine.rows("select * from jobqueue.queue_stats('q')")[-1]
    assert (row["ready"], row["scheduled"], row["processing"]) == (1, 1, 1)


def test_a_schedule_is_replaced_by_its_name_and_many_may_have_one_expression(engine: Engine) -> None:
    for name in ("a", "b"):
        engine.call("schedule", name, "q", "* * * * *", Jsonb({"of": name}), {"time_zone": "Europe/Berlin"})
    engine.call("schedule", "a", "q", "0 3 * * *", Jsonb({"of": "a, again"}), {"priority": 3})
    rows = engine.rows("select name, expression, time_zone, payload, options from jobqueue.schedules order by name")
    assert [(row["name"], row["expression"], row["time_zone"]) for row in rows] == [
        ("a", "0 3 * * *", "UTC"),
        ("b", "* * * * *", "Europe/Berlin"),
    ]
    assert (rows[0]["payload"], rows[0]["options"]) == ({"of": "a, again"}, {"priority": 3})
