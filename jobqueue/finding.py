"""Jobs found page by page, and waiting jobs changed by those who sent them.

```
page = await app.find_jobs("exports", payload={"kind": "pdf"}, max_jobs=100)
page = await app.find_jobs("exports", payload={"kind": "pdf"}, max_jobs=100, after=page[-1].id)
await app.update_jobs("exports", {"singleton_key": "report:7", "match": "all"}, priority=5)
await app.upsert("export", {"number": 7}, queue="exports", singleton_key="report:7")
```
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict
from uuid import UUID

from jobqueue import client
from jobqueue.errors import InvalidArgument, UnknownOption
from jobqueue.options import encode_options, options_text
from jobqueue.payloads import encode_payload

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Unpack

    from psycopg import AsyncConnection, Connection

    from jobqueue.client import AnyConnection
    from jobqueue.records import JobRecord
    from jobqueue.sender import Sender

UPDATE_JOBS = "select id from jobqueue.update_jobs(%s::text, %s::text::jsonb, %s::text::jsonb)"
UPSERT = "select id, created, updated, reason from jobqueue.upsert(%s::text, %s::text::jsonb, %s::text::jsonb)"

MOST_FOUND = 10_000
"""Jobs per page, as in SQL `find_jobs`."""
ORDERS = {"id": "id", "newest": "created_at desc, id desc"}


class JobFilter(TypedDict, total=False):
    """What jobs are found by; None is not applied. Each but `id` and the two JSON ones may be a list of alternatives."""

    id: UUID | str | None
    status: str | Sequence[str] | None
    job_type: str | Sequence[str] | None
    tenant: str | Sequence[str] | None
    subject: str | Sequence[str] | None
    singleton_key: str | Sequence[str] | None
    error_class: str | Sequence[str] | None
    error_code: str | Sequence[str] | None
    payload: Any
    """What the payload contains, at every level: `{"kind": "pdf"}`."""
    metadata: Mapping[str, Any] | None
    """What the metadata contain, likewise."""


FILTERS = ("queue", *JobFilter.__annotations__)


class Upserted(NamedTuple):
    """What `upsert` answers: neither `created` nor `updated` if a job that does not wait stands in its place.

    Then `id` is that job's (None if it belongs to another tenant) and `reason` says why, as of `Sent`.
    """

    id: UUID
    created: bool
    updated: bool
    reason: str | None


async def find_jobs(
    connection: AnyConnection,
    filters: Mapping[str, Any],
    *,
    max_jobs: int = 1000,
    after: UUID | str | None = None,
    order: Literal["id", "newest"] = "id",
) -> list[JobRecord]:
    """Return the jobs that have all of `filters`: `queue`, and those of `JobFilter`.

    `max_jobs`: 1 to 10,000, default 1,000. `after`: the last id of the page before; for order "id" (the default: by age,
    unless senders chose the ids). Raises InvalidArgument, UnknownOption for an unknown filter.
    """
    from jobqueue.records import COLUMNS, JobRecord

    if not 1 <= max_jobs <= MOST_FOUND:
        raise InvalidArgument(f"max_jobs must be from 1 to {MOST_FOUND}, not {max_jobs}")
    conditions = [_condition(name, value) for name, value in filters.items() if value is not None]
    if after is not None:
        conditions.append(("id > %s", _as_uuid("after", after)))
    where = f"where {' and '.join(text for text, _ in conditions)}" if conditions else ""
    columns = ", ".join(COLUMNS)
    query = f"select {columns} from jobqueue.jobs {where} order by {ORDERS[order]} limit %s"  # noqa: S608
    rows = await client.fetch(connection, query, (*(value for _, value in conditions), max_jobs))
    return [JobRecord.model_validate(dict(zip(COLUMNS, row, strict=True))) for row in rows]


class Finding:
    """The part of `App` that finds jobs page by page and changes those that wait."""

    if TYPE_CHECKING:
        _sender: Sender

        def _prepare(
            self, name: str | Callable[..., Any], payload: Any, queue: str | None, options: dict[str, Any]
        ) -> tuple[str, str, str]: ...
        def _lend(self, connection: Any) -> AbstractAsyncContextManager[AsyncConnection[Any]]: ...
        def _lend_blocking(self, connection: Any) -> AbstractContextManager[Connection[Any]]: ...

    async def find_jobs(
        self,
        queue: str | Sequence[str] | None = None,
        *,
        max_jobs: int = 1000,
        after: UUID | str | None = None,
        **filters: Unpack[JobFilter],
    ) -> list[JobRecord]:
        """Return jobs in the order of their ids: by age, unless senders chose them.

        `queue`: a name, or a list of them; None (default) for all. `max_jobs`: 1 to 10,000, default 1,000. `after`: the
        last id of the page before, which need not exist any more, so that pages stay stable while jobs come and go.
        `filters`: id, status, job_type, tenant, subject, singleton_key, error_class, error_code (a text, or a list of
        which one is meant), payload and metadata (what they contain); all must hold. Raises InvalidArgument,
        UnknownOption.
        """
        async with self._lend(None) as lent:
            return await find_jobs(lent, {"queue": queue, **filters}, max_jobs=max_jobs, after=after)

    def find_jobs_sync(
        self,
        queue: str | Sequence[str] | None = None,
        *,
        max_jobs: int = 1000,
        after: UUID | str | None = None,
        **filters: Unpack[JobFilter],
    ) -> list[JobRecord]:
        """The blocking form of `find_jobs`."""
        with self._lend_blocking(None) as lent:
            return client.blocking(find_jobs(lent, {"queue": queue, **filters}, max_jobs=max_jobs, after=after))

    async def update_jobs(
        self, queue: str, target: UUID | str | Mapping[str, Any], *, connection: Any = None, **changes: Any
    ) -> list[UUID]:
        """Change jobs of a queue that wait, and return the ids of those that were changed.

        `target`: an id, or `{"singleton_key": …, "match": "newest" (default), "oldest" or "all", "tenant": "default"}`.
        `changes`: `payload` (what JSON has, a model or a dataclass; no handler checks it) and the options of `send` that
        do not say who the job is: priority, run_at, delay, subject, display_name, metadata, group, tier, max_retries,
        dead_letter, and those of time. What is not named stays; None is as if it had not been sent. A job that a worker
        has claimed meanwhile is passed over. `connection`: as of `send`.

        Raises QueueNotFound, InvalidArgument, UnknownOption, Forbidden, TooLarge.
        """
        parameters = _update_parameters(queue, target, changes)
        async with self._lend(connection) as lent:
            return [found for (found,) in await client.fetch(lent, UPDATE_JOBS, parameters)]

    def update_jobs_sync(
        self, queue: str, target: UUID | str | Mapping[str, Any], *, connection: Any = None, **changes: Any
    ) -> list[UUID]:
        """The blocking form of `update_jobs`."""
        parameters = _update_parameters(queue, target, changes)
        with self._lend_blocking(connection) as lent:
            return [found for (found,) in client.blocking(client.fetch(lent, UPDATE_JOBS, parameters))]

    async def upsert(
        self,
        name: str | Callable[..., Any],
        payload: Any = None,
        *,
        queue: str | None = None,
        connection: Any = None,
        **options: Any,
    ) -> Upserted:
        """Change the waiting job with this `id` or `singleton_key`, or send a new one.

        `name`, `payload`, `queue`, `connection`, `options`: as of `send`, with exactly one of `id` and `singleton_key`. A
        waiting job takes the payload and the options, the handler's own among them, as far as `update_jobs` changes
        them; the others matter only if it is sent. Raises as of `send`.
        """
        parameters = self._prepare(name, payload, queue, options)
        async with self._lend(connection) as lent:
            return Upserted._make((await self._sender.upsert(lent, UPSERT, parameters))[0])

    def upsert_sync(
        self,
        name: str | Callable[..., Any],
        payload: Any = None,
        *,
        queue: str | None = None,
        connection: Any = None,
        **options: Any,
    ) -> Upserted:
        """The blocking form of `upsert`."""
        parameters = self._prepare(name, payload, queue, options)
        with self._lend_blocking(connection) as lent:
            return Upserted._make(client.blocking(self._sender.upsert(lent, UPSERT, parameters))[0])


def _condition(name: str, value: Any) -> tuple[str, Any]:
    if name not in FILTERS:
        near = difflib.get_close_matches(name, FILTERS, n=1, cutoff=0.0)[0]
        raise UnknownOption(
            f'find_jobs has no filter "{name}"',
            hint=f'Did you mean "{near}"? Known are: {", ".join(sorted(FILTERS))}.',
            details={"option": name, "nearest": near},
        )
    if name == "id":
        return "id = %s", _as_uuid(name, value)
    if name in {"payload", "metadata"}:
        return f"{name} @> %s::text::jsonb", encode_payload(value, f"the filter {name}")
    return f"{name} = any(%s::text[])", [value] if isinstance(value, str) else list(value)


def _as_uuid(name: str, value: UUID | str) -> UUID:
    try:
        return value if isinstance(value, UUID) else UUID(value)
    except (ValueError, AttributeError, TypeError):
        raise InvalidArgument(f"{name} is no uuid: {str(value)[:100]!r}", details={"option": name}) from None


def _update_parameters(
    queue: str, target: UUID | str | Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[str, str, str]:
    """Return what SQL `update_jobs` takes; the database judges the target and which options can be changed."""
    wanted = target if isinstance(target, Mapping) else {"id": target}
    given = {name: value for name, value in changes.items() if name != "payload"}
    cleared = {name: None for name, value in given.items() if value is None}
    text = options_text(cleared | encode_options(given, "update_jobs"))
    if "payload" in changes:
        payload = encode_payload(changes["payload"], "update_jobs")
        text = f'{text[:-1]}{"," if given else ""}"payload":{payload}}}'
    return queue, options_text(wanted), text
