"""Estimates (S5): learned from history, from the handler's own counts, from the place in the line; checked against reality.

Time is virtual: `pass_time` moves everything that the database has noted of a job into the past.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from uuid import UUID

import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import PERMANENT, WORKER, Claim, Engine


def pass_time(engine: Engine, job: UUID, seconds: float) -> None:
    """So much time passes for one job."""
    engine.run(
        "with stages as (update jobqueue.stage s set started_at = s.started_at - a.ago, "
        "completed_at = s.completed_at - a.ago from (select %s::interval as ago) a where s.job_id = %s) "
        "update jobqueue.job j set started_at = j.started_at - a.ago, estimated_completion = j.estimated_completion - a.ago "
        "from (select %s::interval as ago) a where j.id = %s",
        f"{seconds} seconds", job, f"{seconds} seconds", job,
    )  # fmt: skip


def left(engine: Engine, job: UUID) -> float | None:
    """Seconds until the job is expected to end."""
    seconds = engine.value(
        "select extract(epoch from estimated_completion - now())::float8 from jobqueue.jobs where id = %s", job
    )
    return None if seconds is None else float(seconds)


def learn(engine: Engine) -> None:
    """Maintenance reads what has ended."""
    engine.rows("select * from jobqueue.maintain(null, '{estimates}')")


def learned(engine: Engine, job_type: str, stage: str = "") -> dict[str, Any]:
    """What is known of a stage."""
    return engine.row("select * from jobqueue.estimate where job_type = %s and stage = %s", job_type, stage)


def beat(engine: Engine, claim: Claim) -> None:
    """The worker's heartbeat."""
    job = {"id": str(claim.id), "token": str(claim.token), "started": True}
    engine.rows("select * from jobqueue.heartbeat(%s, %s)", WORKER, Jsonb([job]))


def completed_run(engine: Engine, queue: str, seconds: float) -> None:
    """A job that took so long and said nothing."""
    claim = engine.claimed(queue)
    pass_time(engine, claim.id, seconds)
    engine.call("complete", claim.id, claim.token)


def test_a_job_that_says_nothing_is_estimated_from_the_runs_before_it(engine: Engine) -> None:
    for seconds in (90, 110):
        completed_run(engine, "quiet", seconds)
    learn(engine)
    assert learned(engine, "quiet")["seconds"] == pytest.approx(100, abs=1)
    claim = engine.claimed("quiet")
    version = engine.job(claim.id)["version"]
    assert left(engine, claim.id) is None
    beat(engine, claim)
    assert left(engine, claim.id) == pytest.approx(100, abs=1)
    seen = engine.view(claim.id)
    assert seen["version"] == version + 1
    # A heartbeat alone is no news: nothing moves.
    pass_time(engine, claim.id, 60)
    beat(engine, claim)
    assert engine.view(claim.id)["version"] == version + 1
    assert left(engine, claim.id) == pytest.approx(40, abs=1)


def test_a_late_job_is_never_expected_in_the_past(engine: Engine) -> None:
    completed_run(engine, "late", 100)
    learn(engine)
    claim = engine.claimed("late")
    beat(engine, claim)
    for _ in range(5):
        pass_time(engine, claim.id, 90)
        beat(engine, claim)
        seconds = left(engine, claim.id)
        assert seconds is not None
        assert seconds > 0
    assert engine.value("select ends_at >= now() from jobqueue.estimate(%s)", claim.id)


def test_a_mean_forgets_slowly_and_one_run_that_hangs_does_not_spoil_it(engine: Engine) -> None:
    for _ in range(6):
        completed_run(engine, "q", 10)
    learn(engine)
    completed_run(engine, "q", 100_000)
    learn(engine)
    assert learned(engine, "q")["seconds"] == pytest.approx(10 + (100 - 10) / 7, rel=0.02)
    assert learned(engine, "q")["runs"] == 7
    for _ in range(30):
        completed_run(engine, "q", 40)
        learn(engine)
    assert learned(engine, "q")["seconds"] == pytest.approx(40, rel=0.05)
    assert engine.count("pace") == 0


def test_units_say_more_than_the_mean(engine: Engine) -> None:
    for pages in (10, 30):
        claim = engine.claimed("book")
        engine.call("estimate_units", claim.id, claim.token, pages)
        pass_time(engine, claim.id, 2 * pages)
        engine.call("complete", claim.id, claim.token)
    learn(engine)
    assert learned(engine, "book")["unit_seconds"] == pytest.approx(2, rel=0.05)
    claim = engine.claimed("book")
    engine.call("estimate_units", claim.id, claim.token, 500)
    assert left(engine, claim.id) == pytest.approx(1000, rel=0.05)


