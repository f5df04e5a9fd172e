"""The benchmarks run to their end with tiny numbers and say what they measured. No time decides anything here."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobqueue.database.embedded import EmbeddedServer

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 240
ROW_KEYS = {"name", "unit", "median", "values", "limit", "limits", "ratio", "ratios", "bars", "met", "note"}


Bench = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def command() -> Iterator[Any]:
    """The command line of the benchmarks in this process: a process of its own for each would import for a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        # Not measured for coverage: that made 18 short-lived processes a quarter slower and showed nothing new.
        for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
            patch.delenv(name)
        yield importlib.import_module("benchmarks.main").main


@pytest.fixture
def bench(command: Any, tmp_path: Path) -> Bench:
    """Runs a benchmark and returns the JSON that it wrote."""

    def run(*arguments: str) -> dict[str, Any]:
        output = tmp_path / "results" / "out.json"
        ended = CliRunner().invoke(command, [*arguments, "--output", str(output)], catch_exceptions=False)
        assert ended.exit_code == 0, ended.output
        assert f"bench {arguments[0]}" in ended.stdout
        report: dict[str, Any] = json.loads(output.read_text())
        assert report["benchmark"] == arguments[0]
        assert report["rows"]
        return report

    return run


def rows_by_name(report: dict[str, Any], runs: int) -> dict[str, dict[str, Any]]:
    """The rows, each checked for what every row has."""
    for row in report["rows"]:
        assert set(row) == ROW_KEYS
        assert len(row["values"]) == runs
        assert all(value >= 0 for value in row["values"])
        assert min(row["values"]) <= row["median"] <= max(row["values"])
        assert (row["ratio"] is None) == (row["limits"] == [])
        assert len(row["ratios"]) == len(row["limits"]) in (0, runs)
        assert (row["met"] is None) == (row["bars"] == [])
    return {row["name"]: row for row in report["rows"]}


@pytest.mark.slow
def test_drain_measures_both_states_of_statistics_beside_the_raw_limit(bench: Bench, server: EmbeddedServer) -> None:
    arguments = ["--jobs", "60", "--runs", "1", "--dsn", server.dsn]
    rows = rows_by_name(bench("drain", *arguments), runs=1)
    for state in ("analyzed", "no statistics"):
        assert len(rows[f"default, 1 process, {state}"]["ratios"]) == 1
    assert rows["default, 1 process, analyzed"]["bars"] == ["≥ 25000", "≥ 0.5 of limit"]
    assert "default: no statistics ÷ analyzed" in rows


@pytest.mark.slow
def test_enqueue_measures_bulk_and_single_sends(bench: Bench, server: EmbeddedServer) -> None:
    arguments = ["--jobs", "20", "--runs", "1", "--singles", "8", "--idle", "2", "--dsn", server.dsn]
    rows = rows_by_name(bench("enqueue", *arguments), runs=1)
    assert {"bulk, 1000 per call", "bulk, 5000 per call"} <= set(rows)
    for workers in ("no idle worker", "2 idle workers"):
        assert f"single, Python, {workers}" in rows
        for clients in ("1 client", "4 clients", "8 clients"):
            assert rows[f"single, pgbench, {clients}, {workers}"]["bars"] == ["≥ 0.8 of limit"]


@pytest.mark.slow
def test_latency_has_quantiles_of_both_sides(bench: Bench, server: EmbeddedServer) -> None:
    report = bench("latency", "--jobs", "10", "--runs", "2", "--rate", "200", "--dsn", server.dsn)
    rows = rows_by_name(report, runs=2)
    assert set(rows) == {"pickup p50", "pickup p99", "pickup max"}
    assert rows["pickup p50"]["median"] <= rows["pickup p99"]["median"] <= rows["pickup max"]["median"]
    assert rows["pickup p50"]["limit"] > 0


@pytest.mark.slow
def test_cost_counts_wal_and_statements_on_a_durable_server_of_its_own(bench: Bench) -> None:
    report = bench("cost", "--jobs", "50", "--runs", "1", "--idle-seconds", "1")
    rows = rows_by_name(report, runs=1)
    facts = report["facts"]
    assert (facts["fsync"], facts["synchronous_commit"], facts["full_page_writes"]) == ("on", "on", "on")
    for name in ("life of a job, sent alone", "life of a job, sent in bulk"):
        assert 0 < rows[name]["median"] <= rows[f"{name}, with full-page images"]["median"]
    assert rows["statements per job, busy worker"]["median"] > 0
    assert "statements of an idle worker" in rows


@pytest.mark.slow
def test_snapshot_counts_the_buffers_of_claims(bench: Bench) -> None:
    report = bench("snapshot", "--jobs", "40", "--runs", "1", "--rounds", "2")
    rows = rows_by_name(report, runs=1)
    assert rows["buffers per claimed job after 1,000"]["median"] > 0
    assert rows["buffers per claimed job after 40"]["ratio"] > 0
    assert [len(rates) for rates in report["facts"]["round_rates"]] == [2]


def test_the_program_refuses_a_server_that_does_not_count_statements_and_says_what_to_set(
    server: EmbeddedServer,
) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench"), "cost", "--jobs", "1", "--dsn", server.dsn]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert ended.returncode != 0
    assert "shared_preload_libraries" in ended.stderr


def test_history_compares_a_full_table_with_an_empty_one(bench: Bench) -> None:
    report = bench("history", "--jobs", "300", "--runs", "1", "--turns", "1")
    named = {row["name"]: row for row in report["rows"]}
    assert {"send", "claim", "complete", "GET /jobs/{id}, finished", "GET /jobs/active, a person's"} < named.keys()
    assert all(row["bars"] == ["≤ 1.3 of limit"] for row in report["rows"][:-1])
