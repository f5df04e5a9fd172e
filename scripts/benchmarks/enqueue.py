"""P3: sends in bulk and one by one, beside plain inserts of the same columns into a table of the same shape."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from psycopg.types.json import Jsonb

from benchmarks.children import STOP, Child
from benchmarks.payloads import QUEUE, payload
from benchmarks.pgbench import statements_per_second
from benchmarks.places import Connection, Place, connect, describe_server, value
from benchmarks.report import Bar, Report, Row
from jobqueue import App

CHUNKS = (1000, 5000)
CLIENTS = (1, 4, 8)
KNOWN = "known"
"""A queue whose job_type a worker has registered; the other one has no worker yet."""
STORAGE = "select array_to_string(reloptions, ', ') from pg_class where oid = 'jobqueue.job'::regclass"
SEQUENCE = "create sequence same_shape_seq cache 1"
SAME_SHAPE = "create table same_shape (like jobqueue.job including all) with ({storage})"
BARE = "create table no_index (like jobqueue.job including all excluding indexes) with ({storage})"
BULK = """
insert into {table} (queue, job_type, payload, ready_seq)
select 'mail', 'mail', p::jsonb, nextval('same_shape_seq') from unnest(%s::text[]) p {returning}
"""
SINGLE = """
insert into same_shape (queue, job_type, payload, ready_seq) values ('mail', 'mail', %s, nextval('same_shape_seq'))
"""
PGBENCH_PAYLOAD = json.dumps({"i": 1, "t": 1000.5, "to": "user@example.com"})
PGBENCH_SEND = f"select jobqueue.send('{QUEUE}', '{PGBENCH_PAYLOAD}')"
PGBENCH_INSERT = (
    "insert into same_shape (queue, job_type, payload, ready_seq) "
    f"values ('mail', 'mail', '{PGBENCH_PAYLOAD}', nextval('same_shape_seq'))"
)
AT_LEAST = (Bar(0.8),)

Pairs = dict[str, list[tuple[float, float]]]
"""Measured and limit, run by run, by the name of the figure."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements of one run share."""

    dsn: str
    connection: Connection
    app: App
    jobs: int
    singles: int


def run(place: Place, *, jobs: int, runs: int, singles: int, idle: int) -> Report:
    """Measure `runs` times, each time first one side and then the other."""
    bulk: Pairs = defaultdict(list)
    single: Pairs = defaultdict(list)
    information: Pairs = defaultdict(list)
    for number in range(runs):
        with place.database() as dsn, connect(dsn) as connection:
            _prepare(connection)
            bench = Bench(dsn, connection, App(dsn), jobs, singles)
            _measure_bulk(bench, bulk, information, number)
            _measure_singles(bench, single, information, number, "no idle worker")
            with Child("listeners", {"dsn": dsn, "queue": QUEUE, "count": idle}) as listeners:
                listeners.wait_ready()
                _measure_singles(bench, single, information, number, f"{idle} idle workers")
                listeners.tell(STOP)
                listeners.result(timeout=60)
    report = Report("enqueue", {"jobs": jobs, "singles": singles, "runs": runs, **describe_server(place.dsn)})
    for pairs, bars in ((bulk, AT_LEAST), (single, AT_LEAST), (information, ())):
        report.rows += [_row(name, measured, bars) for name, measured in pairs.items()]
    return report


def _row(name: str, pairs: list[tuple[float, float]], bars: tuple[Bar, ...]) -> Row:
    unit = "sends/s" if name.startswith("single") else "jobs/s"
    return Row(name, unit, [one for one, _ in pairs], [limit for _, limit in pairs], bars)


def _prepare(connection: Connection) -> None:
    storage = value(connection, STORAGE)
    connection.execute(SEQUENCE)
    for table in (SAME_SHAPE, BARE):
        connection.execute(table.format(storage=storage).encode())
    types = [{"name": KNOWN, "queue": KNOWN}]
    connection.execute("select jobqueue.register_job_types(%s)", (Jsonb(types),))
    for queue in (QUEUE, KNOWN):
        # The first job creates its queue.
        connection.execute("select jobqueue.send(%s)", (queue,))


