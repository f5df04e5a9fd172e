"""Limits under attack: locks held for long, races of pauses, killed backends, a crash of the server, changes under load."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from jobqueue.database.migrations import migrate_up
from tests.sql.engine import Engine
from tests.sql.test_limits import GROUP, KEY, complete, limited, numbers, send_all, used
from tests.worker.test_faults import Database


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


@pytest.mark.parametrize(
    ("per", "change", "left", "wait"),
    [
        ("queue", {"concurrency": 100}, 0, 60),
        ("queue", {"rate_limit": {"limit": 3, "period": 60}}, 1, 60),
        ("queue", {"rate_limit": {"limit": 2, "period": 3600}}, 0, 3600),
        ("key", {"concurrency": 100}, 0, 60),
        ("key", {"rate_limit": {"limit": 2, "period": 10}}, 0, 10),
        ("queue", {"rate_limit": None}, 4, None),
    ],
)
def test_a_change_of_limits_forgets_no_start_that_the_rate_has_counted(
    engine: Engine, per: str, change: dict[str, object], left: int, wait: float | None
) -> None:
    limited(engine, rate_limit={"limit": 2, "period": 60, "per": per})
    send_all(engine, [{KEY: "k"} if per == "key" else {}] * 6)
    complete(engine, *engine.claim(6))
    engine.call("update_queue", "q", change)
    assert len(engine.claim(6)) == left
    waits = engine.values(
        "select extract(epoch from due - (select max(started_at) from jobqueue.job)) "
        "from jobqueue.admission_note where due is not null"
    )
    # less than the whole if the machine was busy between the claims
    assert waits == [] if wait is None else waits and all(wait - 30 < seconds < wait + 5 for seconds in waits)
    assert engine.value("select jobqueue.recount_slots(q) from jobqueue.queue q") == 0
    engine.run("update jobqueue.admission_note set due = now()")
    assert (len(engine.claim(6)) > 0) == (left < 4), "they come back"


def test_a_rate_of_keys_that_becomes_one_of_the_queue_counts_the_starts_of_all_keys(engine: Engine) -> None:
    limited(engine, rate_limit={"limit": 1, "period": 60, "per": "key"})
    send_all(engine, [{KEY: key} for key in "abab"])
    complete(engine, *engine.claim(4))
    engine.call("update_queue", "q", {"rate_limit": {"limit": 3, "period": 60}})
    assert len(engine.claim(4)) == 1
    assert used(engine) == {(5, ""): 3}


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


def test_a_cancelled_job_that_is_taken_up_again_goes_by_the_limits_of_now(engine: Engine) -> None:
    engine.call("create_queue", "q")
    jobs = [engine.send() for _ in range(4)]
    for change, most in (({"concurrency": 1}, 1), ({"concurrency": None}, 3)):
        for job in jobs:
            engine.call("cancel", job, "later")
        engine.call("update_queue", "q", change)
        for job in jobs:
            engine.call("resume", job, "now")
        claims = engine.claim(10)
        assert len(claims) == most
        complete(engine, *claims)
        jobs = engine.values("select id from jobqueue.job where status = 'pending'")


# under load

LEFT = "select count(*) from jobqueue.job where status <> 'completed'"
RUNNING = "select count(*), count(*) filter (where group_key = 'g0') from jobqueue.job where status = 'processing'"
LOST = """
    with lost as (
        update jobqueue.job set lease_until = now() - interval '1 s'
        where id = any (array(select id from jobqueue.job where status = 'processing' and started_at < now() - interval '2 s'
            order by id for update skip locked))
        returning id)
    update jobqueue.claim_batch set check_at = now() - interval '1 s' where job_ids && array(select id from lost)
