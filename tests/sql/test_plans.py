"""Plans that do not flip with statistics, and claims whose cost stays flat while a snapshot is held."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from jobqueue.worker.claim import CLAIM_ONE, SWEEP_SECONDS
from jobqueue.worker.floors import Floors
from tests.sql.engine import Engine
from tests.support.claimers import Claimers, claimers

LOWEST, HIGHEST = -(2**31), 2**31 - 1
CLAIM = "select * from jobqueue.claim_queue('q', %s, %s, %s, %s, null, %s, %s, null, null)"


def cost(engine: Engine, floors: Floors) -> int:
    """Shared buffers of the claim of 100 jobs that a worker with these floors would make next; it is undone."""
    with engine.undone():
        call = "explain (analyze, buffers, format json) " + CLAIM_ONE
        (plan,) = engine.value(call, "q", uuid4(), *floors.ranges(), 100, 100, 1, None)
    top = plan["Plan"]
    assert top["Actual Rows"] == 100
    return int(top["Shared Hit Blocks"] + top["Shared Read Blocks"])


def fill(engine: Engine, jobs: int, priorities: int = 1) -> None:
    """Send plain jobs, of several priorities in turn."""
    engine.run(
        "insert into jobqueue.job (queue, job_type, priority, ready_seq) "
        "select 'q', 'q', n %% %s, jobqueue.next_ready() from generate_series(1, %s) n",
        priorities,
        jobs,
    )


JOBS = 100_000
SPARE = 2_000
"""Jobs that are left in the line for the last measurement."""


@dataclass(slots=True)
class Costs:
    """Buffers of claims of 100 jobs in the five quiet moments of a tenth of the run."""

    with_floors: list[int] = field(default_factory=list)
    plain: list[int] = field(default_factory=list)


def costs_of_a_tenth(engine: Engine, four: Claimers, start: int) -> Costs:
    """Let the four run for a tenth of the jobs; every 2,000 they stand still, and the next claim of each is measured."""
    found = Costs()
    for jobs in range(start + JOBS // 50, start + JOBS // 10 + 1, JOBS // 50):
        four.go(until=lambda jobs=jobs: four.total >= jobs)
        four.stand_still()
        four.each_claims_once()
        found.with_floors += [cost(engine, member.claimer.floors) for member in four.members]
        found.plain.append(cost(engine, Floors()))
    return found


def flat(first: list[int], last: list[int]) -> bool:
    """The gate: at the end a claim costs at most half more than at the beginning."""
    return median(last) <= 1.5 * median(first)


def find_late(four: Claimers, producer: Engine, late: UUID) -> None:
    """Commit while all four are busy, and wait for the job; the line stays full, so no claim ever comes back short."""
    four.go(until=lambda: four.has(late) or four.total >= 0.6 * JOBS)
    four.wait(lambda: four.total >= 0.2 * JOBS, "a fifth of the jobs")
    producer.run("commit")
    sweeps = [member.claimer.sweeps for member in four.members]
    four.portion = 1  # so that the line lasts for many seconds, on fast machines too
    four.stand_still()
    assert four.has(late), f"not found in {four.total:,} jobs"
    (finder,) = (n for n, member in enumerate(four.members) if str(late) in member.claimed)
    # Not by the clock, which says little of a busy machine: a sweep that was under way, the next one, or the one after it.
    assert four.members[finder].claimer.sweeps - sweeps[finder] <= 2 / SWEEP_SECONDS
    four.portion = 100


@pytest.mark.slow
def test_claims_of_four_at_once_stay_flat_for_100000_jobs_of_a_held_snapshot(engine: Engine) -> None:
    """Compared are the buffers of the next claim of 100 jobs of each of the four, in five quiet moments of the first tenth
    of the run and in five of the last: the medians of these twenty. In a quiet moment all four stand still and each has
    just claimed once more in its turn: what the others took lies in front of each in the same way at both ends.
    """
    engine.call("create_queue", "q")
    holder, producer = engine.another(), engine.another()
    producer.run("begin")
    late = producer.send(priority=2)  # takes its number in front of all others
    fill(engine, JOBS + SPARE, priorities=3)
    with claimers(engine.dsn, 4) as four, holder.connection.transaction():
        holder.run("set transaction isolation level repeatable read")
        holder.run("select 1 from jobqueue.job limit 1")
        cost(engine, Floors())  # the first call reads the catalogs too
        first = costs_of_a_tenth(engine, four, 0)
        find_late(four, producer, late)
        four.go(until=lambda: four.total >= 0.9 * JOBS)
        four.stand_still()
        last = costs_of_a_tenth(engine, four, 9 * JOBS // 10)
        four.go(until=lambda: four.total == JOBS + SPARE + 1)
        four.stand_still()
    claimed = [job for member in four.members for job in member.claimed]
    assert len(claimed) == len(set(claimed)) == JOBS + SPARE + 1
    assert engine.rows("select status, count(*) from jobqueue.job group by 1") == [
        {"status": "completed", "count": len(claimed)}
    ]
    assert flat(first.with_floors, last.with_floors), (
        f"{first.with_floors} at the beginning, {last.with_floors} at the end"
    )
    assert not flat(first.plain, last.plain), f"nothing was measured: plain claims, {first.plain} and {last.plain}"


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
