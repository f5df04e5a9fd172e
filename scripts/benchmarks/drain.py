"""P1 and P2: how fast worker processes finish what waits, right after ANALYZE and on a table without statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace

import psycopg

from benchmarks import raw
from benchmarks.children import run_together
from benchmarks.places import Place, connect, describe_server
from benchmarks.report import Bar, Report, Row
from benchmarks.workers import Drained, WorkerOptions, drain, send
from jobqueue import App

RAW_BATCHES = (100, 500)
STATES = ("analyzed", "no statistics")
NEVER_ANALYZED = "alter table jobqueue.job set (autovacuum_enabled = false)"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to set the workers up. `batch`: jobs per call of a batch handler, 0: one at a time."""

    name: str
    tuned: bool = False
    concurrency: int | None = None
    batch: int = 0


DEFAULT = Variant("default")
TUNED = (
    Variant("tuned", tuned=True, concurrency=1000),
    Variant("tuned, batch handler of 500", tuned=True, concurrency=1000, batch=500),
)


def run(place: Place, *, jobs: int, runs: int, processes: int, tuned: bool, profile: str | None = None) -> Report:
    """Measure `runs` times: each variant in each state, every one beside the raw limit of the same moment.

    With more than one process, one process is measured too: P2 is their ratio. `profile`: a file for the cProfile of
    the last default worker.
    """
    variants = (DEFAULT, *TUNED) if tuned else (DEFAULT,)
    facts = {"jobs": jobs, "runs": runs, "processes": processes, **describe_server(place.dsn)}
    counts = sorted({1, processes})
    keys = [(variant, state, count) for count in counts for variant in variants for state in STATES]
    drained: dict[tuple[Variant, str, int], list[Drained]] = {key: [] for key in keys}
    limits: dict[tuple[Variant, str, int], list[float]] = {key: [] for key in keys}
    for number in range(runs):
        for key in keys if number % 2 == 0 else reversed(keys):
            variant, state, count = key
            drained[key].append(_measure(place, variant, state, count, jobs, profile))
            limits[key].append(_limit(place, state, count, jobs))
    report = Report("drain", facts)
    for key in keys:
        report.rows += _rows(key, drained[key], limits[key])
    for variant in variants:
        report.rows += _comparisons(variant, counts, drained)
    return report


def _measure(place: Place, variant: Variant, state: str, processes: int, jobs: int, profile: str | None) -> Drained:
    with place.database() as dsn:
        app = App(dsn)
        with connect(dsn) as connection:
            if state == "no statistics":
                connection.execute(NEVER_ANALYZED)
            send(app, connection, jobs)
            _settle_down(connection, "jobqueue.job" if state == "analyzed" else None)
        options = WorkerOptions(dsn, tuned=variant.tuned, concurrency=variant.concurrency, batch=variant.batch)
        if profile is not None and variant is DEFAULT and processes == 1:
            options = replace(options, profile=profile)
        return drain(options, jobs, processes)


def _limit(place: Place, state: str, clients: int, jobs: int) -> float:
    """The better of the batch sizes."""
    return max(_raw(place, state, clients, jobs, batch) for batch in RAW_BATCHES)


def _raw(place: Place, state: str, clients: int, jobs: int, batch: int) -> float:
    with place.database() as dsn, connect(dsn) as connection:
        raw.create(connection)
        if state == "no statistics":
            connection.execute("alter table raw_job set (autovacuum_enabled = false)")
        raw.fill(connection, jobs)
        _settle_down(connection, "raw_job" if state == "analyzed" else None)
        run_together("raw", [{"dsn": dsn, "batch": batch}] * clients, timeout=120 + jobs / 500)
        return raw.rate(connection)


def _settle_down(connection: psycopg.Connection[tuple[object, ...]], table: str | None) -> None:
    """Both sides begin with the sends written out."""
    if table is not None:
        connection.execute(f"analyze {table}".encode())
    connection.execute("checkpoint")


def _rows(key: tuple[Variant, str, int], drained: list[Drained], limits: list[float]) -> list[Row]:
    variant, state, processes = key
    rates = [one.rate for one in drained]
    bars: tuple[Bar, ...] = ()
    if processes == 1 and variant is DEFAULT:
        bars = (Bar(25_000, of="median"), Bar(0.5))
    elif processes == 1:
        bars = (Bar(65_000, of="median"),)
    name = f"{variant.name}, {processes} process{'es' if processes > 1 else ''}, {state}"
    cpu = f"worker CPU {sum(one.cpu for one in drained) / len(drained):.1f} µs/job"
    return [Row(name, "jobs/s", rates, limits, bars, cpu)]


def _comparisons(
    variant: Variant, counts: list[int], drained: dict[tuple[Variant, str, int], list[Drained]]
) -> list[Row]:
    rows = []
    with_statistics, without = ([one.rate for one in drained[variant, state, 1]] for state in STATES)
    ratios = [b / a for a, b in zip(with_statistics, without, strict=True)]
    bars = (Bar(0.9, of="median"), Bar(1.1, at_most=True, of="median"))
    rows.append(Row(f"{variant.name}: no statistics ÷ analyzed", "ratio", ratios, bars=bars))
    for count in counts[1:]:
        for state in STATES:
            pairs = zip(drained[variant, state, count], drained[variant, state, 1], strict=True)
            ratios = [many.rate / one.rate for many, one in pairs]
            name = f"{variant.name}: {count} processes ÷ 1, {state}"
            rows.append(Row(name, "ratio", ratios, bars=(Bar(1.0, of="median"),)))
    return rows
