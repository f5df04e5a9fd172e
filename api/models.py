"""Bodies of requests and answers, for checking what comes in and for the OpenAPI document.

What comes in is checked here by its form only; names and values of options are the database's to judge, which knows
the nearest right name. What goes out is JSON text made by the database and is not built from these models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictBool, StrictInt, StrictStr, computed_field

from jobqueue.records import ENDED, JobRecord

MOST_JOBS = 1000
"""Jobs in one POST."""

Duration = Annotated[
    StrictInt | float | StrictStr,
    Field(description='Seconds as a number, or text such as "5 minutes" or "PT5M"', examples=[30, "PT5M"]),
]
Name = Annotated[StrictStr, Field(min_length=1, max_length=200)]


class SendJob(BaseModel):
    """A job to send: its queue, its payload, and any option of `jobqueue.send`."""

    # Unknown options pass, so that the database can name the nearest one; the document says that there are none.
    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})

    queue: Annotated[StrictStr, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_./:-]+$")]
    payload: JsonValue = Field(default_factory=dict, description="any JSON, at most 8 MB")
    job_type: Name | None = Field(None, description="which handler runs it; default: the queue's name")
    priority: Annotated[StrictInt, Field(ge=-2147483646, le=2147483647)] | None = Field(
        None, description="higher first"
    )
    run_at: StrictStr | None = Field(
        None, description="RFC 3339 with an offset", json_schema_extra={"format": "date-time"}
    )
    delay: Duration | None = None
    singleton_key: StrictStr | None = None
    throttle_seconds: Duration | None = None
    debounce_seconds: Duration | None = None
    slot_until: Literal["window", "ended"] | None = None
    merge_payload: StrictBool | None = None
    group: StrictStr | None = None
    tier: StrictStr | None = None
    tenant: Name | None = None
    subject: Annotated[StrictStr, Field(min_length=1, max_length=1000)] | None = None
    display_name: Annotated[StrictStr, Field(min_length=1, max_length=1000)] | None = None
    metadata: dict[str, JsonValue] | None = Field(None, description="at most 1 MB")
    created_by: Annotated[StrictStr, Field(min_length=1, max_length=500)] | None = None
    max_retries: Annotated[StrictInt, Field(ge=0, le=1000000)] | None = None
    retry_delay: Duration | None = None
    retry_backoff: StrictBool | None = None
    retry_delay_max: Duration | None = None
    timeout: Duration | None = None
    max_runtime: Duration | None = None
    lease: Duration | None = None
    expires_in: Duration | None = None
    keep_completed: Duration | None = None
    keep_ended: Duration | None = None
    dead_letter: Name | None = None
    stages: list[JsonValue] | None = Field(None, description='names, or {"name", "weight"}')
    id: StrictStr | None = Field(None, description="any uuid that is to be the job's id")
    depends_on: list[StrictStr | dict[str, JsonValue]] | None = Field(
        None, description='ids of jobs that it waits for, or {"id", "on_failure"}'
    )
    on_failure: Literal["wait", "fail", "cancel", "run"] | None = Field(
        None, description="when one of them fails or is cancelled"
    )
    batch: StrictStr | None = Field(None, description="the id of a batch that it belongs to")
    trace_context: dict[str, StrictStr] | None = Field(
        None, description="W3C trace context that it comes from: traceparent, tracestate, baggage"
    )


class SendJobs(BaseModel):
    """Many jobs, all or none."""

    model_config = ConfigDict(extra="forbid")

    jobs: list[SendJob] = Field(min_length=1, max_length=MOST_JOBS)


class JobResource(JobRecord):
    """A job: every column of the view jobqueue.jobs, and what can be done with it."""

    allowed_actions: list[str]
    refused_actions: dict[str, str] = Field(description="action to reason")
    queue_position: int | None = Field(
        description="1 is next; at most 1000, which means or more; null unless it may run"
    )
    links: dict[str, str]
    stages: list[dict[str, Any]] | None = Field(None, description="with include=stages")
    attempts: list[dict[str, Any]] | None = Field(None, description="with include=attempts")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def done(self) -> bool:
        """Whether the job has ended."""
        return self.status in ENDED


class SentJob(JobResource):
    """A job that was sent, or the one that stands in its place."""

    jobId: UUID
    created: bool
    reason: str | None = Field(
        description="why it is another one: singleton, throttled, debounced, duplicate_id, policy or idempotency_key"
    )


class SentMeta(BaseModel):
    """How many were asked for, and how many are new."""

    total: int
    created: int


class SentJobs(BaseModel):
    """The jobs in the order of the request."""

    data: list[SentJob]
    meta: SentMeta


class ErrorBody(BaseModel):
    """What went wrong, for programs."""

    code: str
    message: str
    details: dict[str, Any]


class ErrorEnvelope(BaseModel):
    """Every error; the fields beside `error` are those of RFC 9457."""

    error: ErrorBody
    type: str
    title: str
    status: int
    detail: str
    request_id: str


class Health(BaseModel):
    """A probe's answer."""

    status: Literal["ok"]
