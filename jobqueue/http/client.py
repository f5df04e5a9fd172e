"""The blocking client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote
from uuid import UUID

import httpx2

from jobqueue.errors import InvalidArgument
from jobqueue.http.calls import Calls
from jobqueue.http.models import Page, RemoteJob, SentJob
from jobqueue.http.transport import BlockingTransport

T = TypeVar("T")


class Client:
    """A client of the HTTP API, blocking; `with` closes it. One per thread.

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
        client: httpx2.Client | None = None,
    ) -> None:
        self._owned = client is None
        self._client = client or httpx2.Client(timeout=timeout)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._calls = Calls(BlockingTransport(self._client, headers), base_of(url, tenant, tenant_segment))

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, unless the httpx2 client is yours."""
        if self._owned:
            self._client.close()

    def send(self, queue: str, payload: Any = None, *, idempotency_key: str | None = None, **options: Any) -> SentJob:
        """Send a job.

        `payload`: anything that JSON has, a pydantic model or a dataclass. `options`: as of `App.send`. Sent once, however
        often the network fails: every call has an idempotency key of its own, or yours (`idempotency_key`), which the
        API remembers for 24 hours. Raises QueueNotFound, InvalidArgument, UnknownOption, Conflict, TooLarge.
        """
        return _run(self._calls.send(queue, payload, idempotency_key=idempotency_key, **options))

    def get(self, job_id: UUID | str, *, include: Sequence[str] = ()) -> RemoteJob:
        """Return a job. `include`: "stages", "attempts". Raises JobNotFound."""
        return _run(self._calls.get(job_id, include=include))

    def poll(self, job: RemoteJob, wait: float = 0.0) -> RemoteJob:
        """Return the job as it is now, or the same object if nothing has changed.

        `wait`: seconds to wait for a change on the server, at most 25 (0: none). Without it, poll again after
        `job.poll_after` seconds; an unchanged job costs no quota. Raises JobNotFound.
        """
        return _run(self._calls.poll_job(job, wait))

    def wait(self, job_id: UUID | str, timeout: float | None = None) -> RemoteJob:
        """Return the job once it has ended, however it ended. `timeout`: seconds; None: no end.

        Raises JobNotFound, TimedOut.
        """
        return _run(self._calls.wait(job_id, timeout))

    def page(self, **filters: Any) -> Page:
        """Return one page of jobs, newest first.

        `filters`: status, queue, job_type, subject, tenant, ids, error_class (texts or lists), created_after,
        created_before, fields, and limit (20, at most 200), cursor (`next_cursor` of the page before), page, per_page.
        """
        return _run(self._calls.page(**filters))

    def retry(self, job_id: UUID | str, reason: str | None = None, *, from_start: bool = False) -> RemoteJob:
        """Run a failed job again; `from_start` drops its partial progress. Raises JobNotFound, InvalidTransition."""
        return _run(self._calls.act(job_id, "retry", reason, from_start=from_start))

    def cancel(self, job_id: UUID | str, reason: str | None = None, *, force: bool = False) -> RemoteJob:
        """Stop a job. A running one is asked (`requested_action`), with `force` it is cancelled at once.

        Raises JobNotFound, InvalidTransition.
        """
        return _run(self._calls.act(job_id, "cancel", reason, force=force))

    def skip(self, job_id: UUID | str, reason: str | None = None) -> RemoteJob:
        """Go on without a failed job. Raises JobNotFound, InvalidTransition."""
        return _run(self._calls.act(job_id, "skip", reason))

    def pause(self, job_id: UUID | str, reason: str | None = None) -> RemoteJob:
        """Hold a job. Raises JobNotFound, InvalidTransition."""
        return _run(self._calls.act(job_id, "pause", reason))

    def resume(self, job_id: UUID | str, reason: str | None = None) -> RemoteJob:
        """Take a paused or cancelled job up again. Raises JobNotFound, InvalidTransition."""
        return _run(self._calls.act(job_id, "resume", reason))

    def run_now(self, job_id: UUID | str, reason: str | None = None) -> RemoteJob:
        """Do not wait for run_at. Raises JobNotFound, InvalidTransition."""
        return _run(self._calls.act(job_id, "run-now", reason))

    def change(
        self,
        job_id: UUID | str,
        *,
        priority: int | None = None,
        run_at: datetime | None = None,
        reason: str | None = None,
    ) -> RemoteJob:
        """Change priority or time of a waiting job. Raises JobNotFound, InvalidTransition."""
        return _run(self._calls.change(job_id, priority=priority, run_at=run_at, reason=reason))

    def delete(self, job_id: UUID | str, reason: str | None = None) -> None:
        """Delete an ended job. Raises JobNotFound, InvalidTransition."""
        _run(self._calls.delete(job_id, reason))

    def explain(self, job_id: UUID | str) -> list[dict[str, Any]]:
        """Say why a job is not running, or why it ended so: rows of reason, detail, what_to_do."""
        return _run(self._calls.rows(f"/jobs/{job_id}/explain"))

    def attempts(self, job_id: UUID | str) -> list[dict[str, Any]]:
        """Return every attempt of a job with its error."""
        return _run(self._calls.rows(f"/jobs/{job_id}/attempts"))

    def stages(self, job_id: UUID | str) -> list[dict[str, Any]]:
        """Return the stages of a job."""
        return _run(self._calls.rows(f"/jobs/{job_id}/stages"))

    def stats(self) -> dict[str, Any]:
        """Return how many jobs are in each status, and `avg_processing_time_ms`."""
        return _run(self._calls.stats())

    def follow(self, job_id: UUID | str) -> Iterator[RemoteJob]:
        """Yield the job now and at every change until it has ended.

        By server-sent events; while no stream can be had, by polling every 5 s. Raises JobNotFound.
        """
        return _each(self._calls.follow(job_id))

    def jobs(self, **filters: Any) -> Iterator[RemoteJob]:
        """Yield all jobs of a list, newest first, page after page. `filters`: as of `page`."""
        return _each(self._calls.jobs(**filters))


def base_of(url: str, tenant: str | None, tenant_segment: str) -> str:
    """Return what stands before every path. Raises InvalidArgument for a tenant that no path can name."""
    if tenant is not None and (not tenant or "/" in tenant):
        raise InvalidArgument(f"no path can name the tenant {tenant!r}", hint="Use a key that has only this tenant.")
    return url.rstrip("/") + ("" if tenant is None else f"/{tenant_segment}/{quote(tenant, safe='')}")


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits: its transport blocks."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    coroutine.close()
    raise RuntimeError("a blocking call waits for an event loop")


def _each(items: AsyncIterator[T]) -> Iterator[T]:
    async def following() -> T:
        return await anext(items)

    async def end() -> None:
        await items.aclose()  # type: ignore[attr-defined]

    try:
        while True:
            try:
                item = _run(following())
            except StopAsyncIteration:
                return
            yield item
    finally:
        _run(end())
