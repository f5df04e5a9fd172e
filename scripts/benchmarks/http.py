"""P8: `GET /jobs/{id}` beside a bare Starlette route that selects the row, 304 beside 200, and thousands of long polls.

All servers run at the same time, each with a pool of the same size, and are asked in turn; the client is a process of
its own. The jobs asked for are a third pending, a third processing, a third completed.
"""

from __future__ import annotations

import json
import math
import socket
import statistics
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.children import GO, STOP, Child
from benchmarks.http_server import STATE
from benchmarks.payloads import QUEUE, payload
from benchmarks.places import Connection, Place, connect, describe_server, value
from benchmarks.report import Bar, Report, Row
from jobqueue.keys import make_key

CONNECTIONS = 32
POOL = 4
SLICE = 0.25
"""Seconds that a side is asked before it is another's turn."""
QUOTA = 2_000_000_000
SEND = "select count(*) from jobqueue.send_many(%s, %s::jsonb)"
SETTLE = """
select count(*) from (
    select jobqueue.complete(c.id, c.claim_token, '{"ok": true}') from jobqueue.claim(array[%s], gen_random_uuid(), %s) c) x
"""
CLAIM = "select count(*) from jobqueue.claim(array[%s], gen_random_uuid(), %s)"
CHANGE = "select jobqueue.progress(j.id, j.claim_token, %s) from jobqueue.job j where j.id = any (%s::uuid[])"
SESSIONS = "select count(*)::float8 from pg_stat_activity where application_name like 'jobqueue api%%' and datname = %s"


@dataclass(frozen=True, slots=True)
class Side:
    """A server and what is asked of it."""

    name: str
    port: int
    paths: list[str]
    headers: dict[str, str]
    conditional: bool = False

    @property
    def status(self) -> str:
        """The answer that counts."""
        return "304" if self.conditional else "200"

    def asked(self, connections: int, etags: dict[str, str] | None = None) -> dict[str, Any]:
        """What a client of it needs to know. `etags`: those that it has at the beginning, by path."""
        return {
            "port": self.port,
            "paths": self.paths if etags is None else list(etags),
            "headers": self.headers,
            "conditional": self.conditional or etags is not None,
            "etags": etags or {},
            "connections": connections,
        }


@dataclass(frozen=True, slots=True)
class Polls:
    """What was seen while many requests waited. Seconds from a change of all jobs to the last answer."""

    waiting: float
    sessions: float
    in_use: float
    seconds: float
    answered: float


def run(place: Place, *, jobs: int, runs: int, seconds: float, polls: int) -> Report:
    """Ask each side for so many seconds per run, and let so many requests wait."""
    measured: dict[str, list[float]] = {}
    waited: list[Polls] = []
    with _sides(place, jobs) as (sides, connection, database):
        for _ in range(runs):
            for name, figure in _load(sides, seconds).items():
                measured.setdefault(name, []).append(figure)
            waited.append(_poll(sides[1], connection, database, polls))
    facts = {"jobs": jobs, "runs": runs, "seconds": seconds, "connections": CONNECTIONS, "pool": POOL}
    report = Report("http", {**facts, **describe_server(place.dsn)})
    bare, plain = measured["bare"], measured["200"]
    report.rows = [
        Row("GET /jobs/{id}, 200", "1/s", plain, bare, (Bar(0.5),), "limit: a bare route"),
        Row("the same with an API key", "1/s", measured["key"], bare),
        Row("the same with a key that has a quota", "1/s", measured["quota"], bare, (Bar(0.5),)),
        Row("304", "1/s", measured["304"], plain, (Bar(1.0),), "limit: the 200"),
        Row("304 with a key that has a quota", "1/s", measured["quota 304"], measured["quota"], (Bar(1.0),), "its 200"),
        Row("long polls open", "", [one.waiting for one in waited], bars=(Bar(polls, of="median"),)),
        Row("database sessions meanwhile", "", [one.sessions for one in waited], bars=(Bar(POOL + 1, True, "median"),)),
        Row("of them lent", "", [one.in_use for one in waited], note="mean; shared readings every 5 s"),
        Row("from a change of all to the last answer", "s", [one.seconds for one in waited]),
        Row("long polls answered", "", [one.answered for one in waited], bars=(Bar(polls, of="median"),)),
    ]
    return report


