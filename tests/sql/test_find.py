"""Waiting jobs are changed by their senders, found page by page, and acted on in bulk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import PERMANENT, Engine, Row, new_token


def update(engine: Engine, target: dict[str, Any], changes: dict[str, Any], queue: str = "q") -> list[UUID]:
    return engine.values("select id from jobqueue.update_jobs(%s, %s, %s)", queue, target, changes)


def upsert(engine: Engine, payload: Any, **options: Any) -> Row:
    return engine.row("select * from jobqueue.upsert('q', %s, %s)", Jsonb(payload), options)


def find(engine: Engine, max_jobs: int = 1000, after: UUID | None = None, **filters: Any) -> list[UUID]:
    return engine.values("select id from jobqueue.find_jobs('q', %s, %s, %s)", filters, max_jobs, after)


def bulk(engine: Engine, action: str, dry_run: bool = False, expected: int | None = None, **filters: Any) -> Row:
    rows = engine.rows("select * from jobqueue.bulk(%s, %s, 'because', %s, %s)", action, filters, dry_run, expected)
    return {row["outcome"]: row["jobs"] for row in rows}


# update_jobs


def test_what_is_named_changes_and_the_rest_stays(engine: Engine) -> None:
    job = engine.send(payload={"a": 1}, subject="s", max_retries=1, timeout=50, metadata={"m": 1})
    changes = {"payload": {"a": 2}, "priority": 9, "max_retries": 5, "max_runtime": 70, "metadata": None}
    assert update(engine, {"id": str(job)}, changes) == [job]
    row = engine.view(job)
    assert (row["payload"], row["priority"], row["max_retries"], row["subject"]) == ({"a": 2}, 9, 5, "s")
    assert (row["metadata"], row["version"]) == (None, 2)
    (claim,) = engine.claim()
    assert (claim.row["timeout"], claim.row["max_runtime"]) == (50, 70)


def test_a_job_is_moved_in_time_and_back(engine: Engine) -> None:
    job = engine.send(expires_in=100)
    update(engine, {"id": str(job)}, {"delay": 3600})
    row = engine.job(job)
    assert row["ready_seq"] is None
    assert row["wait_until"] == row["run_at"]
    assert (row["expires_at"] - row["run_at"]).total_seconds() == pytest.approx(100, abs=0.001)
    assert engine.claim() == []
    update(engine, {"id": str(job)}, {"delay": 0})
    assert [claim.id for claim in engine.claim()] == [job]


@pytest.mark.parametrize(("match", "which"), [(None, [2]), ("newest", [2]), ("oldest", [0]), ("all", [0, 1, 2])])
def test_a_key_names_the_newest_the_oldest_or_all(engine: Engine, match: str | None, which: list[int]) -> None:
    jobs = [engine.send(singleton_key="k", throttle_seconds=seconds) for seconds in (101, 102, 103)]
    other = engine.send(singleton_key="k", tenant="b")
    target = {"singleton_key": "k", **({"match": match} if match else {})}
    assert update(engine, target, {"priority": 1}) == sorted(jobs[n] for n in which)
    assert engine.job(other)["priority"] == 0


@pytest.mark.parametrize("status", ["processing", "completed", "failed", "cancelled", "skipped"])
def test_only_what_waits_is_changed(engine: Engine, status: str) -> None:
    job = engine.in_status(status)
    assert update(engine, {"id": str(job)}, {"payload": {"b": 1}}) == []
    assert engine.job(job)["payload"] == {}


@pytest.mark.parametrize("status", ["paused", "blocked"])
def test_what_waits_for_something_else_goes_on_waiting_for_it(engine: Engine, status: str) -> None:
    engine.call("create_queue", "q")
    job = engine.in_status(status)
    assert update(engine, {"id": str(job)}, {"payload": {"b": 1}, "delay": 0}) == [job]
    assert engine.status(job) == status


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ({}, {}),
        ({"id": "x"}, {}),
        ({"id": "00000000-0000-4000-8000-000000000001", "singleton_key": "k"}, {}),
        ({"id": "00000000-0000-4000-8000-000000000001", "match": "all"}, {}),
        ({"singleton_key": "k", "match": "some"}, {}),
        ({"singleton_key": "k"}, {"priority": "high"}),
        ({"singleton_key": "k"}, {"timeout": 0}),
        ({"singleton_key": "k"}, {"singleton_key": "l"}),
        ({"singleton_key": "k"}, {"tenant": "b"}),
        ({"colour": "red"}, {}),
    ],
)
def test_a_wrong_target_or_change_is_refused(engine: Engine, target: dict[str, Any], changes: dict[str, Any]) -> None:
    engine.send(singleton_key="k")
    assert engine.refused(update, engine, target, changes).sqlstate == "JQ400"


def test_another_tenants_job_is_not_found(engine: Engine) -> None:
    job = engine.send(tenant="b")
    with engine.acting_as("jobqueue_producer", "a"):
        assert update(engine, {"id": str(job)}, {"priority": 1}) == []
        assert engine.refused(update, engine, {"singleton_key": "k", "tenant": "b"}, {}).sqlstate == "JQ403"
    assert engine.refused(update, engine, {"id": str(job)}, {}, "nowhere").code == "QUEUE_NOT_FOUND"


# upsert


def test_upsert_sends_and_then_changes(engine: Engine) -> None:
    first = upsert(engine, {"n": 1}, singleton_key="k", subject="s")
    assert (first["created"], first["updated"]) == (True, False)
    second = upsert(engine, {"n": 2}, singleton_key="k", priority=4)
    assert (second["id"], second["created"], second["updated"]) == (first["id"], False, True)
    row = engine.view(first["id"])
    assert (row["payload"], row["priority"], row["subject"]) == ({"n": 2}, 4, "s")
    (claim,) = engine.claim()
    third = upsert(engine, {"n": 3}, singleton_key="k")
    assert third == {"id": first["id"], "created": False, "updated": False, "reason": "singleton"}
    engine.call("complete", claim.id, claim.token)
    assert upsert(engine, {"n": 4}, singleton_key="k")["created"]


def test_upsert_changes_no_job_of_another_tenant(engine: Engine) -> None:
    job = engine.send(payload={"n": 1}, tenant="theirs")
    for options in ({"id": str(job)}, {"id": str(job), "tenant": "ours"}):
        assert engine.refused(upsert, engine, {"n": 2}, **options).sqlstate == "JQ409"
    assert engine.job(job)["payload"] == {"n": 1}
    assert upsert(engine, {"n": 2}, id=str(job), tenant="theirs")["updated"]


def test_upsert_finds_the_job_of_the_tenant_that_its_job_type_names(engine: Engine) -> None:
    engine.call("register_job_types", Jsonb([{"name": "t", "options": {"tenant": "theirs"}}]))
    first = upsert(engine, {"n": 1}, job_type="t", singleton_key="k")
    assert engine.job(first["id"])["tenant"] == "theirs"
    assert upsert(engine, {"n": 2}, job_type="t", singleton_key="k")["updated"]


def test_upsert_by_id(engine: Engine) -> None:
    job = str(new_token())
    assert upsert(engine, {"n": 1}, id=job)["created"]
    assert upsert(engine, [2], id=job)["updated"]
    assert engine.view(UUID(job))["payload"] == [2]
    assert engine.refused(upsert, engine, {}).sqlstate == "JQ400"


def test_many_upserts_of_one_key_make_one_job(engine: Engine) -> None:
    engine.call("create_queue", "q")
    others = [engine.another() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda n: upsert(others[n % 4], {"n": n}, singleton_key="k"), [0, 1, 2, 3]))
    assert sum(answer["created"] for answer in answers) == 1
    assert sum(answer["updated"] for answer in answers) == 3
    assert len({answer["id"] for answer in answers}) == engine.count() == 1


# find_jobs


def test_pages_are_stable_while_jobs_come_and_go(engine: Engine) -> None:
    jobs = sorted(engine.send() for _ in range(7))
    engine.send("other")
    first = find(engine, 3)
    assert first == jobs[:3]
    for gone in (first[-1], jobs[4]):
        engine.call("cancel", gone, "r")
        engine.call("delete_job", gone, "r")
    second = find(engine, 3, first[-1])
    assert second == [jobs[3], jobs[5], jobs[6]]
    assert find(engine, 3, second[-1]) == []


def test_filters_name_what_is_meant(engine: Engine) -> None:
    a = engine.send(payload={"x": 1, "y": [1, 2]}, subject="s", job_type="t", metadata={"by": "anna", "n": 1})
    b = engine.send(singleton_key="k", tenant="b")
    engine.call("pause", b, "r")
    cases: list[tuple[dict[str, Any], list[UUID]]] = [
        ({"payload": {"y": [2]}}, [a]),
        ({"metadata": {"by": "anna"}}, [a]),
        ({"status": "paused"}, [b]),
        ({"status": ["paused", "pending"]}, sorted([a, b])),
        ({"subject": "s", "job_type": "t"}, [a]),
        ({"subject": "s", "tenant": "b"}, []),
        ({"singleton_key": "k"}, [b]),
        ({"id": str(a)}, [a]),
    ]
    for filters, found in cases:
        assert find(engine, **filters) == found, filters
    with engine.acting_as("jobqueue_api", "b"):
        assert find(engine) == [b]
    for wrong in ({"colour": 1}, {"id": "x"}):
        assert engine.refused(find, engine, **wrong).sqlstate == "JQ400"
    assert engine.refused(find, engine, 0).sqlstate == "JQ400"


# bulk


def test_retry_all_failed_and_cancel_all_pending(engine: Engine) -> None:
    failed = [engine.claimed().id for _ in range(3)]
    for job in failed:
        token = engine.job(job)["claim_token"]
        engine.call("fail", job, token, PERMANENT)
    done = engine.in_status("completed")
    assert bulk(engine, "retry", dry_run=True, status="failed", queue="q") == {"done": 3}
    assert {engine.status(job) for job in failed} == {"failed"}
    assert bulk(engine, "retry", expected=3, status="failed", queue="q") == {"done": 3}
    assert bulk(engine, "cancel", status="pending") == {"done": 3}
    assert {engine.status(job) for job in failed} == {"cancelled"}
    assert [line["reason"] for line in engine.audit(failed[0])] == ["because", "because"]
    assert engine.status(done) == "completed"


def test_every_outcome_is_counted_and_a_preview_says_the_same(engine: Engine) -> None:
    for status in ("processing", "completed", "paused", "cancelled", "pending"):
        engine.in_status(status)
    counts = {"asked": 1, "done": 2, "refused": 1, "unchanged": 1}
    assert bulk(engine, "cancel", dry_run=True, queue="q") == counts
    assert bulk(engine, "cancel", queue="q") == counts
    assert bulk(engine, "cancel", queue="q") == {"refused": 1, "unchanged": 4}


def test_one_refusal_leaves_the_others_alone(engine: Engine) -> None:
    claim = engine.claimed(singleton_key="k")
    engine.fail(claim, PERMANENT)
    free = engine.in_status("failed")
    engine.send(singleton_key="k")
    assert bulk(engine, "retry", ids=[str(claim.id), str(free), str(new_token())]) == {"done": 1, "refused": 1}
    assert (engine.status(claim.id), engine.status(free)) == ("failed", "pending")


def test_a_set_that_has_grown_is_refused(engine: Engine) -> None:
    for _ in range(12):
        engine.send()
    refusal = engine.refused(bulk, engine, "cancel", expected=10, queue="q")
    assert (refusal.sqlstate, refusal.detail["count"]) == ("JQ409", 12)
    assert bulk(engine, "cancel", expected=11, queue="q") == {"done": 12}


def test_filters_of_bulk(engine: Engine) -> None:
    job = engine.claimed(subject="s", job_type="t", tenant="a").id
    engine.call("fail", job, engine.job(job)["claim_token"], {"class": "quota", "code": "NoCredits"})
    engine.send(tenant="b")
    now = engine.value("select to_char(now() at time zone 'UTC' + interval '1 s', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')")
    past = "2020-01-01T00:00:00Z"
    ones: list[dict[str, Any]] = [{"error_class": "quota"}, {"error_code": ["NoCredits", "x"]}, {"subject": "s"}]
    ones += [{"job_type": "t"}, {"tenant": "a"}, {"ended_after": past}, {"ids": [str(job)]}]
    for filters in ones:
        assert sum(bulk(engine, "retry", dry_run=True, **filters).values()) == 1, filters
    for both in ({"created_before": now}, {"created_after": past}):
        assert sum(bulk(engine, "retry", dry_run=True, **both).values()) == 2, both
    with engine.acting_as("jobqueue_api", "b"):
        assert bulk(engine, "cancel", queue="q", status=["failed", "pending"]) == {"done": 1}


@pytest.mark.parametrize(
    ("action", "filters"),
    [
        ("explode", {"queue": "q"}),
        ("cancel", {}),
        ("cancel", {"status": None}),
        ("cancel", {"colour": "red"}),
        ("cancel", {"ids": "x"}),
        ("cancel", {"created_before": "yesterday"}),
    ],
)
def test_wrong_bulk_calls_are_refused(engine: Engine, action: str, filters: dict[str, Any]) -> None:
    assert engine.refused(bulk, engine, action, **filters).sqlstate == "JQ400"
    assert engine.refused(engine.run, "select jobqueue.bulk('cancel', '{\"queue\":\"q\"}', ' ')").sqlstate == "JQ400"
