"""What tests say to the SQL engine, in one line each. No rule of the engine is repeated here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

WORKER = UUID("00000000-0000-4000-8000-00000000000a")
STATUSES = ("blocked", "pending", "processing", "paused", "completed", "failed", "cancelled", "skipped")
TRANSIENT = {"class": "transient", "code": "ConnectionError", "message": "no answer"}
PERMANENT = {"class": "permanent", "code": "ValueError", "message": "never again"}

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Claim:
    """A claimed job: its id, its claim token, and the whole row."""

    id: UUID
    token: UUID
    row: Row


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error of the engine: SQLSTATE, message, hint and the JSON in DETAIL."""

    sqlstate: str
    message: str
    hint: str
    detail: dict[str, Any]

    @property
    def code(self) -> str:
        """The name that programs test."""
        return str(self.detail.get("code"))


class Engine:
    """One autocommit connection and the verbs of the schema jobqueue."""

    def __init__(self, connection: psycopg.Connection[tuple[Any, ...]], dsn: str) -> None:
        self.connection = connection
        self.dsn = dsn
        self._others: list[psycopg.Connection[tuple[Any, ...]]] = []

    def close(self) -> None:
        """Close the other connections."""
        for other in self._others:
            other.close()

    def another(self) -> Engine:
        """The engine through one more connection, closed with this one."""
        connection = psycopg.connect(self.dsn, autocommit=True)
        self._others.append(connection)
        return Engine(connection, self.dsn)

    def run(self, query: str, *parameters: Any) -> int:
        """Run a statement; how many rows it touched."""
        return self.connection.execute(query.encode(), _adapted(parameters) or None).rowcount

    def rows(self, query: str, *parameters: Any) -> list[Row]:
        """All rows, by column name."""
        with self.connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(query.encode(), _adapted(parameters) or None).fetchall()

    def row(self, query: str, *parameters: Any) -> Row:
        """The only row."""
        (only,) = self.rows(query, *parameters)
        return only

    def values(self, query: str, *parameters: Any) -> list[Any]:
        """The first column of all rows."""
        return [found[0] for found in self.connection.execute(query.encode(), _adapted(parameters) or None).fetchall()]

    def value(self, query: str, *parameters: Any) -> Any:
        """The only value."""
        (only,) = self.values(query, *parameters)
        return only

    def call(self, function: str, *arguments: Any, **named: Any) -> Any:
        """The value of jobqueue.<function>(arguments)."""
        places = ["%s"] * len(arguments) + [f"{name} => %s" for name in named]
        return self.value(f"select jobqueue.{function}({', '.join(places)})", *arguments, *named.values())

    def refused(self, attempt: Callable[..., Any], *arguments: Any, **named: Any) -> Refusal:
        """The refusal that an attempt meets; the test fails without one, or with an error of another kind."""
        with pytest.raises(psycopg.Error) as caught:
            attempt(*arguments, **named)
        error = caught.value
        assert (error.sqlstate or "").startswith("JQ"), f"{error.sqlstate}: {error}"
        return Refusal(
            error.sqlstate or "",
            error.diag.message_primary or "",
            error.diag.message_hint or "",
            json.loads(error.diag.message_detail or "{}"),
        )

    @contextmanager
    def undone(self) -> Iterator[None]:
        """A transaction that is rolled back."""
        with self.connection.transaction(force_rollback=True):
            yield

    @contextmanager
    def acting_as(self, role: str, tenants: str | None = None) -> Iterator[None]:
        """A transaction in another role, for some tenants, rolled back."""
        with self.undone():
            self.connection.execute(sql.SQL("set local role {}").format(sql.Identifier(role)))
            if tenants is not None:
                self.run("select set_config('jobqueue.tenants', %s, true)", tenants)
            yield

    # the life of a job

    def send(self, queue: str = "q", payload: Any = None, **options: Any) -> UUID:
        """Send one job that must be stored; its id."""
        found = self.row("select * from jobqueue.send(%s, %s, %s)", queue, Jsonb(payload or {}), options)
        assert found["created"], found
        return UUID(str(found["id"]))

    def claim(
        self, max_jobs: int = 1, queue: str | list[str] = "q", worker: UUID = WORKER, **options: Any
    ) -> list[Claim]:
        """Claim jobs of one queue or several."""
        queues = [queue] if isinstance(queue, str) else queue
        rows = self.rows("select * from jobqueue.claim(%s, %s, %s, %s)", queues, worker, max_jobs, options)
        return [Claim(row["id"], row["claim_token"], row) for row in rows]

    def claimed(self, queue: str = "q", **options: Any) -> Claim:
        """Send one job and claim it; the queue must be empty."""
        sent = self.send(queue, **options)
        (claim,) = self.claim(1, queue)
        assert claim.id == sent
        return claim

    def prefetch(self, max_jobs: int, start: int, queue: str = "q", suspects: int | None = None) -> list[Row]:
        """Claim as the Python worker does: only the first `start` jobs start at once."""
        return self.rows(
            "select * from jobqueue.claim_queue(%s, %s, '{-2147483648}', '{0}', '{2147483647}', null, "
            "%s, %s, %s, null)",
            queue,
            WORKER,
            max_jobs,
            start,
            suspects,
        )

    def fail(self, claim: Claim, error: dict[str, Any] | None = None, retry_in: str | None = None) -> str:
        """Fail an attempt; the new status."""
        status = self.value(
            "select jobqueue.fail(%s, %s, %s, %s::interval)", claim.id, claim.token, error or TRANSIENT, retry_in
        )
        return str(status)

    def in_status(self, status: str, queue: str = "q") -> UUID:
        """A new job that has come into a status in the regular way (blocked: inserted so)."""
        if status == "blocked":
            return self.blocked(queue)
        job = self.send(queue, priority=2147483647)
        if status in ("processing", "completed", "failed", "skipped"):
            (claim,) = self.claim(1, queue)
            if status == "completed":
                self.call("complete", claim.id, claim.token)
            elif status != "processing":
                self.fail(claim, PERMANENT)
        action = {"paused": "pause", "cancelled": "cancel", "skipped": "skip"}.get(status)
        if action:
            self.call(action, job, "to have one")
        assert self.status(job) == status
        return job

    def blocked(self, queue: str = "q") -> UUID:
        """A job that waits for another."""
        return UUID(
            str(
                self.value(
                    "insert into jobqueue.job (queue, job_type, status, unfinished_parents) values (%s, %s, "
                    "'blocked', 1) "
                    "returning id",
                    queue,
                    queue,
                )
            )
        )

    def lose_lease(self, *jobs: UUID) -> None:
        """As if the leases of claims had run out a second ago."""
        self.run("update jobqueue.job set lease_until = now() - interval '1 s' where id = any (%s)", list(jobs))
        self.run("update jobqueue.claim_batch set check_at = now() - interval '1 s' where job_ids && %s", list(jobs))

    def lose_worker(self, job: UUID) -> None:
        """The worker of a running job is lost, and the job rescued."""
        self.lose_lease(job)
        assert self.call("rescue", 10) == 1

    def make_due(self, job: UUID) -> None:
        """The time of a waiting job has come."""
        self.run(
            "update jobqueue.job set wait_until = now() - interval '1 ms' where id = %s and wait_until is not null", job
        )
        self.value("select promoted from jobqueue.promote(100)")

    # what is stored

    def job(self, job: UUID) -> Row:
        """The row of the engine's table."""
        return self.row("select * from jobqueue.job where id = %s", job)

    def view(self, job: UUID) -> Row:
        """The row that people read."""
        return self.row("select * from jobqueue.jobs where id = %s", job)

    def status(self, job: UUID) -> str:
        """The status of a job."""
        return str(self.job(job)["status"])

    def attempts(self, job: UUID) -> list[Row]:
        """The history of a job's attempts that ended without success."""
        return self.rows("select * from jobqueue.attempt where job_id = %s order by attempt", job)

    def audit(self, job: UUID) -> list[Row]:
        """What people did with a job."""
        return self.rows("select * from jobqueue.actions_taken where job_id = %s order by id", job)

    def count(self, table: str = "job") -> int:
        """How many rows a table of the engine has."""
        return int(self.value(f"select count(*) from jobqueue.{table}"))


def new_token() -> UUID:
    """A claim token that nobody has."""
    return uuid4()


def _adapted(parameters: tuple[Any, ...]) -> list[Any]:
    """Dictionaries go as JSON."""
    return [Jsonb(value) if isinstance(value, dict) else value for value in parameters]