def test_without_history_the_job_s_own_speed_counts(engine: Engine) -> None:
    claim = engine.claimed()
    pass_time(engine, claim.id, 30)
    engine.call("progress", claim.id, claim.token, None, None, {"done": 10, "total": 100})
    assert left(engine, claim.id) == pytest.approx(270, abs=1)


def test_what_an_earlier_attempt_has_done_is_not_taken_for_speed(engine: Engine) -> None:
    claim = engine.claimed()
    pass_time(engine, claim.id, 80)
    engine.call("progress", claim.id, claim.token, None, None, {"done": 80, "total": 100})
    engine.fail(claim, retry_in="0")
    (claim,) = engine.claim()
    engine.call("progress", claim.id, claim.token, None, None, {"done": 80, "total": 100})
    pass_time(engine, claim.id, 10)
    engine.call("progress", claim.id, claim.token, None, None, {"done": 90, "total": 100})
    assert left(engine, claim.id) == pytest.approx(10, abs=1)
    engine.call("complete", claim.id, claim.token)
    learn(engine)
    # 20 pages in 10 s: what a page takes is learned, what a run takes is not.
    pass_time(engine, claim.id, 0)
    assert learned(engine, "q")["runs"] == 0
    assert learned(engine, "q")["unit_seconds"] == pytest.approx(0.5, abs=0.1)


def test_the_same_report_again_moves_nothing(engine: Engine) -> None:
    claim = engine.claimed()
    pass_time(engine, claim.id, 30)
    report = (claim.id, claim.token, None, "m", {"done": 10, "total": 100})
    engine.call("progress", *report)
    before = engine.view(claim.id)
    engine.call("progress", *report)
    engine.call("progress", claim.id, claim.token, None, "another message")
    after = engine.view(claim.id)
    assert after["estimated_completion"] == before["estimated_completion"]
    assert after["version"] == before["version"] + 1
    # A page that came a little early moves it by less than people would see.
    pass_time(engine, claim.id, 2.9)
    moved = engine.view(claim.id)["estimated_completion"]
    engine.call("progress", claim.id, claim.token, None, "m", {"done": 11, "total": 100})
    assert engine.view(claim.id)["estimated_completion"] == moved


def test_configured_defaults_hold_until_something_is_learned(engine: Engine) -> None:
    defaults = {"PROCESS_DOCUMENT__OCR_MS": 3000, "PROCESS_DOCUMENT__EMBED_PAGES_MS_PER_UNIT": 150, "Q_MS": 7000}
    assert engine.call("set_estimates", defaults) == 3
    assert engine.call("set_estimates", defaults) == 0
    expected = "select jobqueue.expected_seconds(%s, %s, %s::float8)"
    assert engine.value(expected, "process-document", "ocr", None) == 3
    assert engine.value(expected, "process document", "embed pages", 100) == 15
    claim = engine.claimed()
    beat(engine, claim)
    assert left(engine, claim.id) == pytest.approx(7, abs=0.5)
    pass_time(engine, claim.id, 20)
    engine.call("complete", claim.id, claim.token)
    learn(engine)
    assert engine.value(expected, "q", "", None) == pytest.approx(20, abs=0.5)
    assert engine.call("set_estimates", {"Q_MS": None}) == 1
    for wrong in ({"Q": 3}, {"Q_MS": -1}, {"Q_MS": "3"}, [1]):
        assert engine.refused(engine.call, "set_estimates", Jsonb(wrong)).sqlstate == "JQ400"


def test_the_wait_of_a_pending_job_is_jobs_ahead_times_their_mean_by_the_slots(engine: Engine) -> None:
    completed_run(engine, "q", 30)
    learn(engine)
    jobs = [engine.send() for _ in range(7)]
    estimate = "select * from jobqueue.estimate(%s)"
    assert engine.row(estimate, jobs[6])["queue_position"] == 7
    engine.run("update jobqueue.worker set heartbeat_at = now() - interval '5 min'")
    assert engine.row(estimate, jobs[6])["wait_seconds"] is None
    engine.call("register_worker", WORKER, Jsonb({"name": "w", "concurrency": 2, "queues": ["q"]}))
    last = engine.row(estimate, jobs[6])
    assert last["wait_seconds"] == pytest.approx(6 * 30 / 2, rel=0.01)
    assert last["run_seconds"] == pytest.approx(30, rel=0.01)
    assert (last["ends_at"] - last["starts_at"]).total_seconds() == pytest.approx(30, rel=0.01)
    assert engine.row(estimate, jobs[0])["wait_seconds"] == 0
    # A limit of the queue is a limit of its slots; and urgent jobs stand ahead.
    urgent = engine.send(priority=5)
    engine.run("update jobqueue.queue set concurrency = 1")
    assert engine.row(estimate, jobs[6])["wait_seconds"] == pytest.approx(7 * 30, rel=0.01)
    assert engine.row(estimate, urgent)["queue_position"] == 1
    engine.run("update jobqueue.queue set concurrency = null")
    later = engine.row(estimate, engine.send(delay=3600))
    assert (later["queue_position"], later["wait_seconds"]) == (None, None)
    assert later["starts_at"] is not None
    engine.call("cancel", jobs[6], "not needed")
    assert engine.row(estimate, jobs[6])["ends_at"] is None


