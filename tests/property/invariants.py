"""What must hold after every step: most of it is one query on the rows; what concerns a change, the model remembers.

Nothing here decides what the engine does; it says what must never be seen.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any
from uuid import UUID

from tests.property.clients import ENDED, QUEUES
from tests.sql.engine import Engine, Row

MAY_BECOME = {
    "blocked": {"pending", "cancelled", "failed"},
    "pending": {"processing", "paused", "cancelled", "failed"},
    "processing": {"completed", "failed", "cancelled", "paused", "pending"},
    "paused": {"pending", "cancelled"},
    "failed": {"pending", "blocked", "skipped"},
    "cancelled": {"pending", "blocked"},
    "completed": set(),
    "skipped": set(),
}
"""The table of product.md, written down again on purpose."""

JOBS = """
    select j.id, j.queue, j.status, j.version, j.attempt, j.retry_count, j.settle_flags, j.tenant, j.singleton_key, j.group_key,
        j.tier, l.seq as place, l.stage as stage, l.held as held
    from jobqueue.job j left join jobqueue.admission_line l on l.job_id = j.id order by j.id
"""

# Each is a query of ids (as text) that must be empty.
NEVER = {
    "a pending job of a queue without limits is neither ready nor waiting for its time":
        "select id from j where status = 'pending' and settle_flags & 256 = 0 and ready_seq is null and wait_until is null",
    "a job waits to be admitted without a row in the line, or the other way round": """
        select coalesce(j.id, l.job_id) from j full join jobqueue.admission_line l on l.job_id = j.id
        where (j.inbox_seq is not null) <> (l.job_id is not null)""",
    "a job goes through admission that should not, or the other way round": """
        select j.id from j join q on q.name = j.queue
        where q.limited <> (j.settle_flags & 256 <> 0) and j.status in ('blocked', 'pending', 'processing', 'paused')""",
    "a job that neither runs nor is ready holds slots": """
        select j.id from j join q on q.name = j.queue
        where j.settle_flags & case when q.policy = 'key_strict_fifo' and j.status in ('pending', 'paused', 'failed')
                then 224 else 232 end <> 0
            and j.status not in ('completed', 'processing') and j.ready_seq is null""",
    "a job is set aside though nothing of it is paused, or ready though it is": """
        select j.id from j left join jobqueue.admission_line l on l.job_id = j.id
        cross join lateral (select exists (select from jobqueue.tenant_pause p where p.tenant = j.tenant)
            or exists (select from jobqueue.job_type t where t.name = j.job_type and t.paused_at is not null) as paused) p
        where l.stage = 6 and not p.paused or j.settle_flags & 256 <> 0 and j.ready_seq is not null and p.paused""",
    "a child waits for more or fewer parents than its edges say": """
        select j.id from j where j.unfinished_parents <> case when j.status in ('blocked', 'failed', 'cancelled') then (
            select count(*) from jobqueue.edge e join j p on p.id = e.parent_id where e.child_id = j.id and not e.passed
                and p.status not in ('completed', 'skipped')
                and not (p.status in ('failed', 'cancelled') and e.on_failure = 'run'))
            else j.unfinished_parents end""",
    "a job is blocked though it waits for nobody":
        "select id from j where status = 'blocked' and unfinished_parents = 0",
    # taken up again by a person it waits until its parent is, too
    "a blocked job has a parent whose bad end was to end it": """
        select j.id from j join jobqueue.edge e on e.child_id = j.id and e.on_failure in ('fail', 'cancel') and not e.passed
        join j p on p.id = e.parent_id and p.status in ('failed', 'cancelled')
        where j.status = 'blocked' and j.retry_count = 0 and j.resume_count = 0""",
    "the history of attempts has a gap": """
        select j.id from j where (select count(*) from jobqueue.attempt a where a.job_id = j.id and a.attempt > 0)
            <> j.attempt - case when j.status in ('processing', 'completed') then 1 else 0 end""",
    "a dead letter has no provenance, or waits though its original was taken up again": """
        select j.id from j left join j o on o.id = j.dead_letter_of
        where j.queue = 'dead' and (j.dead_letter_of is null or
            j.status in ('pending', 'paused') and j.attempt + j.retry_count + j.resume_count = 0 and o.status <> 'failed')""",
    "something hangs on a job that is gone": """
        select a.job_id from jobqueue.attempt a where not exists (select from j where j.id = a.job_id) union all
        select a.job_id from jobqueue.checkpoint a where not exists (select from j where j.id = a.job_id) union all
        select a.job_id from jobqueue.flow_member a where not exists (select from j where j.id = a.job_id) union all
        select a.child_id from jobqueue.edge a where not exists (select from j where j.id = a.child_id)""",
    "a running job can not be found by rescue": """
        select id from j where status = 'processing'
            and not exists (select from jobqueue.claim_batch b where j.id = any (b.job_ids))""",
    "a key has two holders where its policy has one": """
        select min(j.id::text)::uuid from j join q on q.name = j.queue
        where j.held_key is null or j.held_key not like 'slot:%%'
        group by j.queue, coalesce(j.tenant || '/' || j.singleton_key, 'queue'), q.policy
        having count(*) filter (where j.status in ('blocked', 'pending', 'paused') and j.retry_count = 0 and j.attempt = 0)
                > case when q.policy in ('short', 'stately') and j.queue <> 'flex' then 1 else 1000000 end
            or count(*) filter (where j.status in ('pending', 'paused') and j.retry_count > 0)
                > case when q.policy = 'stately' and j.queue <> 'flex' then 1 else 1000000 end
            or count(*) filter (where j.status in ('blocked', 'pending', 'paused', 'processing'))
                > case when q.policy = 'exclusive' and j.queue <> 'flex' then 1 else 1000000 end""",
    "a singleton key of a plain queue has two holders": """
        select min(id::text)::uuid from j where queue = 'plain' and singleton_key is not null
            and status in ('blocked', 'pending', 'paused', 'processing') group by tenant, singleton_key having count(*) > 1""",
    "a key of strict order is held by more than one job, or its slot is not counted right": """
        select s.id from (
            select min(j.id::text)::uuid as id, q.number, jobqueue.policy_key(j.tenant, j.singleton_key) as line,
                count(*) as holders
            from j join q on q.name = j.queue left join jobqueue.admission_line l on l.job_id = j.id
            where q.name = 'fifo' and j.status <> 'completed' and (j.settle_flags & 8 <> 0 or l.held & 8 <> 0)
            group by 2, 3) s
        where s.holders > 1 or s.holders <> coalesce((select t.used from jobqueue.admission_slot t
                where t.queue_number = s.number and t.stage = 1 and t.line = s.line), 0)
            - coalesce((select sum(n.slots) from jobqueue.admission_note n
                where n.queue_number = s.number and n.stage = 1 and n.line = s.line), 0)""",
}  # fmt: skip
VIOLATIONS = (
    "with j as materialized (select * from jobqueue.job), q as (select * from jobqueue.queue) "
    + " union all ".join(
        f"(select '{name}' as rule, x.id::text as job from ({query}) x (id) limit 3)" for name, query in NEVER.items()
    )
)


def violations(engine: Engine) -> list[Row]:
    """Rules that do not hold, with the jobs concerned."""
    return engine.rows(VIOLATIONS)


class Model:
    """What was seen last, and what follows from it for the next look.

    Args:
        engine: a connection to look through.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.jobs: dict[UUID, Row] = {}
        self._allowance: Counter[tuple[str, str]] = Counter()
        self._starts = 0

    def look(self, step: str, claimed: list[UUID]) -> None:
        """Compare the rows with those of the last look and check everything.

        Raises:
            AssertionError: something must not be so.
        """
        now: dict[UUID, Row] = {row["id"]: row for row in self._engine.rows(JOBS)}
        for job, before in self.jobs.items():
            self._change(step, before, now.get(job))
        self._strict_order(now, claimed)
        self._limits(now)
        self._rate(step, now, claimed)
        broken = violations(self._engine)
        assert broken == [], "; ".join(f"{row['rule']}: {row['job']}" for row in broken)
        self.jobs = now

    def _change(self, step: str, before: Row, now: Row | None) -> None:
        if now is None:
            gone_by_itself = before["settle_flags"] & 17 != 0
            assert before["status"] in ENDED or gone_by_itself or step == "purge", f"lost: {before}"
            assert step in ("delete_job", "retention", "purge") or gone_by_itself, f"deleted by {step}: {before}"
            return
        if before["status"] != now["status"]:
            assert now["status"] in MAY_BECOME[before["status"]], f"{before} became {now}"
            assert now["version"] > before["version"], f"no new version: {before} became {now}"
        for name in ("version", "attempt", "retry_count"):
            assert now[name] >= before[name], f"{name} fell: {before} became {now}"
        if now["status"] == "failed" != before["status"] and "dead_letter" in QUEUES[now["queue"]]:
            copies = "select count(*) from jobqueue.job where dead_letter_of = %s and status = 'pending'"
            assert self._engine.value(copies, now["id"]) >= 1, f"no dead letter of {now}"

    def _strict_order(self, now: dict[UUID, Row], claimed: list[UUID]) -> None:
        """Who starts in a key of strict order had come before all who still wait."""
        for job in claimed:
            mine = self.jobs.get(job)
            if mine is None or mine["queue"] != "fifo" or mine["place"] is None or (mine["held"] or 0) & 8:
                continue
            for other in self.jobs.values():
                same = (other["queue"], other["tenant"], other["singleton_key"]) == (
                    "fifo",
                    mine["tenant"],
                    mine["singleton_key"],
                )
                if same and other["place"] is not None and other["place"] < mine["place"] and other["stage"] != 6:
                    still = now.get(other["id"], {}).get("place")
                    assert still is None, f"{job} overtook {other}"

    def _limits(self, now: dict[UUID, Row]) -> None:
        """No line has more jobs that run than its limit, or than it had when its limit was lowered."""
        queues = {row["name"]: row for row in self._engine.rows("select * from jobqueue.queue")}
        running: Counter[tuple[str, str]] = Counter()
        most: dict[tuple[str, str], int] = defaultdict(int)
        for job in now.values():
            if job["status"] == "processing":
                for line, limit in lines_of(job, queues[job["queue"]]):
                    running[line] += 1
                    most[line] = max(most[line], 1000000 if limit is None else limit)
        for line, count in running.items():
            assert count <= max(most[line], self._allowance[line]), f"{count} jobs of {line} run at once"
        self._allowance = running

    def _rate(self, step: str, now: dict[UUID, Row], claimed: list[UUID]) -> None:
        """No more starts than the rate allows since the last period was over."""
        if step == "tokens":
            self._starts = 0
        self._starts += sum(1 for job in claimed if now[job]["queue"] == "rates")
        assert self._starts <= QUEUES["rates"]["rate_limit"]["limit"], "the rate was exceeded"


def lines_of(job: Row, queue: Row) -> list[tuple[tuple[str, str], int | None]]:
    """The lines that a running job counts in, with their limits; None: no limit."""
    name, groups = job["queue"], queue["group_concurrency"] or {}
    group_limit: Any = groups.get("tiers", {}).get(job["tier"], groups.get("default"))
    key_limit = 1 if queue["policy"] in ("singleton", "stately", "key_strict_fifo") else queue["key_concurrency"]
    if queue["policy"] == "standard" and job["singleton_key"] is None:
        key_limit = None
    lines = [
        ("queue", queue["concurrency"]),
        (f"group {job['group_key']}", group_limit if job["group_key"] else None),
        (f"key {job['tenant']}/{job['singleton_key']}" if job["singleton_key"] else "no key", key_limit),
    ]
    return [((name, line), limit) for line, limit in lines]
