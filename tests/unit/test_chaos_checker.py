"""The checker of scripts/chaos finds every breach of what it stands for: it is fed histories that are broken on purpose."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from chaos_lab.checker import check, late_starts
from chaos_lab.history import Answer, Effect, Final, History, Injection, Move, Past, Run
from chaos_lab.plan import QUEUE_LIMIT, Planned, make_plan
from chaos_lab.recovery import judge, paces

LEASE = 10.0


class Story:
    """A history that is told job by job, and is flawless unless a test breaks it."""

    def __init__(self) -> None:
        self.history = History(LEASE)
        self.clock = 0.0

    def plan(self, kind: str, lane: str | None = None, *, ends: str = "completed", fails: int = 0) -> Planned:
        """Plan a job whose sender was told that it is in."""
        number = len(self.history.planned)
        job = Planned(number, f"job-{number}", kind, lane, fails, ends, 0.05)
        self.history.planned.append(job)
        self.history.accepted.add(number)
        return job

    def job(
        self,
        kind: str,
        lane: str | None = None,
        *,
        sent: float | None = None,
        outcomes: tuple[str, ...] = (),
        ends: str = "completed",
        fails: int = 0,
        seconds: float = 0.1,
    ) -> Planned:
        """Send a job, let its attempts end as told, then end it."""
        job = self.plan(kind, lane, ends=ends, fails=fails)
        at = self.clock if sent is None else sent
        self.move(job.id, 0, None, "", "pending", at)
        for attempt, outcome in enumerate((*outcomes, ends), start=1):
            token = f"{job.id}/{attempt}"
            last = attempt > len(outcomes)
            self.move(job.id, attempt, token, "pending", "processing", at + 0.01)
            self.history.runs.append(Run(job.id, token, "start", at + 0.02))
            at += seconds
            self.move(job.id, attempt, token, "processing", ends if last else "pending", at)
            if last and ends == "completed":
                self.history.runs.append(Run(job.id, token, "end", at - 0.01))
                if kind == "effect":
                    self.history.effects.append(Effect(job.id, token))
            else:
                self.history.pasts.append(Past(job.id, attempt, token, "failed" if last else outcome))
        self.clock = max(self.clock, at)
        self.history.finals.append(Final(job.id, kind, ends, len(outcomes) + 1, None))
        return job

    def move(self, job: str, attempt: int, token: str | None, was: str, became: str, at: float) -> None:
        """Record a change of status."""
        self.history.moves.append(Move(job, attempt, token, "worker", was, became, at))

    def rules(self) -> set[str]:
        """The rules that are broken."""
        return {violation.rule for violation in check(self.history)}


def a_good_story() -> Story:
    """One of everything, and nothing wrong with it."""
    story = Story()
    for kind in ("plain", "effect", "http"):
        story.job(kind)
    story.job("flaky", outcomes=("failed",), fails=1)
    story.job("flaky", ends="failed")
    story.job("snoozed", outcomes=("snoozed",))
    story.job("effect", outcomes=("lost",))
    for _ in range(3):
        story.job("ordered", "key-1")
        story.job("unique", "key-2")
    for _ in range(2):
        story.job("grouped", "group-1", sent=1.0)
    for _ in range(QUEUE_LIMIT):
        story.job("limited", sent=2.0)
    refused = story.plan("unique", "key-2")
    story.history.accepted.remove(refused.number)
    story.history.refused.add(refused.number)
    return story


def final_of(story: Story, job: Planned, **changes: str) -> None:
    finals = story.history.finals
    at = next(n for n, final in enumerate(finals) if final.job == job.id)
    finals[at] = replace(finals[at], **changes)  # type: ignore[arg-type]


def test_a_history_without_a_flaw_breaks_no_rule() -> None:
    assert check(a_good_story().history) == []


def test_a_job_that_lost_three_workers_in_a_row_may_fail() -> None:
    story = a_good_story()
    job = story.job("plain", outcomes=("lost", "lost"), ends="failed")
    story.history.planned[job.number] = replace(job, ends="completed")
    assert story.rules() == {"end"}
    story.history.pasts[-1] = replace(story.history.pasts[-1], outcome="lost")
    assert story.rules() == set()


def lose_a_job(story: Story) -> None:
    job = story.plan("plain")
    assert job.number in story.history.accepted


def lose_a_row(story: Story) -> None:
    story.history.finals.pop(0)


def never_answer(story: Story) -> None:
    story.history.accepted.remove(0)


def keep_what_was_refused(story: Story) -> None:
    story.history.accepted.remove(0)
    story.history.refused.add(0)


def invent_a_job(story: Story) -> None:
    story.history.finals.append(Final("job-x", "plain", "completed", 1, None))
    story.move("job-x", 0, None, "", "completed", 0.0)


def end_otherwise(story: Story) -> None:
    story.job("plain", ends="cancelled")
    story.history.planned[-1] = replace(story.history.planned[-1], ends="completed")


def leave_a_job_waiting(story: Story) -> None:
    job = story.plan("plain", ends="pending")
    story.move(job.id, 0, None, "", "pending", 1.0)
    story.history.finals.append(Final(job.id, "plain", "pending", 0, None))


def leave_a_job_under_way(story: Story) -> None:
    job = story.plan("plain", ends="processing")
    story.move(job.id, 0, None, "", "pending", 1.0)
    story.move(job.id, 1, "t", "pending", "processing", 1.0)
    story.history.finals.append(Final(job.id, "plain", "processing", 1, None))


def skip_a_status(story: Story) -> None:
    story.history.moves.remove(next(move for move in story.history.moves if move.was == "" and move.job == "job-0"))


def differ_from_the_last_move(story: Story) -> None:
    job = story.job("plain", ends="failed")
    final_of(story, job, status="completed")


def settle_twice(story: Story) -> None:
    job = story.job("plain")
    story.move(job.id, 1, f"{job.id}/1", "processing", "completed", story.clock + 1)


def settle_with_a_foreign_token(story: Story) -> None:
    job = story.job("plain")
    story.history.moves[-1] = replace(story.history.moves[-1], token=f"{job.id}/stale")


def use_a_token_again(story: Story) -> None:
    job = story.job("plain", outcomes=("lost",))
    moves = story.history.moves
    for n, move in enumerate(moves):
        if move.job == job.id and move.token:
            moves[n] = replace(move, token="same")


def end_twice(story: Story) -> None:
    job = story.job("plain", ends="failed")
    story.history.planned[job.number] = replace(job, ends="completed")
    for attempt, was, became in (
        (1, "failed", "pending"),
        (2, "pending", "processing"),
        (2, "processing", "completed"),
    ):
        story.move(job.id, attempt, None if became == "pending" else "again", was, became, story.clock + 1)
    final_of(story, job, status="completed")
    story.history.runs += [Run(job.id, "again", what, story.clock) for what in ("start", "end")]


def forget_an_attempt(story: Story) -> None:
    story.job("plain", outcomes=("lost",))
    story.history.pasts.pop()


def invent_an_attempt(story: Story) -> None:
    story.history.pasts.append(Past(story.job("plain").id, 1, "t", "lost"))


def skip_an_attempt_number(story: Story) -> None:
    job = story.job("plain")
    moves = story.history.moves
    for n, move in enumerate(moves):
        if move.job == job.id and move.token:
            moves[n] = replace(move, attempt=2)


def take_effect_twice(story: Story) -> None:
    job = story.job("effect")
    story.history.effects.append(Effect(job.id, f"{job.id}/1"))


def take_effect_without_completing(story: Story) -> None:
    job = story.job("effect", outcomes=("lost",))
    story.history.effects.append(Effect(job.id, f"{job.id}/1"))


def complete_without_effect(story: Story) -> None:
    story.job("effect")
    story.history.effects.pop()


def complete_what_never_ran(story: Story) -> None:
    story.job("plain")
    story.history.runs.pop()


def complete_what_should_have_failed_first(story: Story) -> None:
    story.job("flaky", fails=1)


def exceed_the_limit_of_the_queue(story: Story) -> None:
    story.job("limited", sent=2.0)


def exceed_the_limit_of_a_group(story: Story) -> None:
    story.job("grouped", "group-1", sent=1.05)


def run_two_of_a_key_at_once(story: Story) -> None:
    story.job("ordered", "key-9", sent=5.0)
    story.job("ordered", "key-9", sent=5.05)


def overtake_within_a_key(story: Story) -> None:
    story.job("ordered", "key-9", sent=6.0)
    story.job("ordered", "key-9", sent=5.0)


def overtake_a_retry(story: Story) -> None:
    story.job("ordered", "key-9", sent=5.0, outcomes=("failed",), fails=1, seconds=1.0)
    # between the failure of the first and its retry
    moves = story.history.moves
    at = next(n for n, move in enumerate(moves) if move.job == moves[-1].job and move.attempt == 2)
    moves[at] = replace(moves[at], at=6.5)
    story.job("ordered", "key-9", sent=6.1, seconds=0.1)


def hold_a_key_twice(story: Story) -> None:
    story.job("unique", "key-9", sent=5.0)
    story.job("unique", "key-9", sent=5.05)


def die(story: Story) -> None:
    story.history.survivors.append("worker-1 ended by itself with 1")


def answer_500(story: Story) -> None:
    story.history.answers += [Answer(1.0, 200), Answer(2.0, 503), Answer(3.0, 0), Answer(4.0, 500)]


@pytest.mark.parametrize(
    ("breach", "rule"),
    [
        (lose_a_job, "lost"),
        (lose_a_row, "lost"),
        (never_answer, "unsent"),
        (keep_what_was_refused, "refused"),
        (invent_a_job, "unplanned"),
        (end_otherwise, "end"),
        (leave_a_job_waiting, "open"),
        (leave_a_job_under_way, "open"),
        (skip_a_status, "chain"),
        (differ_from_the_last_move, "chain"),
        (settle_twice, "settled"),
        (settle_with_a_foreign_token, "settled"),
        (use_a_token_again, "token"),
        (end_twice, "twice"),
        (forget_an_attempt, "attempts"),
        (invent_an_attempt, "attempts"),
        (skip_an_attempt_number, "attempts"),
        (take_effect_twice, "effect"),
        (take_effect_without_completing, "effect"),
        (complete_without_effect, "effect"),
        (complete_what_never_ran, "unrun"),
        (complete_what_should_have_failed_first, "retries"),
        (exceed_the_limit_of_the_queue, "limit"),
        (exceed_the_limit_of_a_group, "limit"),
        (run_two_of_a_key_at_once, "limit"),
        (overtake_within_a_key, "order"),
        (overtake_a_retry, "order"),
        (hold_a_key_twice, "unique"),
        (die, "survivors"),
        (answer_500, "api"),
    ],
)
def test_a_breach_is_found(breach: Callable[[Story], None], rule: str) -> None:
    story = a_good_story()
    breach(story)
    assert rule in story.rules()


def test_a_handler_that_goes_on_after_its_claim_has_ended_holds_no_slot_and_is_counted() -> None:
    story = a_good_story()
    job = story.job("limited", sent=20.0, outcomes=("lost",))
    story.history.runs.append(Run(job.id, f"{job.id}/1", "end", story.clock + 5))
    assert story.rules() == set()
    assert late_starts(story.history) == {"start": 0, "end": 1}


def steady(rate: int, *spans: tuple[float, float]) -> History:
    """A history of jobs that end at a steady rate in some spans of time, and a fault from 20 to 22 s."""
    history = History(LEASE, injections=[Injection("a fault", 20.0, 22.0)])
    for begin, end in spans:
        count = int((end - begin) * rate)
        ends = (begin + n / rate for n in range(count))
        history.moves += [Move(f"j{at}", 1, f"t{at}", "w", "processing", "completed", at) for at in ends]
    return history


def rules_of(history: History) -> set[str]:
    return {violation.rule for violation in judge(history, paces(history))}


def test_full_rate_within_ten_seconds_is_a_recovery() -> None:
    history = steady(50, (0, 20), (26, 60))
    (pace,) = paces(history)
    assert pace.before == pytest.approx(50, rel=0.05)
    assert pace.during == 0
    assert pace.recovery == pytest.approx(3.75, abs=0.5)
    assert rules_of(history) == set()


def test_full_rate_after_more_than_ten_seconds_is_none() -> None:
    assert rules_of(steady(50, (0, 20), (34, 60))) == {"recovery"}


def test_a_rate_that_stays_low_is_no_recovery() -> None:
    history = steady(50, (0, 20))
    history.moves += steady(25, (22, 60)).moves
    assert rules_of(history) == {"recovery"}


def test_jobs_that_have_run_out_measure_nothing() -> None:
    (pace,) = paces(steady(50, (0, 20), (22, 23)))
    assert pace.recovery is None


@pytest.mark.parametrize(("again", "rules"), [(14.9, set()), (15.1, {"rerun"}), (None, {"rerun"})])
def test_the_jobs_of_a_killed_worker_run_again_within_its_lease_and_five_seconds(
    again: float | None, rules: set[str]
) -> None:
    history = steady(50, (0, 60))
    history.injections = [Injection("SIGKILL", 21.9, 22.0, ("dead",))]
    history.moves.append(Move("job", 1, "t1", "dead", "pending", "processing", 21.0))
    if again is not None:
        history.moves.append(Move("job", 1, "t1", "dead", "processing", "pending", 22.0 + again - 0.1))
        history.moves.append(Move("job", 2, "t2", "other", "pending", "processing", 22.0 + again))
    assert rules_of(history) == rules


def test_an_api_that_stays_away_is_found() -> None:
    history = steady(50, (0, 60))
    history.answers = [Answer(10.0, 200), Answer(23.0, 503), Answer(32.5, 200)]
    assert rules_of(history) == {"api"}
    history.answers[-1] = Answer(31.5, 200)
    assert rules_of(history) == set()


def test_a_history_that_was_kept_is_read_again(tmp_path: Path) -> None:
    history = a_good_story().history
    history.injections.append(Injection("SIGKILL", 1.0, 2.0, ("one", "two")))
    history.answers.append(Answer(1.0, 200))
    history.write(tmp_path)
    assert History.read(tmp_path) == history


def test_the_same_seed_plans_the_same_jobs() -> None:
    assert make_plan(7, 500) == make_plan(7, 500)
    assert make_plan(7, 500) != make_plan(8, 500)
    assert {job.kind for job in make_plan(7, 500)} == {
        *("plain", "effect", "ordered", "grouped", "limited", "flaky", "snoozed", "unique", "http")
    }
