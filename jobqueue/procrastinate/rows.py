"""A claimed job as procrastinate's row."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any
from uuid import UUID

from procrastinate import jobs

from jobqueue.job import Claim
from jobqueue.json_text import RAW, from_json
from jobqueue.procrastinate.statements import Row

COLUMNS = (
    "id", "status", "task_name", "priority", "lock", "queueing_lock", "args", "scheduled_at", "queue_name", "attempts",
    "worker_id",
)  # fmt: skip
NOTHING: Row = dict.fromkeys(COLUMNS)
_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


def options_of(claim: Claim) -> Mapping[str, Any]:
    """The options that are kept with a job."""
    options = claim.options
    if options is None:
        return _NO_OPTIONS
    decoded: Mapping[str, Any] = from_json(options)
    return decoded


def needs_start(claim: Claim) -> bool:
    """Whether the database has to agree to the start: the job has a lock or a queueing_lock."""
    return claim.singleton_key is not None or (claim.options is not None and "queueing_lock" in options_of(claim))


def job_row(claim: Claim, worker: UUID, loads: Callable[[Any], Any]) -> Row:
    """Return the row of fetch_job."""
    job = job_of(claim, worker, loads)
    return {
        "id": job.id, "status": "doing", "task_name": job.task_name, "priority": job.priority, "lock": job.lock,
        "queueing_lock": job.queueing_lock, "args": job.task_kwargs, "scheduled_at": job.scheduled_at,
        "queue_name": job.queue, "attempts": job.attempts, "worker_id": job.worker_id,
    }  # fmt: skip


def job_of(claim: Claim, worker: UUID, loads: Callable[[Any], Any] = json.loads) -> jobs.Job:
    """Return procrastinate's object for a claimed job."""
    payload = claim.payload
    return jobs.Job(
        id=int(claim.id.replace("-", ""), 16),
        status="doing",
        queue=claim.queue,
        priority=claim.priority,
        lock=claim.singleton_key,
        queueing_lock=options_of(claim).get("queueing_lock") if claim.options is not None else None,
        task_name=claim.job_type,
        task_kwargs=loads(bytes(payload)) if type(payload) in RAW else payload,
        scheduled_at=claim.run_at if claim.run_at != claim.created_at else None,
        attempts=claim.retry_count,
        worker_id=worker.int,
    )
