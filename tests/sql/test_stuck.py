"""Slots that are kept by handlers whose attempts have ended: what a worker says of them, and where people see it."""

from __future__ import annotations

from uuid import UUID, uuid4

from psycopg.types.json import Jsonb

from tests.sql.engine import WORKER, Engine
from tests.sql.test_explain import explain, worker

HANGS = {"id": str(UUID(int=7)), "job_type": "hangs", "why": "timeout", "seconds": 90}


def health(engine: Engine) -> tuple[str, str]:
    row = engine.row("select status, detail from jobqueue.health() where name = 'stuck handlers'")
    return row["status"], row["detail"]


def note(engine: Engine, slots: int, id: UUID = WORKER) -> None:
    engine.call("note_stuck", id, slots, Jsonb([HANGS] * slots))


def test_health_names_the_worker_and_the_jobs_and_fails_when_no_slot_is_left(engine: Engine) -> None:
    worker(engine)
    assert health(engine) == ("ok", "no handler goes on after its attempt has ended")
    note(engine, 1)
    status, detail = health(engine)
    assert status == "warn"
    assert detail.startswith(
        "1 of 2 slots of press is kept by handlers whose attempts have ended: "
        "job 00000000-0000-0000-0000-000000000007 (hangs) since "
    )
    assert engine.value("select stuck #>> '{jobs,0,since}' from jobqueue.worker")
    assert engine.value("select stuck from jobqueue.workers") == 1
    note(engine, 2)
    assert health(engine)[0] == "fail"
    # of one that is lost or has stopped nothing is known any more
    engine.run("update jobqueue.worker set heartbeat_at = now() - interval '31 s'")
    assert health(engine)[0] == "ok"
    engine.rows("select * from jobqueue.heartbeat(%s)", WORKER)
    assert health(engine)[0] == "fail"
    engine.call("stop_worker", WORKER)
    note(engine, 2)
    assert engine.value("select stuck from jobqueue.workers") == 0
    worker(engine)
    note(engine, 2)
    worker(engine)
    assert health(engine)[0] == "ok", "a worker that starts anew has none"


def test_a_waiting_job_explains_that_the_slots_are_kept(engine: Engine) -> None:
    job = engine.send()
    worker(engine)
    note(engine, 1)
    assert list(explain(engine, job)) == ["ready"]
    engine.run("update jobqueue.worker set running = 1")
    assert explain(engine, job)["workers_busy"] == (
        "All 1 live workers that could run it have as many jobs as they may; "
        "1 of their 2 slots are kept by handlers that go on after their attempts have ended."
    )
    engine.run("update jobqueue.worker set running = 0")
    note(engine, 2)
    found = explain(engine, job)
    assert list(found) == ["workers_stuck", "ready"]
    assert found["workers_stuck"].startswith("All 2 slots of the live workers that could run it are kept by handlers")
    engine.call("register_worker", uuid4(), {"name": "another", "concurrency": 1})
    assert list(explain(engine, job)) == ["ready"]
