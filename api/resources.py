"""Bodies of the routes about lists, history, actions and operations; models.py has those of jobs.

As there: what comes in is checked by its form only, and what goes out is JSON text made by the database.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from jobqueue.api.models import JobResource

# -- Requests ---------------------------------------------------------------------------------------------------------

Reason = Annotated[StrictStr, Field(max_length=2000, description="why, for those who read the audit later")]


class ReasonRequest(BaseModel):
    """Why."""

    model_config = ConfigDict(extra="forbid")

    reason: Reason | None = None


class ActionRequest(ReasonRequest):
    """What is asked of a job; the body may be missing."""

    from_start: StrictBool | None = Field(None, description="retry only: drop checkpoint, done keys and stage outputs")
    force: StrictBool | None = Field(None, description="cancel only: at once, whatever the worker does")


class ChangeRequest(ReasonRequest):
    """Changes of a waiting job; at least one."""

    priority: Annotated[StrictInt, Field(ge=-2147483646, le=2147483647)] | None = Field(
        None, description="higher first"
    )
    run_at: StrictStr | None = Field(
        None, description="RFC 3339 with an offset", json_schema_extra={"format": "date-time"}
    )


# -- Lists of jobs ----------------------------------------------------------------------------------------------------


class ListedJob(JobResource):
    """A job in a list. Values over 16 kB are left out."""

    omitted: list[str] | None = Field(None, description="what was left out; GET /jobs/{id} has it")


class PageMeta(BaseModel):
    """Where a page stands."""

    total: int = Field(description="at most 10,000")
    total_capped: bool = Field(description="whether there are, or may be, more")
    page: int | None = Field(None, description="null when read by cursor")
    per_page: int
    next_cursor: str | None = Field(
        None, description="null on the last page; a page before it may have fewer jobs than per_page, or none"
    )


class JobPage(BaseModel):
    """Jobs, newest first."""

    data: list[ListedJob]
    meta: PageMeta


class StatusCounts(BaseModel):
    """Jobs by status, and how long completed ones took."""

    blocked: int
    pending: int
    processing: int
    paused: int
    completed: int
    failed: int
    cancelled: int
    skipped: int
    total: int
    avg_processing_time_ms: int | None
    avg_progress_pct: float | None = Field(description="of those that have not ended")


class StatsMeta(BaseModel):
    """How far was counted."""

    capped: bool = Field(description="whether there are more jobs than were counted")


class Stats(BaseModel):
    """The counts."""

    data: StatusCounts
    meta: StatsMeta


# -- History ----------------------------------------------------------------------------------------------------------


class ListMeta(BaseModel):
    """What is said about a list."""

    per_page: int | None = None
    next_cursor: str | None = None


class StageResource(BaseModel):
    """A stage of a job."""

    job_id: UUID
    tenant: str
    position: int
    name: str
    status: Literal["pending", "in_progress", "completed", "failed", "skipped"]
    weight: float
    attempt: int | None
    started_at: datetime | None
    completed_at: datetime | None
    error: str | None
    metadata: Any
    output: Any


class StageList(BaseModel):
    """The stages of a job, in their order."""

    data: list[StageResource]
    meta: ListMeta


class AttemptResource(BaseModel):
    """One claim of a job by a worker."""

    job_id: UUID
    attempt: int
    tenant: str
    outcome: str = Field(description="processing, completed, failed, timed_out, lost, released, snoozed, …")
    worker_id: UUID | None
    started_at: datetime | None
    ended_at: datetime | None
    error_class: str | None
    error_code: str | None
    error_message: str | None
    error_detail: str | None = Field(description="the stack trace; only with jobs:act or admin")
    next_run_at: datetime | None


class AttemptList(BaseModel):
    """Every attempt of a job, the first one first."""

    data: list[AttemptResource]
    meta: ListMeta


class AuditLine(BaseModel):
    """Somebody did something."""

    id: int
    at: datetime
    action: str
    job_id: UUID | None
    tenant: str | None
    target: str | None = Field(description="the queue, schedule, worker or tenant that it was done to")
    from_status: str | None
    to_status: str | None
    reason: str
    actor: str | None = Field(description="as the application named them")
    details: Any
    session_user_name: str | None = Field(description="the proven login; only with jobs:act or admin")
    application_name: str | None
    client_addr: str | None


class AuditPage(BaseModel):
    """Lines of the audit."""

    data: list[AuditLine]
    meta: ListMeta


class ReasonLine(BaseModel):
    """One cause."""

    reason: str
    detail: str
    what_to_do: str | None


class ReasonList(BaseModel):
    """Why a job is not running, or why it ended so; the weightiest cause first."""

    data: list[ReasonLine]
    meta: ListMeta


# -- Operations -------------------------------------------------------------------------------------------------------


class QueueResource(BaseModel):
    """A queue; durations are seconds."""

    name: str
    policy: str
    state: Literal["active", "paused"]
    max_retries: int
    retry_delay: float
    retry_backoff: bool
    retry_delay_max: float | None
    timeout: float | None
    max_runtime: float | None
    lease: float
    expires_in: float | None
    keep_completed: float | None
    keep_ended: float | None
    dead_letter: str | None
    concurrency: int | None
    group_concurrency: Any
    key_concurrency: int | None
    rate_limit: Any
    ageing: float | None
    fair_by: str | None
    warn_backlog: int | None
    paused_at: datetime | None
    pause_reason: str | None
    paused_by: str | None
    ready: int = Field(description="jobs that may run now; at most 1,000, which means or more")
    created_at: datetime
    updated_at: datetime


class QueueList(BaseModel):
    """All queues, by name."""

    data: list[QueueResource]
    meta: ListMeta


class WorkerResource(BaseModel):
    """A process that runs jobs."""

    id: UUID
    name: str | None
    hostname: str | None
    pid: int | None
    version: str | None
    queues: list[str] | None
    job_types: list[str] | None
    concurrency: int | None
    running: int
    started_at: datetime
    heartbeat_at: datetime
    stopped_at: datetime | None
    state: Literal["working", "draining", "lost", "stopped"]
    drain_reason: str | None
    stuck: int = Field(description="slots that are kept by handlers that go on after their attempts have ended")


class WorkerList(BaseModel):
    """The workers, the latest first."""

    data: list[WorkerResource]
    meta: ListMeta


class ScheduleResource(BaseModel):
    """What is sent when."""

    name: str
    queue: str
    expression: str
    time_zone: str
    missed: Literal["skip", "once", "all"]
    payload: Any
    options: Any
    state: Literal["active", "paused", "failing", "finished"]
    next_at: datetime | None
    last_at: datetime | None
    last_job_id: UUID | None
    last_reason: str | None
    last_error: str | None
    failures: int
    retry_at: datetime | None
    gap_from: datetime | None
    gap_until: datetime | None
    paused_at: datetime | None
    pause_reason: str | None
    paused_by: str | None
    tenant: str
    created_at: datetime
    updated_at: datetime


class ScheduleList(BaseModel):
    """The schedules, by name."""

    data: list[ScheduleResource]
    meta: ListMeta


# -- Streams ----------------------------------------------------------------------------------------------------------


class TicketRequest(BaseModel):
    """Which stream a ticket is for."""

    model_config = ConfigDict(extra="forbid")

    job_id: StrictStr | None = Field(None, description="GET /jobs/{id}/events; without it GET /events")


class TicketResource(BaseModel):
    """A ticket: opens its stream once."""

    ticket: str
    url: str = Field(description="the stream's path with the ticket")
    expires_at: datetime


# -- Bulk -------------------------------------------------------------------------------------------------------------

Names = StrictStr | Annotated[list[StrictStr], Field(min_length=1, max_length=1000)]


class BulkFilter(BaseModel):
    """Which jobs: all that is given must hold. A text, or a list of which one must hold."""

    model_config = ConfigDict(extra="forbid")

    status: Names | None = None
    queue: Names | None = None
    job_type: Names | None = None
    tenant: StrictStr | None = None
    subject: Names | None = None
    error_class: Names | None = None
    error_code: Names | None = None
    created_after: StrictStr | None = None
    created_before: StrictStr | None = None
    ended_after: StrictStr | None = None


class BulkRequest(ReasonRequest):
    """One action on many jobs, by `ids` or by `filter`."""

    action: Literal["cancel", "pause", "resume", "retry", "restart", "skip", "run_now", "delete"]
    ids: Annotated[list[StrictStr], Field(min_length=1, max_length=10000)] | None = None
    filter: BulkFilter | None = None
    dry_run: StrictBool | None = Field(None, description="count only")
    expected_count: Annotated[StrictInt, Field(ge=0, le=10000000)] | None = Field(
        None, description="what a dry run said"
    )


class BulkResource(BaseModel):
    """A bulk operation. `counts` has done, asked (of a worker), unchanged, refused and gone."""

    id: UUID | None
    action: str
    status: str = Field(description="dry_run, or that of its job; completed if it was done at once")
    reason: str | None = None
    total: int
    done: int
    counts: dict[str, int] | None
    created_at: datetime | None = None
    ended_at: datetime | None = None
    links: dict[str, str]


# -- Flows and batches ------------------------------------------------------------------------------------------------


class Ends(BaseModel):
    """Jobs by status; `pct` is what has ended, rounded down."""

    tenant: str
    total: int
    ended: int
    pct: int | None
    blocked: int
    pending: int
    processing: int
    paused: int
    completed: int
    failed: int
    cancelled: int
    skipped: int
    created_at: datetime
    ended_at: datetime | None


class FlowEdge(BaseModel):
    """A job that is waited for."""

    id: UUID
    on_failure: Literal["wait", "fail", "cancel", "run"]


class FlowJob(BaseModel):
    """A job of a flow."""

    id: UUID
    ref: str | None
    queue: str
    job_type: str
    display_name: str | None
    status: str
    progress_pct: int
    depends_on: list[FlowEdge]


class FlowResource(Ends):
    """Jobs that depend on each other."""

    flow_id: UUID
    jobs: list[FlowJob]


class BatchResource(Ends):
    """Jobs that are counted together."""

    batch_id: UUID
    name: str | None
    state: Literal["open", "closed", "ended"]
    metadata: Any
    callback_on: str
    callback_job_id: UUID | None
    callback_error: str | None
    closed_at: datetime | None
    first_failed_at: datetime | None
