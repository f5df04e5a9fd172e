"""What comes back from the view `jobqueue.jobs`."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict

Status = Literal["blocked", "pending", "processing", "paused", "completed", "failed", "cancelled", "skipped"]
ENDED: frozenset[str] = frozenset({"completed", "failed", "cancelled", "skipped"})


class JobRecord(BaseModel):
    """A job as it was when it was read: every column of the view `jobqueue.jobs`, whose comments explain them.

    Times are aware and in UTC. `alive` is None unless the job is processing. `version` rises with every change that a
    poller can see.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: UUID
    queue: str
    job_type: str
    status: Status
    requested_action: str | None = None
    status_reason: str | None = None
    priority: int
    tenant: str
    subject: str | None = None
    display_name: str | None = None
    payload: Any = None
    result: Any = None
    stats: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    progress_pct: int
    progress_done: int | None = None
    progress_total: int | None = None
    progress_message: str | None = None
    current_stage: str | None = None
    substage: str | None = None
    total_stages: int | None = None
    completed_stages: int | None = None
    estimated_completion: datetime | None = None
    attempt: int
    retry_count: int
    max_retries: int | None = None
    run_at: datetime
    error_class: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    created_by: str | None = None
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    updated_at: datetime
    heartbeat_at: datetime | None = None
    alive: bool | None = None
    worker_id: UUID | None = None
    pausable: bool | None = None
    pause_reason: str | None = None
    paused_at: datetime | None = None
    resumed_at: datetime | None = None
    resume_count: int
    checkpoint_stage: str | None = None
    checkpoint_reference: str | None = None
    checkpoint_hash: str | None = None
    checkpoint_at: datetime | None = None
    singleton_key: str | None = None
    group_key: str | None = None
    batch_id: UUID | None = None
    dead_letter_of: UUID | None = None
    version: int

    @property
    def done(self) -> bool:
        """Whether the job has ended: completed, failed, cancelled or skipped."""
        return self.status in ENDED


COLUMNS: tuple[str, ...] = tuple(JobRecord.model_fields)
