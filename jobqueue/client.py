"""One thin coroutine per SQL verb; errors come out as `JobqueueError`. No policy of its own.

Every coroutine takes a connection first, asynchronous or blocking, and leaves its transaction alone: in autocommit mode
a call is a transaction of its own, otherwise it joins the caller's. On a blocking connection nothing is ever awaited,
so
`blocking(send(connection, …))` runs the same code without an event loop.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from uuid import UUID

from jobqueue.errors import InvalidArgument, TooLarge, translate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import AsyncConnection, Connection

    from jobqueue.records import JobRecord

    AnyConnection = AsyncConnection[Any] | Connection[Any]

T = TypeVar("T")
Action = Literal["cancel", "pause", "resume", "retry", "skip", "run_now", "prioritize", "delete"]

_FUNCTION_OF_ACTION: Mapping[str, str] = {
    "cancel": "cancel",
    "pause": "pause",
    "resume": "resume",
    "retry": "retry",
    "skip": "skip",
    "run_now": "run_now",
    "prioritize": "prioritize",
    "delete": "delete_job",
}
_ARGUMENTS_OF_ACTION: Mapping[str, frozenset[str]] = {
    "cancel": frozenset({"force"}),
    "retry": frozenset({"from_start"}),
    "prioritize": frozenset({"priority"}),
}


class Sent(NamedTuple):
    """What `send` answers: a tuple, because a bulk send makes ten thousands of them.

    `created` is False if another job stands in its place: then `id` is that job's (None if it belongs to another
    tenant) and `reason` one of singleton, throttled, debounced, duplicate_id, policy.
    """

    id: UUID
    created: bool
    reason: str | None


async def send(connection: AnyConnection, queue: str, payload: str = "{}", options: str = "{}") -> Sent:
    """Add one job; `payload` and `options` are JSON text.

    Raises InvalidArgument, UnknownOption, Forbidden, QueueNotFound, Conflict, TooLarge.
    """
    rows = await fetch(
        connection,
        "select id, created, reason from jobqueue.send(%s::text, %s::text::jsonb, %s::text::jsonb)",
        (queue, payload, options),
    )
    return Sent(*rows[0])


async def send_many(connection: AnyConnection, queue: str, jobs: str) -> list[Sent]:
    """Add many jobs, all or none; `jobs` is the JSON text of `[{"payload":…,"options":…},…]`, at most 100,000.

    Raises as of `send`; `details["index"]` says which element was refused.
    """
    query = "select id, created, reason from jobqueue.send_many(%s::text, %s::text::jsonb)"
    return list(map(Sent._make, await fetch(connection, query, (queue, jobs))))


async def get(connection: AnyConnection, job_id: UUID | str) -> JobRecord:
    """Return a job. Raises JobNotFound, also for an id that is no uuid."""
    from jobqueue.errors import JobNotFound
    from jobqueue.records import COLUMNS

    given = as_job_id(job_id)
    query = f"select {', '.join(COLUMNS)} from jobqueue.jobs where id = %s"  # noqa: S608
    rows = await fetch(connection, query, (given,))
    if not rows:
        raise JobNotFound(
            f"There is no job {given}.",
            hint="It may have been deleted after its time of keeping, or it belongs to a tenant that you do not see.",
            details={"id": str(given)},
        )
    return _record(rows[0])


async def find(
    connection: AnyConnection,
    *,
    status: str | Sequence[str] | None = None,
    queue: str | None = None,
    job_type: str | None = None,
    tenant: str | None = None,
    subject: str | None = None,
    limit: int = 20,
) -> list[JobRecord]:
    """Return jobs, newest first; a filter that is None is not applied. `limit`: 1 to 1,000, default 20."""
    from jobqueue.records import COLUMNS

    if not 1 <= limit <= 1000:
        raise InvalidArgument(f"limit must be from 1 to 1000, not {limit}")
    statuses = [status] if isinstance(status, str) else None if status is None else list(status)
    given = {"queue = %s": queue, "job_type = %s": job_type, "tenant = %s": tenant, "subject = %s": subject}
    conditions = {**{text: value for text, value in given.items() if value is not None}}
    if statuses is not None:
        conditions["status = any(%s::text[])"] = statuses  # type: ignore[assignment]
    where = f"where {' and '.join(conditions)}" if conditions else ""
    columns = ", ".join(COLUMNS)
    query = f"select {columns} from jobqueue.jobs {where} order by created_at desc, id desc limit %s"  # noqa: S608
    return [_record(row) for row in await fetch(connection, query, (*conditions.values(), limit))]


async def act(connection: AnyConnection, action: Action, job_id: UUID | str, reason: str, **arguments: Any) -> str:
    """Do something with a job and return the status it has then (for delete: that it had).

    `arguments`: `force` for cancel, `from_start` for retry, `priority` for prioritize.
    Raises JobNotFound, InvalidTransition with what is allowed, InvalidArgument for a blank reason.
    """
    function = _FUNCTION_OF_ACTION.get(action)
    if function is None:
        raise InvalidArgument(f'there is no action "{action}"', hint=f"Actions: {', '.join(_FUNCTION_OF_ACTION)}.")
    unknown = arguments.keys() - _ARGUMENTS_OF_ACTION.get(action, frozenset())
    if unknown:
        raise InvalidArgument(f"{action} takes no argument {', '.join(sorted(unknown))}")
    named = {"id": as_job_id(job_id), "reason": reason, **arguments}
    places = ", ".join(f"{name} => %s" for name in named)
    rows = await fetch(connection, f"select jobqueue.{function}({places})", tuple(named.values()))
    return str(rows[0][0])


async def complete(
    connection: AnyConnection, job_id: UUID, token: UUID, result: str | None = None, stats: str | None = None
) -> str:
    """Complete a claimed job in the connection's transaction: ok, already or failed. Raises LeaseLost, JobNotFound."""
    query = "select jobqueue.complete(%s, %s, %s::text::jsonb, %s::text::jsonb)"
    return str((await fetch(connection, query, (job_id, token, result, stats)))[0][0])


