"""What the API answers, typed."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from jobqueue.records import JobRecord


class RemoteJob(JobRecord):
    """A job as the API shows it.

    `etag` and `poll_after` (seconds; None once it has ended) are the answer's headers. In lists and streams values over
    16 kB are missing, and `omitted` names them. `previous_status` is set by streams.
    """

    allowed_actions: list[str] = Field(default_factory=list)
    refused_actions: dict[str, str] = Field(default_factory=dict)
    queue_position: int | None = None
    links: dict[str, str] = Field(default_factory=dict)
    omitted: list[str] = Field(default_factory=list)
    previous_status: str | None = None
    stages: list[dict[str, Any]] | None = None
    attempts: list[dict[str, Any]] | None = None
    etag: str | None = None
    poll_after: float | None = None


class SentJob(RemoteJob):
    """A job that was sent, or the one in its place: then `created` is False and `reason` says why.

    `replayed`: the same idempotency key was used before.
    """

    created: bool
    reason: str | None = None
    replayed: bool = False


class Page(BaseModel):
    """Jobs, newest first. `total` is exact up to 10,000; beyond that `total_capped` is True."""

    model_config = ConfigDict(frozen=True)

    jobs: list[RemoteJob]
    total: int
    total_capped: bool
    next_cursor: str | None
