"""Queues and events from Python: `await app.create_queue("indexing", max_retries=5)`, `await app.publish("paid", {…})`.

Every call is one statement; what it does is decided in the database (`sql/functions/queues.sql`, `publish.sql`, …).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from jobqueue import client
from jobqueue.durations import parse_duration
from jobqueue.options import encode_options, options_text
from jobqueue.payloads import encode_payload
from jobqueue.support import Support

if TYPE_CHECKING:
    from psycopg import AsyncConnection, Connection

    from jobqueue.sender import Sender

CREATE_QUEUE = "select jobqueue.create_queue(%s::text, %s::text::jsonb)"
UPDATE_QUEUE = "select jobqueue.update_queue(%s::text, %s::text::jsonb)"
DELETE_QUEUE = "select jobqueue.delete_queue(%s::text)"
PAUSE_QUEUE = "select jobqueue.pause_queue(%s::text, %s::text)"
RESUME_QUEUE = "select jobqueue.resume_queue(%s::text, %s::text)"
PUBLISH = "select queue, id, created, reason from jobqueue.publish(%s::text, %s::text::jsonb, %s::text::jsonb)"
SUBSCRIBE = "select jobqueue.subscribe(%s::text, %s::text)"
UNSUBSCRIBE = "select jobqueue.unsubscribe(%s::text, %s::text)"
EXPLAIN = "select reason, detail, what_to_do from jobqueue.explain(%s)"
BLOCKED_KEYS = "select singleton_key, tenant, job_id, status, since, waiting from jobqueue.blocked_keys(%s::text)"
REDRIVE = "select redriven, sent, conflicts, unroutable from jobqueue.redrive(%s::text, %s::text::jsonb)"
PREVIEW_REDRIVE = "select destination, originals, new_jobs from jobqueue.preview_redrive(%s::text, %s::text::jsonb)"

LIMITS = ("concurrency", "group_concurrency", "key_concurrency", "rate_limit", "ageing", "fair_by")
OWN_OPTIONS = ("policy", "warn_backlog", *LIMITS)
"""Options of a queue that `send` does not have."""


class Published(NamedTuple):
    """What `publish` answers for one queue: `created`, `id` and `reason` as of `Sent`."""

    queue: str
    id: UUID | None
    created: bool
    reason: str | None


class Reason(NamedTuple):
    """One row of `explain`: a word for programs, a sentence for people, and what to do about it (None: nothing)."""

    reason: str
    detail: str
    what_to_do: str | None


class BlockedKey(NamedTuple):
    """A key whose first job does not run, that job's id and status, since when, and how many jobs wait behind it."""

    singleton_key: str
    tenant: str
    job_id: UUID
    status: str
    since: datetime
    waiting: int


class Redriven(NamedTuple):
    """What `redrive` did: originals sent back, new jobs sent, copies that stay (key taken; no queue to go to)."""

    redriven: int
    sent: int
    conflicts: int
    unroutable: int


class RedrivePreview(NamedTuple):
    """What `redrive` would send to one queue (None: there is none): originals that go back, and new jobs."""

    destination: str | None
    originals: int
    new_jobs: int


