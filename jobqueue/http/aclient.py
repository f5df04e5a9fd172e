"""The client for event loops."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any
from uuid import UUID

import httpx2

from jobqueue.http.calls import Calls
from jobqueue.http.client import base_of
from jobqueue.http.models import Page, RemoteJob, SentJob
from jobqueue.http.transport import AsyncTransport


class AsyncClient:
    """A client of the HTTP API for event loops; `async with` closes it.

    `url`: where the API is, with its prefix (`https://jobs.example.org/api`). `key`: an API key. `tenant`: all calls
    under this tenant's path; None: all tenants of the key. `tenant_segment`: what the installation calls tenants
    (`JOBQUEUE_TENANT_SEGMENT`). `timeout`: seconds for an answer, besides the time that a long poll asks for.
    `client`: an httpx2 client of your own, for proxies, certificates and the like; it stays open.

    Every call raises the library's errors: JobNotFound, InvalidTransition, InvalidArgument, Unauthorized, Forbidden,
    LimitReached (also a used-up quota; `details["retry_after"]`), ServiceUnavailable.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        tenant: str | None = None,
        tenant_segment: str = "tenants",
        timeout: float = 10.0,
        client: httpx2.AsyncClient | None = None,
    ) -> None:
        self._owned = client is None
        self._client = client or httpx2.AsyncClient(timeout=timeout)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._calls = Calls(AsyncTransport(self._client, headers), base_of(url, tenant, tenant_segment))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections, unless the httpx2 client is yours."""
        if self._owned:
            await self._client.aclose()

    async def send(
        self, queue: str, payload: Any = None, *, idempotency_key: str | None = None, **options: Any
    ) -> SentJob:
        """Send a job.

        `payload`: anything that JSON has, a pydantic model or a dataclass. `options`: as of `App.send`. Sent once, however
        often the network fails: every call has an idempotency key of its own, or yours (`idempotency_key`), which the
        API remembers for 24 hours. Raises QueueNotFound, InvalidArgument, UnknownOption, Conflict, TooLarge.
        """
        return await self._calls.send(queue, payload, idempotency_key=idempotency_key, **options)

    async def get(self, job_id: UUID | str, *, include: Sequence[str] = ()) -> RemoteJob:
        """Return a job. `include`: "stages", "attempts". Raises JobNotFound."""
        return await self._calls.get(job_id, include=include)

    async def poll(self, job: RemoteJob, wait: float = 0.0) -> RemoteJob:
        """Return the job as it is now, or the same object if nothing has changed.

        `wait`: seconds to wait for a change on the server, at most 25 (0: none). Without it, poll again after
        `job.poll_after` seconds; an unchanged job costs no quota. Raises JobNotFound.
        """
        return await self._calls.poll_job(job, wait)

    async def wait(self, job_id: UUID | str, timeout: float | None = None) -> RemoteJob:
        """Return the job once it has ended, however it ended. `timeout`: seconds; None: no end.

        Raises JobNotFound, TimedOut.
        """
        return await self._calls.wait(job_id, timeout)

    async def page(self, **filters: Any) -> Page:
        """Return one page of jobs, newest first.

        `filters`: status, queue, job_type, subject, tenant, ids, error_class (texts or lists), created_after,
        created_before, fields, and limit (20, at most 200), cursor (`next_cursor` of the page before), page, per_page.
        """
        return await self._calls.page(**filters)

    async def retry(self, job_id: UUID | str, reason: str | None = None, *, from_start: bool = False) -> RemoteJob:
        """Run a failed job again; `from_start` drops its partial progress. Raises JobNotFound, InvalidTransition."""
        return await self._calls.act(job_id, "retry", reason, from_start=from_start)

    async def cancel(self, job_id: UUID | str, reason: str | None = None, *, force: bool = False) -> RemoteJob:
        """Stop a job. A running one is asked (`requested_action`), with `force` it is cancelled at once.

        Raises JobNotFound, InvalidTransition.
        """
        return await self._calls.act(job_id, "cancel", reason, force=force)

    async def skip(self, job_id: UUID | str, reason: str | None = None) -> RemoteJob:
        """Go on without a failed job. Raises JobNotFound, InvalidTransition."""
        return await self._calls.act(job_id, "skip", reason)

    async def pause(self, job_id: UUID | str, reason: str | None = None) -> RemoteJob:
        """Hold a job. Raises JobNotFound, InvalidTransition."""
        return await self._calls.act(job_id, "pause", reason)

    async def resume(self, job_id: UUID | str, reason: str | None = None) -> RemoteJob:
        """Take a paused or cancelled job up again. Raises JobNotFound, InvalidTransition."""
        return await self._calls.act(job_id, "resume", reason)

    async def run_now(self, job_id: UUID | str, reason: str | None = None) -> RemoteJob:
        """Do not wait for run_at. Raises JobNotFound, InvalidTransition."""
        return await self._calls.act(job_id, "run-now", reason)

    async def change(
        self,
        job_id: UUID | str,
        *,
        priority: int | None = None,
        run_at: datetime | None = None,
        reason: str | None = None,
    ) -> RemoteJob:
        """Change priority or time of a waiting job. Raises JobNotFound, InvalidTransition."""
        return await self._calls.change(job_id, priority=priority, run_at=run_at, reason=reason)

    async def delete(self, job_id: UUID | str, reason: str | None = None) -> None:
        """Delete an ended job. Raises JobNotFound, InvalidTransition."""
        await self._calls.delete(job_id, reason)

    async def explain(self, job_id: UUID | str) -> list[dict[str, Any]]:
        """Say why a job is not running, or why it ended so: rows of reason, detail, what_to_do."""
        return await self._calls.rows(f"/jobs/{job_id}/explain")

    async def attempts(self, job_id: UUID | str) -> list[dict[str, Any]]:
        """Return every attempt of a job with its error."""
        return await self._calls.rows(f"/jobs/{job_id}/attempts")

    async def stages(self, job_id: UUID | str) -> list[dict[str, Any]]:
        """Return the stages of a job."""
        return await self._calls.rows(f"/jobs/{job_id}/stages")

    async def stats(self) -> dict[str, Any]:
        """Return how many jobs are in each status, and `avg_processing_time_ms`."""
        return await self._calls.stats()

    def follow(self, job_id: UUID | str) -> AsyncIterator[RemoteJob]:
        """Yield the job now and at every change until it has ended.

        By server-sent events; while no stream can be had, by polling every 5 s. Raises JobNotFound.
        """
        return self._calls.follow(job_id)

    def jobs(self, **filters: Any) -> AsyncIterator[RemoteJob]:
        """Yield all jobs of a list, newest first, page after page. `filters`: as of `page`."""
        return self._calls.jobs(**filters)
