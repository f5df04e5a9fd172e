"""Connections of other libraries, seen as the little that jobqueue needs of one.

psycopg's own connections are used as they are. Everything else gets an adapter: it runs one statement in the transaction
that its owner has open, and it can begin one of its own. Nothing is committed, rolled back or closed that was not begun
here.

```
app.send(…, connection=X) ── adopt(X) ──► psycopg connection, or an adapter with .rows(), .transaction(), .whole()
job.transaction(connection=X) ── borrow ──► whole_transaction ──► X's own transaction, committed with the completion
```
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, cast

from jobqueue.errors import InvalidArgument, from_postgres

if TYPE_CHECKING:
    import psycopg
    from psycopg import AsyncConnection, Connection

    from jobqueue.connections import Connections
    from jobqueue.errors import JobqueueError

ASYNCHRONOUS = "psycopg.AsyncConnection, SQLAlchemy's AsyncSession or AsyncConnection, or an asyncpg connection"
BLOCKING = "psycopg.Connection, SQLAlchemy's Session or Connection, or django.db.connection"

# By the package of a class or one of its bases: nothing is imported to find out.
_HOMES: Mapping[str, str] = {
    "sqlalchemy": "jobqueue.integrations.sqlalchemy",
    "asyncpg": "jobqueue.integrations.asyncpg",
    "django": "jobqueue.integrations.django.connection",
}


class Adapter(Protocol):
    """What an adapter of an asynchronous connection does; one of a blocking connection never suspends in `rows`."""

    is_async: bool

    async def rows(self, query: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Run one statement, written for psycopg (`%s`), in the owner's transaction. Raises JobqueueError for JQ…."""

    def transaction(self) -> Any:
        """A transaction inside of the owner's, or one of its own if there is none."""

    def whole(self) -> Any:
        """A transaction that ends with the block. Raises InvalidArgument if the connection is in one already."""


def adopt(connection: Any) -> AsyncConnection[Any]:
    """Return what asynchronous calls work on. Raises InvalidArgument, with what is accepted, for anything else."""
    import psycopg

    if isinstance(connection, psycopg.AsyncConnection):
        return connection
    adapter = None if isinstance(connection, psycopg.Connection) else _adapter(connection)
    if adapter is None or not adapter.is_async:
        raise _refused(connection, "this call", ASYNCHRONOUS, f"the blocking form, app.send_sync, takes {BLOCKING}")
    return cast("AsyncConnection[Any]", adapter)


def adopt_blocking(connection: Any) -> Connection[Any]:
    """Return what blocking calls work on. Raises InvalidArgument, with what is accepted, for anything else."""
    import psycopg

    if isinstance(connection, psycopg.Connection):
        return connection
    adapter = None if isinstance(connection, psycopg.AsyncConnection) else _adapter(connection)
    if adapter is None or adapter.is_async:
        raise _refused(connection, "a blocking call", BLOCKING, f"the form with await, app.send, takes {ASYNCHRONOUS}")
    return cast("Connection[Any]", adapter)


@asynccontextmanager
async def borrow(connections: Connections, connection: Any) -> AsyncIterator[AsyncConnection[Any]]:
    """Lend one of our connections, unless the caller has given one."""
    if connection is not None:
        yield adopt(connection)
        return
    async with connections.lend() as lent:
        yield lent


@contextmanager
def borrow_blocking(connections: Connections, connection: Any) -> Iterator[Connection[Any]]:
    """The blocking form of `borrow`."""
    if connection is not None:
        yield adopt_blocking(connection)
        return
    with connections.lend_blocking() as lent:
        yield lent


def whole_transaction(lent: AsyncConnection[Any]) -> AbstractAsyncContextManager[Any]:
    """A transaction that is committed with the block. Raises InvalidArgument if the connection is in one already."""
    return cast("AbstractAsyncContextManager[Any]", _whole(lent))


def whole_transaction_blocking(lent: Connection[Any]) -> AbstractContextManager[Any]:
    """The blocking form of `whole_transaction`."""
    return cast("AbstractContextManager[Any]", _whole(lent))


def in_transaction_already() -> InvalidArgument:
    """The error of a connection that cannot begin a transaction of its own."""
    return InvalidArgument(
        "this connection is in a transaction already, so the job's end could not be committed with the block",
        hint="Commit or roll back first, or write inside the block: job.transaction begins and commits by itself.",
    )


def translated(sqlstate: str | None, message: str | None, hint: str | None, detail: str | None) -> JobqueueError | None:
    """Return what an error of another driver means, or None when it is not one of jobqueue's (SQLSTATE JQ…)."""
    diagnosis = SimpleNamespace(message_primary=message, message_hint=hint, message_detail=detail)
    return from_postgres(cast("psycopg.Error", SimpleNamespace(sqlstate=sqlstate, diag=diagnosis)))


def numbered(query: str) -> str:
    """Return a query with `$1`, `$2`, … in the place of psycopg's `%s`."""
    first, *rest = query.split("%s")
    text = first + "".join(f"${number}{part}" for number, part in enumerate(rest, start=1))
    return text.replace("%%", "%")


def _adapter(connection: Any) -> Adapter | None:
    for kind in type(connection).__mro__:
        home = _HOMES.get(kind.__module__.partition(".")[0])
        if home is not None:
            found: Adapter | None = importlib.import_module(home).adapter_of(connection)
            return found
    return None


def _whole(lent: Any) -> Any:
    import psycopg

    if not isinstance(lent, psycopg.Connection | psycopg.AsyncConnection):
        return lent.whole()
    if lent.info.transaction_status is not psycopg.pq.TransactionStatus.IDLE:
        raise in_transaction_already()
    return lent.transaction()


def _refused(connection: Any, what: str, accepted: str, otherwise: str) -> InvalidArgument:
    kind = type(connection)
    return InvalidArgument(
        f"{what} cannot use a {kind.__module__}.{kind.__qualname__} as connection: it takes {accepted}",
        hint=f"{otherwise[0].upper()}{otherwise[1:]}.",
        details={"type": f"{kind.__module__}.{kind.__qualname__}"},
    )