"""


class Claimers:
    """Clients that claim and complete until they are told to stop; one whose connection is killed opens another."""

    def __init__(self, dsn: Callable[[], str], number: int) -> None:
        self._dsn, self._stop = dsn, threading.Event()
        self.errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(number)]

    def __enter__(self) -> Claimers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        deadline = time.monotonic() + 120
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        assert not any(thread.is_alive() for thread in self._threads), "a claim hangs"
        assert self.errors == []

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with psycopg.connect(
                    make_conninfo(self._dsn(), application_name="claimer"), autocommit=True
                ) as connection:
                    self._work(connection)
            except psycopg.OperationalError as error:
                if error.sqlstate in ("40P01", "55P03"):
                    self.errors.append(error)
            except BaseException as error:
                self.errors.append(error)

    def _work(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        me = uuid4()
        while not self._stop.is_set():
            claims = connection.execute("select id, claim_token from jobqueue.claim('{q}', %s, 3)", (me,)).fetchall()
            for claim in claims:
                try:
                    connection.execute("select jobqueue.complete(%s, %s)", claim)
                except psycopg.DatabaseError as error:
                    # on a slow machine it was rescued meanwhile
                    if error.sqlstate != "JQ409":
                        raise
            if not claims:
                self._stop.wait(0.02)


def all_completed(engine: Engine, within: float = 180) -> None:
    """Wait until every job is completed; claims whose client was killed are rescued meanwhile."""
    deadline = time.monotonic() + within
    while engine.value(LEFT):
        engine.run(LOST)
        engine.call("rescue", 100)
        tend(engine)
        rows = engine.rows(
            "select j.status, l.stage, l.line, l.held from jobqueue.job j "
            "left join jobqueue.admission_line l on l.job_id = j.id where j.status <> 'completed' limit 5"
        )
        assert time.monotonic() < deadline, f"{engine.value(LEFT)} jobs do not end: {rows}"
        time.sleep(0.02)
    engine.value("select jobqueue.admit(q, 10, true) from jobqueue.queue q")
    tend(engine)
    engine.value("select jobqueue.admit(q, 10, true) from jobqueue.queue q")
    assert used(engine) == {}, "no slot has leaked"
    assert engine.count("admission_line") == 0


def kill_clients(engine: Engine, chance: random.Random) -> None:
    pids = engine.values(
        "select pid from pg_stat_activity where application_name = 'claimer' and datname = current_database()"
    )
    if pids:
        engine.value("select pg_terminate_backend(%s)", chance.choice(sorted(pids)))


def change_limits(engine: Engine, chance: random.Random) -> None:
    # none of them is above what the test watches for
    changes = (
        {"concurrency": 2},
        {"concurrency": 4},
        {"group_concurrency": {"default": 1}},
        {"group_concurrency": {"default": 2}},
    )
    change = chance.choice(changes)
    while True:
        try:
            engine.call("update_queue", "q", change)
        except psycopg.DatabaseError as error:
            # on a slow machine the claimers' transactions are open for longer than it waits for them; it says: try again
            if error.sqlstate != "JQ409":
                raise
        else:
            return


def pause_somebody(engine: Engine, chance: random.Random) -> None:
    verb, tenant = chance.choice(("pause", "resume")), chance.choice(("t0", "t1", "t2"))
    engine.call(f"{verb}_tenant", tenant, "by chance")


def hold_a_claim(engine: Engine, chance: random.Random) -> None:
    other = engine.another()
    with other.connection.transaction(force_rollback=chance.random() < 0.5):
        claims = other.claim(2, worker=uuid4())
        engine.value("select pg_sleep(0.05)")
        for claim in claims:
            other.call("complete", claim.id, claim.token)


@contextmanager
def paused_to_the_end(engine: Engine) -> Iterator[None]:
    """Whatever is paused at the end goes on."""
    yield
    for tenant in ("t0", "t1", "t2"):
        engine.call("resume_tenant", tenant, "the end")


@pytest.mark.parametrize(
    "attack", [kill_clients, change_limits, pause_somebody, hold_a_claim], ids=lambda attack: attack.__name__
)
def test_limits_hold_and_no_job_is_lost_under_attack(
    engine: Engine, attack: Callable[[Engine, random.Random], None]
) -> None:
    limited(engine, concurrency=4, group_concurrency={"default": 2})
    chance = random.Random(1)
    send_all(engine, [{GROUP: f"g{n % 3}", "tenant": f"t{n % 4}", "max_retries": 50} for n in range(100)])
    with Claimers(lambda: engine.dsn, 8), paused_to_the_end(engine):
        for _ in range(8):
            attack(engine, chance)
            total, group = engine.connection.execute(RUNNING).fetchone() or (0, 0)
            assert total <= 4
            assert group <= 2
    with Claimers(lambda: engine.dsn, 4):
        all_completed(engine)


def test_a_queue_that_was_deleted_leaves_nothing_behind(engine: Engine) -> None:
    for _ in range(2):
        limited(engine, concurrency=1, rate_limit={"limit": 5, "period": 60})
        send_all(engine, [{}] * 3)
        # However fast the others are done: this one keeps the queue from being deleted.
        later = engine.send(delay=3600)
        with Claimers(lambda: engine.dsn, 2):
            assert engine.refused(engine.call, "delete_queue", "q").code == "CONFLICT"
            engine.call("cancel", later, "not needed")
            engine.call("delete_job", later, "not needed")
            deadline = time.monotonic() + 60
            while engine.value(LEFT):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        engine.call("delete_queue", "q")
        for table in ("admission_line", "admission_slot", "admission_note", "admission"):
            assert engine.count(table) == 0


def test_a_crash_of_the_server_loses_no_job_and_leaks_no_slot() -> None:
    database = Database()
    try:
        migrate_up(database.dsn)
        with psycopg.connect(database.dsn, autocommit=True) as connection:
            engine = Engine(connection, database.dsn)
            limited(engine, concurrency=4, group_concurrency={"default": 2})
            send_all(engine, [{GROUP: f"g{n % 3}", "max_retries": 50} for n in range(60)])
        with Claimers(lambda: database.dsn, 4):
            deadline = time.monotonic() + 60
            while database.query(LEFT) > 30:
                assert time.monotonic() < deadline
            database.crash_and_restart()
            with psycopg.connect(database.dsn, autocommit=True) as connection:
                all_completed(Engine(connection, database.dsn))
    finally:
        database.server.stop()


def test_waiting_jobs_of_a_queue_in_strict_order_can_be_changed_and_upserted(engine: Engine) -> None:
    limited(engine, policy="key_strict_fifo")
    first = engine.send(singleton_key="a")
    changed = engine.values("select id from jobqueue.update_jobs('q', %s, '{\"priority\": 3}')", {"id": str(first)})
    assert changed == [first]
    again = engine.row("select * from jobqueue.upsert('q', '{\"n\": 2}', %s)", {"singleton_key": "a"})
    assert (again["id"], again["created"], again["updated"]) == (first, False, True)
    assert engine.row("select * from jobqueue.upsert('q', '{}', %s)", {"singleton_key": "b"})["created"]


def test_of_two_jobs_of_a_key_that_are_taken_up_again_at_once_one_is_refused(engine: Engine) -> None:
    first = engine.send(singleton_key="k")
    engine.call("cancel", first, "later")
    second = engine.send(singleton_key="k")
    engine.call("cancel", second, "later")
    other, looks = engine.another(), engine.another()
    refusals: list[str] = []

    def resume() -> None:
        refusals.append(engine.refused(engine.call, "resume", second, "now").code)

    waiter = threading.Thread(target=resume)
    with other.connection.transaction():
        other.call("resume", first, "now")
        waiter.start()
        deadline = time.monotonic() + 60
        waiting = (
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        )
        while not looks.value(waiting):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    waiter.join(10)
    assert refusals == ["CONFLICT"]
