"""What both clients do: one coroutine per call, whatever the transport.

Reads, sends (which carry an idempotency key) and actions (which change nothing when repeated) are tried again when the
API is away: three times, after 0.5, 1 and 2 s or what Retry-After says.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any
from urllib.parse import quote
from uuid import UUID, uuid4

from jobqueue.errors import JobqueueError, TimedOut
from jobqueue.http.models import Page, RemoteJob, SentJob
from jobqueue.http.problems import ServiceUnavailable, problem_of
from jobqueue.http.transport import Answer, Lines, Transport
from jobqueue.options import encode_options
from jobqueue.payloads import encode_payload

TRIES_AFTER = (0.5, 1.0, 2.0)
LONGEST_RETRY_AFTER = 30.0
POLL_SECONDS = 5.0
POLLS_PER_STREAM = 6
"""While no stream can be had, it is tried again after this many polls."""
LONG_POLL_SECONDS = 25
LEAST_SECONDS = 0.25
"""Between two long polls: a job that changes often must not become a busy loop."""


class Calls:
    """The calls of one client.

    `base`: prefix and tenant of every path, such as `/api/matters/7`. `poll`: seconds between polls while a stream
    cannot be had (5).
    """

    def __init__(self, transport: Transport, base: str = "", poll: float = POLL_SECONDS) -> None:
        self.transport = transport
        self.base = base
        self.poll = poll

    async def send(
        self, queue: str, payload: Any = None, *, idempotency_key: str | None = None, **options: Any
    ) -> SentJob:
        """Send a job; see `Client.send`."""
        body = {**encode_options(options, "send"), "queue": queue}
        # The payload's own encoding is kept: nothing of it goes through another one.
        text = json.dumps(body)[:-1] + f', "payload": {encode_payload(payload, queue)}}}'
        headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key or str(uuid4())}
        answer = await self._request("POST", "/jobs", content=text.encode(), headers=headers)
        replayed = answer.headers.get("idempotent-replayed") == "true"
        return SentJob.model_validate({**_job_values(answer), "replayed": replayed})

    async def get(self, job_id: UUID | str, *, include: Sequence[str] = ()) -> RemoteJob:
        """Return a job; see `Client.get`."""
        params = {"include": ",".join(include)} if include else None
        return RemoteJob.model_validate(_job_values(await self._request("GET", _job_path(job_id), params=params)))

    async def poll_job(self, job: RemoteJob, wait: float = 0.0) -> RemoteJob:
        """Return the job as it is now, or the same object if nothing has changed; see `Client.poll`."""
        headers = {"If-None-Match": job.etag} if job.etag else {}
        params = {"wait": f"{min(wait, LONG_POLL_SECONDS):.3f}"} if wait > 0 else None
        # The server answers when its time is over; the usual time-out comes on top of that.
        answer = await self._request("GET", _job_path(job.id), headers=headers, params=params)
        return job if answer.status == 304 else RemoteJob.model_validate(_job_values(answer))

    async def wait(self, job_id: UUID | str, timeout: float | None = None) -> RemoteJob:
        """Return the job once it has ended; see `Client.wait`."""
        ends = None if timeout is None else self.transport.now() + timeout
        job = await self.get(job_id)
        while not job.done:
            left = LONG_POLL_SECONDS if ends is None else ends - self.transport.now()
            if left <= 0:
                raise TimedOut(f"job {job_id} has not ended within {timeout:g} s; it is {job.status}.")
            began = self.transport.now()
            job = await self.poll_job(job, wait=left)
            if not job.done and self.transport.now() - began < LEAST_SECONDS:
                await self.transport.sleep(LEAST_SECONDS)
        return job

    async def follow(self, job_id: UUID | str) -> AsyncIterator[RemoteJob]:
        """Yield the job now and at every change until it has ended; see `Client.follow`."""
        job: RemoteJob | None = None
        polls = 0
        while job is None or not job.done:
            if polls % POLLS_PER_STREAM == 0:
                try:
                    async with aclosing(self._stream(job_id, job)) as stream:
                        async for latest in stream:
                            job, polls = latest, 0
                            yield job
                    if job is not None and job.done:
                        return
                except ServiceUnavailable:
                    pass
            if polls:
                await self.transport.sleep(self.poll)
            polls += 1
            try:
                latest = await self.get(job_id) if job is None else await self.poll_job(job)
            except ServiceUnavailable:
                continue
            if job is None or (latest.version, latest.alive) != (job.version, job.alive):
                job = latest
                yield job

    async def page(self, **filters: Any) -> Page:
        """Return one page of jobs; see `Client.page`."""
        params = {name: _query_value(value) for name, value in filters.items() if value is not None}
        body = _json(await self._request("GET", "/jobs", params=params))
        meta = body["meta"]
        jobs = [RemoteJob.model_validate(job) for job in body["data"]]
        return Page(jobs=jobs, total=meta["total"], total_capped=meta["total_capped"], next_cursor=meta["next_cursor"])

    async def jobs(self, **filters: Any) -> AsyncIterator[RemoteJob]:
        """Yield all jobs of a list, newest first, page after page; see `Client.jobs`."""
        filters = {"limit": 200, **filters}
        while True:
            page = await self.page(**filters)
            for job in page.jobs:
                yield job
            if page.next_cursor is None:
                return
            filters["cursor"] = page.next_cursor

    async def act(self, job_id: UUID | str, action: str, reason: str | None = None, **options: bool) -> RemoteJob:
        """Do an action with a job and return it as it is then; see `Client.cancel` and the others."""
        body = {"reason": reason, **{name: value for name, value in options.items() if value}}
        return RemoteJob.model_validate(
            _job_values(await self._request("POST", f"{_job_path(job_id)}/{action}", json=body))
        )

    async def change(self, job_id: UUID | str, *, priority: int | None, run_at: Any, reason: str | None) -> RemoteJob:
        """Change a waiting job; see `Client.change`."""
        body = {"priority": priority, "reason": reason, **encode_options({"run_at": run_at}, "change")}
        kept = {name: value for name, value in body.items() if value is not None}
        return RemoteJob.model_validate(_job_values(await self._request("PATCH", _job_path(job_id), json=kept)))

    async def delete(self, job_id: UUID | str, reason: str | None = None) -> None:
        """Delete an ended job; see `Client.delete`."""
        params = {"reason": reason} if reason else None
        await self._request("DELETE", _job_path(job_id), params=params, again=False)

    async def rows(self, path: str) -> list[dict[str, Any]]:
        """Return the rows of a list that is not one of jobs: stages, attempts, audit, explain."""
        found: list[dict[str, Any]] = _json(await self._request("GET", path))["data"]
        return found

    async def stats(self) -> dict[str, Any]:
        """Return the counts; see `Client.stats`."""
        found: dict[str, Any] = _json(await self._request("GET", "/jobs/stats"))["data"]
        return found

    # -- Requests -----------------------------------------------------------------------------------------------------

    async def _request(self, method: str, path: str, *, again: bool = True, **options: Any) -> Answer:
        for pause in (*(TRIES_AFTER if again else ()), None):
            try:
                return await self._once(method, path, options)
            except ServiceUnavailable as error:
                if pause is None:
                    raise
                asked = min(error.details.get("retry_after") or 0.0, LONGEST_RETRY_AFTER)
                await self.transport.sleep(max(pause, asked))
        raise AssertionError("unreachable")

    async def _once(self, method: str, path: str, options: Mapping[str, Any]) -> Answer:
        timeout = _timeout(options)
        answer = await self.transport.request(method, self.base + path, **options, **timeout)
        if answer.status < 400:
            return answer
        raise _problem(answer.status, answer.headers, answer.content)

    async def _stream(self, job_id: UUID | str, seen: RemoteJob | None) -> AsyncGenerator[RemoteJob, None]:
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": str(seen.version)} if seen else {})}
        async with self.transport.stream(f"{self.base}{_job_path(job_id)}/events", headers) as stream:
            if stream.status == 204:
                return
            if stream.status != 200:
                raise _stream_problem(stream)
            name, data = "", ""
            async for line in stream.lines:
                if line.startswith("event: "):
                    name = line[7:]
                elif line.startswith("data: "):
                    data = line[6:]
                elif line == "" and name:
                    if name == "job":
                        yield RemoteJob.model_validate_json(data)
                    elif name in {"done", "bye"}:
                        return
                    name = data = ""


def _stream_problem(stream: Lines) -> JobqueueError:
    problem = _problem(stream.status, stream.headers, stream.content)
    # A stream that the quota or a proxy refuses is no stream; polling may be let through.
    missing = stream.status in {405, 406, 429} or stream.status >= 500 or problem.code == "NOT_FOUND"
    return ServiceUnavailable(problem.message) if missing else problem


def _problem(status: int, headers: Mapping[str, str], content: bytes) -> JobqueueError:
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    return problem_of(status, body, _seconds(headers.get("retry-after")))


def _timeout(options: Mapping[str, Any]) -> dict[str, Any]:
    wait = (options.get("params") or {}).get("wait")
    return {} if wait is None else {"timeout": float(wait) + 15.0}


def _job_values(answer: Answer) -> dict[str, Any]:
    values: dict[str, Any] = _json(answer)
    return {**values, "etag": answer.headers.get("etag"), "poll_after": _seconds(answer.headers.get("retry-after"))}


def _json(answer: Answer) -> Any:
    try:
        return json.loads(answer.content)
    except ValueError:
        raise ServiceUnavailable("the answer is not one of the API's", hint="Is the address that of the API?") from None


def _seconds(header: str | None) -> float | None:
    return float(header) if header and header.isascii() and header.isdigit() else None


def _job_path(job_id: UUID | str) -> str:
    return f"/jobs/{quote(str(job_id), safe='')}"


def _query_value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    if isinstance(value, Sequence):
        return ",".join(str(part) for part in value)
    return str(value)