@contextmanager
def _sides(place: Place, jobs: int) -> Iterator[tuple[list[Side], Connection, str]]:
    """Two databases, without and with keys; three servers."""
    with ExitStack() as stack:
        open_dsn, keyed_dsn = (stack.enter_context(place.database()) for _ in range(2))
        connection = stack.enter_context(connect(open_dsn))
        keyed = stack.enter_context(connect(keyed_dsn))
        open_paths, keyed_paths = _fill(connection, jobs), _fill(keyed, jobs)
        open_ended, keyed_ended = _ended(connection), _ended(keyed)
        plain, bounded = _make_key(keyed, {}), _make_key(keyed, {"quota_reads": QUOTA})
        ports = [_serve(stack, dsn, bare) for dsn, bare in ((open_dsn, True), (open_dsn, False), (keyed_dsn, False))]
        sides = [
            Side("bare", ports[0], open_paths, {}),
            Side("200", ports[1], open_paths, {}),
            Side("304", ports[1], open_ended, {}, conditional=True),
            Side("key", ports[2], keyed_paths, plain),
            Side("quota", ports[2], keyed_paths, bounded),
            Side("quota 304", ports[2], keyed_ended, bounded, conditional=True),
        ]
        yield sides, connection, str(value(connection, "select current_database()"))


def _fill(connection: Connection, jobs: int) -> list[str]:
    """Send jobs, complete a third, claim a third; the paths of all, mixed."""
    # Nobody maintains this database; the leases only have to outlast their progress.
    sent = json.dumps([{"payload": payload(i), "options": {"lease": 3600}} for i in range(jobs)])
    connection.execute(SEND.encode(), (QUEUE, sent))
    connection.execute(SETTLE.encode(), (QUEUE, jobs // 3))
    connection.execute(CLAIM.encode(), (QUEUE, jobs // 3))
    connection.execute("vacuum analyze")
    found = connection.execute("select id::text from jobqueue.job order by md5(id::text)").fetchall()
    return [f"/jobs/{job_id}" for (job_id,) in found]


def _ended(connection: Connection) -> list[str]:
    """The paths of the completed jobs: their ETags stay."""
    found = connection.execute("select id::text from jobqueue.job where status = 'completed'").fetchall()
    return [f"/jobs/{job_id}" for (job_id,) in found]


def _make_key(connection: Connection, options: dict[str, Any]) -> dict[str, str]:
    key = make_key()
    connection.execute("select jobqueue.create_api_key(%s, %s, %s::jsonb)", (key.id, key.hash, json.dumps(options)))
    return {"Authorization": f"Bearer {key.text}"}


def free_port() -> int:
    """Return a port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _serve(stack: ExitStack, dsn: str, bare: bool) -> int:
    port = free_port()
    child = stack.enter_context(Child("http_server", {"dsn": dsn, "bare": bare, "port": port, "pool_size": POOL}))
    child.wait_ready()
    stack.callback(child.tell, STOP)
    return port


def _load(sides: list[Side], seconds: float) -> dict[str, float]:
    """Answers per second, of the status that counts, by side."""
    given = {
        "sides": {side.name: side.asked(CONNECTIONS) for side in sides},
        "slices": math.ceil(seconds / SLICE),
        "slice_seconds": SLICE,
        "polls": False,
    }
    with Child("http_load", given) as child:
        child.wait_ready()
        child.tell(GO)
        found = child.result(timeout=len(sides) * (seconds + SLICE) * 3 + 60)
    return {side.name: found[side.name].get(side.status, 0.0) for side in sides}


def _poll(side: Side, connection: Connection, database: str, polls: int) -> Polls:
    """Let requests wait for a hundred jobs, look who holds connections, then change all of the jobs."""
    ids = [
        job_id
        for (job_id,) in connection.execute(
            "select id::text from jobqueue.job where status = 'processing' order by id limit 100"
        ).fetchall()
    ]
    etags = {f"/jobs/{job_id}": _etag(side.port, job_id) for job_id in ids}
    given = {**side.asked(polls, etags), "polls": True}
    with Child("http_load", given) as child:
        child.wait_ready()
        waiting = _until_waiting(side.port, polls)
        seen = []
        for _ in range(40):
            time.sleep(0.05)
            seen.append(_state(side.port)["in_use"])
        sessions = float(value(connection, SESSIONS, (database,)))
        child.tell(GO)
        connection.execute(CHANGE.encode(), (int(time.monotonic()) % 100, ids))
        found = child.result(timeout=90)
    return Polls(waiting, sessions, statistics.mean(seen), found["seconds"], found.get("200", 0.0))


def _until_waiting(port: int, polls: int) -> float:
    deadline = time.monotonic() + 20
    while (waiting := float(_state(port)["waiting"])) < polls and time.monotonic() < deadline:
        time.sleep(0.1)
    return waiting


def _state(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{STATE}", timeout=30) as found:
        state: dict[str, Any] = json.load(found)
    return state


def _etag(port: int, job_id: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/jobs/{job_id}", timeout=30) as found:
        return str(found.headers["ETag"])
