"""Fill a database: the jobs that have ended, set by set, then those that wait, run and are paused, through the functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, LiteralString, cast
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from seeding.kinds import kinds_of

Connection = psycopg.Connection[Any]

CHUNK = 50_000
"""Jobs per transaction: half a second to two."""
WORKER = UUID("5eed0000-0000-4000-8000-000000000001")
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be made. `jobs`: that have ended; `days`: over how long; `until`: the end of that time; `queues`: their
    names (none: those of kinds.py); `seed`: the same number makes the same jobs."""

    jobs: int
    days: float
    until: datetime
    tenants: int = 5
    queues: Sequence[str] = ()
    seed: int = 1


def fill_history(connection: Connection, wanted: Wanted, told: Callable[[int], None] | None = None) -> None:
    """Insert the jobs that have ended, with attempts, audit and statistics. `told`: called with the number so far."""
    parameters = {
        "jobs": wanted.jobs, "days": wanted.days, "until": wanted.until, "tenants": wanted.tenants, "seed": wanted.seed * 1000,
        "kinds": Jsonb(kinds_of(wanted.queues)), "worker": WORKER,
    }  # fmt: skip
    query = _text("history.sql")
    for first in range(1, wanted.jobs + 1, CHUNK):
        last = min(first + CHUNK - 1, wanted.jobs)
        with connection.transaction():
            connection.execute("set local synchronous_commit = off; set local jit = off")
            connection.execute(query, {**parameters, "first": first, "last": last})
        if told is not None:
            told(last)


def fill_live(connection: Connection, wanted: Wanted, live: int) -> None:
    """Send, claim, pause and schedule: `live` jobs that wait, and a few of every other kind."""
    kinds = Jsonb(kinds_of(wanted.queues))
    seed = wanted.seed * 1000
    parameters = {"live": live, "tenants": wanted.tenants, "seed": seed, "kinds": kinds, "worker": WORKER}
    for statement in _text("live.sql").split(";\n"):
        if statement.strip():
            connection.execute(cast(LiteralString, statement), parameters)


def _text(name: str) -> LiteralString:
    return cast(LiteralString, (HERE / name).read_text())
