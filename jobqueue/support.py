"""What support staff and operators do, from Python: one action on many jobs, pauses, purges, health.

```
seen = await app.bulk("retry", "the disk is back", status="failed", queue="exports", dry_run=True)
done = await app.bulk("retry", "the disk is back", status="failed", queue="exports", expected_count=seen.total)
```

Every call is one statement; what it does is decided in the database (`sql/functions/find.sql`, `pauses.sql`, `help.sql`, …).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict
from uuid import UUID

from jobqueue import client
from jobqueue.errors import InvalidArgument, WorkerNotFound
from jobqueue.finding import Finding
from jobqueue.flows import FLOW_STATUS, FlowStatus
from jobqueue.options import options_text

if TYPE_CHECKING:
    from typing import Unpack

BULK = "select outcome, jobs from jobqueue.bulk(%s::text, %s::text::jsonb, %s::text, %s::boolean, %s::int)"
PURGE_QUEUE = "select cancelled, deleted, running from jobqueue.purge_queue(%s::text, %s::text)"
PURGE_TENANT = "select cancelled, deleted, running from jobqueue.purge_tenant(%s::text, %s::text)"
PAUSE_JOB_TYPE = "select jobqueue.pause_job_type(%s::text, %s::text)"
RESUME_JOB_TYPE = "select jobqueue.resume_job_type(%s::text, %s::text)"
PAUSE_TENANT = "select jobqueue.pause_tenant(%s::text, %s::text)"
RESUME_TENANT = "select jobqueue.resume_tenant(%s::text, %s::text)"
PAUSE_SCHEDULE = "select jobqueue.pause_schedule(%s::text, %s::text)"
RESUME_SCHEDULE = "select jobqueue.resume_schedule(%s::text, %s::text)"
DRAIN_WORKER = "select jobqueue.drain_worker(%s, %s::text)"
PARENTS = "select id, ref, queue, job_type, status, on_failure, result, display_name from jobqueue.parents(%s)"
CHILDREN = """
    select id, ref, queue, job_type, status, on_failure, unfinished_parents, display_name from jobqueue.children(%s)
