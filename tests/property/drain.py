"""The end of a run: everything that was sent can be brought to an end, and nothing is left of any limit."""

from __future__ import annotations

from uuid import uuid4

from tests.property.clients import BEGINNING, QUEUES, WHY
from tests.sql.engine import Engine

UNENDED = "select count(*) from jobqueue.job where status in ('blocked', 'pending', 'processing', 'paused')"
HEADS = """
    select id from jobqueue.job p where status = 'failed' and (settle_flags & 8 <> 0 or exists (
        select from jobqueue.edge e join jobqueue.job c on c.id = e.child_id
        where e.parent_id = p.id and c.status = 'blocked' and not e.passed))
"""
CANCELLED_PARENTS = """
    select id from jobqueue.job p where status = 'cancelled' and exists (
        select from jobqueue.edge e join jobqueue.job c on c.id = e.child_id
        where e.parent_id = p.id and c.status = 'blocked' and not e.passed)
"""


def settle_counts(engine: Engine) -> None:
    """At a quiet moment no slot of any line is counted wrong."""
    engine.rows("select jobqueue.admit(q, 3, true) from jobqueue.queue q where q.limited order by q.number")
    off = engine.rows(
        "select x.name, x.n from (select q.name, jobqueue.recount_slots(q) as n from jobqueue.queue q where q.limited) x "
        "where x.n <> 0"
    )
    assert off == [], f"slots were counted wrong: {off}"


def unpause(engine: Engine) -> None:
    """End every pause of a queue, a tenant or a job_type."""
    for kind, names in {"queue": list(QUEUES), "tenant": ["t", "u"], "job_type": ["x", "y"]}.items():
        for name in names:
            engine.call(f"resume_{kind}", name, WHY)


def drain(engine: Engine) -> None:
    """Complete all that can be claimed, and help on what waits for a person, until nothing is left.

    Raises:
        AssertionError: something is left that nobody can bring to an end.
    """
    unpause(engine)
    # with the claims of clients that are gone
    engine.run("update jobqueue.job set lease_until = now() - interval '1 s' where status = 'processing'")
    engine.run("update jobqueue.claim_batch set check_at = now() - interval '1 s'")
    engine.rows("select * from jobqueue.maintain(null, '{rescue,batches,admission}')")
    for _ in range(300):
        engine.run("update jobqueue.job set wait_until = now() - interval '1 ms' where wait_until is not null")
        engine.run("update jobqueue.admission_note set due = now() where due is not null")
        engine.rows("select * from jobqueue.promote(10000)")
        # nobody claims what has expired meanwhile, and it keeps its slots until it is found
        engine.call("expire", 10000)
        progress = sum(claim_and_complete(engine, queue) for queue in QUEUES)
        if engine.value(UNENDED) == 0:
            break
        assert progress + help_on(engine), f"nothing goes on: {left(engine)}"
    assert engine.value(UNENDED) == 0, f"left: {left(engine)}"
    nothing_left(engine)


def claim_and_complete(engine: Engine, queue: str) -> int:
    """What can be claimed of a queue is completed; how many."""
    claims = engine.claim(100, queue, uuid4())
    for claim in claims:
        engine.call("complete", claim.id, claim.token)
    return len(claims)


def help_on(engine: Engine) -> int:
    """Take up what a person has to decide; how many."""
    n = 0
    for query, verb in (
        ("select id from jobqueue.job where status = 'paused' order by id", "resume"),
        (HEADS, "skip"),
        (CANCELLED_PARENTS, "resume"),
    ):
        for job in engine.values(query):
            # one that was helped on may have helped on the next
            if engine.value(f"select count(*) from ({query}) x where x.id = %s", job):
                if verb == "resume" and key_is_taken(engine, job):
                    continue
                engine.call(verb, job, WHY)
                n += 1
    return n


def key_is_taken(engine: Engine, job: object) -> bool:
    """Whether another job has the key that this one would need."""
    return bool(
        engine.value(
            "select count(*) from jobqueue.job j join jobqueue.job o on o.queue = j.queue and o.id <> j.id "
            "and (o.held_key = jobqueue.held_name(j.queue, j.options ->> 'hold') or o.held_key = jobqueue.retry_key(j)) "
            "where j.id = %s",
            job,
        )
    )


def left(engine: Engine) -> list[object]:
    """What has not ended, for the message."""
    return [
        (row["queue"], row["status"], row["stage"], row["line"], row["held"], str(row["id"]))
        for row in engine.rows(
            "select j.*, l.stage, l.line, l.held from jobqueue.job j left join jobqueue.admission_line l on l.job_id = j.id "
            "where j.status in ('blocked', 'pending', 'processing', 'paused') limit 10"
        )
    ]


def nothing_left(engine: Engine) -> None:
    """No slot is taken, nobody stands in a line, and the counts of every batch are those of its jobs."""
    engine.rows("select jobqueue.admit(q, 3, true) from jobqueue.queue q where q.limited order by q.number")
    assert engine.rows("select * from jobqueue.admission_slot where used <> 0 and stage not in (3, 5)") == []
    assert engine.count("admission_line") == 0
    assert engine.values("select id from jobqueue.job where status <> 'completed' and settle_flags & 232 <> 0") == []
    engine.rows("select * from jobqueue.remove_old(%s, 10000)", BEGINNING)
