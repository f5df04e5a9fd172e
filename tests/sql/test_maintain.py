"""Maintenance: what is due is moved, what is over is ended or removed, each step once and never waiting for another."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.sql.engine import PERMANENT, Engine


def maintain(engine: Engine, *steps: str) -> dict[str, int]:
    """Run steps now; what each has done."""
    rows = engine.rows("select * from jobqueue.maintain(null, %s)", list(steps))
    return {row["step"]: row["done"] for row in rows}


def test_promotion_moves_what_is_due_and_says_when_the_next_is(engine: Engine) -> None:
    due, later = engine.send(delay=60), engine.send(delay=3600)
    engine.run("update jobqueue.job set wait_until = now() - interval '1 s' where id = %s", due)
    before = engine.job(due)["version"]
    row = engine.row("select * from jobqueue.promote(10)")
    assert (row["promoted"], row["next_due"]) == (1, engine.job(later)["wait_until"])
    assert engine.call("next_due") == engine.job(later)["wait_until"]
    assert engine.job(due)["version"] == before + 1
    assert [claim.id for claim in engine.claim(5)] == [due]


def test_promotion_is_in_portions_and_in_the_order_of_time(engine: Engine) -> None:
    jobs = [engine.send(delay=60 + n) for n in range(5)]
    engine.run("update jobqueue.job set wait_until = wait_until - interval '1 h'")
    assert engine.row("select promoted from jobqueue.promote(3)") == {"promoted": 3}
    assert {claim.id for claim in engine.claim(9)} == set(jobs[:3])


def test_promotion_looks_only_behind_a_time_if_told(engine: Engine) -> None:
    engine.send(delay=60)
    engine.run("update jobqueue.job set wait_until = now() - interval '1 h'")
    recent = "select promoted from jobqueue.promote(9, now() - interval '1 min')"
    assert engine.value(recent) == 0
    assert engine.value("select promoted from jobqueue.promote(9)") == 1


def test_a_job_that_expires_before_it_ran_ends_failed_and_is_copied_to_the_dead_letter_queue(engine: Engine) -> None:
    job = engine.send(expires_in="10 min", dead_letter="dead")
    assert maintain(engine, "expire") == {"expire": 0}
    engine.run("update jobqueue.job set expires_at = now()")
    assert maintain(engine, "expire") == {"expire": 1}
    row = engine.view(job)
    assert (row["status"], row["error_code"], row["error_class"]) == ("failed", "EXPIRED", "permanent")
    assert [a["outcome"] for a in engine.attempts(job)] == ["expired"]
    assert engine.values("select queue from jobqueue.job where dead_letter_of = %s", job) == ["dead"]


def test_the_time_to_expire_begins_when_the_job_may_run(engine: Engine) -> None:
    row = engine.job(engine.send(delay=100, expires_in=60))
    assert row["expires_at"] - row["run_at"] == timedelta(seconds=60)


def test_a_job_that_has_run_never_expires(engine: Engine) -> None:
    claim = engine.claimed(expires_in=60)
    engine.fail(claim)
    assert engine.job(claim.id)["expires_at"] is None


@pytest.mark.parametrize(
    ("status", "days", "kept"),
    [
        ("completed", 6.9, True),
        ("completed", 7.1, False),
        ("failed", 7.1, True),
        ("failed", 30.1, False),
        ("cancelled", 30.1, False),
    ],
)
def test_completed_jobs_are_kept_7_days_and_other_ended_ones_30(
    engine: Engine, status: str, days: float, kept: bool
) -> None:
    engine.in_status(status)
    engine.run("update jobqueue.job set completed_at = now() - make_interval(secs => %s)", days * 86400)
    maintain(engine, "retention")
    assert engine.count() == int(kept)


@pytest.mark.parametrize(("keep", "days", "kept"), [(None, 9999, True), (60, 0.1, False), ("10 days", 9, True)])
def test_a_job_may_say_how_long_it_is_kept(engine: Engine, keep: Any, days: float, kept: bool) -> None:
    claim = engine.claimed(keep_completed=keep)
    engine.call("complete", claim.id, claim.token)
    engine.run("update jobqueue.job set completed_at = now() - make_interval(secs => %s)", days * 86400)
    maintain(engine, "retention")
    assert engine.count() == int(kept)


def test_retention_never_removes_unended_jobs_and_goes_on_where_it_stopped(engine: Engine) -> None:
    unended = [engine.in_status(status, queue=status) for status in ("blocked", "pending", "processing", "paused")]
    for _ in range(3):
        engine.in_status("completed", queue="done")
    engine.run("update jobqueue.job set completed_at = now() - interval '99 days' where status = 'completed'")
    place, removed = "00000000-0000-0000-0000-000000000000", 0
    for _ in range(5):
        row = engine.row("select * from jobqueue.remove_old(%s, 2)", place)
        removed += row["removed"]
        if row["next_from"] is None:
            break
        place = row["next_from"]
    assert removed == 3
    assert set(engine.values("select id from jobqueue.job")) == set(unended)


def test_retention_takes_the_history_of_jobs_along(engine: Engine) -> None:
    claim = engine.claimed(stages=["a"])
    engine.fail(claim, PERMANENT)
    engine.run("update jobqueue.job set completed_at = now() - interval '31 days'")
    assert maintain(engine, "retention") == {"retention": 1}
    assert engine.count("attempt") == engine.count("stage") == 0


def test_housekeeping_forgets_old_listeners_workers_and_keys(engine: Engine) -> None:
    engine.run(
        "insert into jobqueue.watch values ('all', now() - interval '1 min'), ('job:x', now() + interval '1 min')"
    )
    engine.run("insert into jobqueue.worker (id, heartbeat_at) values (gen_random_uuid(), now() - interval '2 days')")
    engine.run(
        "insert into jobqueue.idempotency_key values ('o', 'k', 'f', '{}', now() - interval '25 "
        "h'), ('o', 'l', 'f', '{}', now())"
    )
    assert maintain(engine, "housekeeping") == {"housekeeping": 3}
    assert [engine.count(t) for t in ("watch", "worker", "idempotency_key")] == [1, 0, 1]


def test_housekeeping_forgets_keys_that_were_used_a_few_times_and_none_that_has_a_new_name(engine: Engine) -> None:
    insert = "insert into jobqueue.key_generation values ('q', %s, %s, now() - interval '61 min')"
    engine.run(insert, "once", 0)
    engine.run(insert, "often", 1)
    engine.run("insert into jobqueue.key_generation (queue, key) values ('q', 'just now')")
    maintain(engine, "housekeeping")
    assert sorted(engine.values("select key from jobqueue.key_generation")) == ["just now", "often"]


def test_a_step_runs_when_it_is_due_and_not_before(engine: Engine) -> None:
    steps = set(engine.values("select step from jobqueue.maintenance"))
    assert steps >= {"admission", "expire", "housekeeping", "rescue", "retention", "schedules"}
    done: list[str] = []
    # a call that takes long leaves the rest to the next
    while some := engine.values("select step from jobqueue.maintain()"):
        done += some
    assert sorted(done) == sorted(steps)
    engine.run("update jobqueue.maintenance set next_at = now() where step = 'rescue'")
    row = engine.row("select step, next_due - now() < interval '3 s' as soon from jobqueue.maintain()")
    assert row == {"step": "rescue", "soon": True}


def test_a_call_that_takes_long_leaves_the_rest_to_the_next_and_gives_back_what_it_locked(engine: Engine) -> None:
    engine.run(
        "update jobqueue.maintenance set next_at = now() - case step when 'expire' then interval '3 min' "
        "when 'housekeeping' then interval '2 min' when 'rescue' then interval '1 min' else interval '-1 h' end"
    )
    # Housekeeping takes longer than a call should.
    engine.run(
        "create function public.slow() returns trigger language plpgsql "
        "as 'begin perform pg_sleep(0.15); return null; end'"
    )
    engine.run("create trigger slow before delete on jobqueue.watch execute function public.slow()")
    done: list[str] = []
    while "housekeeping" not in done:  # on a slow machine the first step may take long as well
        done += engine.values("select step from jobqueue.maintain()")
    assert done == ["expire", "housekeeping"]
    assert engine.call("maintenance_is_due")
    assert engine.values("select step from jobqueue.maintain()") == ["rescue"]
    assert not engine.call("maintenance_is_due")


def test_maintenance_never_waits_for_another_worker(engine: Engine) -> None:
    rival = engine.another()
    with rival.undone():
        rival.run("select * from jobqueue.maintain()")
        engine.run("set statement_timeout = '60 s'")
        assert maintain(engine, "rescue", "expire") == {}


def test_rescue_passes_over_a_job_that_is_being_settled(engine: Engine) -> None:
    claim = engine.claimed()
    engine.lose_lease(claim.id)
    rival = engine.another()
    with rival.undone():
        rival.call("complete", claim.id, claim.token)
        engine.run("set statement_timeout = '60 s'")
        assert maintain(engine, "rescue") == {"rescue": 0}
    assert engine.count("claim_batch") == 1