class Administration(Support):
    """The part of `App` that manages queues and events."""

    if TYPE_CHECKING:
        _sender: Sender

        def _lend(self, connection: Any) -> AbstractAsyncContextManager[AsyncConnection[Any]]: ...
        def _lend_blocking(self, connection: Any) -> AbstractContextManager[Connection[Any]]: ...

    async def create_queue(self, name: str, **options: Any) -> bool:
        """Make a queue and return whether it is new; one that has the given values already is fine.

        `options`: `policy`, each per singleton_key: "standard" (the default), "short" (one job that has not started),
        "singleton" (one that runs), "stately" (one of each), "exclusive" (one that has not ended), "key_strict_fifo"
        (one after the other, a failed one holds the key). Limits (default None): `concurrency`, `key_concurrency`,
        `group_concurrency` ({"default": n, "tiers": {name: n}}), `rate_limit` ({"limit": n, "period": duration, "per":
        "queue" or "key"}: so many starts in any period). Order: `fair_by` ("group" or "tenant": in turn inside one
        priority) or `ageing` (so long a wait counts like one step of priority). `warn_backlog` (ready jobs, default
        None). As defaults of its jobs max_retries (3),
        retry_delay (60 s), retry_backoff, retry_delay_max, timeout (15 min), max_runtime, lease (30 s), expires_in,
        keep_completed (7 days), keep_ended (30 days), dead_letter. Durations: seconds, text or timedelta.

        Raises Conflict if it is there with other values (use `update_queue`), InvalidArgument, UnknownOption.
        """
        return bool((await self._rows(CREATE_QUEUE, (name, queue_options(options))))[0][0])

    async def update_queue(self, name: str, **options: Any) -> None:
        """Change options of a queue; None clears one. Waiting jobs follow unless they were sent with their own value.

        Raises QueueNotFound, Conflict for another policy while jobs have not ended, InvalidArgument, UnknownOption.
        """
        await self._rows(UPDATE_QUEUE, (name, queue_options(options)))

    async def delete_queue(self, name: str) -> int:
        """Take a queue away, with its ended jobs; return how many those were.

        Raises QueueNotFound, Conflict while it has jobs that have not ended or something names it.
        """
        return int((await self._rows(DELETE_QUEUE, (name,)))[0][0])

    async def pause_queue(self, name: str, reason: str) -> None:
        """Start none of its jobs until it is resumed; those that run go on. Raises QueueNotFound, InvalidArgument."""
        await self._rows(PAUSE_QUEUE, (name, reason))

    async def resume_queue(self, name: str, reason: str) -> None:
        """Start its jobs again. Raises QueueNotFound, InvalidArgument."""
        await self._rows(RESUME_QUEUE, (name, reason))

    async def subscribe(self, event: str, queue: str) -> bool:
        """Let a queue have a job for every event of this name; return whether that is new. Raises InvalidArgument."""
        return bool((await self._rows(SUBSCRIBE, (event, queue)))[0][0])

    async def unsubscribe(self, event: str, queue: str) -> bool:
        """Send it no more jobs for this event; return whether it was subscribed."""
        return bool((await self._rows(UNSUBSCRIBE, (event, queue)))[0][0])

    async def publish(
        self, event: str, payload: Any = None, *, connection: Any = None, **options: Any
    ) -> list[Published]:
        """Send a job to every queue that subscribed to an event, all or none; return one answer per queue, by name.

        `payload`: anything that JSON has, a pydantic model or a dataclass. `connection`, `options`: as of `send`, but
        no `id`. An empty list: nobody subscribed. Raises as of `send`.
        """
        parameters = publish_parameters(event, payload, options)
        async with self._lend(connection) as lent:
            return list(map(Published._make, await self._sender.publish(lent, PUBLISH, parameters)))

    def publish_sync(
        self, event: str, payload: Any = None, *, connection: Any = None, **options: Any
    ) -> list[Published]:
        """The blocking form of `publish`."""
        parameters = publish_parameters(event, payload, options)
        with self._lend_blocking(connection) as lent:
            return list(map(Published._make, client.blocking(self._sender.publish(lent, PUBLISH, parameters))))

    async def explain(self, job_id: UUID | str) -> list[Reason]:
        """Say why a job is not running, or why it ended as it did; the weightiest reason first. Raises JobNotFound."""
        return list(map(Reason._make, await self._rows(EXPLAIN, (client.as_job_id(job_id),))))

    async def blocked_keys(self, queue: str) -> list[BlockedKey]:
        """List the keys of a key_strict_fifo queue whose first job failed, is paused or waits for a retry; oldest first.

        Raises QueueNotFound, InvalidArgument for a queue with another policy.
        """
        return list(map(BlockedKey._make, await self._rows(BLOCKED_KEYS, (queue,))))

    async def redrive(self, dead_letter: str, **options: Any) -> Redriven:
        """Send dead letters back to where they failed.

        `options`: destination (another queue), source (only what failed there), payload (only what contains this),
        created_before (an aware time), ids, max_jobs (default 1,000, oldest first). Raises QueueNotFound,
        InvalidArgument, UnknownOption.
        """
        return Redriven._make((await self._rows(REDRIVE, (dead_letter, redrive_options(options))))[0])

    async def preview_redrive(self, dead_letter: str, **options: Any) -> list[RedrivePreview]:
        """Say what `redrive` would do with the same arguments, per destination; nothing is changed. Raises as `redrive`."""
        parameters = (dead_letter, redrive_options(options))
        return list(map(RedrivePreview._make, await self._rows(PREVIEW_REDRIVE, parameters)))

    async def _rows(self, query: str, parameters: tuple[Any, ...], connection: Any = None) -> list[tuple[Any, ...]]:
        async with self._lend(connection) as lent:
            return await client.fetch(lent, query, parameters)


def queue_options(options: Mapping[str, Any]) -> str:
    """Return the options of a queue as JSON text; the database judges their names. Raises InvalidArgument."""
    own = {name: value for name, value in options.items() if name in OWN_OPTIONS and (name, value) != ("policy", None)}
    if own.get("ageing") is not None:
        own["ageing"] = parse_duration(own["ageing"])
    if isinstance(rate := own.get("rate_limit"), Mapping) and rate.get("period") is not None:
        own["rate_limit"] = {**rate, "period": parse_duration(rate["period"])}
    others = {name: value for name, value in options.items() if name not in OWN_OPTIONS}
    return options_text(own | encode_options(others, "a queue"))


def publish_parameters(event: str, payload: Any, options: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return what SQL `publish` takes. Raises InvalidArgument, UnknownOption."""
    return event, encode_payload(payload, event), options_text(encode_options(options, "publish"))


def redrive_options(options: Mapping[str, Any]) -> str:
    """Return the options of `redrive` as JSON text. Raises InvalidArgument for a time without an offset."""
    chosen = {name: value for name, value in options.items() if value is not None}
    if "created_before" in chosen:
        # read as every time of `send` is
        chosen["created_before"] = encode_options({"run_at": chosen["created_before"]}, "redrive")["run_at"]
    if "ids" in chosen:
        chosen["ids"] = [str(job_id) for job_id in chosen["ids"]]
    return options_text(chosen)
