"""`App`: the handlers of an application, and how its jobs are sent, read and run."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from jobqueue import client
from jobqueue.administration import Administration
from jobqueue.client import Action, Sent
from jobqueue.errors import InvalidArgument, QueueNotFound
from jobqueue.flows import Flows
from jobqueue.instrumentation import Instrumentation
from jobqueue.integrations.adapters import adopt, adopt_blocking
from jobqueue.options import encode_options, merge_options, options_text
from jobqueue.payloads import encode_payload
from jobqueue.registration import Registration
from jobqueue.schedules import Schedules
from jobqueue.statistics import Statistics

if TYPE_CHECKING:
    from types import TracebackType

    from psycopg import AsyncConnection, Connection

    from jobqueue.classify import Classifier
    from jobqueue.connections import Connections
    from jobqueue.handlers import Handler
    from jobqueue.records import JobRecord
    from jobqueue.settings import Settings
    from jobqueue.worker.worker import Worker

BULK_SIZE = 10_000
"""Jobs per statement of send_many; more of them are sent in one transaction."""


class App(Registration, Schedules, Flows, Administration, Statistics, Instrumentation):
    """An application's handlers and its way to the database.

    `dsn`: where the jobs live; default: the settings (`JOBQUEUE_DSN`, …), without any the embedded server, which is
    started when it is first needed. `settings`: default: read from the environment when first needed. `classify`: the
    app's own error classifier (see `jobqueue.classify`). `max_connections`: connections of each kind, asynchronous and
    blocking, for sending and reading (default 10); a worker opens its own.

    Nothing is connected before it is needed; `await app.open()` or `async with app:` does it at once and finds out
    whether the schema fits. The schema is never changed by an app.
    """

    def __init__(
        self,
        dsn: str | None = None,
        settings: Settings | None = None,
        *,
        classify: Classifier | None = None,
        max_connections: int = 10,
    ) -> None:
        super().__init__(classify)
        self._dsn = dsn
        self._settings = settings
        self._max_connections = max_connections
        self._connections: Connections | None = None
        self._checked = False
        self._lock = threading.Lock()

    # -- sending -------------------------------------------------------------------------------------------------------

    async def send(
        self,
        name: str | Callable[..., Any],
        payload: Any = None,
        *,
        queue: str | None = None,
        connection: Any = None,
        **options: Any,
    ) -> Sent:
        """Add a job and return its id: `await app.send("index_repository", IndexRepository(path="."), priority=5)`.

        `name`: a handler's name, or its function; another name only together with `queue`. `payload`: what the handler
        takes; checked before anything is stored. `connection`: your own, so that the job joins your transaction (it is
        neither committed nor closed here): psycopg's, SQLAlchemy's or asyncpg's, for `send_sync` also Django's
        (docs/guide/integrations.md). `options`: those of SQL `send`; durations may be timedelta, times must be aware.

        Returns `created=False` and the reason if another job stands in its place. Raises QueueNotFound for an unknown
        name, InvalidArgument, UnknownOption, Forbidden, Conflict, TooLarge, DatabaseUnavailable, SchemaOutdated.
        """
        where, text, chosen = self._prepare(name, payload, queue, options)
        async with self._lend(connection) as lent:
            return await self._sender.send(lent, where, text, chosen)

    def send_sync(
        self,
        name: str | Callable[..., Any],
        payload: Any = None,
        *,
        queue: str | None = None,
        connection: Any = None,
        **options: Any,
    ) -> Sent:
        """The blocking form of `send`."""
        where, text, chosen = self._prepare(name, payload, queue, options)
        with self._lend_blocking(connection) as lent:
            return client.blocking(self._sender.send(lent, where, text, chosen))

    async def send_many(
        self,
        name: str | Callable[..., Any],
        payloads: Iterable[Any],
        *,
        queue: str | None = None,
        connection: Any = None,
        **options: Any,
    ) -> list[Sent]:
        """Add one job per payload, all or none, and return what `send` would, in order. `options` apply to all of them.

        Faster than single sends. Raises as of `send`; `details["index"]` says which payload was refused.
        """
        where, parts = self._prepare_many(name, payloads, queue, options)
        async with self._lend(connection) as lent:
            async with lent.transaction() if len(parts) > 1 else contextlib.nullcontext():
                return [sent for part in parts for sent in await self._sender.send_many(lent, where, part)]

    def send_many_sync(
        self,
        name: str | Callable[..., Any],
        payloads: Iterable[Any],
        *,
        queue: str | None = None,
        connection: Any = None,
        **options: Any,
    ) -> list[Sent]:
        """The blocking form of `send_many`."""
        where, parts = self._prepare_many(name, payloads, queue, options)
        with self._lend_blocking(connection) as lent:
            with lent.transaction() if len(parts) > 1 else contextlib.nullcontext():
                return [sent for part in parts for sent in client.blocking(self._sender.send_many(lent, where, part))]

    # -- reading and acting --------------------------------------------------------------------------------------------

    async def get(self, job_id: UUID | str) -> JobRecord:
        """Return a job as it is now. Raises JobNotFound."""
        async with self._lend(None) as lent:
            return await client.get(lent, job_id)

    def get_sync(self, job_id: UUID | str) -> JobRecord:
        """The blocking form of `get`."""
        with self._lend_blocking(None) as lent:
            return client.blocking(client.get(lent, job_id))

    async def find(
        self,
        *,
        status: str | Sequence[str] | None = None,
        queue: str | None = None,
        job_type: str | None = None,
        tenant: str | None = None,
        subject: str | None = None,
        limit: int = 20,
    ) -> list[JobRecord]:
        """Return jobs, newest first; `limit`: 1 to 1,000, default 20."""
        async with self._lend(None) as lent:
            return await client.find(
                lent, status=status, queue=queue, job_type=job_type, tenant=tenant, subject=subject, limit=limit
            )

    async def cancel(self, job_id: UUID | str, reason: str, *, force: bool = False, connection: Any = None) -> str:
        """Stop a job for good and return its status; a running one is asked, or with `force` stopped at once.

        Like all actions: `reason` goes into the audit; `connection`: as of `send`. Raises JobNotFound, InvalidTransition
        with what is allowed, InvalidArgument for a blank reason.
        """
        return await self.act("cancel", job_id, reason, connection=connection, force=force)

    async def pause(self, job_id: UUID | str, reason: str, *, connection: Any = None) -> str:
        """Hold a waiting job, or ask a running, pausable one to stop at its next safe place. Raises as of `cancel`."""
        return await self.act("pause", job_id, reason, connection=connection)

    async def resume(self, job_id: UUID | str, reason: str, *, connection: Any = None) -> str:
        """Take up a paused or cancelled job again. Raises as of `cancel`."""
        return await self.act("resume", job_id, reason, connection=connection)

    async def retry(self, job_id: UUID | str, reason: str, *, from_start: bool = False, connection: Any = None) -> str:
        """Run a failed job again; `from_start` also drops what its attempts have kept. Raises as of `cancel`."""
        return await self.act("retry", job_id, reason, connection=connection, from_start=from_start)

    async def skip(self, job_id: UUID | str, reason: str, *, connection: Any = None) -> str:
        """Go on without a failed job. Raises as of `cancel`."""
        return await self.act("skip", job_id, reason, connection=connection)

    async def run_now(self, job_id: UUID | str, reason: str, *, connection: Any = None) -> str:
        """Do not wait for the job's `run_at`. Raises as of `cancel`."""
        return await self.act("run_now", job_id, reason, connection=connection)

    async def prioritize(self, job_id: UUID | str, priority: int, reason: str, *, connection: Any = None) -> str:
        """Give a waiting job another priority, higher first. Raises as of `cancel`."""
        return await self.act("prioritize", job_id, reason, connection=connection, priority=priority)

    async def delete(self, job_id: UUID | str, reason: str, *, connection: Any = None) -> str:
        """Remove an ended job and return the status that it had. Raises as of `cancel`."""
        return await self.act("delete", job_id, reason, connection=connection)

    async def act(
        self, action: Action, job_id: UUID | str, reason: str, *, connection: Any = None, **arguments: Any
    ) -> str:
        """Do any of the actions above by its name."""
        async with self._lend(connection) as lent:
            return await client.act(lent, action, job_id, reason, **arguments)

    def act_sync(
        self, action: Action, job_id: UUID | str, reason: str, *, connection: Any = None, **arguments: Any
    ) -> str:
        """The blocking form of every action: `app.act_sync("cancel", id, "no longer needed")`."""
        with self._lend_blocking(connection) as lent:
            return client.blocking(client.act(lent, action, job_id, reason, **arguments))

    # -- running -------------------------------------------------------------------------------------------------------

    async def run_worker(
        self,
        queues: Sequence[str] | None = None,
        concurrency: int | None = None,
        until_idle: bool = False,
        **options: Any,
    ) -> None:
        """Run jobs in this process until it is told to stop.

        `queues`: default `JOBQUEUE_QUEUES`, else all. `concurrency`: jobs at a time (default `JOBQUEUE_CONCURRENCY`,
        100).
        `until_idle`: return when no job is ready any more. `options`: of `jobqueue.worker.worker.Worker`.
        Raises DatabaseUnavailable, SchemaOutdated.
        """
        worker = await self.make_worker(queues, concurrency, until_idle, **options)
        await worker.run()

    async def make_worker(
        self,
        queues: Sequence[str] | None = None,
        concurrency: int | None = None,
        until_idle: bool = False,
        **options: Any,
    ) -> Worker:
        """Return the worker that `run_worker` would run, for programs that drain or watch it."""
        from jobqueue.worker.worker import Worker

        dsn = await asyncio.to_thread(self.resolve_dsn)
        self._instrument_as_set(self.settings)
        same = ("queues", "concurrency", "drain_timeout", "start_timeout", "listen_dsn", "pooler")
        defaults: dict[str, Any] = {name: getattr(self.settings, name) for name in same}
        defaults |= {"poll": self.settings.poll_interval, "classify": self.classify, "hooks": self.hooks}
        if any(handler.executor == "process" for handler in self.registry.values()):
            from jobqueue.worker.process import ProcessPool

            defaults["processes"] = ProcessPool(os.cpu_count() or 1)
        given = {"queues": queues, "concurrency": concurrency, **options}
        chosen = {**defaults, **{name: value for name, value in given.items() if value is not None}}
        return Worker(dsn, self.registry, until_idle=until_idle, **chosen)

    # -- connections ---------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The settings in use; read when first asked for. Raises ConfigurationError."""
        if self._settings is None:
            from jobqueue.settings import load_settings

            self._settings = load_settings()
        return self._settings

    def resolve_dsn(self) -> str:
        """Return where the jobs live; starts the embedded server if that is where.

        Blocking. Raises EmbeddedServerError, ConfigurationError.
        """
        with self._lock:
            if self._dsn is None:
                self._dsn = self._configured_dsn()
            return self._dsn

    async def open(self) -> App:
        """Connect now. Raises DatabaseUnavailable, SchemaOutdated with the command to run, SchemaTooNew."""
        async with self._lend(None):
            return self

    async def close(self) -> None:
        """Close all connections; a later use opens them again. The embedded server goes on running."""
        if self._connections is not None:
            await self._connections.close()

    def close_sync(self) -> None:
        """Close the blocking connections."""
        if self._connections is not None:
            self._connections.close_blocking()

    async def __aenter__(self) -> App:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @contextlib.asynccontextmanager
    async def _lend(self, connection: Any) -> AsyncIterator[AsyncConnection[Any]]:
        if connection is not None:
            yield adopt(connection)
            return
        connections = self._connections
        if connections is None:
            connections = await asyncio.to_thread(self._connect)
        async with connections.lend() as lent:
            if not self._checked:
                from jobqueue.database.migrations import check_schema_async

                await check_schema_async(lent)
                self._checked = True
            yield lent

    @contextlib.contextmanager
    def _lend_blocking(self, connection: Any) -> Iterator[Connection[Any]]:
        if connection is not None:
            yield adopt_blocking(connection)
            return
        connections = self._connections or self._connect()
        with connections.lend_blocking() as lent:
            if not self._checked:
                from jobqueue.database.migrations import check_schema

                check_schema(lent)
                self._checked = True
            yield lent

    def _connect(self) -> Connections:
        from jobqueue.connections import Connections

        dsn, settings = self.resolve_dsn(), self.settings
        self._instrument_as_set(settings)
        with self._lock:
            if self._connections is None:
                self._connections = Connections(
                    dsn,
                    pooler=settings.pooler,
                    max_size=self._max_connections,
                    timeout=settings.start_timeout,
                )
            return self._connections

    def _configured_dsn(self) -> str:
        from jobqueue.settings import resolve_dsn

        dsn = resolve_dsn(self.settings)
        if dsn is not None:
            return dsn
        from jobqueue.database.embedded import EmbeddedServer, default_data_dir

        return EmbeddedServer(self.settings.data_dir or default_data_dir()).start(timeout=self.settings.start_timeout)

    # -- what send needs -----------------------------------------------------------------------------------------------

    def _prepare(
        self, name: str | Callable[..., Any], payload: Any, queue: str | None, options: dict[str, Any]
    ) -> tuple[str, str, str]:
        """Return the queue, the payload and the options of a call as they go to the database."""
        handler, job_type = self._route(name, queue)
        text = encode_payload(payload, job_type) if handler is None else handler.payload.encode(payload)
        where, chosen = self._common(handler, job_type, queue, options)
        return where, text, options_text(_named(handler, text, chosen))

    def _prepare_many(
        self, name: str | Callable[..., Any], payloads: Iterable[Any], queue: str | None, options: dict[str, Any]
    ) -> tuple[str, list[str]]:
        handler, job_type = self._route(name, queue)
        where, chosen = self._common(handler, job_type, queue, options)
        encode = handler.payload.encode if handler is not None else lambda value: encode_payload(value, job_type)
        labelled = handler is not None and handler.label is not None
        shared = None if labelled else options_text(chosen) if chosen else ""
        elements = []
        for index, payload in enumerate(payloads):
            try:
                text = encode(payload)
                more = options_text(_named(handler, text, chosen)) if shared is None else shared
            except InvalidArgument as error:
                raise InvalidArgument(
                    f"Element {index}: {error}", hint=error.hint, details={**error.details, "index": index}
                ) from None
            elements.append(f'{{"payload":{text},"options":{more}}}' if more else f'{{"payload":{text}}}')
        starts = range(0, len(elements), BULK_SIZE)
        return where, ["[" + ",".join(elements[start : start + BULK_SIZE]) + "]" for start in starts]

    def _route(self, name: str | Callable[..., Any], queue: str | None) -> tuple[Handler | None, str]:
        if not isinstance(name, str):
            handler = self.registry.of_function(name)
            if handler is None:
                raise InvalidArgument(
                    f"{getattr(name, '__qualname__', name)!r} is not a handler of this app",
                    hint="Decorate it: @app.job().",
                )
            return handler, handler.name
        handler = self.registry.get(name)
        if handler is None and queue is None:
            near = difflib.get_close_matches(name, list(self.registry), n=1)
            guess = f'Did you mean "{near[0]}"? ' if near else ""
            raise QueueNotFound(
                f'this app has no handler "{name}"',
                hint=f"{guess}Name the queue too if another program runs it: send({name!r}, …, queue=…).",
                details={"job_type": name},
            )
        return handler, name

    def _common(
        self, handler: Handler | None, job_type: str, queue: str | None, options: dict[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """Return the queue and the options that all jobs of a call have."""
        given = encode_options(options, "send") if options else {}
        where = queue or (handler.queue if handler is not None else job_type)
        chosen = given
        if handler is not None:
            chosen = merge_options(handler.options, given)
            if handler.stages is not None:
                chosen.setdefault("stages", handler.stages)
        if where != job_type:
            chosen.setdefault("job_type", job_type)
        return where, chosen


def _named(handler: Handler | None, text: str, options: dict[str, Any]) -> dict[str, Any]:
    """Add the name for people that the handler's label gives to a job with this payload."""
    if handler is None or handler.label is None or "display_name" in options:
        return options
    try:
        name = handler.display_name(text, options.get("metadata"))
    except Exception as error:
        raise InvalidArgument(f"the label of {handler.name} failed: {type(error).__name__}: {error}") from error
    return {**options, "display_name": name} if name else options