# -- bulk --------------------------------------------------------------------------------------------------------------


def _measure_bulk(bench: Bench, pairs: Pairs, information: Pairs, number: int) -> None:
    for chunk in CHUNKS:
        sends = {queue: _bulk_send(bench, chunk, queue) for queue in (QUEUE, KNOWN)}
        limit = _bulk_insert(bench, chunk, "same_shape")
        pairs[f"bulk, {chunk} per call"].append(_both(sends[QUEUE], limit, number))
        information[f"bulk, {chunk} per call, registered job_type"].append(_both(sends[KNOWN], limit, number))
        returning = _bulk_insert(bench, chunk, "same_shape", "returning id")
        information[f"bulk, {chunk} per call; the limit returns the ids too"].append(
            _both(sends[QUEUE], returning, number)
        )
        bare = _bulk_insert(bench, chunk, "no_index")
        information[f"bulk, {chunk} per call; the limit has no index"].append(_both(sends[QUEUE], bare, number))


def _both(measured: Callable[[], float], limit: Callable[[], float], number: int) -> tuple[float, float]:
    """Measure both, in turns the one or the other first."""
    if number % 2 == 0:
        first = measured()
        return first, limit()
    first = limit()
    return measured(), first


def _bulk_send(bench: Bench, chunk: int, queue: str) -> Callable[[], float]:
    def send() -> float:
        bench.connection.execute("checkpoint")
        began = time.perf_counter()
        for start in range(0, bench.jobs, chunk):
            payloads = [payload(i) for i in range(start, min(start + chunk, bench.jobs))]
            bench.app.send_many_sync(queue, payloads, queue=queue, connection=bench.connection)
        return bench.jobs / (time.perf_counter() - began)

    return send


def _bulk_insert(bench: Bench, chunk: int, table: str, returning: str = "") -> Callable[[], float]:
    query = BULK.format(table=table, returning=returning).encode()

    def insert() -> float:
        bench.connection.execute("checkpoint")
        began = time.perf_counter()
        for start in range(0, bench.jobs, chunk):
            texts = [json.dumps(payload(i)) for i in range(start, min(start + chunk, bench.jobs))]
            cursor = bench.connection.execute(query, (texts,))
            if returning:
                cursor.fetchall()
        return bench.jobs / (time.perf_counter() - began)

    return insert


# -- one by one --------------------------------------------------------------------------------------------------------


def _measure_singles(bench: Bench, pairs: Pairs, information: Pairs, number: int, workers: str) -> None:
    insert = _python_insert(bench)
    pairs[f"single, Python, {workers}"].append(_both(_python_send(bench, QUEUE), insert, number))
    information[f"single, Python, {workers}, registered job_type"].append(
        _both(_python_send(bench, KNOWN), insert, number)
    )
    for clients in CLIENTS:
        pairs[f"single, pgbench, {clients} client{'s' if clients > 1 else ''}, {workers}"].append(
            _both(_pgbench(bench, PGBENCH_SEND, clients), _pgbench(bench, PGBENCH_INSERT, clients), number)
        )


def _python_send(bench: Bench, queue: str) -> Callable[[], float]:
    def send() -> float:
        began = time.perf_counter()
        for i in range(bench.singles):
            bench.app.send_sync(queue, payload(i), queue=queue, connection=bench.connection)
        return bench.singles / (time.perf_counter() - began)

    return send


def _python_insert(bench: Bench) -> Callable[[], float]:
    def insert() -> float:
        began = time.perf_counter()
        for i in range(bench.singles):
            bench.connection.execute(SINGLE, (json.dumps(payload(i)),))
        return bench.singles / (time.perf_counter() - began)

    return insert


def _pgbench(bench: Bench, statement: str, clients: int) -> Callable[[], float]:
    return lambda: statements_per_second(bench.dsn, statement, clients=clients, statements=bench.singles)
