"""Random clients: each operation is one call of the engine, as senders, workers, support and maintenance make it.

Time is moved by the rows' timestamps. What the engine refuses with JQ404 (somebody deleted the job) or JQ409 (not from this
status) is part of the game and counted; any other error fails the run.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from tests.sql.engine import PERMANENT, TRANSIENT, Engine

LIMITED = ("singleton", "stately", "fifo", "groups", "keys", "rates", "fair", "aged", "flex")
QUEUES: dict[str, dict[str, Any]] = {
    "plain": {"dead_letter": "dead"},
    "short": {"policy": "short"},
    "exclusive": {"policy": "exclusive"},
    "singleton": {"policy": "singleton"},
    "stately": {"policy": "stately"},
    "fifo": {"policy": "key_strict_fifo", "dead_letter": "dead"},
    "groups": {"group_concurrency": {"default": 1, "tiers": {"gold": 2}}, "concurrency": 3},
    "keys": {"key_concurrency": 2, "dead_letter": "dead"},
    "rates": {"rate_limit": {"limit": 4, "period": 86400}, "concurrency": 3},
    "fair": {"fair_by": "tenant", "concurrency": 4},
    "aged": {"ageing": 60},
    "flex": {},
    "dead": {"concurrency": 3},
}
CHANGES: tuple[dict[str, Any], ...] = (
    {"concurrency": 1}, {"concurrency": 4}, {"concurrency": None}, {"group_concurrency": {"default": 2}},
    {"group_concurrency": None}, {"key_concurrency": 1}, {"key_concurrency": None}, {"fair_by": "group"}, {"fair_by": None},
    {"rate_limit": {"limit": 3, "period": 86400, "per": "key"}}, {"rate_limit": None}, {"policy": "exclusive"},
    {"policy": "key_strict_fifo"}, {"policy": "standard"}, {"keep_completed": 0}, {"keep_completed": 60}, {"max_retries": 1},
)  # fmt: skip
ENDED = ("completed", "failed", "cancelled", "skipped")
WAITING = ("blocked", "pending", "paused")
BEGINNING = UUID(int=0)
WHY = "by chance"


@dataclass(slots=True)
class Shared:
    """What all clients of a run know."""

    batches: list[UUID] = field(default_factory=list)


class Client:
    """One client that does random operations.

    Args:
        engine: its connection.
        seed: of its choices; equal seeds make equal choices on equal rows.
        number: of the client; its worker id follows from it.
    """

    def __init__(self, engine: Engine, seed: int | str, number: int, shared: Shared) -> None:
        self.engine, self.chance, self.shared = engine, random.Random(f"{seed}/{number}"), shared
        self.worker = UUID(int=0x0A000000_00004000_80000000_00000000 + number)
        self.claims: list[tuple[UUID, UUID]] = []
        self.stale: list[tuple[UUID, UUID]] = []
        self.refusals: Counter[str] = Counter()
        self.deadlocks: list[str] = []
        self.last_claimed: list[UUID] = []
        self.members: Counter[UUID] = Counter()

    def step(self) -> str:
        """One operation; its name."""
        (name,) = self.chance.choices(list(OPERATIONS), weights=list(OPERATIONS.values()))
        self.last_claimed = []
        try:
            self.operation(name)()
        except psycopg.Error as error:
            if error.sqlstate == "40P01":
                self.deadlocks.append(f"{name}: {error.diag.message_detail}\n{error.diag.context}")
            elif error.sqlstate in ("JQ404", "JQ409"):
                self.refusals[f"{name} {error.sqlstate}"] += 1
            else:
                raise
        return name

    def operation(self, name: str) -> Callable[[], Any]:
        """The operation of a name."""
        operation: Callable[[], Any] = getattr(self, name)
        return operation

    # choices

    def often(self, probability: float) -> bool:
        """True with a probability."""
        return self.chance.random() < probability

    def job(self, *statuses: str) -> UUID:
        """A job in one of the statuses; without any such job an id that nobody has."""
        found = self.engine.values("select id from jobqueue.job where status = any (%s) order by id", list(statuses))
        return UUID(str(self.chance.choice(found))) if found else BEGINNING

    def queue(self) -> str:
        """A queue to send to or to claim from."""
        return self.chance.choice(list(QUEUES)[:-1])

    def options(self, queue: str) -> dict[str, Any]:
        """Options of send that fit the queue."""
        o: dict[str, Any] = {"priority": self.chance.choice((0, 0, 0, 1, 2))}
        if queue in ("fifo", "keys", "flex") or self.often(0.4):
            o["singleton_key"] = self.chance.choice("ab")
        elif queue == "plain" and self.often(0.2):
            o[self.chance.choice(("throttle_seconds", "debounce_seconds"))] = 3600
        for probability, name, values in (
            (0.5, "group", ("g", "h")), (0.3, "tier", ("gold",)), (0.4, "tenant", ("t", "u")), (0.3, "job_type", ("x", "y")),
            (0.15, "delay", (3600, 0.001)), (0.2, "expires_in", (3600,)), (0.5, "max_retries", (0, 1, 2)),
            (0.05, "keep_completed", (0,)), (0.05, "keep_ended", (0,)), (0.1, "stages", (["one", "two"],)),
        ):  # fmt: skip
            if self.often(probability):
                o[name] = self.chance.choice(values)
        if self.shared.batches and "tenant" not in o and self.often(0.3):
            o["batch"] = str(self.chance.choice(self.shared.batches[-3:]))
        if self.often(0.1):
            parent = self.job("blocked", "pending", "processing", "paused", "failed", "cancelled", "completed")
            o["depends_on"] = [{"id": str(parent), "on_failure": self.chance.choice(("wait", "fail", "cancel", "run"))}]
        return o

    # senders

    def sent(self, options: dict[str, Any], created: bool) -> None:
        """Count what was sent into a batch."""
        if created and "batch" in options:
            self.members[UUID(options["batch"])] += 1

    def send(self) -> None:
        queue = self.queue()
        options = self.options(queue)
        row = self.engine.row("select * from jobqueue.send(%s, %s, %s)", queue, Jsonb({"n": 1}), options)
        assert row["created"] == (row["reason"] is None), row
        self.sent(options, row["created"])

    def send_many(self) -> None:
        queue = self.queue()
        jobs = [{"payload": {"n": n}, "options": self.options(queue)} for n in range(self.chance.randint(1, 5))]
        rows = self.engine.rows("select * from jobqueue.send_many(%s, %s)", queue, Jsonb(jobs))
        for job, row in zip(jobs, rows, strict=True):
            self.sent(job["options"], row["created"])

    def send_flow(self) -> None:
        jobs: list[dict[str, Any]] = []
        for n in range(self.chance.randint(2, 5)):
            queue = self.chance.choice(("plain", "groups", "fifo", "keys", "flex", "aged"))
            options = {
                "singleton_key": f"{self.chance.random()}",
                "group": "g",
                "max_retries": self.chance.choice((0, 1)),
            }
            parents = self.chance.sample(range(n), k=min(n, self.chance.randint(0, 2)))
            ways = [
                {"ref": f"r{p}", "on_failure": self.chance.choice(("wait", "fail", "cancel", "run"))} for p in parents
            ]
            jobs.append({"ref": f"r{n}", "queue": queue, "options": options, "depends_on": ways})
        self.chance.shuffle(jobs)
        self.engine.rows("select * from jobqueue.send_flow(%s)", Jsonb(jobs))

    def batch(self) -> None:
        if self.shared.batches and self.often(0.5):
            self.engine.call("close_batch", self.chance.choice(self.shared.batches[-3:]))
        else:
            callback = {"queue": "plain", "payload": {"done": True}}
            on = self.chance.choice(("ended", "first_failure", "either"))
            made = self.engine.call("create_batch", {"callback": callback, "callback_on": on})
            self.shared.batches.append(UUID(str(made)))

    def upsert(self) -> None:
        queue = self.chance.choice(("fifo", "keys", "short", "flex", "singleton"))
        options = {"singleton_key": self.chance.choice("ab"), "priority": self.chance.randint(0, 3)}
        self.engine.rows("select * from jobqueue.upsert(%s, %s, %s)", queue, Jsonb({"n": 2}), options)

    def update_jobs(self) -> None:
        change: dict[str, Any] = self.chance.choice((
            {"priority": 2}, {"group": "h"}, {"delay": 3600}, {"delay": 0}, {"payload": {"n": 3}}, {"tier": "gold"},
            {"expires_in": 60}, {"keep_ended": 0},
        ))  # fmt: skip
        target: dict[str, Any] = {
            "singleton_key": self.chance.choice("ab"),
            "match": self.chance.choice(("oldest", "all")),
        }
        queue = self.queue()
        if self.often(0.5):
            job = self.job(*WAITING)
            target = {"id": str(job)}
            queue = (self.engine.values("select queue from jobqueue.job where id = %s", job) or [queue])[0]
        self.engine.rows("select * from jobqueue.update_jobs(%s, %s, %s)", queue, target, change)

    # workers

    def claim(self) -> None:
        queues = [self.queue()] if self.often(0.6) else self.chance.sample(list(QUEUES), k=4)
        options: dict[str, Any] = {"job_types": [*queues, "x"]} if self.often(0.1) else {}
        found = self.engine.claim(self.chance.randint(1, 4), queues, self.worker, **options)
        self.last_claimed = [claim.id for claim in found]
        self.claims += [(claim.id, claim.token) for claim in found]

    def taken(self) -> tuple[UUID, UUID]:
        """One of the claims, which ends now; it is stale afterwards."""
        if not self.claims:
            return BEGINNING, BEGINNING
        claim = self.claims.pop(self.chance.randrange(len(self.claims)))
        self.stale = [*self.stale[-20:], claim]
        return claim

    def shown(self) -> tuple[UUID, UUID]:
        """One of the claims, which goes on."""
        return self.chance.choice(self.claims) if self.claims else (BEGINNING, BEGINNING)

    def complete(self) -> None:
        self.engine.call("complete", *self.taken(), Jsonb({"r": 1}))

    def complete_many(self) -> None:
        claims = [self.taken() for _ in range(min(len(self.claims), 5))] + self.stale[-1:]
        results = [{"id": str(job), "token": str(token)} for job, token in claims]
        self.engine.rows("select * from jobqueue.complete_many(%s)", Jsonb(results))

    def fail(self) -> None:
        error = self.chance.choice((TRANSIENT, TRANSIENT, PERMANENT, {"class": "quota"}))
        self.engine.call("fail", *self.taken(), error)

    def fail_many(self) -> None:
        claims = [self.taken() for _ in range(min(len(self.claims), 3))]
        failures = [{"id": str(job), "token": str(token), "error": PERMANENT} for job, token in claims]
        self.engine.rows("select * from jobqueue.fail_many(%s)", Jsonb(failures))

    def snooze(self) -> None:
        delay = self.chance.choice(("0", "1 hour"))
        self.engine.value("select jobqueue.snooze(%s, %s, %s::interval)", *self.taken(), delay)

    def release(self) -> None:
        self.engine.call("release", *self.taken())

    def acknowledge(self) -> None:
        claim = self.shown()
        self.engine.call("acknowledge", *claim)
        self.claims = [each for each in self.claims if each != claim]

    def heartbeat(self) -> None:
        beats = [{"id": str(job), "token": str(token), "started": True, "pct": 40} for job, token in self.claims]
        rows = self.engine.rows("select * from jobqueue.heartbeat(%s, %s)", self.worker, Jsonb(beats))
        lost = {row["id"] for row in rows if row["command"] == "lost"}
        self.stale += [claim for claim in self.claims if claim[0] in lost]
        self.claims = [claim for claim in self.claims if claim[0] not in lost]

    def progress(self) -> None:
        job, token = self.shown()
        self.engine.value("select jobqueue.progress(%s, %s, %s, 'on it')", job, token, self.chance.randint(0, 100))

    def checkpoint(self) -> None:
        self.engine.call("checkpoint", *self.shown(), "one", {"place": 1})

    def mark_done(self) -> None:
        self.engine.call("mark_done", *self.shown(), [self.chance.choice("pqr")])

    def use_stale(self) -> None:
        """A stale token is refused, whatever it is used for."""
        if not self.stale:
            return
        job, token = self.chance.choice(self.stale)
        way = self.chance.choice(("complete", "fail", "release", "progress", "checkpoint"))
        more: tuple[Any, ...] = {"fail": (TRANSIENT,), "checkpoint": ("one", {})}.get(way, ())
        try:
            answer = self.engine.call(way, job, token, *more)
        except psycopg.Error as error:
            if error.sqlstate not in ("JQ409", "JQ404"):
                raise
        else:
            assert (way, answer) == ("complete", "already"), f"{way} of a stale claim: {answer}"

    # support

    def cancel(self) -> None:
        self.engine.call("cancel", self.job(*WAITING, "processing"), WHY, self.often(0.3))

    def pause(self) -> None:
        self.engine.call("pause", self.job("pending", "processing"), WHY)

    def resume(self) -> None:
        self.engine.call("resume", self.job("paused", "cancelled"), WHY)

    def retry(self) -> None:
        self.engine.call("retry", self.job("failed"), WHY, self.often(0.3))

    def skip(self) -> None:
        self.engine.call("skip", self.job("failed"), WHY)

    def run_now(self) -> None:
        self.engine.call("run_now", self.job("pending"), WHY)

    def prioritize(self) -> None:
        self.engine.call("prioritize", self.job("pending", "blocked"), self.chance.randint(-2, 3), WHY)

    def delete_job(self) -> None:
        self.engine.call("delete_job", self.job(*ENDED), WHY)

    def redrive(self) -> None:
        options = {"max_jobs": 3} | ({"destination": "plain"} if self.often(0.3) else {})
        self.engine.rows("select * from jobqueue.redrive('dead', %s)", options)

    def bulk(self) -> None:
        action, status = self.chance.choice(
            (("retry", "failed"), ("cancel", "pending"), ("resume", "paused"), ("skip", "failed"))
        )
        filters = {"status": status, "tenant": self.chance.choice(("t", "u", "default")), "queue": self.queue()}
        self.engine.rows("select * from jobqueue.bulk(%s, %s, %s)", action, filters, WHY)

    def purge(self) -> None:
        self.engine.rows("select * from jobqueue.purge_queue(%s, %s)", self.queue(), WHY)

    def switch(self) -> None:
        """A pause of a queue, a tenant or a job_type, or its end."""
        kind, names = self.chance.choice((("queue", list(QUEUES)), ("tenant", ["t", "u"]), ("job_type", ["x", "y"])))
        verb = self.chance.choice(("pause", "resume", "resume"))
        self.engine.call(f"{verb}_{kind}", self.chance.choice(names), WHY)

    def update_queue(self) -> None:
        queue = self.chance.choice(("flex", "flex", "groups", "keys"))
        change = self.chance.choice(CHANGES)
        if queue != "flex" and "policy" in change:
            change = {"concurrency": 3}
        if queue == "keys" and "key_concurrency" in change:
            change = {"key_concurrency": self.chance.choice((1, 2, 3))}
        try:
            self.engine.call("update_queue", queue, change)
        except psycopg.Error as error:
            # another client has just given it what does not go together with this: a policy, fairness or ageing
            if queue != "flex" or error.sqlstate != "JQ400":
                raise
            self.refusals["update_queue JQ400"] += 1

    # maintenance; time is moved first

    def promote(self) -> None:
        self.engine.run(
            "update jobqueue.job set wait_until = now() - interval '1 ms', run_at = now() - interval '1 ms' where id = "
            "(select id from jobqueue.job where id = %s and wait_until is not null for update skip locked)",
            self.job("pending"),
        )
        self.engine.rows("select * from jobqueue.promote(100)")

    def rescue(self) -> None:
        job = self.job("processing")
        self.engine.run(
            "update jobqueue.job set lease_until = now() - interval '1 s' where id = "
            "(select id from jobqueue.job where id = %s and status = 'processing' for update skip locked)",
            job,
        )
        self.engine.run(
            "update jobqueue.claim_batch set check_at = now() - interval '1 s' where id = any (array("
            "select id from jobqueue.claim_batch where %s = any (job_ids) order by id for update skip locked))",
            job,
        )
        self.engine.call("rescue", 100)

    def expire(self) -> None:
        self.engine.run(
            "update jobqueue.job set expires_at = now() - interval '1 s' where id = (select id from jobqueue.job "
            "where expires_at is not null and status = 'pending' order by id limit 1 for update skip locked)"
        )
        self.engine.call("expire", 100)

    def tokens(self) -> None:
        """The period of a rate is over."""
        self.engine.run(
            "update jobqueue.admission_note set due = now() where ctid = any (array(select ctid from "
            "jobqueue.admission_note where due is not null for update skip locked))"
        )
        self.admit()

    def admit(self) -> None:
        self.engine.rows("select jobqueue.admit(q, 3, true) from jobqueue.queue q where q.limited order by q.number")

    def retention(self) -> None:
        self.engine.run(
            "update jobqueue.job set completed_at = now() - interval '40 days' where id = any (array(select id from "
            "jobqueue.job where completed_at is not null order by id limit 30 for update skip locked))"
        )
        self.engine.rows("select * from jobqueue.remove_old(%s, 1000)", BEGINNING)

    def tick(self) -> None:
        self.engine.run(
            "update jobqueue.schedule set next_at = now() - interval '1 s' where name = (select name from "
            "jobqueue.schedule where name = 'tick' for update skip locked)"
        )
        row = self.engine.row("select * from jobqueue.run_schedules(10)")
        assert row["sent"] <= 1, "a tick is sent once"

    def maintain(self) -> None:
        for row in self.engine.rows(
            "select * from jobqueue.maintain(null, '{rescue,expire,batches,admission,schedules}')"
        ):
            assert row["step"]
        # a step gives up when another client changes a queue at this moment, and is tried again
        errors = "select state ->> 'error' from jobqueue.maintenance where state ->> 'error' not like '%%lock timeout'"
        found = self.engine.values(errors)
        assert found == [], found


OPERATIONS: dict[str, float] = {
    "send": 12, "send_many": 3, "send_flow": 3, "batch": 1, "upsert": 2, "update_jobs": 3,
    "claim": 16, "complete": 10, "complete_many": 4, "fail": 6, "fail_many": 1, "snooze": 2, "release": 2, "acknowledge": 2,
    "heartbeat": 2, "progress": 2, "checkpoint": 2, "mark_done": 1, "use_stale": 2,
    "cancel": 4, "pause": 4, "resume": 5, "retry": 3, "skip": 2, "run_now": 2, "prioritize": 3, "delete_job": 2,
    "redrive": 1, "bulk": 1, "purge": 0.2, "switch": 3, "update_queue": 1.5,
    "promote": 4, "rescue": 2, "expire": 1, "tokens": 1, "admit": 1, "retention": 2, "tick": 1, "maintain": 1,
}  # fmt: skip


def prepare(engine: Engine) -> None:
    """Make the queues, the job_types and the schedule of a run."""
    engine.run("select setseed(0.5)")
    for name in reversed(QUEUES):
        engine.call("create_queue", name, QUEUES[name])
    for name in ("x", "y"):
        engine.call("pause_job_type", name, WHY)
        engine.call("resume_job_type", name, WHY)
    engine.call("schedule", "tick", "plain", "0 0 1 1 *", {}, {"missed": "all"})
