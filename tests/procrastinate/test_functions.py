"""What the SQL functions behind the connector answer and refuse, called directly."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import Engine, new_token


@pytest.fixture
def engine(connection: psycopg.Connection[tuple[Any, ...]], dsn: str) -> Iterator[Engine]:
    """The engine of the test's database."""
    opened = Engine(connection, dsn)
    yield opened
    opened.close()


def defer(engine: Engine, **job: Any) -> UUID:
    """Defer one job; its id."""
    return UUID(str(engine.call("procrastinate_defer", Jsonb([{"queue": "q", "task": "t", "args": {}, **job}]))))


def statuses(engine: Engine, *jobs: UUID) -> list[str]:
    """Their status in procrastinate's words."""
    return [engine.call("procrastinate_job_status", job) for job in jobs]


def test_many_jobs_are_deferred_in_order_or_none(engine: Engine) -> None:
    given = [{"queue": "q", "task": "t", "args": {"n": n}, "lock": "L" if n % 2 else None} for n in range(6)]
    ids = engine.values("select d from jobqueue.procrastinate_defer(%s) d", Jsonb(given))
    listed = engine.rows("select * from jobqueue.procrastinate_jobs(null, 'q', null, 'todo', null, null, null)")
    assert {row["id"]: row["args"]["n"] for row in listed} == {id: n for n, id in enumerate(ids)}
    assert engine.values("select procrastinate_queues from jobqueue.procrastinate_queues()") == ["q"]
    assert engine.value("select key_concurrency from jobqueue.queue where name = 'q'") == 1
    refused = engine.refused(
        engine.call,
        "procrastinate_defer",
        Jsonb([{"queue": "q", "task": "t", "args": {}}, {"queue": "?", "task": "t"}]),
    )
    assert (refused.sqlstate, engine.count()) == ("JQ400", 6)


def test_a_queueing_lock_is_refused_with_its_name_in_whatever_queue(engine: Engine) -> None:
    defer(engine, queueing_lock="one")
    refused = engine.refused(defer, engine, queue="other", queueing_lock="one")
    assert (refused.sqlstate, refused.code, refused.detail["queueing_lock"]) == ("JQ409", "ALREADY_ENQUEUED", "one")
    assert engine.call("procrastinate_holder", "queueing:one") is not None


def test_two_who_take_one_queueing_lock_at_once_do_not_both_get_it(engine: Engine) -> None:
    other = engine.another()
    engine.call("procrastinate_adopt_queue", "q", False)
    with engine.connection.transaction():
        defer(engine, queueing_lock="one")
        other.run("set lock_timeout = '50 ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            defer(other, queue="q", queueing_lock="one")
    assert other.refused(defer, other, queueing_lock="one").code == "ALREADY_ENQUEUED"


def test_a_tick_is_new_once(engine: Engine) -> None:
    job = Jsonb({"queue": "q", "task": "t", "args": {"timestamp": 60}})
    assert engine.call("procrastinate_defer_periodic", "procrastinate:t", 60, job) is not None
    assert engine.call("procrastinate_defer_periodic", "procrastinate:t", 60, job) is None
    assert not engine.call("procrastinate_tick", "procrastinate:t", "q", "t", 0)
    assert engine.call("procrastinate_tick", "procrastinate:t", "q", "t", 120)
    assert engine.rows("select state from jobqueue.schedules") == [{"state": "finished"}], "nothing comes by itself"


def test_claims_end_by_their_token_only(engine: Engine) -> None:
    jobs = [defer(engine, queueing_lock=f"key {n}") for n in range(4)]
    claims = {claim.id: claim.token for claim in engine.claim(4)}
    assert not engine.call("procrastinate_start", jobs[0], new_token())
    assert all(engine.call("procrastinate_start", job, claims[job]) for job in jobs)
    ends = [
        {"id": str(jobs[0]), "token": str(claims[jobs[0]]), "to": "failed"},
        {"id": str(jobs[1]), "token": str(new_token()), "to": "succeeded"},
        {"id": str(jobs[2]), "token": str(claims[jobs[2]]), "to": "succeeded", "delete": True},
    ]
    settled = {
        row["id"]: row["outcome"] for row in engine.rows("select * from jobqueue.procrastinate_settle(%s)", Jsonb(ends))
    }
    assert settled == {jobs[0]: "ok", jobs[1]: "lost", jobs[2]: "ok"}
    assert statuses(engine, jobs[0], jobs[1]) == ["failed", "doing"]
    assert engine.rows("select * from jobqueue.procrastinate_job_status(%s)", jobs[2]) == []
    at = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    end = Jsonb({"at": at, "queue": "later", "priority": 3})
    assert engine.refused(engine.call, "procrastinate_retry", jobs[3], new_token(), end).code == "LEASE_LOST"
    engine.call("procrastinate_retry", jobs[3], claims[jobs[3]], end)
    row = engine.job(jobs[3])
    assert (row["queue"], row["priority"], row["retry_count"], row["status"]) == ("later", 3, 1, "pending")
    assert row["held_key"] == "queueing:key 3", "it waits again"
    assert (
        engine.refused(engine.call, "procrastinate_finish", jobs[0], Jsonb({"to": "aborted"})).code
        == "INVALID_TRANSITION"
    )


def test_jobs_are_cancelled_aborted_counted_and_cleaned_up(engine: Engine) -> None:
    waiting, running, done = defer(engine), defer(engine, priority=2), defer(engine, priority=1, lock="L")
    assert [claim.id for claim in engine.claim(1)] == [running]
    assert engine.call("procrastinate_cancel", running, False, False) is None
    assert engine.call("procrastinate_cancel", running, True, True) == running
    assert engine.values("select a from jobqueue.procrastinate_to_abort('q') a") == [running]
    engine.run("update jobqueue.worker set heartbeat_at = now() - interval '1 min', version = 'procrastinate 3'")
    stalled = "select id from jobqueue.procrastinate_stalled(%s, %s, null, null)"
    assert engine.values(stalled, 30, None) == [running]
    assert engine.values(stalled, 90, None) == []
    assert engine.values(stalled, None, 3600) == []
    assert len(engine.values("select w from jobqueue.procrastinate_prune(30) w")) == 1
    assert engine.call("procrastinate_cancel", waiting, False, True) == waiting
    engine.call("procrastinate_finish", done, Jsonb({"to": "succeeded"}))
    engine.call("procrastinate_finish", running, Jsonb({"to": "aborted"}))
    assert statuses(engine, running, done) == ["aborted", "succeeded"]
    counts = engine.rows("select * from jobqueue.procrastinate_counts('queue_name', null, null, null, null)")
    assert counts == [{"name": "q", "jobs_count": 2, "stats": {"aborted": 1, "succeeded": 1}}]
    assert engine.call("procrastinate_delete_old", 0, None, ["aborted"]) == 1
    assert engine.count() == 1