def test_a_job_that_waits_for_a_limit_has_a_place_in_its_line_and_an_estimate(engine: Engine) -> None:
    engine.call("create_queue", "q", Jsonb({"concurrency": 2}))
    completed_run(engine, "q", 30)
    learn(engine)
    engine.call("register_worker", WORKER, Jsonb({"name": "w", "concurrency": 50, "queues": ["q"]}))
    jobs = [engine.send() for _ in range(6)]
    estimate = "select * from jobqueue.estimate(%s)"
    assert [engine.row(estimate, job)["queue_position"] for job in jobs] == [1, 2, 3, 4, 5, 6], (
        "before anybody admitted them"
    )
    assert {claim.id for claim in engine.claim(5)} == set(jobs[:2])
    urgent = engine.send(priority=5)
    assert engine.claim(5) == [], "the limit is reached, and the urgent job is in its place now"
    assert [engine.row(estimate, job)["queue_position"] for job in (urgent, *jobs[2:])] == [1, 2, 3, 4, 5]
    # Both slots are taken: the n-th of the line waits for n jobs of 30 s to end in two slots, although the worker has 50.
    assert engine.row(estimate, urgent)["wait_seconds"] == pytest.approx(15, rel=0.01)
    assert engine.row(estimate, jobs[5])["wait_seconds"] == pytest.approx(5 * 15, rel=0.01)
    assert engine.value("select jobqueue.http_queue_position(%s)", jobs[5]) == 5


def test_the_line_of_a_group_counts_its_own_jobs_and_a_fair_queue_takes_turns(engine: Engine) -> None:
    place = "select queue_position from jobqueue.estimate(%s)"
    engine.call("create_queue", "grouped", Jsonb({"group_concurrency": {"default": 1}}))
    noisy = [engine.send(queue="grouped", group="noisy") for _ in range(5)]
    assert len(engine.claim(9, queue="grouped")) == 1
    quiet = [engine.send(queue="grouped", group="quiet") for _ in range(3)]
    assert len(engine.claim(9, queue="grouped")) == 1
    assert [engine.value(place, job) for job in (*noisy[1:], *quiet[1:])] == [1, 2, 3, 4, 1, 2]
    engine.call("create_queue", "fair", Jsonb({"concurrency": 1, "fair_by": "tenant"}))
    many = [engine.send(queue="fair", tenant="many") for _ in range(5)]
    assert len(engine.claim(9, queue="fair")) == 1
    few = engine.send(queue="fair", tenant="few")
    assert engine.claim(9, queue="fair") == []
    assert engine.value(place, few) == 1
    assert engine.value(place, many[4]) == 5
    engine.call("create_queue", "slow", Jsonb({"rate_limit": {"limit": 1, "period": "1 min"}}))
    rated = [engine.send(queue="slow") for _ in range(4)]
    assert len(engine.claim(9, queue="slow")) == 1
    completed_run(engine, "other", 1)
    learn(engine)
    engine.call("register_worker", WORKER, Jsonb({"name": "w", "concurrency": 9}))
    assert engine.row("select wait_seconds from jobqueue.estimate(%s)", rated[3])["wait_seconds"] >= 3 * 60


def test_units_that_are_no_number_are_refused(engine: Engine) -> None:
    claim = engine.claimed()
    for units, stage in ((-1, None), (None, None), (float("inf"), None), (1, "")):
        refusal = engine.refused(engine.call, "estimate_units", claim.id, claim.token, units, stage)
        assert refusal.sqlstate == "JQ400"


def test_what_was_observed_of_jobs_that_are_gone_is_dropped(engine: Engine) -> None:
    claim = engine.claimed()
    engine.call("estimate_units", claim.id, claim.token, 5)
    learn(engine)
    assert engine.count("pace") == 1
    engine.fail(claim, PERMANENT)
    learn(engine)
    assert engine.count("pace") == 0
    assert engine.count("estimate") == 0


