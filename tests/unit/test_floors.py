"""The floors of a worker: which part of the line a claim reads, and which part the sweep."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from jobqueue.worker.floors import HIGHEST_RANK, LOWEST_RANK, MOST_RANKS, Floors


def covered(floors: Floors, keys: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of the keys (rank, seq) that a claim reads."""
    ranges = list(zip(*floors.ranges(), strict=True))
    return [key for key in keys if any(key >= (low, first) and key[0] < end for low, first, end in ranges)]


def covers(floors: Floors, rank: int, seq: int) -> bool:
    """Whether a claim reads this key."""
    return covered(floors, [(rank, seq)]) != []


def test_a_new_worker_reads_the_whole_line() -> None:
    assert Floors().ranges() == ([LOWEST_RANK], [0], [HIGHEST_RANK])


def test_a_claim_begins_where_the_last_one_began() -> None:
    floors = Floors()
    floors.claimed([(0, 10), (0, 11)], short=False, now=0.0)
    assert floors.ranges() == ([LOWEST_RANK, 0], [0, 10], [0, HIGHEST_RANK])
    assert not covers(floors, 0, 9)
    assert covers(floors, 0, 10)


def test_an_unknown_priority_is_found_at_once() -> None:
    floors = Floors()
    floors.claimed([(-5, 100), (0, 200)], short=False, now=0.0)
    for rank in (-7, -3, 4):
        assert covers(floors, rank, 1)


def test_an_emptied_priority_rises_only_to_numbers_that_have_settled() -> None:
    floors = Floors()
    floors.claimed([(0, 10)], short=False, now=0.0)
    floors.claimed([(1, 50)], short=True, now=0.5)
    assert covers(floors, 0, 11), "number 50 is younger than a second: a lower one may still be uncommitted"
    floors.claimed([(1, 60)], short=True, now=1.6)
    assert not covers(floors, 0, 49)
    assert covers(floors, 0, 51)


def test_the_sweep_reads_what_lies_below_the_floors_until_older_transactions_have_ended() -> None:
    floors = Floors()
    floors.claimed([(0, 100)], short=False, now=0.0)
    assert floors.below() == ([0], [0], [100])
    floors.swept(short=True, oldest_running=700, next_transaction=705)
    assert floors.below() == ([0], [0], [100]), "transaction 700 may still bring a number below 100"
    floors.swept(short=True, oldest_running=705, next_transaction=710)
    assert floors.below() == ([], [], [])


def test_a_sweep_that_found_as_much_as_it_asked_for_is_repeated() -> None:
    floors = Floors()
    floors.claimed([(0, 100)], short=False, now=0.0)
    floors.swept(short=False, oldest_running=700, next_transaction=700)
    floors.swept(short=False, oldest_running=800, next_transaction=800)
    assert floors.below() == ([0], [0], [100])


def test_no_more_than_so_many_priorities_are_remembered() -> None:
    floors = Floors()
    for rank in range(MOST_RANKS + 20):
        floors.claimed([(rank, 5)], short=False, now=0.0)
    assert len(floors.ranges().ranks) == MOST_RANKS + 1
    assert covers(floors, 0, 1), "what was forgotten lies in a gap again"


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), batch=st.integers(1, 20))
def test_every_job_is_claimed_once_by_claims_and_sweeps(seed: int, batch: int) -> None:
    """A model of the line: producers take numbers, commit late or not at all in time; nothing is lost, nothing taken twice."""
    chance = random.Random(seed)
    floors, now = Floors(), 0.0
    visible: dict[int, int] = {}
    open_transactions: list[tuple[float, int, int, int]] = []
    number = transaction = taken = sent = 0
    for _ in range(120):
        now += chance.random() / 2
        for _ in range(chance.randrange(6)):
            number, transaction, sent = number + 1, transaction + 1, sent + 1
            late = chance.random() < 0.2
            heapq.heappush(
                open_transactions,
                (now + (3 * chance.random() if late else 0), transaction, number, chance.randrange(3)),
            )
        while open_transactions and open_transactions[0][0] <= now:
            _, _, seq, rank = heapq.heappop(open_transactions)
            visible[seq] = rank
        found = sorted(covered(floors, ((rank, seq) for seq, rank in visible.items())))[:batch]
        for _, seq in found:
            del visible[seq]
        taken += len(found)
        floors.claimed(found, len(found) < batch, now)
        below = floors.below()
        oldest = min((entry[1] for entry in open_transactions), default=transaction + 1)
        swept = [
            (rank, seq)
            for rank, low, high in zip(*below, strict=True)
            for seq, its in list(visible.items())
            if its == rank and low <= seq < high
        ][:batch]
        for _, seq in swept:
            del visible[seq]
        taken += len(swept)
        floors.swept(len(swept) < batch, oldest, transaction + 1)
    # whatever is visible is within reach of a claim or of a sweep
    below = floors.below()
    for seq, rank in visible.items():
        assert covers(floors, rank, seq) or any(
            rank == r and low <= seq < high for r, low, high in zip(*below, strict=True)
        )
    assert taken + len(visible) + len(open_transactions) == sent
