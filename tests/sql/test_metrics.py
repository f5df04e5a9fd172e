"""Counters for monitoring: every change of status of every client, durations, and how the queues stand."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.property.clients import Client, Shared, prepare
from tests.property.drain import drain
from tests.sql.engine import PERMANENT, TRANSIENT, WORKER, Engine

Labels = tuple[tuple[str, str], ...]
Metrics = dict[tuple[str, Labels], float]

WITNESS = """
create table public.witness (change text not null);
create function public.witness() returns trigger language plpgsql as $$
begin
    insert into public.witness values (old.status || ' ' || new.status);
    return null;
end $$;
create trigger witness after update on jobqueue.job
    for each row when (old.status <> new.status) execute function public.witness();
"""
BY_HAND = {
    "claim": "update jobqueue.job set status = 'processing', ready_seq = null, claim_token = gen_random_uuid(), "
    "worker_id = gen_random_uuid(), started_at = now(), lease_until = now() + interval '30 s' where id = %s",
    "complete": "update jobqueue.job set status = 'completed', version = version + 1, progress_pct = 100, lease_until = null, "
    "completed_at = now(), requested_action = null, error_class = null where id = %s",
    "cancel": "update jobqueue.job set status = 'cancelled', ready_seq = null, wait_until = null, completed_at = now() "
    "where id = %s",
}


def metrics(engine: Engine) -> Metrics:
    """All numbers by name and labels; a histogram's is its sum."""
    rows = engine.rows("select name, labels, value from jobqueue.metrics()")
    found = {(row["name"], tuple(sorted(row["labels"].items()))): row["value"] for row in rows}
    assert len(found) == len(rows), "a series comes twice"
    return found


def value(engine: Engine, name: str, **labels: str) -> float:
    """One number."""
    return metrics(engine)[name, tuple(sorted(labels.items()))]


def transitions(engine: Engine) -> Counter[str]:
    """How often each change of status is said to have happened, without those that never did."""
    rows = engine.rows(
        "select labels ->> 'from' || ' ' || (labels ->> 'to') as change, value from jobqueue.metrics() "
        "where name = 'job_status_transitions_total' and value > 0"
    )
    return Counter({row["change"]: round(row["value"]) for row in rows})


def witnessed(engine: Engine) -> Counter[str]:
    """The same as a trigger of the test has seen it."""
    rows = engine.rows("select change, count(*)::int as n from public.witness group by 1")
    return Counter({row["change"]: row["n"] for row in rows})


def fold(engine: Engine) -> None:
    """Let maintenance add the notes to the totals."""
    engine.rows("select * from jobqueue.maintain(null, '{fold_statistics}')")
    assert engine.count("statistics_note") == 0


def counters(found: Metrics) -> Metrics:
    """Those that must never go down."""
    return {key: number for key, number in found.items() if key[0].endswith(("_total", "_seconds"))}


def never_down(before: Metrics, after: Metrics) -> None:
    """No counter of `before` is smaller in `after`, or gone."""
    gauges = {"queue_oldest_ready_age_seconds", "maintenance_late_seconds", "oldest_transaction_age_seconds"}
    for key, number in counters(before).items():
        assert key[0] in gauges or after.get(key, -1) >= number - 1e-6, key


def test_counters_equal_what_a_trigger_sees_after_random_actions_of_every_client_and_never_go_down(
    engine: Engine,
) -> None:
    prepare(engine)
    engine.connection.execute(WITNESS.encode())
    seed = 12
    chance = random.Random(seed)
    shared = Shared()
    clients = [Client(each, seed, n, shared) for n, each in enumerate((engine, engine.another()))]
    before: Metrics = {}
    for n in range(120):
        chance.choice(clients).step()
        if n % 20 == 10:
            act_by_hand(engine, chance)
        if n % 40 == 39:
            assert transitions(engine) == witnessed(engine), f"step {n}"
            never_down(before, before := metrics(engine))
            if n % 80 == 39:
                # the same numbers once the notes are in the totals
                engine.rows("select * from jobqueue.maintain(null, '{fold_statistics}')")
                assert transitions(engine) == witnessed(engine), f"step {n}, folded"
                never_down(before, before := metrics(engine))
    drain(engine)
    engine.run("delete from jobqueue.job where status in ('completed', 'failed', 'cancelled', 'skipped')")
    seen = witnessed(engine)
    assert transitions(engine) == seen
    never_down(before, metrics(engine))
    for change in (
        "pending processing",
        "processing completed",
        "processing pending",
        "processing failed",
        "failed pending",
    ):
        assert seen[change] > 0, seen
    for outcome in ("completed", "failed", "cancelled", "skipped"):
        ended = sum(n for change, n in seen.items() if change.endswith(outcome))
        rows = (
            "select sum(value) from jobqueue.metrics() where name = 'jobs_finished_total' and labels ->> 'outcome' = %s"
        )
        assert engine.value(rows, outcome) == ended


