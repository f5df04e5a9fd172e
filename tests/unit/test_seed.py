"""`scripts/seed` fills a database that has no jobs, with the same jobs for the same number."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result

ROOT = Path(__file__).resolve().parents[2]
Seed = Callable[..., Result]
STATUSES = {"blocked", "pending", "processing", "paused", "completed", "failed", "cancelled", "skipped"}


@pytest.fixture
def seed(dsn: str) -> Iterator[Seed]:
    """Runs the command on the test's database."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        main = importlib.import_module("seeding.main").main
        yield lambda *arguments: CliRunner().invoke(main, ["--dsn", dsn, *arguments])


def values(connection: psycopg.Connection[tuple[Any, ...]], query: str) -> list[Any]:
    """The first column of a query."""
    return [row[0] for row in connection.execute(query.encode()).fetchall()]


def test_a_seeded_database_has_every_status_and_what_hangs_on_jobs(
    seed: Seed, connection: psycopg.Connection[tuple[Any, ...]]
) -> None:
    ended = seed("--jobs", "600", "--days", "2", "--live", "20", "--tenants", "3", "--keys")
    assert ended.exit_code == 0, ended.output
    assert set(values(connection, "select distinct status from jobqueue.job")) == STATUSES
    assert values(connection, "select count(*) from jobqueue.job where created_at < now() - interval '2 h'")[0] > 400
    tenants = set(values(connection, "select distinct tenant from jobqueue.job"))
    assert tenants == {"default", "tenant-1", "tenant-2", "tenant-3"}, "flows and batches are of the tenant default"
    for table in ("attempt", "stage", "audit", "batch", "edge", "schedule", "statistic", "total", "worker"):
        assert values(connection, f"select count(*) from jobqueue.{table}")[0] > 0, table
    assert sorted(values(connection, "select name from jobqueue.api_keys")) == ["free", "solo", "team"]
    assert [line.split("\t")[0] for line in ended.stdout.splitlines()] == ["free", "solo", "team"]
    silent = "select count(*) from jobqueue.job where heartbeat_at > now() and life_at < now() - interval '4 min'"
    assert values(connection, silent) == [1]
    # what was written as a dump is restored is what the functions would have left
    assert values(connection, "select count(*) from jobqueue.doctor() where status = 'fail'") == [0]

    refused = seed("--jobs", "10")
    assert refused.exit_code == 1
    assert "has jobs or live workers" in refused.output
    assert seed("--jobs", "10", "--live", "0", "--seed", "2", "--yes").exit_code == 0


def test_the_same_number_makes_the_same_jobs(seed: Seed, connection: psycopg.Connection[tuple[Any, ...]]) -> None:
    given = (
        "--jobs",
        "50",
        "--live",
        "0",
        "--until",
        "2026-01-31T00:00:00",
        "--queue",
        "a",
        "--queue",
        "b",
        "--tenants",
        "1",
    )
    made = "select md5(string_agg(j::text, ' ' order by j.id)) from jobqueue.job j where j.completed_at is not null"
    found = []
    for number in ("1", "1", "2"):
        assert seed(*given, "--seed", number, "--yes").exit_code == 0
        found += values(connection, made)
        assert set(values(connection, "select distinct queue from jobqueue.job")) == {"a", "b"}
        connection.execute("truncate jobqueue.job, jobqueue.attempt")
    assert found[0] == found[1]
    assert found[0] != found[2]
