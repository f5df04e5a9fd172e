"""How often a worker sends progress: pure arithmetic with a clock of its own."""

from __future__ import annotations

import random
from bisect import bisect

import pytest

from jobqueue.worker.bucket import BURST, Bucket, rate_of


def send(reports: list[float], jobs: int, seconds: float) -> tuple[int, list[float]]:
    """Play the loop of a worker: how many flushes there were, and how long each report waited for its own."""
    bucket, flushes, waited, now = Bucket(0.0), 0, list[float](), 0.0
    for index, at in enumerate(reports):
        if at < now:
            continue  # went with an earlier flush
        now = at
        while wait := bucket.wait(now, jobs):
            now += wait
        if now > seconds:
            break
        bucket.take()
        flushes += 1
        waited += [now - merged for merged in reports[index : bisect(reports, now)]]
    return flushes, waited


@pytest.mark.parametrize("jobs", [45, 100, 1000])
def test_a_thousand_jobs_cost_under_ten_flushes_a_second_whatever_they_report(jobs: int) -> None:
    flushes, waited = send([n / 200 for n in range(4_000)], jobs, 20)
    assert flushes <= 9 * 20 + BURST
    assert max(waited) < 0.12


def test_ten_jobs_that_report_twice_a_second_hardly_wait() -> None:
    chance = random.Random(7)
    reports = sorted(chance.uniform(0, 100) for _ in range(10 * 2 * 100))
    _, waited = send(reports, 10, 100)
    assert len(waited) == len(reports)
    assert sorted(waited)[int(0.99 * len(waited))] < 0.02


def test_a_first_report_and_a_few_more_go_out_at_once() -> None:
    bucket = Bucket(0.0)
    for _ in range(int(BURST)):
        assert bucket.wait(100.0, 1) == 0
        bucket.take()
    assert bucket.wait(100.0, 1) == pytest.approx(1 / 9)


def test_the_rate_rises_to_ten_jobs_and_falls_for_more() -> None:
    assert [rate_of(jobs) for jobs in (0, 1, 2, 5, 10, 20, 40)] == [9, 9, 9, 20, 40, 20, 10]
    assert {rate_of(jobs) for jobs in (45, 100, 1000, 100_000)} == {9}
