"""A job that is none: for handlers that are called directly, in a test or from a script.

`def handler(job: Job | None, …): job = job or NullJob()` and the rest of the handler needs no `if`.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from jobqueue.errors import ConfigurationError
from jobqueue.job import Claim, Job
from jobqueue.loops import NoTimer, Timer

if TYPE_CHECKING:
    from os import PathLike

    from jobqueue.connections import Connections

T = TypeVar("T")
NIL = "00000000-0000-0000-0000-000000000000"


class NullJob(Job):
    """A `Job` without a database: same interface; it reports nothing, keeps nothing and is never cancelled.

    `payload`, `tenant` and `subject` are what the handler may read. Only `transaction()` raises (ConfigurationError):
    there is nothing that could be committed.
    """

    __slots__ = ()

    def __init__(self, payload: Any = None, *, tenant: str = "default", subject: str | None = None) -> None:
        super().__init__(_claim({} if payload is None else payload, tenant, subject), _NullChannel())

    def _remaining(
        self,
        items: Iterable[T] | AsyncIterable[T],
        key: Callable[[T], object],
        message: str | None,
        report: bool,
        make_timer: Callable[[], Timer],
    ) -> AsyncIterator[T]:
        return self.track(items, message=message)

    def _make_timer(self, run: Callable[[Coroutine[Any, Any, Any]], Any] | None = None) -> Timer:
        return NoTimer()

    async def checkpoint(
        self,
        stage: str,
        data: Any = None,
        *,
        reference: str | PathLike[str] | None = None,
        hash: str | None = None,
        pause_safe: bool = True,
    ) -> None:
        """Nothing is kept."""


class _NullChannel:
    """Goes nowhere. It never suspends, so that the blocking form needs no event loop."""

    @property
    def connections(self) -> Connections:
        raise _no_database()

    def report(self, job: Job, pct: int | None, message: str | None, data: dict[str, Any] | None) -> None:
        return None

    async def call(self, job: Job, function: str, **arguments: Any) -> Any:
        return None

    async def keys(self, job: Job) -> set[str]:
        return set()

    async def rows(self, job: Job, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return []

    def blocking(self, awaitable: Coroutine[Any, Any, T]) -> T:
        from jobqueue.client import blocking

        return blocking(awaitable)


def _no_database() -> ConfigurationError:
    return ConfigurationError(
        "a NullJob has no database, so it has no transaction", hint="Run the handler in a worker, or pass a connection."
    )


def _claim(payload: Any, tenant: str, subject: str | None) -> Claim:
    now = datetime.now(UTC)
    return Claim(
        claim_id=0, id=NIL, claim_token=NIL, queue="", job_type="", payload=payload, priority=0, ready_seq=0,
        tenant=tenant, subject=subject, display_name=None, metadata=None, stats=None, options=None, attempt=1,
        retry_count=0, created_at=now, created_by=None, started_at=now, lease_until=None, timeout=None,
        max_runtime=None, suspect=False, checkpoint_id=None, total_stages=None, batch_id=None, group_key=None,
        singleton_key=None, run_at=now, )  # fmt: skip
