"""The judge: reads a history and says what must not have happened. Knows nothing of how the queue works inside.

A claim holds from the statement that made it to the statement that ended it, as the database recorded both. A handler
that goes on after its claim has ended (a fenced or frozen worker) holds nothing any more: its end is refused, and the
limits are free for others. So limits and order are judged by claims, and what a handler did by its token.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from chaos_lab.history import Final, History, Move, Past
from chaos_lab.plan import FINAL, GROUP_LIMIT, QUEUE_LIMIT, Planned

LOST_IN_A_ROW = 3
"""So many lost workers in a row end a job as failed: that is the promise, not a loss."""
WAITING = frozenset({"pending", "blocked", "paused"})


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must not happen. `rule`: its short name. `job`: the job it happened to, if it was one."""

    rule: str
    job: str
    text: str


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim from its beginning to its end; `end` is None if it never ended. `became`: what the job was afterwards."""

    job: str
    attempt: int
    token: str
    worker: str | None
    begin: float
    end: float | None
    became: str | None


class Facts:
    """The history by job, so that each rule reads as its sentence."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.planned: dict[str, Planned] = {job.id: job for job in history.planned}
        self.finals: dict[str, Final] = {final.job: final for final in history.finals}
        self.moves: dict[str, list[Move]] = defaultdict(list)
        for move in history.moves:
            self.moves[move.job].append(move)
        self.pasts: dict[str, list[Past]] = defaultdict(list)
        for past in history.pasts:
            self.pasts[past.job].append(past)
        self.claims: dict[str, list[Claim]] = {job: list(claims_of(moves)) for job, moves in self.moves.items()}

    def of_kind(self, kind: str) -> Iterator[Planned]:
        """The planned jobs of a kind that exist, in the order of the plan."""
        return (job for job in self.history.planned if job.kind == kind and job.id in self.finals)


def claims_of(moves: Iterable[Move]) -> Iterator[Claim]:
    """Pair the beginnings of a job's claims with their ends."""
    open_move: Move | None = None
    for move in moves:
        if move.became == "processing":
            if open_move is not None:
                yield _claim(open_move, None)
            open_move = move
        elif move.was == "processing" and open_move is not None:
            yield _claim(open_move, move)
            open_move = None
    if open_move is not None:
        yield _claim(open_move, None)


def _claim(begin: Move, end: Move | None) -> Claim:
    return Claim(
        begin.job,
        begin.attempt,
        begin.token or "",
        begin.worker,
        begin.at,
        end.at if end is not None else None,
        end.became if end is not None else None,
    )


def check(history: History) -> list[Violation]:
    """Return everything that must not have happened."""
    facts = Facts(history)
    return [violation for rule in RULES for violation in rule(facts)]


# -- no job lost -------------------------------------------------------------------------------------------------------


def every_job_that_was_accepted_ends_as_expected(facts: Facts) -> Iterator[Violation]:
    for job in facts.history.planned:
        final = facts.finals.get(job.id)
        if job.number in facts.history.refused:
            if final is not None:
                yield Violation(
                    "refused", job.id, f"{job.kind} {job.number}: its sender was told of another, and it exists"
                )
        elif job.number not in facts.history.accepted:
            yield Violation("unsent", job.id, f"{job.kind} {job.number}: its sender never got an answer")
        elif final is None:
            yield Violation("lost", job.id, f"{job.kind} {job.number}: sent and committed, and not there any more")
        elif final.status != job.ends and not _is_poison(facts, final):
            yield Violation("end", job.id, f"{job.kind} {job.number}: is {final.status}, not {job.ends}")
    for id in facts.finals.keys() - facts.planned.keys():
        yield Violation("unplanned", id, "nobody sent this job")


def _is_poison(facts: Facts, final: Final) -> bool:
    last = sorted(facts.pasts[final.job], key=lambda past: past.attempt)[-LOST_IN_A_ROW:]
    return final.status == "failed" and [past.outcome for past in last] == ["lost"] * LOST_IN_A_ROW


