"""One procrastinate application three times: its own tables and worker, the connector behind its worker, and our worker.

The goals are ratios to the first: 3 for the connector, 20 for our worker. Every figure is jobs per second from the first
start to the last end, by the database's clock; the application, its task and its concurrency are the same.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from procrastinate import App, PsycopgConnector, SyncPsycopgConnector
from procrastinate.schema import SchemaManager
from psycopg import sql
from psycopg.conninfo import make_conninfo

from benchmarks.children import run_together
from benchmarks.places import Place, connect, describe_server, value
from benchmarks.report import Bar, Report, Row
from jobqueue.procrastinate import SyncJobqueueConnector

TASK = "send_mail"
CONCURRENCY = 100
SHARES = {"stock": 1, "connector": 6, "native": 30}
"""Jobs per measurement, in shares: so many that each takes some seconds."""
STOCK_RATE = """
    select count(*) filter (where type = 'succeeded') / extract(epoch from
        max(at) filter (where type = 'succeeded') - min(at) filter (where type = 'started'))::float8
    from procrastinate_events
"""
OUR_RATE = """
    select count(*) filter (where status = 'completed') / extract(epoch from max(completed_at) - min(started_at))::float8
    from jobqueue.job
"""


def run(place: Place, *, jobs: int, runs: int) -> Report:
    """Measure `runs` times, the three engines one after the other; `jobs`: for the stock engine, the others get more."""
    facts = {"jobs": {name: jobs * share for name, share in SHARES.items()}, "runs": runs, "concurrency": CONCURRENCY}
    report = Report("procrastinate", {**facts, **describe_server(place.dsn)})
    rates: dict[str, list[float]] = {name: [] for name in SHARES}
    for number in range(runs):
        for name in SHARES if number % 2 == 0 else reversed(SHARES):
            rates[name].append(measure(place, name, jobs * SHARES[name]))
    report.rows = [
        Row("procrastinate's own tables and worker", "jobs/s", rates["stock"]),
        Row("connector, procrastinate's worker", "jobs/s", rates["connector"], rates["stock"], (Bar(3),)),
        Row("jobqueue worker their.app", "jobs/s", rates["native"], rates["stock"], (Bar(20),)),
    ]
    return report


def measure(place: Place, name: str, jobs: int) -> float:
    """Defer jobs, run a worker in a process of its own until none is left, and return its rate."""
    with stock_database(place) if name == "stock" else place.database() as dsn:
        connector = SyncPsycopgConnector(conninfo=dsn) if name == "stock" else SyncJobqueueConnector(dsn)
        app = App(connector=connector)
        with app.open():
            for start in range(0, jobs, 1000):
                app.configure_task(TASK).batch_defer(*({"to": n} for n in range(start, min(start + 1000, jobs))))
        run_together("procrastinate_worker", [{"dsn": dsn, "engine": name}], timeout=60 + jobs / 50)
        with connect(dsn) as connection:
            return float(value(connection, STOCK_RATE if name == "stock" else OUR_RATE))


@contextmanager
def stock_database(place: Place) -> Iterator[str]:
    """Yield the DSN of a new database with procrastinate's own schema."""
    name = sql.Identifier(f"bench_{secrets.token_hex(6)}")
    with psycopg.connect(place.dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("create database {} template template0").format(name))
    dsn = make_conninfo(place.dsn, dbname=name.as_string().strip('"'))
    try:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(SchemaManager.get_schema())
        yield dsn
    finally:
        with psycopg.connect(place.dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("drop database {} with (force)").format(name))


def make_app(dsn: str, engine: str) -> App:
    """The application that is measured."""
    from jobqueue.procrastinate import JobqueueConnector

    connector = PsycopgConnector(conninfo=dsn) if engine == "stock" else JobqueueConnector(dsn)
    app = App(connector=connector)

    @app.task(name=TASK)
    async def send_mail(to: int) -> None:
        pass

    return app