"""
ALLOWED_ACTIONS = "select jobqueue.allowed_actions(%s)"
ACTIONS = "select action, allowed, reason from jobqueue.actions(%s)"
HEALTH = "select name, status, detail, what_to_do from jobqueue.health()"
DOCTOR = "select name, status, detail, what_to_do from jobqueue.doctor()"

BulkAction = Literal["cancel", "pause", "resume", "retry", "restart", "skip", "run_now", "delete"]


class BulkFilter(TypedDict, total=False):
    """Which jobs `bulk` means; each of the texts may be a list of alternatives. Times are aware."""

    ids: Sequence[UUID | str] | None
    status: str | Sequence[str] | None
    queue: str | Sequence[str] | None
    job_type: str | Sequence[str] | None
    tenant: str | Sequence[str] | None
    subject: str | Sequence[str] | None
    error_class: str | Sequence[str] | None
    error_code: str | Sequence[str] | None
    created_before: datetime | None
    created_after: datetime | None
    ended_after: datetime | None


class BulkOutcome(NamedTuple):
    """How many jobs an action has changed, asks the workers of, found done already, was refused to, and did not find."""

    done: int = 0
    asked: int = 0
    unchanged: int = 0
    refused: int = 0
    gone: int = 0

    @property
    def total(self) -> int:
        """How many jobs the filter means; for `expected_count`."""
        return sum(self)


class Purged(NamedTuple):
    """What a purge did: how many jobs it cancelled, deleted (those just cancelled among them) and left running."""

    cancelled: int
    deleted: int
    running: int


class ActionState(NamedTuple):
    """Whether an action is allowed now, and if not, why (None: it is)."""

    action: str
    allowed: bool
    reason: str | None


class Parent(NamedTuple):
    """A job that another one waits for or waited for. `ref`: its name in its flow. `result`: None until completed."""

    id: UUID
    ref: str | None
    queue: str
    job_type: str
    status: str
    on_failure: str
    result: Any
    display_name: str | None


class Child(NamedTuple):
    """A job that waits or waited for another one. `unfinished_parents`: how many it still waits for."""

    id: UUID
    ref: str | None
    queue: str
    job_type: str
    status: str
    on_failure: str
    unfinished_parents: int
    display_name: str | None


class Check(NamedTuple):
    """One row of `health` or `doctor`. `status`: "ok", "warn" or "fail". `what_to_do`: None if nothing is."""

    name: str
    status: str
    detail: str | None
    what_to_do: str | None


class Support(Finding):
    """The part of `App` that acts on many jobs, pauses, purges, and says how it goes."""

    if TYPE_CHECKING:

        async def _rows(
            self, query: str, parameters: tuple[Any, ...], connection: Any = None
        ) -> list[tuple[Any, ...]]: ...

    async def bulk(
        self,
        action: BulkAction,
        reason: str,
        *,
        dry_run: bool = False,
        expected_count: int | None = None,
        connection: Any = None,
        **filters: Unpack[BulkFilter],
    ) -> BulkOutcome:
        """Do one action with many jobs, in one transaction; each is audited as if it were done alone.

        `action`: cancel, pause, resume, retry, restart, skip, run_now or delete. `filters`: ids, status, queue, job_type,
        tenant, subject, error_class, error_code (a text, or a list of which one is meant), created_before, created_after,
        ended_after (aware times); all must hold, and at least one is needed. `dry_run`: count only (default False).
        `expected_count`: the `total` of a dry run; Conflict if the set has grown by more than 10 % since. `connection`: as
        of `send`. What is refused to one job leaves the others alone.

        Raises InvalidArgument, also for a blank reason, UnknownOption, Conflict with the `count` in its details.
        """
        parameters = (action, filter_text(filters), reason, dry_run, expected_count)
        return BulkOutcome(**dict(await self._rows(BULK, parameters, connection)))

    async def purge_queue(self, queue: str, reason: str) -> Purged:
        """Cancel all that waits in a queue and delete all that has ended; what runs goes on.

        Raises QueueNotFound, InvalidArgument for a blank reason, Forbidden for those who are bound to a tenant.
        """
        return Purged._make((await self._rows(PURGE_QUEUE, (queue, reason)))[0])

    async def purge_tenant(self, tenant: str, reason: str) -> Purged:
        """Do the same with all jobs of a tenant. Raises InvalidArgument for a blank reason, Forbidden."""
        return Purged._make((await self._rows(PURGE_TENANT, (tenant, reason)))[0])

    async def pause_job_type(self, name: str, reason: str) -> None:
        """Start no job of a type, in any queue, until it is resumed; one that no worker knows yet can be paused too.

        Raises InvalidArgument for a blank reason, Forbidden for those who are bound to a tenant.
        """
        await self._rows(PAUSE_JOB_TYPE, (name, reason))

    async def resume_job_type(self, name: str, reason: str) -> None:
        """Start jobs of that type again. Raises JobTypeNotFound, and as of `pause_job_type`."""
        await self._rows(RESUME_JOB_TYPE, (name, reason))

    async def pause_tenant(self, name: str, reason: str) -> None:
        """Start no job of a tenant until it is resumed. Raises InvalidArgument for a blank reason, Forbidden."""
        await self._rows(PAUSE_TENANT, (name, reason))

    async def resume_tenant(self, name: str, reason: str) -> None:
        """Start jobs of that tenant again. Raises InvalidArgument for a blank reason, Forbidden."""
        await self._rows(RESUME_TENANT, (name, reason))

    async def pause_schedule(self, name: str, reason: str) -> None:
        """Send nothing until it is resumed. Raises ScheduleNotFound, InvalidArgument for a blank reason."""
        await self._rows(PAUSE_SCHEDULE, (name, reason))

    async def resume_schedule(self, name: str, reason: str) -> None:
        """Go on with the next tick from now on. Raises ScheduleNotFound, InvalidArgument for a blank reason."""
        await self._rows(RESUME_SCHEDULE, (name, reason))

    async def drain_worker(self, worker: UUID | str, reason: str) -> None:
        """Ask a worker to finish what it has and to stop; it hears of it with its next heartbeat, within 5 s.

        Raises WorkerNotFound if no worker of that id runs, InvalidArgument for a blank reason.
        """
        await self._rows(DRAIN_WORKER, (_as_worker_id(worker), reason))

    async def parents(self, job_id: UUID | str) -> list[Parent]:
        """List the jobs that a job waits for or waited for, as far as they are there. Raises JobNotFound."""
        return list(map(Parent._make, await self._rows(PARENTS, (client.as_job_id(job_id),))))

    async def children(self, job_id: UUID | str) -> list[Child]:
        """List the jobs that wait or waited for a job. Raises JobNotFound."""
        return list(map(Child._make, await self._rows(CHILDREN, (client.as_job_id(job_id),))))

    def flow_status_sync(self, flow_or_job: UUID | str) -> FlowStatus:
        """The blocking form of `flow_status`. Raises FlowNotFound."""
        with self._lend_blocking(None) as lent:
            rows = client.blocking(client.fetch(lent, FLOW_STATUS, (client.as_job_id(flow_or_job),)))
        return FlowStatus._make(rows[0])

    async def allowed_actions(self, job_id: UUID | str) -> list[str]:
        """Return the names of what can be done with a job now. Raises JobNotFound."""
        return list((await self._rows(ALLOWED_ACTIONS, (client.as_job_id(job_id),)))[0][0])

    async def actions(self, job_id: UUID | str) -> list[ActionState]:
        """Say of every action whether it is allowed for a job now, and if not, why. Raises JobNotFound."""
        return list(map(ActionState._make, await self._rows(ACTIONS, (client.as_job_id(job_id),))))

    async def health(self) -> list[Check]:
        """Say how it goes: workers, leases, maintenance, backlog, what is slow, pauses."""
        return list(map(Check._make, await self._rows(HEALTH, ())))

    async def doctor(self) -> list[Check]:
        """Say what is wrong and what to do: health, and the database around it."""
        return list(map(Check._make, await self._rows(DOCTOR, ())))


def filter_text(filters: Mapping[str, Any]) -> str:
    """Return a filter as JSON text; the database judges its names. Raises InvalidArgument for a time without an offset."""
    return options_text({name: _encode(name, value) for name, value in filters.items() if value is not None})


def _encode(name: str, value: Any) -> Any:
    if not isinstance(value, datetime):
        return value
    if value.utcoffset() is None:
        raise InvalidArgument(
            f"{name} has no time zone: {value.isoformat()}",
            hint="Give an aware datetime, for example datetime.now(timezone.utc).",
            details={"option": name},
        )
    return value.astimezone(UTC).isoformat()


def _as_worker_id(value: UUID | str) -> UUID:
    try:
        return value if isinstance(value, UUID) else UUID(str(value))
    except ValueError:
        raise WorkerNotFound(
            f"There is no running worker {str(value)[:100]!r}: that is no uuid.",
            hint="jobqueue workers list shows them.",
        ) from None
