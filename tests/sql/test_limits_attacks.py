"""Limits under attack: locks held for long, races of pauses, killed backends, a server that is shut down, changes under load."""

from __future__ import annotations

from tests.sql.engine import Engine
from tests.sql.test_limits import GROUP, KEY, complete, limited, numbers, send_all, used


def tend(engine: Engine) -> None:
    """Maintenance looks after admission, due or not."""
    engine.rows("select * from jobqueue.maintain(null, '{admission}')")


def test_a_job_at_the_gate_that_was_locked_for_a_while_is_not_forgotten(engine: Engine) -> None:
    limited(engine, concurrency=1)
    send_all(engine, [{}, {}])
    (first,) = engine.claim(1)
    waiting = engine.value("select id from jobqueue.job where status = 'pending'")
    other = engine.another()
    with other.connection.transaction():
        other.call("prioritize", waiting, 5, "held open")
        complete(engine, first)
        assert engine.claim(1) == []
    assert [claim.id for claim in engine.claim(1)] == [waiting]


def test_the_first_of_a_key_in_strict_order_is_not_overtaken_while_somebody_has_it_locked(engine: Engine) -> None:
    limited(engine, policy="key_strict_fifo")
    send_all(engine, [{KEY: "a"}, {KEY: "a"}, {KEY: "a"}, {KEY: "b"}, {KEY: "b"}])
    first, _ = engine.claim(5)
    second = engine.value("select id from jobqueue.job where payload ->> 'n' = '1'")
    other = engine.another()
    with other.connection.transaction():
        other.call("prioritize", second, 5, "held open")
        complete(engine, first)
        assert engine.claim(5) == []
        send_all(engine, [{KEY: "a"}])
        assert engine.claim(5) == [], "neither is it overtaken by one that comes"
    assert numbers(engine.claim(5)) == [1]


def test_a_job_set_aside_at_the_moment_of_a_resume_comes_back(engine: Engine) -> None:
    limited(engine, concurrency=1)
    engine.call("pause_tenant", "t", "not now")
    engine.send(tenant="t")
    other = engine.another()
    with other.connection.transaction():
        other.value("select jobqueue.admit(q, 1, true) from jobqueue.queue q")
        engine.call("resume_tenant", "t", "now")
    tend(engine)
    assert len(engine.claim(1)) == 1


def test_a_job_made_ready_at_the_moment_of_a_pause_holds_no_slot_for_long(engine: Engine) -> None:
    limited(engine, concurrency=1)
    engine.call("pause_job_type", "held", "so that it is known")
    engine.call("resume_job_type", "held", "again")
    for pause in (("pause_tenant", "t"), ("pause_job_type", "held")):
        paused = engine.send(tenant="t", job_type="held")
        other = engine.another()
        with other.connection.transaction():
            other.value("select jobqueue.admit(q, 1, true) from jobqueue.queue q")
            engine.call(*pause, "not now")
        free = engine.send(tenant="u")
        assert engine.claim(1) == []
        tend(engine)
        (claim,) = engine.claim(1)
        assert claim.id == free
        complete(engine, claim)
        engine.call("cancel", paused, "done with it")
        engine.call(pause[0].replace("pause", "resume"), pause[1], "again")


def test_tokens_that_came_back_while_nobody_claimed_are_not_lost(engine: Engine) -> None:
    limited(engine, rate_limit={"limit": 2, "period": 60})
    send_all(engine, [{}] * 4)
    complete(engine, *engine.claim(4))
    engine.run("update jobqueue.admission_note set due = now() - interval '10 min' where due is not null")
    tend(engine)
    assert len(engine.claim(4)) == 2


def test_a_job_claimed_for_the_second_time_counts_once(engine: Engine) -> None:
    limited(engine, concurrency=2, group_concurrency={"default": 2})
    send_all(engine, [{GROUP: "g"}] * 3)
    for _ in range(3):
        for claim in engine.claim(2):
            engine.call("release", claim.id, claim.token)
    running = engine.claim(2)
    assert engine.value("select jobqueue.recount_slots(q) from jobqueue.queue q") == 0
    assert used(engine) == {(2, "g"): 2, (4, ""): 2}
    complete(engine, *running)
    assert len(engine.claim(2)) == 1