def act_by_hand(engine: Engine, chance: random.Random) -> None:
    """Statements that a superuser writes, without any function of the schema."""
    plain = "select id from jobqueue.job where status = %s and settle_flags = 0 and queue = 'plain' order by id"
    for _ in range(3):
        engine.send("plain", priority=9)
    waiting = engine.values(plain, "pending")
    with engine.connection.transaction():
        # in the transaction of a claim: what functions note and what hands do does not mix
        engine.claim(1, "plain")
        for job, action in zip(chance.sample(waiting, 3), ("claim", "claim", "cancel"), strict=True):
            if engine.status(job) == "pending" and engine.job(job)["ready_seq"] is not None:
                engine.run(BY_HAND[action], job)
    running = engine.values(plain, "processing")
    engine.run(BY_HAND["complete"], chance.choice(running))


def test_a_job_that_is_taken_by_hand_is_rescued_like_any_other(engine: Engine) -> None:
    job = engine.send("q")
    engine.run(BY_HAND["claim"], job)
    assert value(engine, "jobs", queue="q", status="processing") == 1
    engine.lose_lease(job)
    assert engine.call("rescue", 10) == 1
    assert engine.status(job) == "pending"
    assert transitions(engine) == {"pending processing": 1, "processing pending": 1}


def test_a_change_that_is_undone_is_not_counted(engine: Engine) -> None:
    claim = engine.claimed()
    with engine.undone():
        engine.call("complete", claim.id, claim.token)
        assert transitions(engine) == {"pending processing": 1, "processing completed": 1}
    assert transitions(engine) == {"pending processing": 1}


def buckets(engine: Engine, name: str, **labels: str) -> dict[str, int]:
    """A histogram: how many took at most so long."""
    found = engine.value("select buckets from jobqueue.metrics() where name = %s and labels = %s", name, dict(labels))
    return dict(found)


@pytest.mark.parametrize("folded", [False, True])
def test_durations_are_counted_by_queue_and_job_type_within_their_bounds(engine: Engine, folded: bool) -> None:
    took = {"q": [0.1, 0.2, 2], "scan": [0.004, 3600.5]}
    ended: list[tuple[str, UUID, UUID]] = []
    for job_type, seconds in took.items():
        for _ in seconds:
            claim = engine.claimed("q", job_type=job_type)
            ended.append((job_type, claim.id, claim.token))
    with engine.connection.transaction():
        # all times of a transaction are one, so that a job takes exactly so long
        for (_, job, _), each in zip(ended, [s for seconds in took.values() for s in seconds], strict=True):
            engine.run("update jobqueue.job set started_at = now() - %s * interval '1 s' where id = %s", each, job)
        # one call with two job_types, one alone, one failure
        engine.rows(
            "select * from jobqueue.settle(null, %s, %s, null, null, null)",
            [ended[0][1], ended[1][1], ended[3][1]], [ended[0][2], ended[1][2], ended[3][2]],
        )  # fmt: skip
        engine.call("complete", ended[4][1], ended[4][2])
        engine.value("select jobqueue.fail(%s, %s, %s)", ended[2][1], ended[2][2], TRANSIENT)
    if folded:
        fold(engine)
    own, scans = (
        buckets(engine, "job_duration_seconds", queue="q", job_type="q"),
        buckets(engine, "job_duration_seconds", queue="q", job_type="scan"),
    )
    assert {bound: own[bound] for bound in ("0.05", "0.1", "0.25", "1", "2.5", "+Inf")} == {
        "0.05": 0, "0.1": 1, "0.25": 2, "1": 2, "2.5": 3, "+Inf": 3,
    }  # fmt: skip
    assert {bound: scans[bound] for bound in ("0.01", "3600", "+Inf")} == {"0.01": 1, "3600": 1, "+Inf": 2}
    assert list(own) == [*(f"{bound:g}" for bound in engine.value("select jobqueue.duration_bounds()")), "+Inf"]
    assert value(engine, "job_duration_seconds", queue="q", job_type="scan") == pytest.approx(3600.504, rel=1e-5)
    assert buckets(engine, "job_wait_seconds", queue="q")["+Inf"] == 5
    for job_type, completed in (("q", 2), ("scan", 2)):
        assert value(engine, "jobs_finished_total", queue="q", job_type=job_type, outcome="completed") == completed
    assert value(engine, "job_retries_total", queue="q", job_type="q") == 1
    assert value(engine, "job_attempts_failed_total", queue="q", job_type="q") == 1


