"""Flows and batches from Python.

A flow is jobs that wait for jobs, sent all or none; a batch is jobs that are counted together, with a callback job:

```
flow = app.flow()
scan = flow.add("scan", {"path": "."})
parts = [flow.add("parse", {"part": n}, depends_on=[scan]) for n in range(3)]
flow.add("report", depends_on=parts, on_failure="run")
ids = await flow.send()

async with app.batch(callback="report") as batch:
    await app.send_many("parse", payloads, batch=batch)
```

The database decides everything (`sql/functions/flow.sql`, `batch.sql`); here it is only written down.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import UUID

from jobqueue import client
from jobqueue.errors import InvalidArgument
from jobqueue.json_text import to_json_text
from jobqueue.options import encode_dependencies, options_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import AsyncConnection, Connection

    from jobqueue.sender import Sender

OnFailure = Literal["wait", "fail", "cancel", "run"]
"""What becomes of a child when its parent fails or is cancelled: it waits for a retry or skip, fails, …"""

COUNTS = "blocked, pending, processing, paused, completed, failed, cancelled, skipped"
SEND_FLOW = "select ref, id from jobqueue.send_flow(%s::text::jsonb)"
CREATE_BATCH = "select jobqueue.create_batch(%s::text::jsonb)"
CLOSE_BATCH = "select jobqueue.close_batch(%s)"
BATCH_STATUS = f"""
    select batch_id, name, state, total, ended, pct, {COUNTS}, callback_job_id, callback_error, ended_at
    from jobqueue.batch_status(%s)