def test_many_rows_are_learned_in_portions(engine: Engine) -> None:
    engine.run(
        "insert into jobqueue.pace (job_id, stage, job_type, attempt, seconds) "
        "select gen_random_uuid(), 's', 'q', 1, 10 from generate_series(1, 25)"
    )
    portions, place = [], None
    while True:
        found = engine.row("select * from jobqueue.learn_estimates(%s, 10)", place)
        portions.append(found["learned"])
        place = found["next_from"]
        if place is None:
            break
    assert portions == [10, 10, 5]
    assert learned(engine, "q", "s")["seconds"] == pytest.approx(10)


# -- against reality ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Simulated:
    """A job as it will have been: what its handler says, and when (seconds after its start)."""

    job_type: str
    seconds: float
    says: list[tuple[float, str, tuple[Any, ...]]] = field(default_factory=list)


def document(chance: random.Random, counts: bool, announces: bool) -> Simulated:
    """Four stages; recognition and embedding take time by the page, and pages differ."""
    pages = chance.randint(5, 60)
    took = {
        "scan": 2 * chance.lognormvariate(0, 0.2),
        "ocr": sum(3 * chance.lognormvariate(0, 0.4) for _ in range(pages)),
        "embed": sum(0.5 * chance.lognormvariate(0, 0.3) for _ in range(pages)),
        "merge": 6 * chance.lognormvariate(0, 0.2),
    }
    run = Simulated("document", sum(took.values()))
    at = 0.0
    if announces:
        run.says += [(0.0, "estimate_units", (pages, stage)) for stage in ("ocr", "embed")]
    for name, seconds in took.items():
        run.says.append((at, "stage", (name, "in_progress", {"of": 4})))
        if counts and name in ("ocr", "embed"):
            for done in range(0, pages, max(1, pages // 6)):
                report = (None, None, {"done": done, "total": pages})
                run.says.append((at + seconds * done / pages, "progress", report))
        at += seconds
        run.says.append((at, "stage", (name, "completed")))
    return run


def export(chance: random.Random) -> Simulated:
    """No stages; rows are counted, at the job's own speed and an uneven pace."""
    total = chance.randint(20, 400)
    speed = 0.2 * chance.lognormvariate(0, 0.3)
    steps = [total / 8 * speed * chance.lognormvariate(0, 0.4) for _ in range(8)]
    run = Simulated("export", sum(steps))
    at = 0.0
    for index, step in enumerate(steps):
        run.says.append((at, "progress", (None, None, {"done": total * index // 8, "total": total})))
        at += step
    return run


def quiet(chance: random.Random) -> Simulated:
    """Says nothing at all, and does much the same every time."""
    return Simulated("quiet", 30 * chance.lognormvariate(0, 0.15))


def mix(chance: random.Random, rounds: int) -> Iterator[Simulated]:
    """As many of each kind."""
    for _ in range(rounds):
        yield document(chance, counts=True, announces=True)
        yield document(chance, counts=True, announces=False)
        yield document(chance, counts=False, announces=False)
        yield export(chance)
        yield quiet(chance)


def play(engine: Engine, run: Simulated, look: Callable[[float, float | None], None] | None = None) -> None:
    """Let a job run as it will have been; `look` is told the time and what is expected at half time."""
    claim = engine.claimed(run.job_type)
    half = run.seconds / 2
    moments = sorted([*run.says, (half, "look", ()), (run.seconds, "end", ())], key=lambda said: said[0])
    for (before, _, _), (at, verb, arguments) in pairwise([(0.0, "", ()), *moments]):
        pass_time(engine, claim.id, at - before)
        if verb == "look":
            beat(engine, claim)
            if look is not None:
                look(run.seconds - half, left(engine, claim.id))
        elif verb == "end":
            engine.call("complete", claim.id, claim.token)
        else:
            engine.call(verb, claim.id, claim.token, *arguments)


@pytest.mark.slow
def test_at_half_time_the_median_error_over_a_mix_of_jobs_is_under_a_quarter(engine: Engine) -> None:
    chance = random.Random(20260712)
    engine.run("set synchronous_commit = off")
    for run in mix(chance, 8):
        play(engine, run)
    learn(engine)
    errors: dict[str, list[float]] = {}
    for run in mix(chance, 8):

        def note(truth: float, expected: float | None, kind: str = run.job_type) -> None:
            assert expected is not None
            assert expected >= 0
            errors.setdefault(kind, []).append(abs(expected - truth) / truth)

        play(engine, run, note)
    medians = {kind: statistics.median(found) for kind, found in errors.items()}
    overall = statistics.median(error for found in errors.values() for error in found)
    print({"overall": f"{overall:.1%}", **{kind: f"{error:.1%}" for kind, error in medians.items()}})
    assert overall < 0.25