def test_jobs_of_several_queues_in_one_call_are_counted_under_their_own(engine: Engine) -> None:
    claims = [engine.claimed("a"), engine.claimed("b", job_type="x"), engine.claimed("b")]
    engine.rows(
        "select * from jobqueue.settle(null, %s, %s, null, null, null)",
        [claim.id for claim in claims],
        [claim.token for claim in claims],
    )
    for queue, job_type in (("a", "a"), ("b", "x"), ("b", "b")):
        assert value(engine, "jobs_finished_total", queue=queue, job_type=job_type, outcome="completed") == 1
        assert buckets(engine, "job_duration_seconds", queue=queue, job_type=job_type)["+Inf"] == 1


def test_label_values_are_bounded_and_who_has_a_name_keeps_it(engine: Engine) -> None:
    note = "insert into jobqueue.statistics_note (queue, job_type, completed, waits, runs) select %s, %s || n, 1, '{1}', '{1}' "
    engine.run(note + "from generate_series(1, 199) n", "early", "t")
    fold(engine)
    # fold takes notes in no order; the 200th job_type is the last that gets a name
    engine.run(note + "from generate_series(200, 230) n", "early", "t")
    engine.run(
        "insert into jobqueue.statistics_note (queue, completed) select 'q' || n, 1 from generate_series(1, 250) n"
    )
    before = metrics(engine)
    fold(engine)
    after = metrics(engine)
    finished = [dict(labels) for name, labels in after if name == "jobs_finished_total"]
    assert len({labels["job_type"] for labels in finished}) == 201
    assert len({labels["queue"] for labels in finished}) == 201
    assert after["jobs_finished_total", (("job_type", "t7"), ("outcome", "completed"), ("queue", "early"))] == 1
    total = sum(number for (name, _), number in after.items() if name == "jobs_finished_total")
    assert (
        total == 199 + 31 + 250 == sum(number for (name, _), number in before.items() if name == "jobs_finished_total")
    )
    # gauges: the 200 oldest queues
    engine.run("insert into jobqueue.queue (name) select 'q' || n from generate_series(1, 250) n")
    ready = [dict(labels)["queue"] for name, labels in metrics(engine) if name == "jobs_ready"]
    assert len(ready) == 201 == len(set(ready))
    assert "_other" in ready


def test_how_queues_workers_and_the_database_stand(engine: Engine) -> None:
    engine.run("insert into jobqueue.queue (name) values ('empty')")
    late, slow, plain = engine.claimed(), engine.claimed(), engine.claimed()
    engine.send("q")
    engine.run(
        "update jobqueue.job set run_at = now() - interval '90 s', created_at = now() - interval '2 min' "
        "where status = 'pending'"
    )
    engine.send("q", delay=3600)
    engine.run("update jobqueue.job set lease_until = now() - interval '3 min' where id = %s", late.id)
    engine.run(
        "update jobqueue.job set started_at = x, updated_at = x from (select now() - interval '31 min' as x) y where id = %s",
        slow.id,
    )
    failed = engine.claimed("other")
    engine.fail(failed, PERMANENT)
    engine.call("pause_queue", "other", "by night")
    engine.call(
        "register_worker",
        UUID(int=7),
        Jsonb({"name": "w", "hostname": "h", "pid": 1, "queues": ["q"], "concurrency": 5}),
    )
    engine.run("update jobqueue.worker set running = 3 where id = %s", UUID(int=7))
    engine.run("update jobqueue.worker set heartbeat_at = now() - interval '1 min' where id = %s", WORKER)
    # of one that is lost nothing is known any more
    engine.run("update jobqueue.worker set stuck = '{\"slots\": 1}'")
    found = metrics(engine)

    def of(name: str, **labels: str) -> float:
        return found[name, tuple(sorted(labels.items()))]

    jobs = {
        status: of("jobs", queue="q", status=status)
        for status in ("pending", "processing", "blocked", "paused", "failed")
    }
    assert jobs == {"pending": 2, "processing": 3, "blocked": 0, "paused": 0, "failed": 0}
    assert of("jobs", queue="other", status="failed") == 1
    assert of("jobs_ready", queue="q") == 1
    assert of("queue_oldest_ready_age_seconds", queue="q") == pytest.approx(90, abs=20)
    assert of("queue_oldest_ready_age_seconds", queue="empty") == 0
    assert (of("jobs_stuck", queue="q"), of("jobs_unrescued", queue="q")) == (1, 1)
    assert (of("queue_paused", queue="other"), of("queue_paused", queue="q")) == (1, 0)
    assert (of("queue_workers", queue="q"), of("queue_workers", queue="other")) == (1, 0)
    assert [of("workers", state=state) for state in ("working", "draining", "lost")] == [1, 0, 1]
    assert (of("worker_slots"), of("worker_slots_busy"), of("worker_slots_stuck")) == (5, 3, 1)
    assert of("table_bytes", table="job") >= engine.value("select pg_table_size('jobqueue.job')")
    assert of("job_table_bound_bytes") == 100 * 1024 * 1024
    assert 0 <= of("notify_queue_usage_ratio") < 1
    assert of("maintenance_late_seconds") >= 0
    assert of("table_dead_rows", table="job") >= 0
    assert of("watched_topics") == 0
    assert plain.id != late.id


