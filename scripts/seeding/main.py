"""`scripts/seed`: fill a database to try the dashboard, the alerts and queries."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

import click
import psycopg

from jobqueue.cli.session import open_connection
from jobqueue.cli.stack import database_dsn
from jobqueue.database.dsn import mask_dsn
from jobqueue.database.migrations import migrate_up
from jobqueue.keys import make_key
from jobqueue.settings import load_settings
from seeding.fill import Wanted, fill_history, fill_live

NOT_EMPTY = """
select exists (select from jobqueue.job)
    or exists (select from jobqueue.worker where heartbeat_at > now() - interval '1 min')
"""
KEYS = {"free": 100, "solo": 1_000, "team": 10_000}
"""Requests per hour of the keys that `--keys` makes."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--jobs", type=click.IntRange(1), default=20_000, show_default=True, help="Jobs that have ended.")
@click.option(
    "--days", type=click.FloatRange(0.01), default=30.0, show_default=True, help="Over how many days they lie."
)
@click.option("--live", type=click.IntRange(0, 100_000), default=200, show_default=True, help="Jobs that wait.")
@click.option(
    "--queue",
    "queues",
    multiple=True,
    help="Names of the queues; repeatable.  [default: six kinds of jobs in five queues]",
)
@click.option("--tenants", type=click.IntRange(1), default=5, show_default=True, help="1: only the tenant `default`.")
@click.option("--seed", type=int, default=1, show_default=True, help="The same number makes the same jobs.")
@click.option(
    "--until", type=click.DateTime(["%Y-%m-%dT%H:%M:%S"]), help="The end of these days, in UTC.  [default: now]"
)
@click.option("--keys", is_flag=True, help="Also make three API keys with quotas; from then on the API asks for one.")
@click.option("--dsn", metavar="DSN", help="The database.  [default: JOBQUEUE_DSN, else PG*, else the embedded server]")
@click.option(
    "--yes",
    is_flag=True,
    help="Also if the database has jobs or live workers: what is seeded cannot be told from what is real.",
)
def main(
    jobs: int, days: float, live: int, queues: tuple[str, ...], tenants: int, seed: int, until: datetime | None, keys: bool,
    dsn: str | None, yes: bool,
) -> None:  # fmt: skip
    """Fill a database with believable jobs in all statuses: stages, attempts, errors, schedules, a batch, flows, progress."""
    settings = load_settings(dsn=dsn)
    target = database_dsn(settings)
    migrate_up(target, timeout=settings.start_timeout)
    with open_connection(settings, target, pooler=settings.pooler) as connection:
        if not yes and connection.execute(NOT_EMPTY).fetchone() != (False,):
            raise click.ClickException(f"{mask_dsn(target)} has jobs or live workers. Give another database, or --yes.")
        wanted = Wanted(jobs, days, until.replace(tzinfo=UTC) if until else datetime.now(UTC), tenants, queues, seed)
        _fill(connection, wanted, live)
        if keys:
            _make_keys(connection)
    click.echo(f"seeded {mask_dsn(target)}: look at it with `jobqueue api`, or `jobqueue top`", err=True)


def _fill(connection: psycopg.Connection[Any], wanted: Wanted, live: int) -> None:
    began = time.monotonic()

    def told(done: int) -> None:
        click.echo(f"{done:,} of {wanted.jobs:,} jobs, {done / (time.monotonic() - began):,.0f} per second", err=True)

    fill_history(connection, wanted, told)
    fill_live(connection, wanted, live)
    connection.execute("vacuum analyze jobqueue.job")


def _make_keys(connection: psycopg.Connection[Any]) -> None:
    """Make the keys; their secrets are printed this once."""
    for name, quota in KEYS.items():
        key = make_key()
        options = {
            "name": name,
            "tenants": ["*"],
            "subject": f"{name}@example.org",
            "quota_reads": quota,
            "quota_writes": quota,
        }
        connection.execute("select jobqueue.create_api_key(%s, %s, %s::jsonb)", (key.id, key.hash, json.dumps(options)))
        click.echo(f"{name}\t{key.text}")
