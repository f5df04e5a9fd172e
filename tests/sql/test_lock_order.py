"""Actions on many jobs at once lock in one order, so that two of them never wait for each other in a circle."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import PERMANENT, Engine
from tests.sql.test_flows import send_flow
from tests.support.waiting import wait_until

Outcome = dict[str, int]


def bulk(engine: Engine, action: str, *ids: UUID) -> Outcome:
    rows = engine.rows("select * from jobqueue.bulk(%s, %s, 'r')", action, Jsonb({"ids": [str(id) for id in ids]}))
    return {row["outcome"]: row["jobs"] for row in rows}


def meet(engine: Engine, other: Engine, held: UUID, first: Callable[[], Any], second: Callable[[], Any]) -> Any:
    """Stop `first` half-way, at a job that somebody holds; let `second` go as far as it can; then let both end.

    `first` is on `engine` and `second` on `other`. If they meet in a circle, the server ends the first one.
    """
    engine.run("set deadlock_timeout = '10 ms'")
    other.run("set deadlock_timeout = '20 s'")
    watch = engine.another()

    def waits(who: Engine) -> bool:
        return bool(watch.value("select cardinality(pg_blocking_pids(%s)) > 0", who.connection.info.backend_pid))

    with psycopg.connect(engine.dsn) as person, ThreadPoolExecutor(2) as pool:
        person.execute("select from jobqueue.job where id = %s for update", [held])
        futures: list[Future[Any]] = [pool.submit(first)]
        wait_until(lambda: waits(engine), what="the first one waits")
        futures.append(pool.submit(second))
        wait_until(lambda: futures[1].done() or waits(other), what="the second one has gone as far as it can")
        person.commit()
        return [future.result(60) for future in futures]


def deadlocks(*sessions: Engine) -> int:
    """How many circles the server has broken, as far as these sessions have been in one."""
    for session in sessions:
        session.run("select pg_stat_force_next_flush()")
        session.run("select 1")
    return int(sessions[0].value("select deadlocks from pg_stat_database where datname = current_database()"))


def test_cancelling_many_meets_the_cancellation_of_another_parent_of_the_same_child(engine: Engine) -> None:
    ids = send_flow(
        engine, {"ref": "a"}, {"ref": "x"}, {"ref": "b"}, {"ref": "c", "depends_on": ["a", "b"], "on_failure": "cancel"}
    )
    other, before = engine.another(), deadlocks(engine)
    assert meet(
        engine, other, ids["x"],
        lambda: bulk(engine, "cancel", ids["a"], ids["x"], ids["b"]),
        lambda: other.call("cancel", ids["b"], "r"),
    ) == [{"done": 2, "unchanged": 1}, "cancelled"]  # fmt: skip
    assert engine.values("select distinct status from jobqueue.job") == ["cancelled"]
    assert deadlocks(engine, other) == before


def test_purging_a_queue_meets_the_cancellation_of_another_parent_of_the_same_child(engine: Engine) -> None:
    child = {"ref": "c", "queue": "children", "depends_on": ["a", "b"], "on_failure": "cancel"}
    more = [{"ref": f"more {n}"} for n in range(10)]
    ids = send_flow(engine, {"ref": "a"}, *more, {"ref": "x"}, {"ref": "b"}, child)
    other, before = engine.another(), deadlocks(engine)
    purged, cancelled = meet(
        engine, other, ids["x"],
        lambda: engine.row("select cancelled, deleted from jobqueue.purge_queue('q', 'r')"),
        lambda: other.call("cancel", ids["b"], "r"),
    )  # fmt: skip
    assert (purged, cancelled) == ({"cancelled": 12, "deleted": 13}, "cancelled")
    assert deadlocks(engine, other) == before


def test_skipping_many_meets_the_end_of_another_parent_of_the_same_child(engine: Engine) -> None:
    ids = send_flow(engine, {"ref": "a"}, {"ref": "x"}, {"ref": "b"}, {"ref": "c", "depends_on": ["a", "b"]})
    for claim in engine.claim(3):
        engine.fail(claim, PERMANENT)
    other, before = engine.another(), deadlocks(engine)
    assert meet(
        engine, other, ids["x"],
        lambda: bulk(engine, "skip", ids["a"], ids["x"], ids["b"]),
        lambda: other.call("skip", ids["b"], "r"),
    ) == [{"done": 2, "unchanged": 1}, "skipped"]  # fmt: skip
    assert engine.status(ids["c"]) == "pending"
    assert deadlocks(engine, other) == before


def test_retrying_many_meets_an_action_on_one_of_them_and_on_the_copy_of_another(engine: Engine) -> None:
    """The copies that wait in the dead letter queue go with the retry."""
    engine.call("create_queue", "dead")
    jobs = [engine.send(dead_letter="dead", max_retries=0) for _ in range(3)]
    for claim in engine.claim(3):
        engine.fail(claim, PERMANENT)
    copies = dict(engine.connection.execute("select dead_letter_of, id from jobqueue.job where queue = 'dead'"))
    other, before = engine.another(), deadlocks(engine)
    assert meet(
        engine, other, jobs[1],
        lambda: bulk(engine, "retry", *jobs),
        lambda: bulk(other, "cancel", jobs[2], copies[jobs[0]]),
    ) == [{"done": 3}, {"done": 1, "refused": 1}]  # fmt: skip
    assert [engine.status(job) for job in (*jobs, *copies.values())] == ["pending"] * 3 + ["cancelled"] * 3
    assert deadlocks(engine, other) == before


def test_deleting_many_meets_another_deletion_that_counts_in_the_same_batches(engine: Engine) -> None:
    batches = [str(engine.call("create_batch", Jsonb({}))) for _ in range(2)]
    one, third, held, two, fourth = (engine.send(batch=batches[n]) for n in (0, 1, 0, 1, 0))
    bulk(engine, "cancel", one, two, held, third, fourth)
    other, before = engine.another(), deadlocks(engine)
    assert meet(
        engine, other, held,
        lambda: bulk(engine, "delete", one, held, two),
        lambda: bulk(other, "delete", third, fourth),
    ) == [{"done": 3}, {"done": 2}]  # fmt: skip
    assert engine.values("select gone_cancelled from jobqueue.batch order by id") == [3, 2]
    assert deadlocks(engine, other) == before


def test_deleting_many_meets_another_deletion_that_counts_in_the_same_flows(engine: Engine) -> None:
    first = send_flow(engine, {"ref": "a"}, {"ref": "b"})
    second = send_flow(engine, {"ref": "x"}, {"ref": "a"}, {"ref": "b"})
    late = engine.send(depends_on=[str(first["b"])])
    bulk(engine, "cancel", *first.values(), *second.values(), late)
    other, before = engine.another(), deadlocks(engine)
    assert meet(
        engine, other, second["x"],
        lambda: bulk(engine, "delete", first["a"], second["x"], second["b"]),
        lambda: bulk(other, "delete", second["a"], late),
    ) == [{"done": 3}, {"done": 2}]  # fmt: skip
    assert deadlocks(engine, other) == before


def test_a_circle_that_no_order_avoids_is_taken_back_and_done_again(engine: Engine) -> None:
    """The child has a smaller id than its parent, because its sender chose it."""
    held, parent = engine.send(), engine.send()
    child = engine.send(id=str(UUID(int=1)), depends_on=[str(parent)], on_failure="cancel")
    other, before = engine.another(), deadlocks(engine)
    assert meet(
        engine, other, held,
        lambda: bulk(engine, "cancel", child, held, parent),
        lambda: other.call("cancel", parent, "r"),
    ) == [{"done": 1, "unchanged": 2}, "cancelled"]  # fmt: skip
    assert engine.values("select distinct status from jobqueue.job") == ["cancelled"]
    assert engine.values("select action from jobqueue.audit where job_id = %s", held) == ["cancel"], "noted once"
    assert deadlocks(engine, other) == before + 1


def test_whoever_holds_locks_from_before_learns_of_a_circle(engine: Engine) -> None:
    """Taking the bulk action back does not free them, so it is not tried for ever."""
    held, mine, theirs = (engine.send() for _ in range(3))
    other = engine.another()

    def first() -> str:
        with engine.connection.transaction(force_rollback=True):
            engine.call("cancel", mine, "r")
            with pytest.raises(psycopg.errors.DeadlockDetected):
                bulk(engine, "cancel", held, theirs)
        return "learned"

    def second() -> str:
        with other.connection.transaction():
            other.call("cancel", theirs, "r")
            return str(other.call("cancel", mine, "r"))

    assert meet(engine, other, held, first, second) == ["learned", "cancelled"]


@pytest.mark.parametrize("option", ["singleton_key", "id"])
def test_two_calls_with_the_same_keys_in_opposite_orders_wait_for_each_other_in_a_line(
    engine: Engine, option: str
) -> None:
    names = [str(UUID(int=n)) for n in range(1, 4)]
    engine.run("select jobqueue.create_queue('q', '{\"policy\": \"standard\"}')")
    other, before = engine.another(), deadlocks(engine)
    engine.run("set deadlock_timeout = '10 ms'")
    watch = engine.another()

    def send(who: Engine, order: list[str]) -> list[bool]:
        jobs = [{"options": {option: name}} for name in order]
        return [row["created"] for row in who.rows("select * from jobqueue.send_many('q', %s)", Jsonb(jobs))]

    def waits(who: Engine) -> bool:
        return bool(watch.value("select cardinality(pg_blocking_pids(%s)) > 0", who.connection.info.backend_pid))

    with psycopg.connect(engine.dsn) as person, ThreadPoolExecutor(2) as pool:
        # In the middle of the first call stands somebody whose transaction is open.
        person.execute("select jobqueue.send('q', '{}', %s)", [Jsonb({option: names[1]})])
        first = pool.submit(send, engine, names)
        wait_until(lambda: waits(engine), what="the first one waits")
        second = pool.submit(send, other, names[::-1])
        wait_until(lambda: waits(other), what="the second one waits")
        person.rollback()
        assert first.result(60) == [True] * 3
        assert second.result(60) == [False] * 3
    assert deadlocks(engine, other) == before


def test_a_call_with_very_many_keys_takes_few_locks(engine: Engine) -> None:
    jobs = [{"options": {"singleton_key": f"key {n}"}} for n in range(2000)]
    engine.run("begin")
    assert len(engine.rows("select * from jobqueue.send_many('q', %s)", Jsonb(jobs))) == 2000
    held = engine.value("select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()")
    engine.run("rollback")
    assert held == 64