def test_health_warns_of_a_table_that_is_too_large_and_of_many_failures(engine: Engine) -> None:
    def warned() -> dict[str, str]:
        return {
            row["name"]: row["detail"] for row in engine.rows("select * from jobqueue.health() where status = 'warn'")
        }

    engine.run(
        "insert into jobqueue.statistics_note (queue, completed, failed) select 'q', 17, 2 union all select 'few', 1, 9"
    )
    fold(engine)
    assert not {"table size", "failures: q"} & warned().keys()
    engine.run("insert into jobqueue.statistics_note (queue, failed) values ('q', 1)")
    fold(engine)
    engine.run("insert into jobqueue.setting values ('warn_table_size', '\"8 kB\"')")
    assert engine.value("select jobqueue.table_bound()") == 8192
    assert warned()["failures: q"] == "3 of the 20 jobs that ended in the last hour failed"
    assert "of 8192 bytes" in warned()["table size"]
    assert "failures: few" not in warned()


def test_support_and_the_api_may_read_metrics_and_no_tenant_is_in_them(engine: Engine) -> None:
    engine.send("q", tenant="secret-tenant", subject="secret-subject")
    for role in ("jobqueue_api", "jobqueue_support_readonly"):
        with engine.acting_as(role):
            rows = engine.values("select m::text from jobqueue.metrics() m")
            assert any("jobs_ready" in row for row in rows)
            assert not any("secret" in row for row in rows)
    with engine.acting_as("jobqueue_producer"), pytest.raises(psycopg.errors.InsufficientPrivilege):
        engine.rows("select * from jobqueue.metrics()")


def buffers(engine: Engine) -> int:
    """Pages that one call of metrics() reads."""
    plan: Any = engine.value("explain (analyze, buffers, format json) select * from jobqueue.metrics()")
    (top,) = plan
    return int(top["Plan"]["Shared Hit Blocks"] + top["Plan"]["Shared Read Blocks"])


def test_finished_jobs_cost_a_scrape_nothing(engine: Engine) -> None:
    def finish(n: int) -> None:
        engine.run(
            "insert into jobqueue.job (queue, job_type, status, progress_pct, completed_at) "
            "select 'q', 'q', 'completed', 100, now() from generate_series(1, %s)",
            n,
        )
        engine.run("vacuum analyze jobqueue.job")

    engine.send("q")
    finish(100)
    few = min(buffers(engine) for _ in range(2))
    finish(15_000)
    many = min(buffers(engine) for _ in range(2))
    pages = engine.value("select relpages from pg_class where oid = 'jobqueue.job'::regclass")
    assert pages > 2 * few, "the table is too small for the test to say anything"
    assert many < 1.1 * few + 20, (few, many)


def test_the_mark_by_which_claims_and_completions_are_told_from_hands_is_theirs_alone(engine: Engine) -> None:
    marked = engine.values(
        "select p.proname::text from pg_proc p, unnest(p.proconfig) c where p.pronamespace = 'jobqueue'::regnamespace "
        "and c = 'search_path=pg_catalog, jobqueue, jobqueue, pg_temp' order by 1"
    )
    assert marked == ["claim_queue", "release_children", "settle"]
    (guard,) = engine.values("select pg_get_triggerdef(oid) from pg_trigger where tgname = 'job_guard'")
    assert re.search("'pg_catalog, jobqueue, jobqueue, pg_temp'", guard)