"""  # noqa: S608
FLOW_STATUS = f"select flow_id, total, ended, pct, {COUNTS}, ended_at from jobqueue.flow_status(%s)"  # noqa: S608


class FlowStatus(NamedTuple):
    """How far a flow is: `ended` of `total` jobs (`pct`, rounded down), and how many there are in each status."""

    id: UUID
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
    ended_at: datetime | None


class BatchStatus(NamedTuple):
    """How far a batch is; `state`: open (jobs may still come), closed (it ends with its last job) or ended."""

    id: UUID
    name: str | None
    state: str
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
    callback_job_id: UUID | None
    callback_error: str | None
    ended_at: datetime | None


class Flow:
    """Jobs that depend on each other, collected to be sent together. Made by `app.flow()`."""

    def __init__(self, app: Flows) -> None:
        self._app = app
        self._jobs: dict[str, str] = {}

    def add(
        self,
        name: str | Callable[..., Any],
        payload: Any = None,
        *,
        ref: str | None = None,
        queue: str | None = None,
        depends_on: Iterable[Any] = (),
        on_failure: OnFailure | None = None,
        **options: Any,
    ) -> str:
        """Add a job and return its ref, for others to depend on.

        `name`, `payload`, `queue`, `options`: as of `app.send`. `ref`: its name in this flow (default: the job_type,
        numbered from the second on). `depends_on`: refs, ids of jobs that are there, or `{"ref": …, "on_failure": …}`.
        `on_failure`: what becomes of it when one of those fails or is cancelled: "wait" (default: until that one is
        retried or skipped), "fail", "cancel" or "run". Raises InvalidArgument, UnknownOption, QueueNotFound.
        """
        where, text, chosen = self._app._prepare(name, payload, queue, options)
        chosen_ref = ref or self._free_ref(name if isinstance(name, str) else getattr(name, "__name__", "job"))
        if chosen_ref in self._jobs:
            raise InvalidArgument(f'the ref "{chosen_ref}" is there twice', details={"ref": chosen_ref})
        own: dict[str, Any] = {"ref": chosen_ref, "queue": where}
        if parents := encode_dependencies(depends_on):
            own |= {"depends_on": parents}
        if on_failure is not None:
            own |= {"on_failure": on_failure}
        more = "" if chosen == "{}" else f',"options":{chosen}'
        self._jobs[chosen_ref] = f'{to_json_text(own)[:-1]},"payload":{text}{more}}}'
        return chosen_ref

    async def send(self, *, connection: Any = None) -> dict[str, UUID]:
        """Send all of it or nothing, and return the ids by ref. As of `app.send_flow`."""
        return await self._app.send_flow(self, connection=connection)

    def send_sync(self, *, connection: Any = None) -> dict[str, UUID]:
        """The blocking form of `send`."""
        return self._app.send_flow_sync(self, connection=connection)

    @property
    def text(self) -> str:
        """The flow as JSON text, for SQL `send_flow`."""
        return f"[{','.join(self._jobs.values())}]"

    def _free_ref(self, name: str) -> str:
        number = len(self._jobs) + 1
        return name if name not in self._jobs else f"{name}-{number}"


class Flows:
    """The part of `App` that sends flows and batches."""

    if TYPE_CHECKING:
        _sender: Sender

        def _prepare(
            self, name: str | Callable[..., Any], payload: Any, queue: str | None, options: dict[str, Any]
        ) -> tuple[str, str, str]: ...
        def _lend(self, connection: Any) -> AbstractAsyncContextManager[AsyncConnection[Any]]: ...
        def _lend_blocking(self, connection: Any) -> AbstractContextManager[Connection[Any]]: ...

    def flow(self) -> Flow:
        """Return an empty flow: `add` jobs to it, then `send` it."""
        return Flow(self)

    async def send_flow(self, jobs: Flow | Iterable[Mapping[str, Any]], *, connection: Any = None) -> dict[str, UUID]:
        """Send jobs that depend on each other, all or none, across queues; return their ids by ref.

        `jobs`: a `Flow`, or mappings with the arguments of `Flow.add`, at most 100,000: `{"name": "report",
        "depends_on": ["scan"]}`. `connection`: as of `send`.

        Raises InvalidArgument for a cycle, which is named, and for a ref that is unknown or there twice; Conflict if
        another job stands in the place of one; JobNotFound for an unknown parent; otherwise as of `send`.
        """
        async with self._lend(connection) as lent:
            return _ids(await self._sender.send_flow(lent, SEND_FLOW, (self._flow_of(jobs).text,)))

    def send_flow_sync(self, jobs: Flow | Iterable[Mapping[str, Any]], *, connection: Any = None) -> dict[str, UUID]:
        """The blocking form of `send_flow`."""
        with self._lend_blocking(connection) as lent:
            return _ids(client.blocking(self._sender.send_flow(lent, SEND_FLOW, (self._flow_of(jobs).text,))))

    async def flow_status(self, flow_or_job: UUID | str) -> FlowStatus:
        """Say how far a flow is, by its id or that of any of its jobs. Raises NotFound."""
        async with self._lend(None) as lent:
            rows = await client.fetch(lent, FLOW_STATUS, (client.as_job_id(flow_or_job),))
        return FlowStatus._make(rows[0])

    async def create_batch(
        self,
        name: str | None = None,
        *,
        callback: str | Callable[..., Any] | None = None,
        payload: Any = None,
        callback_on: Literal["ended", "first_failure", "either"] = "ended",
        callback_queue: str | None = None,
        callback_options: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        tenant: str | None = None,
        connection: Any = None,
    ) -> UUID:
        """Make a batch and return its id; send jobs into it with `batch=id`, then `close_batch`.

        `callback`: a handler's name or function, sent once, with `payload`; its metadata has batch_id and batch_name.
        `callback_on`: "ended" (default: the batch is closed and all its jobs have ended), "first_failure" (a job of it
        ends as failed) or "either" (what comes first). `callback_queue`, `callback_options`: as of `send`. `name`,
        `metadata`: kept with the batch. `tenant`: of its jobs (default "default"). `connection`: as of `send`, whose
        errors it raises.
        """
        text = self._batch_text(
            name, callback, payload, callback_on, callback_queue, callback_options, metadata, tenant
        )
        async with self._lend(connection) as lent:
            return UUID(str((await client.fetch(lent, CREATE_BATCH, (text,)))[0][0]))

    async def close_batch(self, batch: UUID | str, *, connection: Any = None) -> bool:
        """Say that no more jobs come: the batch ends with those that it has. Returns whether it was open.

        Waits for open transactions that have sent into it. Raises NotFound.
        """
        async with self._lend(connection) as lent:
            return bool((await client.fetch(lent, CLOSE_BATCH, (client.as_job_id(batch),)))[0][0])

    @asynccontextmanager
    async def batch(self, name: str | None = None, *, connection: Any = None, **options: Any) -> AsyncIterator[UUID]:
        """Make a batch, and close it at the end of the block: `async with app.batch(callback="report") as batch:`.

        `connection`, `options`: of `create_batch`. After an exception in the block it stays open, and sends no callback.
        """
        made = await self.create_batch(name, connection=connection, **options)
        yield made
        await self.close_batch(made, connection=connection)

    async def batch_status(self, batch: UUID | str) -> BatchStatus:
        """Say how far a batch is. Raises NotFound."""
        async with self._lend(None) as lent:
            return BatchStatus._make((await client.fetch(lent, BATCH_STATUS, (client.as_job_id(batch),)))[0])

    def create_batch_sync(self, name: str | None = None, *, connection: Any = None, **options: Any) -> UUID:
        """The blocking form of `create_batch`."""
        given: dict[str, Any] = dict.fromkeys(
            ("callback", "payload", "callback_queue", "callback_options", "metadata", "tenant")
        )
        text = self._batch_text(name, **{**given, "callback_on": "ended", **options})
        with self._lend_blocking(connection) as lent:
            return UUID(str(client.blocking(client.fetch(lent, CREATE_BATCH, (text,)))[0][0]))

    def close_batch_sync(self, batch: UUID | str, *, connection: Any = None) -> bool:
        """The blocking form of `close_batch`."""
        with self._lend_blocking(connection) as lent:
            return bool(client.blocking(client.fetch(lent, CLOSE_BATCH, (client.as_job_id(batch),)))[0][0])

    def batch_status_sync(self, batch: UUID | str) -> BatchStatus:
        """The blocking form of `batch_status`."""
        with self._lend_blocking(None) as lent:
            rows = client.blocking(client.fetch(lent, BATCH_STATUS, (client.as_job_id(batch),)))
        return BatchStatus._make(rows[0])

    def _flow_of(self, jobs: Flow | Iterable[Mapping[str, Any]]) -> Flow:
        if isinstance(jobs, Flow):
            return jobs
        flow = Flow(self)
        for job in jobs:
            if "name" not in job:
                raise InvalidArgument("a job of a flow has no name", hint='Give {"name": "report", …}.')
            flow.add(**job)
        return flow

    def _batch_text(
        self,
        name: str | None,
        callback: str | Callable[..., Any] | None,
        payload: Any,
        callback_on: str,
        callback_queue: str | None,
        callback_options: Mapping[str, Any] | None,
        metadata: Mapping[str, Any] | None,
        tenant: str | None,
    ) -> str:
        given = {"name": name, "metadata": metadata, "tenant": tenant, "callback_on": callback_on}
        text = options_text({key: value for key, value in given.items() if value is not None})
        if callback is None:
            return text
        where, input_text, chosen = self._prepare(callback, payload, callback_queue, dict(callback_options or {}))
        return f'{text[:-1]},"callback":{{"queue":{to_json_text(where)},"payload":{input_text},"options":{chosen}}}}}'


def _ids(rows: Sequence[tuple[Any, ...]]) -> dict[str, UUID]:
    return {ref: job_id for ref, job_id in rows if ref is not None}
