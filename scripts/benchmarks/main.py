"""The command line of the benchmarks. Every one starts a server of its own, unless `--dsn` names one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from benchmarks import cost as cost_benchmark
from benchmarks import drain as drain_benchmark
from benchmarks import enqueue as enqueue_benchmark
from benchmarks import history as history_benchmark
from benchmarks import http as http_benchmark
from benchmarks import latency as latency_benchmark
from benchmarks import procrastinate as procrastinate_benchmark
from benchmarks import progress as progress_benchmark
from benchmarks import snapshot as snapshot_benchmark
from benchmarks.places import Place, open_place
from benchmarks.report import Report

F = TypeVar("F", bound=Callable[..., Any])


def common(jobs: int) -> Callable[[F], F]:
    """Add the options of every benchmark; `jobs`: its default number of jobs."""
    options = [
        click.option("--jobs", type=click.IntRange(1), default=jobs, show_default=True, help="Jobs per measurement."),
        click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Medians of so many runs."),
        click.option(
            "--dsn", metavar="DSN", help="A server to measure; its role may create databases.  [default: our own]"
        ),
        click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the results as JSON."),
    ]

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def measure(dsn: str | None, output: Path | None, run: Callable[[Place], Report], *, statements: bool = False) -> None:
    """Run one benchmark, print its table and write its JSON."""
    with open_place(dsn, statements=statements) as place:
        report = run(place)
    report.show()
    if output is not None:
        report.write(output)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure jobqueue beside raw SQL. The ratios of one run count; absolute figures do not travel."""


@main.command()
@common(40_000)
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="Worker processes.")
@click.option("--tuned", is_flag=True, help="Also with uvloop, orjson and concurrency 1000, and with a batch handler.")
@click.option("--profile", metavar="FILE", help="Write the cProfile of a default worker; its figures are then slower.")
def drain(
    jobs: int, runs: int, dsn: str | None, output: Path | None, processes: int, tuned: bool, profile: str | None
) -> None:
    """P1, P2: jobs per second of worker processes."""
    measure(
        dsn,
        output,
        lambda place: drain_benchmark.run(
            place, jobs=jobs, runs=runs, processes=processes, tuned=tuned, profile=profile
        ),
    )


@main.command()
@common(20_000)
@click.option(
    "--singles", type=click.IntRange(8), default=3000, show_default=True, help="Single sends per measurement."
)
@click.option("--idle", type=click.IntRange(1), default=10, show_default=True, help="Idle workers that listen.")
def enqueue(jobs: int, runs: int, dsn: str | None, output: Path | None, singles: int, idle: int) -> None:
    """P3: bulk and single sends."""
    measure(dsn, output, lambda place: enqueue_benchmark.run(place, jobs=jobs, runs=runs, singles=singles, idle=idle))


@main.command()
@common(500)
def procrastinate(jobs: int, runs: int, dsn: str | None, output: Path | None) -> None:
    """One procrastinate application: its own engine, the connector, our worker."""
    measure(dsn, output, lambda place: procrastinate_benchmark.run(place, jobs=jobs, runs=runs))


@main.command()
@common(90)
@click.option("--rate", type=click.FloatRange(1), default=20.0, show_default=True, help="Sends per second.")
def latency(jobs: int, runs: int, dsn: str | None, output: Path | None, rate: float) -> None:
    """P4: from before the send to the start of the handler, on an idle queue."""
    measure(dsn, output, lambda place: latency_benchmark.run(place, jobs=jobs, runs=runs, rate=rate))


@main.command()
@common(20_000)
@click.option("--idle-seconds", type=click.FloatRange(1), default=20.0, show_default=True, help="How long to watch.")
def cost(jobs: int, runs: int, dsn: str | None, output: Path | None, idle_seconds: float) -> None:
    """P7: WAL bytes and statements per job, statements of an idle worker."""
    measure(
        dsn,
        output,
        lambda place: cost_benchmark.run(place, jobs=jobs, runs=runs, idle_seconds=idle_seconds),
        statements=True,
    )


@main.command()
@common(1000)
@click.option("--seconds", type=click.FloatRange(0.5), default=5.0, show_default=True, help="How long to watch.")
def progress(jobs: int, runs: int, dsn: str | None, output: Path | None, seconds: float) -> None:
    """P9: notifying commits of one worker whose jobs all report, and the way of a report to a stream's client."""
    measure(
        dsn,
        output,
        lambda place: progress_benchmark.run(place, jobs=jobs, runs=runs, seconds=seconds),
        statements=True,
    )


@main.command()
@common(200_000)
@click.option("--rounds", type=click.IntRange(2), default=10, show_default=True, help="Rounds of enqueue and drain.")
def snapshot(jobs: int, runs: int, dsn: str | None, output: Path | None, rounds: int) -> None:
    """P5: what a snapshot that is held for long does to claims. The bar is for --jobs 1000000."""
    measure(
        dsn,
        output,
        lambda place: snapshot_benchmark.run(place, jobs=jobs, runs=runs, rounds=rounds),
        statements=True,
    )


@main.command()
@common(90)
@click.option("--seconds", type=click.FloatRange(0.1), default=3.0, show_default=True, help="Each turn of each side.")
@click.option("--polls", type=click.IntRange(1), default=5000, show_default=True, help="Requests that wait at once.")
def http(jobs: int, runs: int, dsn: str | None, output: Path | None, seconds: float, polls: int) -> None:
    """P8: GET /jobs/{id} beside a bare route, 304 beside 200, long polls and the connections that they hold."""
    measure(dsn, output, lambda place: http_benchmark.run(place, jobs=jobs, runs=runs, seconds=seconds, polls=polls))


@main.command()
@common(1_000_000)
@click.option("--turns", type=click.IntRange(1), default=100, show_default=True, help="Of every call, each run.")
def history(jobs: int, runs: int, dsn: str | None, output: Path | None, turns: int) -> None:
    """P6: a table full of finished jobs beside an empty one. The bar is for --jobs 10000000 (7 GB of disk)."""
    measure(dsn, output, lambda place: history_benchmark.run(place, jobs=jobs, runs=runs, turns=turns))