def every_status_follows_from_the_one_before(facts: Facts) -> Iterator[Violation]:
    for id, final in facts.finals.items():
        status = ""
        for move in facts.moves[id]:
            if move.was != status:
                yield Violation("chain", id, f"went from {move.was} to {move.became}, but was {status or 'not there'}")
            status = move.became
        if status != final.status:
            yield Violation("chain", id, f"is {final.status}, but went to {status or 'nothing'} last")


# -- no attempt settled twice ------------------------------------------------------------------------------------------


def every_claim_is_ended_once(facts: Facts) -> Iterator[Violation]:
    ends = Counter(move.token for move in facts.history.moves if move.was == "processing")
    begins = Counter(move.token for move in facts.history.moves if move.became == "processing")
    for move in facts.history.moves:
        if move.became == "processing" and (move.token is None or begins[move.token] != 1):
            yield Violation("token", move.job, f"attempt {move.attempt} has no token of its own")
        elif move.became == "processing" and ends[move.token] != 1:
            yield Violation("settled", move.job, f"attempt {move.attempt} was ended {ends[move.token]} times")
        elif move.was == "processing" and begins[move.token] == 0:
            yield Violation("settled", move.job, f"attempt {move.attempt} was ended by a token that never claimed it")


def every_job_ends_once(facts: Facts) -> Iterator[Violation]:
    for id, moves in facts.moves.items():
        ends = [move.became for move in moves if move.became in FINAL]
        if len(ends) > 1:
            yield Violation("twice", id, f"ended {len(ends)} times: {', '.join(ends)}")


def every_attempt_is_told_in_the_history(facts: Facts) -> Iterator[Violation]:
    for id in facts.finals:
        claims = facts.claims.get(id, [])
        numbers = [claim.attempt for claim in claims]
        if numbers != list(range(1, len(claims) + 1)):
            yield Violation("attempts", id, f"its claims are numbered {numbers}")
        ended = sorted(
            (claim.attempt, claim.token) for claim in claims if claim.end is not None and claim.became != "completed"
        )
        told = sorted((past.attempt, past.token or "") for past in facts.pasts[id])
        if ended != told:
            yield Violation("attempts", id, f"attempts {told} are told of, {ended} ended without completing")


def every_effect_is_there_once_if_its_job_completed(facts: Facts) -> Iterator[Violation]:
    tokens: dict[str, list[str]] = defaultdict(list)
    for effect in facts.history.effects:
        tokens[effect.job].append(effect.token)
    for job in facts.of_kind("effect"):
        completed = [claim.token for claim in facts.claims.get(job.id, []) if claim.became == "completed"]
        if tokens[job.id] != completed:
            yield Violation("effect", job.id, f"effects of {tokens[job.id]}, completed by {completed}")


def nothing_completes_that_did_not_run(facts: Facts) -> Iterator[Violation]:
    ran: dict[str, set[str]] = defaultdict(set)
    for run in facts.history.runs:
        ran[run.token].add(run.what)
    for id, claims in facts.claims.items():
        for claim in claims:
            said = ran[claim.token]
            if claim.became == "completed" and not said >= {"start", "end"}:
                yield Violation(
                    "unrun", id, f"attempt {claim.attempt} was completed, its handler only said {sorted(said)}"
                )


def what_fails_by_itself_was_tried_again(facts: Facts) -> Iterator[Violation]:
    for job in facts.history.planned:
        bad = sum(past.outcome in ("failed", "lost", "timed_out") for past in facts.pasts[job.id])
        if job.id in facts.finals and bad < job.fails:
            yield Violation("retries", job.id, f"fails {job.fails} times by itself, and {bad} bad attempts are told of")


# -- limits and order --------------------------------------------------------------------------------------------------


