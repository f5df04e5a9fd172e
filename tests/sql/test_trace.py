"""Where a job comes from stays with it, on every way that it can take."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from tests.sql.engine import PERMANENT, Engine

HERE = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
THERE = {**HERE, "tracestate": "vendor=1", "baggage": "customer=7"}
SENT_MANY = "select id from jobqueue.send_many('q', jobqueue.with_trace_context(%s, %s))"


def origin(engine: Engine, job: UUID) -> Any:
    return engine.value("select jobqueue.trace_context(%s)", job)


def test_a_job_keeps_it_through_retries_changes_dead_letters_and_redrives(engine: Engine) -> None:
    engine.call("create_queue", "q", {"dead_letter": "dead", "max_retries": 0})
    job = engine.send("q", trace_context=THERE)
    assert origin(engine, job) == THERE
    assert engine.job(job)["metadata"] is None
    engine.call("update_jobs", "q", {"id": str(job)}, {"priority": 3, "timeout": 60})
    (claim,) = engine.claim(1, "q")
    assert claim.id == job
    engine.fail(claim, PERMANENT)
    copy = engine.value("select id from jobqueue.job where dead_letter_of = %s", job)
    assert origin(engine, job) == origin(engine, copy) == THERE
    engine.value("select sent from jobqueue.redrive('dead', '{\"destination\": \"elsewhere\"}')")
    assert origin(engine, engine.value("select id from jobqueue.job where queue = 'elsewhere'")) == THERE
    engine.call("retry", job, "again")
    (row,) = engine.rows("select options from jobqueue.claim_queue('q', gen_random_uuid(), "
                         "array[-10], array[0::bigint], array[1], null, 1, 1, null, null)")  # fmt: skip
    assert row["options"]["trace_context"] == THERE


def test_what_is_none_is_refused_and_named(engine: Engine) -> None:
    for wrong in (3, "00-…", ["x"], {"traceparent": 1}, {"baggage": "x" * 8200}):
        for more in ({}, {"priority": 1}):
            refusal = engine.refused(engine.send, "q", trace_context=wrong, **more)
            assert (refusal.sqlstate, refusal.detail["option"]) == ("JQ400", "trace_context")
        many = Jsonb([{}, {"options": {"trace_context": wrong}}])
        assert engine.refused(engine.rows, "select * from jobqueue.send_many('q', %s)", many).detail["index"] == 1
        flow = Jsonb([{"ref": "a", "queue": "q"}, {"ref": "b", "queue": "q", "options": {"trace_context": wrong}}])
        assert engine.refused(engine.rows, "select * from jobqueue.send_flow(%s)", flow).detail["index"] == 1
    assert engine.count() == 0


def test_none_is_none(engine: Engine) -> None:
    jobs = [engine.send("q", trace_context=nothing) for nothing in (None, {})]
    assert [origin(engine, job) for job in jobs] == [None, None]
    refusal = engine.refused(origin, engine, UUID(int=1))
    assert refusal.sqlstate == "JQ404"
    with engine.acting_as("jobqueue_api", "other"):
        assert engine.refused(origin, engine, jobs[0]).sqlstate == "JQ404"


def test_many_jobs_get_it_in_one_call_and_keep_their_own(engine: Engine) -> None:
    jobs = [
        {"payload": 1},
        {"payload": 2, "options": {"trace_context": THERE}},
        {"payload": 3, "options": {"priority": 1}},
    ]
    first, second, third = engine.values(SENT_MANY, Jsonb(jobs), HERE)
    assert [origin(engine, job) for job in (first, second, third)] == [HERE, THERE, HERE]
    assert [engine.job(job)["payload"] for job in (first, second, third)] == [1, 2, 3]
    # the short way: nothing else differs from jobs that are not traced
    engine.values(SENT_MANY, Jsonb([{}, {"options": None}]), HERE)
    short = engine.values(
        "select id from jobqueue.send_many('q', %s)", Jsonb([{"options": {"trace_context": HERE}}, {}])
    )
    assert [origin(engine, job) for job in short] == [HERE, None]
    traced, plain = (engine.job(job) for job in short)
    unlike = {name for name in plain if traced[name] != plain[name]}
    assert unlike <= {"id", "created_at", "updated_at", "run_at", "ready_seq", "options"}
    assert engine.value("select jobqueue.with_trace_context('{}', '{}')") == {}
    assert engine.refused(engine.rows, SENT_MANY, {}, HERE).sqlstate == "JQ400"
    assert engine.refused(engine.rows, SENT_MANY, Jsonb([7]), HERE).detail["index"] == 0


def test_a_flow_gets_it_in_one_call(engine: Engine) -> None:
    jobs = [{"ref": "a", "queue": "q"}, {"ref": "b", "queue": "q", "depends_on": ["a"], "options": {"priority": 2}}]
    ids = engine.values("select id from jobqueue.send_flow(jobqueue.with_trace_context(%s, %s))", Jsonb(jobs), HERE)
    assert [origin(engine, job) for job in ids] == [HERE, HERE]
    assert [engine.job(job)["status"] for job in ids] == ["pending", "blocked"]
