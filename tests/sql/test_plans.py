"""Plans that do not flip with statistics, and claims whose cost stays flat while a snapshot is held."""

from __future__ import annotations

from collections import defaultdict
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import Engine

LOWEST, HIGHEST = -(2**31), 2**31 - 1
CLAIM = "select * from jobqueue.claim_queue('q', %s, %s, %s, %s, null, %s, %s, null, null)"


class Claimer:
    """A worker that remembers its floors: per rank the smallest ready_seq of its last claim there."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.worker = uuid4()
        self.floors: dict[int, int] = {}

    def ranges(self) -> tuple[list[int], list[int], list[int]]:
        """Where each range begins (rank and seq) and at which rank it ends."""
        ranks = sorted(self.floors)
        return [LOWEST, *ranks], [0, *(self.floors[rank] for rank in ranks)], [*ranks, HIGHEST]

    def consume(self, max_jobs: int) -> list[UUID]:
        """Claim, remember the floors, complete."""
        rows = self.engine.rows(CLAIM, self.worker, *self.ranges(), max_jobs, max_jobs)
        lowest: dict[int, int] = defaultdict(lambda: 2**62)
        for row in rows:
            lowest[-row["priority"]] = min(lowest[-row["priority"]], row["ready_seq"])
        self.floors |= lowest
        ids, tokens = [row["id"] for row in rows], [row["claim_token"] for row in rows]
        assert (
            self.engine.rows("select * from jobqueue.settle(%s, %s, %s, null, null, null)", self.worker, ids, tokens)
            == []
        )
        return ids

    def cost(self, max_jobs: int) -> int:
        """Buffers of a claim that is undone."""
        with self.engine.undone():
            explain = "explain (analyze, buffers, format json) " + CLAIM
            (plan,) = self.engine.value(explain, self.worker, *self.ranges(), max_jobs, max_jobs)
        top = plan["Plan"]
        assert top["Actual Rows"] == max_jobs
        return int(top["Shared Hit Blocks"] + top["Shared Read Blocks"])


def fill(engine: Engine, jobs: int, priorities: int = 1) -> None:
    """Send plain jobs, of several priorities in turn."""
    engine.run(
        "insert into jobqueue.job (queue, job_type, priority, ready_seq) "
        "select 'q', 'q', n %% %s, jobqueue.next_ready() from generate_series(1, %s) n",
        priorities,
        jobs,
    )


@pytest.mark.slow
def test_a_claim_costs_the_same_after_100000_jobs_while_a_snapshot_is_held(engine: Engine) -> None:
    engine.send()
    fill(engine, 102_000, priorities=3)
    holder = engine.another()
    claimers = [Claimer(engine.another()) for _ in range(4)]
    with holder.connection.transaction():
        holder.run("set transaction isolation level repeatable read")
        holder.run("select 1 from jobqueue.job limit 1")
        consumed = [job for claimer in claimers for job in claimer.consume(250)]
        first = sum(claimer.cost(100) for claimer in claimers)
        while len(consumed) < 100_000:
            consumed += [job for claimer in claimers for job in claimer.consume(500)]
        last = sum(claimer.cost(100) for claimer in claimers)
        blind = Claimer(engine).cost(100)
    assert blind > first, "the snapshot did not keep dead entries: nothing was measured"
    assert len(set(consumed)) == len(consumed)
    assert last <= 1.5 * first, f"{first} buffers at the beginning, {last} at the end"


def plans_of(engine: Engine, *calls: tuple[str, tuple[object, ...]]) -> str:
    """The plans of all statements that calls run, those inside functions included."""
    notices: list[str] = []

    def collect(diagnostic: psycopg.errors.Diagnostic) -> None:
        notices.append(diagnostic.message_primary or "")

    engine.run("load 'auto_explain'")
    for name, setting in (("log_min_duration", "0"), ("log_nested_statements", "on"), ("log_analyze", "off")):
        engine.run(f"set auto_explain.{name} = {setting}")
    engine.connection.add_notice_handler(collect)
    engine.run("set client_min_messages = log")
    for call, parameters in calls:
        engine.run(call, *parameters)
    engine.run("reset client_min_messages")
    engine.connection.remove_notice_handler(collect)
    return "\n".join(notices)


@pytest.mark.parametrize("statistics", ["none", "of the empty table", "of the full table"])
def test_no_state_of_statistics_makes_a_hot_path_read_the_whole_table(engine: Engine, statistics: str) -> None:
    engine.send("q")
    worker = uuid4()
    if statistics == "of the empty table":
        engine.claim()
        engine.run(
            "update jobqueue.job set completed_at = now(), status = 'cancelled', claim_token = null, lease_until = null"
        )
        engine.run("delete from jobqueue.job")
        engine.run("analyze jobqueue.job")
    fill(engine, 3000)
    if statistics == "of the full table":
        engine.run("analyze jobqueue.job")
    claims = engine.claim(3)
    ids, tokens = [claim.id for claim in claims], [claim.token for claim in claims]
    beat = Jsonb([{"id": str(i), "token": str(t), "pct": 5} for i, t in zip(ids, tokens, strict=True)])
    plans = plans_of(
        engine,
        ("select * from jobqueue.claim('{q}', %s, 10)", (worker,)),
        ("select * from jobqueue.claim('{q,r}', %s, 10)", (worker,)),
        (CLAIM, (worker, [LOWEST, 0], [0, 5], [0, HIGHEST], 10, 10)),
        ("select * from jobqueue.heartbeat(%s, %s)", (worker, beat)),
        ("select jobqueue.progress(%s, %s, 7)", (ids[0], tokens[0])),
        ("select jobqueue.fail(%s, %s, '{}')", (ids[0], tokens[0])),
        ("select * from jobqueue.settle(%s, %s, %s, null, null, null)", (worker, ids[1:], tokens[1:])),
        ("select * from jobqueue.promote(10)", ()),
        ("select jobqueue.next_due()", ()),
        ("select jobqueue.rescue(10)", ()),
        ("select jobqueue.expire(10)", ()),
        ("select jobqueue.send('q', '{}', '{\"priority\": 1}')", ()),
    )
    assert "Index Scan using job_claim on job" in plans
    assert "Index Scan using job_waiting on job" in plans or "Index Only Scan using job_waiting on job" in plans
    assert "Seq Scan on job " not in plans, [part for part in plans.split("Query Text") if "Seq Scan on job " in part]
    assert "Bitmap Heap Scan on job " not in plans
