"""Claiming: by priority, then in the order of becoming ready, never more than asked, never twice."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import WORKER, Engine


def test_a_claim_makes_a_job_processing_with_a_token_a_lease_and_a_counted_attempt(engine: Engine) -> None:
    claim = engine.claimed(payload={"n": 1})
    row = engine.job(claim.id)
    assert (row["status"], row["attempt"], row["claim_token"], row["worker_id"]) == (
        "processing",
        1,
        claim.token,
        WORKER,
    )
    assert row["lease_until"] - row["started_at"] == timedelta(seconds=30)
    assert engine.view(claim.id)["alive"] is True
    assert (claim.row["status"], claim.row["payload"], claim.row["timeout"]) == ("processing", {"n": 1}, 900)


def test_higher_priorities_come_first_and_equal_ones_in_the_order_of_becoming_ready(engine: Engine) -> None:
    late = engine.send(delay=3600)
    low, first, high, second = engine.send(priority=-5), engine.send(), engine.send(priority=9), engine.send()
    engine.make_due(late)
    assert [claim.id for claim in engine.claim(10)] == [high, first, second, late, low]


def test_extreme_priorities_are_found(engine: Engine) -> None:
    jobs = [engine.send(priority=priority) for priority in (-2147483646, 2147483647, 0)]
    assert [claim.id for claim in engine.claim(10)] == [jobs[1], jobs[2], jobs[0]]


def test_never_more_than_asked_and_nothing_twice(engine: Engine) -> None:
    for _ in range(7):
        engine.send()
    batches = [engine.claim(3) for _ in range(4)]
    assert [len(batch) for batch in batches] == [3, 3, 1, 0]
    assert len({claim.id for batch in batches for claim in batch}) == 7
    assert len({claim.token for batch in batches for claim in batch}) == 7


def test_several_queues_are_one_line_by_priority(engine: Engine) -> None:
    order = [
        engine.send(queue, priority=priority) for queue, priority in [("a", 3), ("b", 2), ("a", 1), ("c", 0), ("b", -1)]
    ]
    claims = engine.claim(4, ["c", "b", "a", "unknown", "a"])
    assert [claim.id for claim in claims] == order[:4]
    assert [claim.id for claim in engine.claim(4, ["a", "b", "c"])] == order[4:]


def test_only_asked_queues_are_touched(engine: Engine) -> None:
    other = engine.send("other")
    assert engine.claim(5, ["a", "b"]) == []
    assert engine.status(other) == "pending"


def test_the_filter_of_job_types_leaves_others_pending(engine: Engine) -> None:
    ocr, pdf = engine.send(job_type="ocr"), engine.send(job_type="pdf")
    assert engine.claim(5, job_types=["nothing"]) == []
    assert engine.claim(5, job_types=[]) == []
    assert [claim.id for claim in engine.claim(5, job_types=["pdf", "x"])] == [pdf]
    assert engine.status(ocr) == "pending"


@pytest.mark.parametrize("queue", ["q", ["q", "r"]])
def test_the_bounds_of_priority_are_inclusive(engine: Engine, queue: str | list[str]) -> None:
    jobs = {priority: engine.send(priority=priority) for priority in (-1, 0, 1, 2, 3)}
    between = engine.claim(9, queue, min_priority=0, max_priority=2)
    assert [claim.id for claim in between] == [jobs[2], jobs[1], jobs[0]]
    assert [claim.id for claim in engine.claim(9, queue, min_priority=3)] == [jobs[3]]
    assert [claim.id for claim in engine.claim(9, queue, max_priority=-1)] == [jobs[-1]]


def test_an_unknown_worker_is_registered_by_its_claim(engine: Engine) -> None:
    worker = uuid4()
    engine.claim(worker=worker)
    assert engine.row("select id, state from jobqueue.workers") == {"id": worker, "state": "working"}


def test_four_concurrent_claimers_never_claim_a_job_twice(engine: Engine) -> None:
    sent = 2000
    engine.run(
        "select jobqueue.send('q', to_jsonb(n), jsonb_build_object('priority', n %% 5)) from generate_series(1, %s) n",
        sent,
    )

    def consume(mine: Engine) -> list[UUID]:
        found: list[UUID] = []
        while claims := mine.claim(25, worker=uuid4()):
            assert len(claims) <= 25
            found += [claim.id for claim in claims]
        return found

    with ThreadPoolExecutor(4) as pool:
        found = [job for jobs in pool.map(consume, [engine.another() for _ in range(4)]) for job in jobs]
    found += [claim.id for claim in engine.claim(sent)]
    assert len(found) == len(set(found)) == sent
    assert engine.value("select count(*) from jobqueue.job where attempt = 1") == sent


PAUSES = {
    "queue": "update jobqueue.queue set paused_at = now() where name = 'q'",
    "job_type": "insert into jobqueue.job_type (name, paused_at) values ('ocr', now())",
    "tenant": "insert into jobqueue.tenant_pause (tenant, pause_reason, paused_by) values ('a', 'r', 'me')",
}


@pytest.mark.parametrize("pause", PAUSES)
def test_nothing_of_a_paused_queue_job_type_or_tenant_is_claimed(engine: Engine, pause: str) -> None:
    job = engine.send(job_type="ocr", tenant="a")
    engine.run(PAUSES[pause])
    assert engine.claim(5) == []
    assert engine.claim(5, ["q", "r"]) == []
    assert engine.status(job) == "pending"


@pytest.mark.parametrize("pause", PAUSES)
def test_what_is_paused_does_not_keep_other_jobs_back(engine: Engine, pause: str) -> None:
    for _ in range(5):
        engine.send(job_type="ocr", tenant="a", priority=9)
    others = [engine.send("r", priority=5), engine.send("r", priority=4)]
    if pause != "queue":
        others.append(engine.send(priority=1))
    engine.run(PAUSES[pause])
    assert [claim.id for claim in engine.claim(3, ["q", "r"])] == others


def test_jobs_that_somebody_else_is_claiming_do_not_keep_others_back(engine: Engine) -> None:
    for _ in range(3):
        engine.send(priority=9)
    other = engine.send("r")
    rival = engine.another()
    with rival.undone():
        assert len(rival.claim(3)) == 3
        assert [claim.id for claim in engine.claim(3, ["q", "r"], worker=uuid4())] == [other]


def test_a_claim_brings_the_last_checkpoint(engine: Engine) -> None:
    claim = engine.claimed()
    engine.call("checkpoint", claim.id, claim.token, "one", {"n": 1})
    engine.call("checkpoint", claim.id, claim.token, "two", {"n": 2})
    engine.call("release", claim.id, claim.token)
    (again,) = engine.claim()
    assert again.row["checkpoint"]["stage"] == again.row["checkpoint_stage"] == "two"
    assert again.row["checkpoint"]["data"] == again.row["checkpoint_data"] == {"n": 2}
    assert again.row["checkpoint_hash"] == engine.view(claim.id)["checkpoint_hash"]


def test_prefetched_jobs_are_known_not_to_have_started(engine: Engine) -> None:
    jobs = [engine.send() for _ in range(3)]
    assert [row["id"] for row in engine.prefetch(3, start=1)] == jobs
    assert [engine.job(job)["handler_started"] for job in jobs] == [True, False, False]


def suspects(engine: Engine, queues: tuple[str, ...], number: int) -> None:
    """Jobs whose worker was lost while they ran."""
    for queue in queues:
        for _ in range(number):
            engine.send(queue)
        for claim in engine.claim(number, queue):
            engine.lose_worker(claim.id)


def test_a_claim_that_bounds_suspects_takes_no_more_of_them(engine: Engine) -> None:
    suspects(engine, ("q",), 3)
    fresh = [engine.send() for _ in range(2)]
    assert [row["id"] for row in engine.prefetch(10, start=10, suspects=0)] == fresh
    (row,) = engine.prefetch(10, start=0, suspects=1)
    assert row["suspect"]
    assert engine.job(row["id"])["handler_started"] is True
    assert len(engine.claim(10)) == 2


def test_the_bound_of_suspects_counts_over_all_queues(engine: Engine) -> None:
    suspects(engine, ("a", "b", "c"), 2)
    fresh = [engine.send("a"), engine.send("c")]
    rows = engine.rows(
        "select * from jobqueue.claim_ranges(%s, '{a,b,c}', array_fill(-2147483648, array[3]), '{0,0,0}', "
        "array_fill(2147483647, array[3]), 10, 10, 1, null)",
        WORKER,
    )
    assert sum(row["suspect"] for row in rows) == 1
    assert {row["id"] for row in rows if not row["suspect"]} == set(fresh)


def test_a_job_that_has_lost_a_worker_does_not_wait_behind_the_lines_of_several_queues(engine: Engine) -> None:
    for _ in range(2):
        engine.send("b")
    claims = engine.claim(2, "b")
    for queue in ("a", "b"):
        for _ in range(5):
            engine.send(queue)
    for claim in claims:
        engine.lose_worker(claim.id)
    rows = engine.rows(
        "select * from jobqueue.claim_ranges(%s, '{a,b}', array_fill(-2147483648, array[2]), '{0,0}', "
        "array_fill(2147483647, array[2]), 4, 4, 1, null)",
        WORKER,
    )
    assert [row["suspect"] for row in rows] == [True, False, False, False]


def test_the_sweep_takes_what_lies_below_a_floor_and_nothing_else(engine: Engine) -> None:
    jobs = [engine.send() for _ in range(6)]
    seqs = [engine.job(job)["ready_seq"] for job in jobs]
    found = engine.values(
        "select id from jobqueue.claim_queue('q', %s, '{0}', %s, null, %s, 10, 10, 0, null)",
        WORKER,
        [seqs[1]],
        [seqs[4]],
    )
    assert found == jobs[1:4]


def test_ranges_leave_the_holes_between_them_alone(engine: Engine) -> None:
    jobs = {(rank, n): engine.send(priority=-rank) for rank in (0, 1, 2) for n in range(3)}
    floors = {rank: engine.job(jobs[rank, 2])["ready_seq"] for rank in (0, 1, 2)}
    found = engine.values(
        "select id from jobqueue.claim_queue('q', %s, '{-2147483648,0,1}', %s, '{0,1,2}', null, 10, 10, null, null)",
        WORKER,
        [0, floors[0], floors[1]],
    )
    assert found == [jobs[0, 2], jobs[1, 2]]


def test_the_bounds_of_the_snapshot_say_which_transactions_have_ended(engine: Engine) -> None:
    rival = engine.another()
    with rival.undone():
        mine = int(rival.value("select pg_current_xact_id()::text"))
        assert engine.row("select * from jobqueue.snapshot_bounds()")["xmin"] <= mine
    assert engine.row("select * from jobqueue.snapshot_bounds()")["xmin"] > mine


def test_a_worker_of_all_queues_asks_for_their_names(engine: Engine) -> None:
    for queue in ("b", "a"):
        engine.send(queue)
    assert engine.values("select name from jobqueue.queue_names()") == ["a", "b"]


def test_a_job_that_has_expired_is_not_claimed_any_more(engine: Engine) -> None:
    """Nobody may have looked for expired jobs for long: all workers were down."""
    jobs = [engine.send(queue, expires_in=60) for queue in ("q", "r") for _ in range(2)]
    fresh = [engine.send(queue) for queue in ("q", "r")]
    engine.run("update jobqueue.job set expires_at = now() where id = any (%s)", jobs)
    assert [claim.id for claim in engine.claim(1, ["q", "r"])] == fresh[:1]
    assert [claim.id for claim in engine.claim(9, "r")] == fresh[1:]
    explained = engine.rows("select * from jobqueue.explain(%s)", jobs[0])[-1]
    assert (explained["reason"], "no worker takes it any more" in explained["detail"]) == ("expires", True)
    assert engine.call("expire", 10) == 4


def test_an_expired_job_takes_nobodys_turn(engine: Engine) -> None:
    engine.call("create_queue", "q", Jsonb({"fair_by": "group"}))
    late = engine.send(expires_in=60)
    with engine.undone():
        assert len(engine.claim()) == 1
    assert engine.value("select jobqueue.admit(q, 1, true) from jobqueue.queue q"), "it has its turn"
    engine.run("update jobqueue.job set expires_at = now() where id = %s", late)
    fresh = engine.send()
    assert [claim.id for claim in engine.claim()] == [fresh]


def test_an_expired_job_gives_its_slot_back_when_it_is_found(engine: Engine) -> None:
    engine.call("create_queue", "q", Jsonb({"concurrency": 1}))
    late, fresh = engine.send(expires_in=60), engine.send()
    engine.value("select jobqueue.admit(q, 1, true) from jobqueue.queue q")
    engine.run("update jobqueue.job set expires_at = now() where id = %s", late)
    assert engine.claim() == []
    assert engine.call("expire", 10) == 1
    assert [claim.id for claim in engine.claim()] == [fresh]