async def fetch(connection: AnyConnection, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    """Run one statement and return its rows as tuples, whatever the connection's own row factory is."""
    import psycopg
    from psycopg.rows import tuple_row

    with _translated():
        if isinstance(connection, psycopg.Connection):
            with connection.cursor(row_factory=tuple_row) as cursor:
                return cursor.execute(query.encode(), parameters).fetchall()
        if not isinstance(connection, psycopg.AsyncConnection):
            # of another library: jobqueue.integrations.adapters
            return await connection.rows(query, parameters)  # type: ignore[unreachable]
        async with connection.cursor(row_factory=tuple_row) as acursor:
            await acursor.execute(query.encode(), parameters)
            return await acursor.fetchall()


def blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run one of these coroutines on a blocking connection, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    coroutine.close()
    raise RuntimeError("this call waits for an event loop: give it a blocking psycopg.Connection")


def as_job_id(value: UUID | str) -> UUID:
    """Return an id as a uuid. Raises JobNotFound if it is none: no job can have it."""
    from jobqueue.errors import JobNotFound

    if isinstance(value, UUID):
        return value
    try:
        return UUID(str(value))
    except ValueError:
        raise JobNotFound(
            f"There is no job {str(value)[:100]!r}: that is no uuid.", details={"id": str(value)[:100]}
        ) from None


def _record(row: Sequence[Any]) -> JobRecord:
    from jobqueue.records import COLUMNS, JobRecord

    return JobRecord.model_validate(dict(zip(COLUMNS, row, strict=True)))


@contextmanager
def _translated() -> Iterator[None]:
    """Also translate what PostgreSQL itself says about JSON that is too large or too deep for any jsonb."""
    from psycopg import DataError, errors

    try:
        with translate():
            yield
    except errors.ProgramLimitExceeded as error:
        raise TooLarge(f"PostgreSQL cannot hold this value: {error.diag.message_primary}") from error
    except (errors.StatementTooComplex, errors.UntranslatableCharacter, errors.NumericValueOutOfRange) as error:
        raise InvalidArgument(f"PostgreSQL cannot hold this value: {error.diag.message_primary}") from error
    except DataError as error:
        # Raised by psycopg before anything is sent, for text with NUL characters.
        if error.sqlstate is None:
            raise InvalidArgument(f"this value cannot be sent: {error}") from error
        raise