def no_limit_is_exceeded(facts: Facts) -> Iterator[Violation]:
    limits = {"limited": QUEUE_LIMIT, "grouped": GROUP_LIMIT, "ordered": 1}
    for kind, limit in limits.items():
        lanes: dict[str | None, list[Claim]] = defaultdict(list)
        for job in facts.of_kind(kind):
            lanes[job.lane] += facts.claims.get(job.id, [])
        for lane, claims in lanes.items():
            for at, claim, running in _peaks(claims, limit):
                yield Violation(
                    "limit", claim.job, f"{running} claims of {lane or kind} at {at:.6f}, allowed are {limit}"
                )


def _peaks(claims: Iterable[Claim], limit: int) -> Iterator[tuple[float, Claim, int]]:
    """Where more claims than allowed hold at the same moment. Ends go before beginnings of the same instant."""
    events = [(claim.begin, 1, claim) for claim in claims]
    events += [(claim.end, -1, claim) for claim in claims if claim.end is not None]
    running = 0
    for at, step, claim in sorted(events, key=lambda event: event[:2]):
        running += step
        if step > 0 and running > limit:
            yield at, claim, running


def every_key_keeps_its_order(facts: Facts) -> Iterator[Violation]:
    lanes: dict[str | None, list[Planned]] = defaultdict(list)
    for job in facts.of_kind("ordered"):
        lanes[job.lane].append(job)
    for lane, jobs in lanes.items():
        free_at, before = 0.0, ""
        for job in jobs:
            claims = facts.claims.get(job.id, [])
            if claims and claims[0].begin < free_at:
                yield Violation(
                    "order", job.id, f"claimed {free_at - claims[0].begin:.3f} s before {before} of {lane} ended"
                )
            free_at, before = max((claim.end or float("inf") for claim in claims), default=free_at), job.id


def no_key_is_held_by_two(facts: Facts) -> Iterator[Violation]:
    lanes: dict[str | None, list[tuple[float, float, str]]] = defaultdict(list)
    for job in facts.of_kind("unique"):
        moves = facts.moves[job.id]
        if moves:
            end = moves[-1].at if moves[-1].became in FINAL else float("inf")
            lanes[job.lane].append((moves[0].at, end, job.id))
    for lane, held in lanes.items():
        held.sort()
        for (_, end, one), (begin, _, other) in itertools.pairwise(held):
            if begin < end:
                yield Violation("unique", other, f"sent under {lane} while {one} had not ended")


def nothing_is_left_open(facts: Facts) -> Iterator[Violation]:
    for id, final in facts.finals.items():
        if final.status in WAITING or final.status == "processing":
            yield Violation("open", id, f"is still {final.status}")


# -- who lives on ------------------------------------------------------------------------------------------------------


def every_process_survives(facts: Facts) -> Iterator[Violation]:
    for complaint in facts.history.survivors:
        yield Violation("survivors", "", complaint)


def the_api_never_answers_500(facts: Facts) -> Iterator[Violation]:
    for answer in facts.history.answers:
        if answer.status >= 500 and answer.status != 503:
            yield Violation("api", "", f"answered {answer.status} at {answer.at:.3f}")


RULES: tuple[Callable[[Facts], Iterator[Violation]], ...] = (
    every_job_that_was_accepted_ends_as_expected,
    every_status_follows_from_the_one_before,
    every_claim_is_ended_once,
    every_job_ends_once,
    every_attempt_is_told_in_the_history,
    every_effect_is_there_once_if_its_job_completed,
    nothing_completes_that_did_not_run,
    what_fails_by_itself_was_tried_again,
    no_limit_is_exceeded,
    every_key_keeps_its_order,
    no_key_is_held_by_two,
    nothing_is_left_open,
    every_process_survives,
    the_api_never_answers_500,
)


def late_starts(history: History) -> Mapping[str, int]:
    """Handlers that began or went on although their claim had ended: frozen workers. Refused, therefore only counted."""
    ends = {move.token: move.at for move in history.moves if move.was == "processing"}
    late = Counter(run.what for run in history.runs if run.at > ends.get(run.token, float("inf")))
    return {"start": late["start"], "end": late["end"]}
