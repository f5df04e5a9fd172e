"""The server's clock was ahead for a while and is right again: nothing waits until the time that it had shown."""

from __future__ import annotations

from datetime import timedelta

import pytest
from psycopg.types.json import Jsonb

from jobqueue.testing.clock import _shift
from tests.sql.engine import WORKER, Engine

YEAR = timedelta(days=365).total_seconds()
SOON = "select {0} > now() and {0} <= now() + interval '{1}' from jobqueue.{2}"


def set_back(engine: Engine, seconds: float = YEAR) -> None:
    """Every time in every row was written by a clock that was ahead by so much."""
    _shift(engine.connection, -seconds)


def maintain(engine: Engine) -> set[str]:
    """One round of maintenance, as a worker does it; the steps that were due."""
    steps = set()
    while engine.call("maintenance_is_due"):
        steps |= set(engine.values("select step from jobqueue.maintain()"))
    return steps


def test_every_step_of_maintenance_is_due(engine: Engine) -> None:
    steps = maintain(engine)
    set_back(engine)
    assert maintain(engine) == steps
    assert not engine.call("maintenance_is_due")


def test_a_lost_worker_is_noticed_and_one_that_lives_keeps_its_job(engine: Engine) -> None:
    lost, lives = (engine.send() for _ in range(2))
    claims = engine.claim(2)
    maintain(engine)
    set_back(engine)
    maintain(engine)
    assert engine.values(SOON.format("lease_until", "30 s", "job")) == [True, True]
    beat = [{"id": str(claim.id), "token": str(claim.token)} for claim in claims if claim.id == lives]
    pass_by = "update jobqueue.{0} set {1} = {1} - interval '31 s'"
    engine.run(pass_by.format("job", "lease_until"))
    engine.run(pass_by.format("claim_batch", "check_at"))
    assert engine.rows("select * from jobqueue.heartbeat(%s, %s)", WORKER, Jsonb(beat)) == []
    engine.call("rescue", 10)
    assert [engine.status(job) for job in (lost, lives)] == ["pending", "processing"]


@pytest.mark.parametrize("per", ["queue", "key"])
def test_tokens_of_a_rate_come_back_within_its_period(engine: Engine, per: str) -> None:
    engine.call("create_queue", "q", Jsonb({"rate_limit": {"limit": 1, "period": 60, "per": per}}))
    options = {"singleton_key": "k"} if per == "key" else {}
    for _ in range(2):
        engine.send(**options)
    claim = engine.claim(2)[0]
    engine.call("complete", claim.id, claim.token)
    maintain(engine)
    set_back(engine)
    maintain(engine)
    assert engine.values(SOON.format("due", "60 s", "admission_note")) == [True]
    assert engine.claim(2) == []
    engine.run("update jobqueue.admission_note set due = now()")
    assert len(engine.claim(2)) == 1


def test_a_schedule_goes_on_with_its_next_tick_and_after_a_small_step_back_none_happens_twice(engine: Engine) -> None:
    engine.call("schedule", "s", "q", "* * * * *")
    engine.run("update jobqueue.schedule set next_at = date_trunc('minute', now())")
    assert engine.row("select sent from jobqueue.run_schedules()") == {"sent": 1}
    maintain(engine)
    set_back(engine, 3600)
    maintain(engine)
    assert engine.values("select next_at > now() + interval '59 min' from jobqueue.schedule") == [True]
    set_back(engine)
    maintain(engine)
    assert engine.values(SOON.format("next_at", "1 min", "schedule")) == [True]
    assert engine.count("job") == 1


def test_workers_listeners_and_hours_of_quotas_do_not_last_until_then(engine: Engine) -> None:
    engine.claim()
    engine.call("watch", "all")
    assert engine.row("select granted from jobqueue.take_quota('o', 'reads', 1, 1)") == {"granted": 1}
    maintain(engine)
    set_back(engine)
    maintain(engine)
    assert engine.values("select heartbeat_at <= now() from jobqueue.worker") == [True]
    assert engine.values("select until <= now() + interval '1 hour' from jobqueue.watch") == [True]
    assert engine.row("select granted from jobqueue.take_quota('o', 'reads', 1, 1)") == {"granted": 1}
    assert engine.row("select granted from jobqueue.take_quota('o', 'reads', 1, 1)") == {"granted": 0}
