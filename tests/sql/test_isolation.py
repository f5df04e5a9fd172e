"""Transactions that see the past (REPEATABLE READ, SERIALIZABLE), savepoints, and what an owner does to the tables.

A transaction that sees the past is refused with 40001 where it would act on what is no longer so; its caller tries again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import Engine
from tests.sql.test_flows import send_flow
from tests.sql.test_maintain import maintain

SEES_THE_PAST = ("repeatable read", "serializable")
WAYS_TO_SEND: dict[str, Callable[[Engine], Any]] = {
    "send": lambda e: e.send(),
    "send with options": lambda e: e.send(priority=1),
    "send_many": lambda e: e.rows("select * from jobqueue.send_many('q', '[{}, {}]')"),
    "send_flow": lambda e: send_flow(e, {"ref": "a"}, {"ref": "b", "depends_on": ["a"]}),
    "publish": lambda e: e.rows("select * from jobqueue.publish('event')"),
    "upsert": lambda e: e.rows("select * from jobqueue.upsert('q', '{}', '{\"singleton_key\": \"k\"}')"),
}


def begin(engine: Engine, level: str) -> Engine:
    """Another session in a transaction that sees the jobs and queues as they are now."""
    other = engine.another()
    other.run(f"begin isolation level {level}")
    other.value("select count(*) from jobqueue.setting")
    return other


def refused_as_late(attempt: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """The server refuses what a transaction does that sees the past."""
    with pytest.raises(psycopg.errors.SerializationFailure):
        attempt(*arguments, **named)


@pytest.mark.parametrize("way", WAYS_TO_SEND)
def test_who_sees_a_queue_without_the_limits_that_it_has_by_now_cannot_send_to_it(engine: Engine, way: str) -> None:
    engine.call("create_queue", "q")
    engine.call("subscribe", "event", "q")
    sender = begin(engine, "repeatable read")
    engine.call("update_queue", "q", {"concurrency": 1})
    refused_as_late(WAYS_TO_SEND[way], sender)
    sender.run("rollback")
    for _ in range(2):
        WAYS_TO_SEND[way](sender)
    assert len(engine.claim(10)) == 1


def test_the_copy_of_a_failed_job_does_not_escape_the_limits_of_its_dead_letter_queue(engine: Engine) -> None:
    engine.call("create_queue", "dead")
    claim = engine.claimed(dead_letter="dead")
    worker = begin(engine, "repeatable read")
    engine.call("update_queue", "dead", {"concurrency": 1})
    refused_as_late(worker.fail, claim, {"class": "permanent"})
    worker.run("rollback")
    worker.fail(claim, {"class": "permanent"})
    engine.send("dead")
    assert len(engine.claim(10, "dead")) == 1


@pytest.mark.parametrize("level", SEES_THE_PAST)
def test_a_key_has_one_holder_though_a_sender_does_not_see_its_new_generation(engine: Engine, level: str) -> None:
    engine.call("create_queue", "q")
    sender = begin(engine, level)
    holder = engine.send(singleton_key="k")
    key = engine.job(holder)["held_key"]
    engine.run("insert into jobqueue.key_generation (queue, key, generation) values ('q', %s, 1)", key)
    engine.run("update jobqueue.job set held_key = jobqueue.held_name('q', %s)", key)
    refused_as_late(sender.send, singleton_key="k")
    sender.run("rollback")
    again = sender.row("select * from jobqueue.send('q', '{}', '{\"singleton_key\": \"k\"}')")
    assert (again["id"], again["reason"]) == (holder, "singleton")


@pytest.mark.parametrize("level", SEES_THE_PAST)
def test_a_claim_that_sees_the_past_lets_nobody_overlook_a_job_that_comes_late(engine: Engine, level: str) -> None:
    """What is below the floor of admission is never read again."""
    engine.call("create_queue", "q", Jsonb({"concurrency": 100}))
    engine.send()
    assert len(engine.claim()) == 1
    later = "select max(jobqueue.next_ready()) from generate_series(1, 300)"
    claimer = begin(engine, level)
    with psycopg.connect(engine.dsn) as person:
        late = Engine(person, engine.dsn).send()
        engine.value(later)
        claimer.send()
        assert len(claimer.claim(10)) == 1
        claimer.run("commit")
        engine.value(later)
        engine.send()
        assert len(engine.claim(10)) == 1
    assert [claim.id for claim in engine.claim(10)] == [late]


def test_floors_rise_again_after_a_dump_was_restored_on_another_server(engine: Engine) -> None:
    """Its ids of transactions may be far ahead of those of this server."""
    engine.call("create_queue", "q", Jsonb({"concurrency": 100}))
    engine.send()
    engine.claim()
    engine.run("update jobqueue.admission set next_xid = '99999999999', next_floor = 1, floor = 0")
    engine.run("update jobqueue.maintenance set state = '{\"floor\": 0, \"next\": 1, \"xid\": 99999999999}' where step = %s",
               "fold_statistics")  # fmt: skip
    for _ in range(3):
        engine.value("select max(jobqueue.next_ready()) from generate_series(1, 300)")
        engine.send()
        engine.claim()
        maintain(engine, "fold_statistics")
    assert engine.value("select floor from jobqueue.admission") > 300
    floor, xid = engine.rows("select (state ->> 'floor')::bigint as floor, (state ->> 'xid')::bigint as xid from "
                             "jobqueue.maintenance where step = 'fold_statistics'")[0].values()  # fmt: skip
    assert (floor >= 1, xid < 99999999999) == (True, True)


def test_what_a_savepoint_takes_back_never_was(engine: Engine) -> None:
    engine.call("create_queue", "q", Jsonb({"concurrency": 1}))
    engine.call("create_queue", "keys", Jsonb({"policy": "exclusive"}))
    first, second = engine.send(), engine.send()
    engine.run("begin")
    engine.run("savepoint s")
    claim = engine.claim(2)[0]
    engine.call("complete", claim.id, claim.token)
    assert engine.claim()[0].id == second, "the slot is free again"
    engine.send("keys")
    engine.run("rollback to s")
    assert engine.send("keys"), "nobody has the key"
    assert [claim.id for claim in engine.claim(2)] == [first]
    engine.run("commit")
    assert engine.claim(2) == [], "one at a time"
    assert engine.count("claim_batch") == 1
    assert [engine.status(job) for job in (first, second)] == ["processing", "pending"]


def test_a_transaction_that_is_to_be_prepared_notifies_nobody(engine: Engine) -> None:
    """PostgreSQL refuses to prepare one that has notified."""
    listener = engine.another()
    listener.run("listen jobqueue_ready")
    listener.run("listen jobqueue_jobs")
    for topic in ("all", "queue:q"):
        engine.call("watch", topic)
    for said in ("off", "on"):
        engine.run("begin")
        engine.run(f"set local jobqueue.notify = '{said}'")
        engine.send()
        engine.send(priority=1)
        claim = engine.claim()[0]
        engine.call("cancel", claim.id, "not needed")
        engine.call("complete", claim.id, claim.token)
        engine.run("commit")
        heard = {notify.channel for notify in listener.connection.notifies(timeout=0.1, stop_after=2)}
        assert heard == (set() if said == "off" else {"jobqueue_ready", "jobqueue_jobs"})


def test_truncated_jobs_leave_nothing_behind(engine: Engine) -> None:
    options = {"policy": "key_strict_fifo", "rate_limit": {"limit": 1, "period": 3600}}
    engine.call("create_queue", "fifo", Jsonb(options))
    engine.call("create_queue", "keys", Jsonb({"policy": "singleton"}))
    for queue in ("fifo", "keys"):
        engine.send(queue, singleton_key="k")
        engine.send(queue, singleton_key="k")
        assert len(engine.claim(2, queue)) == 1
    batch = engine.call("create_batch", Jsonb({}))
    engine.send(batch=str(batch), stages=["s"])
    send_flow(engine, {"ref": "a"}, {"ref": "b", "depends_on": ["a"]})
    engine.run("truncate jobqueue.job")
    for table in ("claim_batch", "admission_line", "edge", "flow", "flow_member", "batch", "stage"):
        assert engine.count(table) == 0, table
    maintain(engine, "admission", "batches", "rescue")
    again: list[UUID] = [engine.send(queue, singleton_key="k") for queue in ("fifo", "keys")]
    assert [claim.id for claim in engine.claim(5, ["fifo", "keys"])] == again[1:], "the rate has counted its start"
    engine.run("update jobqueue.admission_note set due = now()")
    assert [claim.id for claim in engine.claim(5, "fifo")] == again[:1]
