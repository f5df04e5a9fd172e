"""Limits hold under any number of claimers, are fair, and never block those whom they do not concern."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import PERMANENT, Claim, Engine

GROUP, KEY = "group", "singleton_key"


def limited(engine: Engine, **options: Any) -> None:
    """Make the queue q with limits."""
    assert engine.call("create_queue", "q", options) is True


def send_all(engine: Engine, options: list[dict[str, Any]], queue: str = "q") -> None:
    """Send a job per element; its payload has its number as n."""
    jobs = [{"payload": {"n": n}, "options": each} for n, each in enumerate(options)]
    engine.value("select count(*) from jobqueue.send_many(%s, %s)", queue, Jsonb(jobs))


def numbers(claims: list[Claim]) -> list[int]:
    """The numbers of claimed jobs."""
    return [claim.row["payload"]["n"] for claim in claims]


def complete(engine: Engine, *claims: Claim) -> None:
    """Complete claims."""
    for claim in claims:
        engine.call("complete", claim.id, claim.token)


def used(engine: Engine) -> dict[tuple[int, str], int]:
    """Slots taken, by stage and line."""
    rows = engine.rows("select stage, line, used from jobqueue.admission_slot where used <> 0")
    return {(row["stage"], row["line"]): row["used"] for row in rows}


# policies of one job at a time


def test_singleton_runs_one_job_per_key_and_lets_any_number_wait(engine: Engine) -> None:
    limited(engine, policy="singleton")
    send_all(engine, [{KEY: "a"}, {KEY: "a"}, {KEY: "b"}, {KEY: "a"}, {}, {}])
    first = engine.claim(10)
    assert sorted(numbers(first)) == [0, 2, 4]
    assert engine.claim(10) == []
    complete(engine, first[0])
    assert numbers(engine.claim(10)) == [1]


def test_keys_of_different_tenants_are_different_keys(engine: Engine) -> None:
    limited(engine, policy="singleton")
    send_all(engine, [{KEY: "a", "tenant": "x"}, {KEY: "a", "tenant": "y"}])
    assert len(engine.claim(10)) == 2


def test_stately_has_one_job_per_key_in_each_state(engine: Engine) -> None:
    limited(engine, policy="stately", retry_delay=60)
    first = engine.send("q", singleton_key="k")
    held = engine.row("select * from jobqueue.send('q', '{}', '{\"singleton_key\": \"k\"}')")
    assert (held["created"], held["reason"], held["id"]) == (False, "policy", first)
    (running,) = engine.claim(10)
    second = engine.send("q", singleton_key="k")
    assert engine.claim(10) == [], "one of the key runs"
    assert engine.fail(running) == "pending"
    (next_one,) = engine.claim(10)
    assert next_one.id == second
    assert engine.fail(next_one) == "failed", "another one waits for its retry already"
    assert engine.refused(engine.call, "retry", second, "again").detail["holder"] == str(first)
    engine.call("run_now", first, "it is wanted")
    complete(engine, *engine.claim(10))
    assert engine.call("retry", second, "again") == "pending"


@pytest.mark.parametrize("policy", ["short", "stately"])
def test_a_job_that_was_given_back_counts_as_one_that_has_not_started(engine: Engine, policy: str) -> None:
    limited(engine, policy=policy)
    first = engine.send("q", singleton_key="k")
    (claim,) = engine.claim(1)
    engine.call("release", claim.id, claim.token)
    refused = engine.row("select * from jobqueue.send('q', '{}', '{\"singleton_key\": \"k\"}')")
    assert (refused["created"], refused["id"]) == (False, first)
    (claim,) = engine.claim(1)
    second = engine.send("q", singleton_key="k")
    engine.call("release", claim.id, claim.token)
    assert engine.status(second) == engine.status(first) == "pending", "none is lost if another one came meanwhile"


def test_a_key_of_strict_order_runs_one_after_the_other_through_retries_and_releases(engine: Engine) -> None:
    limited(engine, policy="key_strict_fifo", retry_delay=60)
    send_all(engine, [{KEY: "a"}, {KEY: "a"}, {KEY: "b"}, {KEY: "a", "priority": 100}])
    claims = engine.claim(10)
    assert numbers(claims) == [0, 2]
    engine.call("release", claims[0].id, claims[0].token)
    (again,) = engine.claim(10)
    assert numbers([again]) == [0], "a released job is still the head of its key"
    engine.fail(again)
    assert engine.claim(10) == [], "the key waits with its head for the retry"
    blocked = engine.row("select * from jobqueue.blocked_keys('q')")
    assert (blocked["singleton_key"], blocked["job_id"], blocked["status"], blocked["waiting"]) == (
        "a",
        again.id,
        "pending",
        2,
    )
    engine.make_due(again.id)
    (again,) = engine.claim(10)
    complete(engine, again)
    assert numbers(engine.claim(10)) == [1], "priority does not reorder inside a key"


def test_a_failed_head_holds_its_key_until_it_is_retried_skipped_or_deleted(engine: Engine) -> None:
    limited(engine, policy="key_strict_fifo", keep_ended=1)
    send_all(engine, [{KEY: "a"}] * 4)
    for n, solve in enumerate(("retry", "skip", "delete_job")):
        (head,) = engine.claim(10)
        assert numbers([head]) == [n]
        assert engine.fail(head, PERMANENT) == "failed"
        assert engine.claim(10) == []
        waiting = engine.values("select id from jobqueue.job where status = 'pending' order by id")[0]
        told = engine.row("select * from jobqueue.explain(%s) where reason = 'waits_for_key'", waiting)
        assert str(head.id) in told["detail"]
        assert "retry" in told["what_to_do"]
        engine.run("update jobqueue.job set completed_at = now() - interval '1 hour' where status = 'failed'")
        removed = "select removed from jobqueue.remove_old('00000000-0000-0000-0000-000000000000', 100)"
        assert engine.value(removed) == 0, "retention does not delete a failed head that has followers"
        engine.call(solve, head.id, "so that the key goes on")
        if solve == "retry":
            complete(engine, *engine.claim(10))
    (last,) = engine.claim(10)
    assert numbers([last]) == [3]
    engine.fail(last, PERMANENT)
    engine.run("update jobqueue.job set completed_at = now() - interval '1 hour' where status = 'failed'")
    assert engine.value(removed) == 1, "nobody follows"


def test_every_job_of_a_queue_of_strict_order_needs_a_key(engine: Engine) -> None:
    limited(engine, policy="key_strict_fifo")
    assert engine.refused(engine.send, "q").detail["option"] == "singleton_key"
    limits = engine.refused(engine.call, "blocked_keys", "none")
    assert limits.code == "QUEUE_NOT_FOUND"
    engine.call("create_queue", "plain")
    assert engine.refused(engine.call, "blocked_keys", "plain").code == "INVALID_ARGUMENT"


# concurrency


def test_a_queue_runs_as_many_jobs_as_it_may(engine: Engine) -> None:
    limited(engine, concurrency=3)
    send_all(engine, [{"priority": n % 2} for n in range(8)])
    first = engine.claim(10)
    assert numbers(first) == [1, 3, 5], "the highest priority first"
    complete(engine, first[0])
    assert len(engine.claim(10)) == 1
    told = [
        row["reason"]
        for row in engine.rows(
            "select e.reason from jobqueue.job j cross join lateral jobqueue.explain(j.id) e where j.status = 'pending'"
        )
    ]
    assert told.count("waits_for_queue") == 4


def test_a_group_has_the_limit_of_its_tier_and_a_full_one_blocks_nobody(engine: Engine) -> None:
    limited(engine, group_concurrency={"default": 1, "tiers": {"gold": 3}})
    send_all(engine, [{GROUP: "full"}] * 30 + [{GROUP: "rich", "tier": "gold"}] * 5 + [{}] * 5)
    claims = engine.claim(100)
    lines = [claim.row["group_key"] for claim in claims]
    assert (lines.count("full"), lines.count("rich"), lines.count(None)) == (1, 3, 5)


def test_without_a_default_only_the_named_tiers_are_limited(engine: Engine) -> None:
    limited(engine, group_concurrency={"tiers": {"free": 1}})
    send_all(engine, [{GROUP: "a", "tier": "free"}] * 3 + [{GROUP: "b"}] * 3)
    assert len(engine.claim(100)) == 4


def test_a_key_has_slots_too(engine: Engine) -> None:
    limited(engine, key_concurrency=2)
    send_all(engine, [{KEY: "a"}] * 4 + [{}] * 2)
    assert len(engine.claim(100)) == 4


@pytest.mark.parametrize("end", ["complete", "fail", "snooze", "release", "cancel", "rescue", "expire", "pause"])
def test_every_way_out_gives_the_slots_back(engine: Engine, end: str) -> None:
    limited(engine, concurrency=2, group_concurrency={"default": 2}, key_concurrency=2)
    for _ in range(3):
        engine.send(group="g", singleton_key="k", expires_in=60)
    first, second = engine.claim(10)
    waiting = engine.values("select id from jobqueue.job where status = 'pending'")
    for claim in (first, second):
        match end:
            case "complete":
                complete(engine, claim)
            case "fail":
                engine.fail(claim, PERMANENT)
            case "snooze":
                engine.value("select jobqueue.snooze(%s, %s, '1 hour')", claim.id, claim.token)
            case "release":
                engine.call("release", claim.id, claim.token)
            case "cancel":
                engine.call("cancel", claim.id, "enough", True)
            case "rescue":
                engine.lose_lease(claim.id)
                engine.call("rescue", 10)
            case _:
                complete(engine, claim)
    if end in ("expire", "pause"):
        # one that is ready holds its slots as well
        assert engine.value("select jobqueue.admit(q, 10, true) from jobqueue.queue q") is True
        assert used(engine)[4, ""] == 1
        if end == "pause":
            engine.call("pause", waiting[0], "not now")
        else:
            engine.run("update jobqueue.job set expires_at = now() - interval '1 s' where status = 'pending'")
            assert engine.call("expire", 10) == 1
    for claim in engine.claim(10):
        complete(engine, claim)
    for claim in engine.claim(10):
        complete(engine, claim)
    engine.value("select jobqueue.admit(q, 10, true) from jobqueue.queue q")
    assert used(engine) == {}
    assert engine.count("admission_line") == 0


def test_a_cancelled_job_that_waits_for_a_slot_leaves_its_line(engine: Engine) -> None:
    limited(engine, group_concurrency={"default": 1}, key_concurrency=1)
    send_all(engine, [{GROUP: "g", KEY: "a"}, {GROUP: "g", KEY: "b"}, {GROUP: "h", KEY: "b"}])
    (first,) = engine.claim(10)
    b, other = engine.values("select id from jobqueue.job where status = 'pending' order by id")
    assert engine.row("select * from jobqueue.explain(%s) limit 1", b)["reason"] == "waits_for_group"
    assert engine.row("select * from jobqueue.explain(%s) limit 1", other)["reason"] == "waits_for_key"
    engine.call("cancel", b, "its key is wanted")
    assert [claim.id for claim in engine.claim(10)] == [other], "the slot of its key went on"
    complete(engine, first)


def test_priority_counts_among_those_that_wait(engine: Engine) -> None:
    limited(engine, concurrency=1)
    send_all(engine, [{}, {}, {}])
    (first,) = engine.claim(10)
    last = engine.values("select id from jobqueue.job where status = 'pending' order by id")[-1]
    engine.call("prioritize", last, 7, "it is urgent")
    complete(engine, first)
    assert numbers(engine.claim(10)) == [2]


def test_changed_jobs_keep_their_place_unless_their_group_changes(engine: Engine) -> None:
    limited(engine, group_concurrency={"default": 1})
    send_all(engine, [{GROUP: "g"}, {GROUP: "g"}, {GROUP: "g"}])
    first = engine.claim(10)
    one, two = engine.values("select id from jobqueue.job where status = 'pending' order by id")
    for change in ({"subject": "new"}, {"priority": 0}):
        engine.rows("select * from jobqueue.update_jobs('q', %s, %s)", {"id": str(one)}, change)
    engine.rows("select * from jobqueue.update_jobs('q', %s, %s)", {"id": str(two)}, {"group": "h"})
    assert [claim.id for claim in engine.claim(10)] == [two]
    complete(engine, *first)
    assert [claim.id for claim in engine.claim(10)] == [one]


# rates


def test_no_more_jobs_start_in_a_period_than_the_rate_allows(engine: Engine) -> None:
    limited(engine, rate_limit={"limit": 3, "period": 60})
    send_all(engine, [{}] * 8)
    first = engine.claim(10)
    assert len(first) == 3
    complete(engine, *first)
    assert engine.claim(10) == [], "a token comes back a period after the start, not at the end"
    due = engine.value("select next_due - now() from jobqueue.promote(10)").total_seconds()
    assert 0 < due <= 60, "a worker sleeps until then"
    engine.run("update jobqueue.admission_note set due = now() where due is not null")
    assert len(engine.claim(10)) == 3


def test_the_rate_of_a_key_is_its_own(engine: Engine) -> None:
    limited(engine, rate_limit={"limit": 1, "period": "1 minute", "per": "key"})
    send_all(engine, [{KEY: "a"}, {KEY: "a"}, {KEY: "b"}, {}])
    assert sorted(numbers(engine.claim(10))) == [0, 2, 3]
    assert engine.claim(10) == []


def test_a_token_of_a_job_that_never_started_comes_back_at_once(engine: Engine) -> None:
    limited(engine, rate_limit={"limit": 1, "period": 3600})
    send_all(engine, [{}, {}])
    engine.value("select jobqueue.admit(q, 10, true) from jobqueue.queue q")
    ready = engine.value("select id from jobqueue.job where ready_seq is not null")
    engine.call("cancel", ready, "not this one")
    assert numbers(engine.claim(10)) == [1]


# fairness and ageing


@pytest.mark.parametrize(("fair_by", "name"), [("group", "group"), ("tenant", "tenant")])
def test_lanes_take_turns_inside_one_priority(engine: Engine, fair_by: str, name: str) -> None:
    limited(engine, fair_by=fair_by)
    send_all(
        engine, [{name: "big"}] * 20 + [{name: "small"}] * 3 + [{name: "mid"}] * 5 + [{name: "big", "priority": 1}]
    )
    claims = [engine.claim(4) for _ in range(5)]
    column = "group_key" if name == "group" else "tenant"
    lanes = [claim.row[column] for part in claims for claim in part]
    assert lanes[0] == "big", "the higher priority first"
    assert lanes[1:10].count("small") == 3, "each had its three turns before anybody had a fourth"
    assert lanes[1:10].count("mid") == 3
    assert lanes[1:10].count("big") == 3


def test_waiting_counts_like_priority_in_an_ageing_queue(engine: Engine) -> None:
    limited(engine, ageing="1 minute")
    for n, (priority, waited) in enumerate([(0, 11), (5, 0), (10, 0), (0, 0), (5, 7)]):
        engine.send("q", {"n": n}, priority=priority)
        engine.run(
            "update jobqueue.admission_line set entered_at = now() - make_interval(mins => %s) where seq = "
            "(select max(seq) from jobqueue.admission_line)",
            waited,
        )
    order = [numbers(engine.claim(1))[0] for _ in range(5)]
    assert order == [4, 0, 2, 1, 3]


# changes and pauses


def test_a_new_limit_reaches_jobs_that_wait_and_counts_those_that_run(engine: Engine) -> None:
    engine.call("create_queue", "q")
    send_all(engine, [{GROUP: "g"}] * 6)
    running = engine.claim(2)
    engine.call("update_queue", "q", {"concurrency": 3})
    (third,) = engine.claim(10)
    assert engine.claim(10) == []
    engine.call("update_queue", "q", {"concurrency": None, "group_concurrency": {"default": 1}})
    assert engine.claim(10) == [], "three of the group run already"
    complete(engine, *running)
    assert engine.claim(10) == []
    complete(engine, third)
    assert len(engine.claim(10)) == 1
    engine.call("update_queue", "q", {"group_concurrency": None})
    assert len(engine.claim(10)) == 2
    assert engine.count("admission_slot") == 0


def test_the_jobs_of_a_paused_tenant_hold_no_slot(engine: Engine) -> None:
    limited(engine, concurrency=2)
    send_all(engine, [{"tenant": "a"}] * 3 + [{"tenant": "b"}] * 2)
    engine.value("select jobqueue.admit(q, 10, true) from jobqueue.queue q")
    engine.call("pause_tenant", "a", "they owe us")
    claims = engine.claim(10)
    assert numbers(claims) == [3, 4]
    complete(engine, *claims)
    assert engine.claim(10) == []
    reason = engine.values(
        "select e.reason from jobqueue.job j cross join lateral jobqueue.explain(j.id) e where j.status = 'pending'"
    )
    assert {"tenant_paused", "set_aside"} <= set(reason)
    engine.call("resume_tenant", "a", "they paid")
    assert set(numbers(engine.claim(10))) < {0, 1, 2}


def test_jobs_that_no_live_worker_has_a_handler_for_make_room(engine: Engine) -> None:
    limited(engine, concurrency=1)
    send_all(engine, [{"job_type": "unknown"}, {"job_type": "known"}])
    engine.value("select jobqueue.register_worker(%s, %s)", uuid4(), {"queues": ["q"], "job_types": ["known"]})
    assert engine.claim(10, job_types=["known"]) == []
    engine.run("delete from jobqueue.worker where job_types is null")
    engine.run("update jobqueue.job set updated_at = now() - interval '1 min'")
    engine.rows("select * from jobqueue.maintain(null, '{admission}')")
    assert numbers(engine.claim(10, job_types=["known"])) == [1]


def test_maintenance_puts_wrong_counts_right(engine: Engine) -> None:
    limited(engine, concurrency=2, group_concurrency={"default": 2})
    send_all(engine, [{GROUP: "g"}] * 4)
    complete(engine, engine.claim(10)[0])
    engine.run("update jobqueue.admission_slot set used = 5")
    assert engine.claim(10) == []
    engine.rows("select * from jobqueue.maintain(null, '{admission}')")
    assert len(engine.claim(10)) == 1
    assert used(engine) == {(2, "g"): 2, (4, ""): 2}


@pytest.mark.parametrize("options", [
    {"concurrency": 0}, {"group_concurrency": 3}, {"group_concurrency": {}}, {"group_concurrency": {"tiers": {"a": 0}}},
    {"group_concurrency": {"default": 1, "other": 2}}, {"key_concurrency": "x"}, {"rate_limit": {}},
    {"rate_limit": {"limit": 1, "per": "day"}}, {"rate_limit": {"limit": 1, "period": -1}}, {"ageing": 0.5},
    {"fair_by": "colour"}, {"fair_by": "group", "ageing": 60}, {"policy": "singleton", "key_concurrency": 2},
    {"policy": "none"},
])  # fmt: skip
def test_limits_that_make_no_sense_are_refused(engine: Engine, options: dict[str, Any]) -> None:
    assert engine.refused(engine.call, "create_queue", "q", options).code in ("INVALID_ARGUMENT", "UNKNOWN_OPTION")
    assert engine.values("select name from jobqueue.queues") == []


def test_who_looks_for_due_jobs_looks_again_soon_while_a_claim_has_not_told_of_its_tokens(engine: Engine) -> None:
    engine.run('select jobqueue.create_queue(\'q\', \'{"rate_limit": {"limit": 1, "period": 0.4}}\')')
    soon = "select extract(epoch from next_due - now())::float8 between 0 and 0.4 from jobqueue.promote(10)"
    engine.send()
    engine.send()
    other = engine.another()
    other.run("begin")
    assert len(other.rows("select * from jobqueue.claim(array['q'], gen_random_uuid(), 5)")) == 1
    # Its token is not seen yet; the one who waits for the second job must not sleep until its next poll.
    assert engine.value(soon) is True
    other.run("commit")
    assert engine.value(soon) is True
    engine.run("select jobqueue.pause_queue('q', 'r')")
    engine.run("delete from jobqueue.admission_note")
    assert engine.value("select next_due is null from jobqueue.promote(10)") is True, "nobody can start it"
