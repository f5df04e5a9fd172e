"""Batches: jobs counted together, and one callback when they have ended or the first has failed."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from tests.sql.engine import PERMANENT, Engine, Row

CALLBACK = {"queue": "done", "payload": {"tell": "anna"}, "options": {"priority": 7, "metadata": {"x": 1}}}


def status(engine: Engine, batch: UUID) -> Row:
    """What batch_status says."""
    return engine.row("select * from jobqueue.batch_status(%s)", batch)


def callbacks(engine: Engine) -> list[Row]:
    """The callback jobs that were sent."""
    return engine.rows("select * from jobqueue.job where queue = 'done'")


def complete_all(engine: Engine, most: int = 1) -> None:
    """Claim and complete until nothing is left in the queue q."""
    while claims := engine.claim(most):
        for claim in claims:
            engine.call("complete", claim.id, claim.token)


def test_the_callback_is_sent_once_in_the_transaction_that_ends_the_last_job(engine: Engine) -> None:
    batch = engine.call("create_batch", {"name": "pages", "metadata": {"document": 7}, "callback": CALLBACK})
    jobs = [engine.send(batch=str(batch)) for _ in range(4)]
    complete_all(engine)
    found = status(engine, batch)
    assert (found["state"], found["total"], found["ended"], found["pct"]) == ("open", 4, 4, 100)
    assert callbacks(engine) == []
    last = engine.send(batch=str(batch))
    assert engine.call("close_batch", batch) is True
    assert engine.call("close_batch", batch) is False
    assert (status(engine, batch)["state"], status(engine, batch)["pct"]) == ("closed", 80)
    with engine.undone():
        complete_all(engine)
        assert len(callbacks(engine)) == 1
    assert callbacks(engine) == []
    (claim,) = engine.claim()
    assert engine.fail(claim, PERMANENT) == "failed"
    (callback,) = callbacks(engine)
    assert (callback["payload"], callback["priority"]) == ({"tell": "anna"}, 7)
    assert callback["metadata"] == {"x": 1, "batch_id": str(batch), "batch_name": "pages"}
    found = status(engine, batch)
    assert (
        found | {"state": "ended", "completed": 4, "failed": 1, "callback_job_id": callback["id"], "name": "pages"}
        == found
    )
    # an end is one: what is taken up again later sends no second callback
    engine.call("retry", last, "again")
    complete_all(engine)
    assert len(callbacks(engine)) == 1
    assert engine.job(jobs[0])["settle_flags"] == 0, "only a witness has a flag: completing a member costs nothing"


def test_a_batch_without_jobs_ends_when_it_is_closed(engine: Engine) -> None:
    batch = engine.call("create_batch", {"callback": {"queue": "done"}})
    engine.call("close_batch", batch)
    assert (status(engine, batch)["state"], status(engine, batch)["pct"], len(callbacks(engine))) == ("ended", None, 1)


@pytest.mark.parametrize(
    ("callback_on", "after_failure", "after_end"), [("ended", 0, 1), ("first_failure", 1, 1), ("either", 1, 1)]
)
def test_a_callback_may_be_sent_when_the_first_job_fails(
    engine: Engine, callback_on: str, after_failure: int, after_end: int
) -> None:
    batch = engine.call("create_batch", {"callback": {"queue": "done"}, "callback_on": callback_on})
    for _ in range(3):
        engine.send(batch=str(batch))
    for claim in engine.claim(2):
        engine.fail(claim, PERMANENT)
    assert len(callbacks(engine)) == after_failure
    assert status(engine, batch)["first_failed_at"] is not None
    engine.call("close_batch", batch)
    complete_all(engine)
    assert len(callbacks(engine)) == after_end
    calm = engine.call("create_batch", {"callback": {"queue": "calm"}, "callback_on": callback_on})
    engine.call("close_batch", calm)
    assert engine.value("select count(*) from jobqueue.job where queue = 'calm'") == (callback_on != "first_failure")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"nam": "x"}, "UNKNOWN_OPTION"),
        ({"metadata": [1]}, "INVALID_ARGUMENT"),
        ({"callback_on": "never"}, "INVALID_ARGUMENT"),
        ({"callback": {"queue": "no queue"}}, "INVALID_ARGUMENT"),
        ({"callback": {}}, "INVALID_ARGUMENT"),
        ({"callback": {"queue": "q", "options": {"id": "x"}}}, "UNKNOWN_OPTION"),
        ({"callback": {"queue": "q", "options": {"priority": "x"}}}, "INVALID_ARGUMENT"),
    ],
)
def test_a_batch_that_could_not_send_its_callback_is_refused_at_once(
    engine: Engine, options: dict[str, Any], code: str
) -> None:
    assert engine.refused(engine.call, "create_batch", options).code == code
    assert engine.count("batch") == 0


def test_jobs_come_into_open_batches_of_their_own_tenant_only(engine: Engine) -> None:
    batch = engine.call("create_batch", {"tenant": "a"})
    for tenant in ("default", "b"):
        assert engine.refused(engine.send, "q", tenant=tenant, batch=str(batch)).code == "BATCH_NOT_FOUND"
    assert engine.refused(engine.send, "q", batch=str(uuid4())).sqlstate == "JQ404"
    assert engine.refused(engine.send, "q", batch="x").sqlstate == "JQ400"
    assert engine.view(engine.send("q", tenant="a", batch=str(batch)))["batch_id"] == batch
    for function in ("batch_status", "close_batch"):
        with engine.acting_as("jobqueue_api", "b"):
            assert engine.refused(engine.call, function, batch).code == "BATCH_NOT_FOUND"
    engine.call("close_batch", batch)
    assert engine.refused(engine.send, "q", tenant="a", batch=str(batch)).sqlstate == "JQ409"


def test_deleted_members_are_counted_and_a_batch_goes_when_nobody_needs_it(engine: Engine) -> None:
    engine.call("create_queue", "q", {"keep_completed": 0})
    batch = engine.call("create_batch", {})
    jobs = [engine.send(batch=str(batch)) for _ in range(3)]
    complete_all(engine)
    assert engine.count() == 3
    engine.value("select done from jobqueue.maintain(null, '{retention}')")
    engine.call("close_batch", batch)
    assert (engine.count(), status(engine, batch)["completed"], status(engine, batch)["total"]) == (0, 3, 3)
    engine.value("select done from jobqueue.maintain(null, '{housekeeping}')")
    assert engine.count("batch") == 1
    engine.run("update jobqueue.batch set ended_at = now() - interval '31 days'")
    engine.value("select done from jobqueue.maintain(null, '{housekeeping}')")
    assert (engine.count("batch"), len(jobs)) == (0, 3)
    assert engine.refused(engine.call, "batch_status", batch).code == "BATCH_NOT_FOUND"


def test_a_callback_that_cannot_be_sent_keeps_no_job_from_ending_and_is_tried_again(engine: Engine) -> None:
    batch = engine.call("create_batch", {"callback": {"queue": "done"}})
    engine.run("delete from jobqueue.queue where name = 'done'")
    engine.run("insert into jobqueue.setting values ('create_queues', 'false')")
    engine.run("insert into jobqueue.queue (name) values ('q')")
    engine.send(batch=str(batch))
    engine.call("close_batch", batch)
    complete_all(engine)
    found = status(engine, batch)
    assert (found["state"], found["callback_job_id"], "done" in found["callback_error"]) == ("ended", None, True)
    engine.run("insert into jobqueue.queue (name) values ('done')")
    engine.value("select done from jobqueue.maintain(null, '{batches}')")
    assert (len(callbacks(engine)), status(engine, batch)["callback_error"]) == (1, None)


def test_what_others_hold_is_passed_over_and_looked_at_again(engine: Engine) -> None:
    batch = engine.call("create_batch", {"callback": {"queue": "done"}})
    for _ in range(2):
        engine.send(batch=str(batch))
    engine.call("close_batch", batch)
    first, witness = engine.claim(2)
    with psycopg.connect(engine.dsn) as other:
        Engine(other, engine.dsn).call("complete", first.id, first.token)
        # the one that is left is in the hands of somebody else: nobody waits, and nothing is sent yet
        engine.call("complete", witness.id, witness.token)
        assert (status(engine, batch)["state"], engine.count("batch_note")) == ("closed", 1)
        other.commit()
    engine.value("select done from jobqueue.maintain(null, '{batches}')")
    assert (status(engine, batch)["state"], len(callbacks(engine))) == ("ended", 1)
    engine.value("select done from jobqueue.maintain(null, '{batches}')")
    assert len(callbacks(engine)) == 1


def test_many_workers_end_many_batches_once_each(engine: Engine) -> None:
    batches = [engine.call("create_batch", {"callback": {"queue": "done"}, "callback_on": "either"}) for _ in range(6)]
    for n in range(150):
        engine.send(batch=str(batches[n % 6]))
    for batch in batches:
        engine.call("close_batch", batch)

    def work(seed: int) -> None:
        chance = random.Random(seed)
        with psycopg.connect(engine.dsn, autocommit=True) as connection:
            mine = Engine(connection, engine.dsn)
            while claims := mine.claim(chance.randint(1, 9), worker=UUID(int=seed)):
                failed = {claim.id for claim in claims if chance.random() < 0.02}
                done = [claim for claim in claims if claim.id not in failed]
                mine.rows("select * from jobqueue.settle(null, %s::uuid[], %s::uuid[], null, null, null)",
                          [claim.id for claim in done], [claim.token for claim in done])  # fmt: skip
                for claim in claims:
                    if claim.id in failed:
                        mine.fail(claim, PERMANENT)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(1, 5)))
    for _ in range(2):
        engine.value("select done from jobqueue.maintain(null, '{batches}')")
    assert {status(engine, batch)["state"] for batch in batches} == {"ended"}
    sent = sorted(row["metadata"]["batch_id"] for row in callbacks(engine))
    assert sent == sorted(map(str, batches))
    assert engine.value("select deadlocks from pg_stat_database where datname = current_database()") == 0
