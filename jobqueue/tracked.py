"""What the parts of a job (its loops, stages, chunks, checkpoints and its blocking form) need of the job itself.

```
tracked  ◄── loops, stages, checkpoints  ◄── chunks  ◄── blocking  ◄── job  ◄── null_job
```

Imports go one way along this line: the parts take these protocols, and `Job` is composed of the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from uuid import UUID

from jobqueue.errors import InvalidArgument
from jobqueue.json_text import NotStorable, to_json_text

if TYPE_CHECKING:
    from jobqueue.connections import Connections


class Claim(NamedTuple):
    """One claimed job: the columns of `jobqueue.claim_queue`, in their order.

    As the worker reads them: uuids as text, time-outs in seconds; JSON columns may be bytes (not decoded yet).
    """

    claim_id: int
    id: str
    claim_token: str
    queue: str
    job_type: str
    payload: Any
    priority: int
    ready_seq: int
    tenant: str
    subject: str | None
    display_name: str | None
    metadata: Any
    stats: Any
    options: Any
    attempt: int
    retry_count: int
    created_at: datetime
    created_by: str | None
    started_at: datetime | None
    lease_until: datetime | None
    timeout: float | None
    max_runtime: float | None
    suspect: bool
    checkpoint_id: int | None
    total_stages: int | None
    batch_id: UUID | None
    group_key: str | None
    singleton_key: str | None
    run_at: datetime | None


class Tracked(Protocol):
    """A job as its parts see it."""

    claim: Claim

    @property
    def _asked(self) -> str | None:
        """What was asked of it: cancel, pause or lost."""

    async def _call(self, function: str, **arguments: Any) -> Any:
        """Return the scalar of `jobqueue.<function>(id, token, …)`; JSON arguments are JSON text."""

    async def _keys(self) -> set[str]:
        """Return its done keys."""

    async def _rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a query; its id and its token come before the parameters."""

    def _report(
        self,
        done: int | None,
        total: int | None,
        message: str | None,
        pct: float | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        """Note progress, to be sent soon."""

    def raise_if_cancelled(self) -> None:
        """Raise what stops the handler, if it was asked to stop."""

    def obey(self, command: str | None = None, *, at_safe_place: bool = True) -> None:
        """Note an order, and raise what it means."""

    def _begin_loop(self, loop: Finishing) -> None:
        """Call the loop's `finish` if the attempt ends before it does."""

    def _end_loop(self, loop: Finishing) -> None:
        """It has ended."""


class Finishing(Protocol):
    """A loop with something to save."""

    async def finish(self) -> None:
        """Save it now."""


class Borrowing(Protocol):
    """What lends connections to a job."""

    @property
    def connections(self) -> Connections:
        """For `job.transaction()`."""


Coro = Coroutine[Any, Any, Any]


class Awaited(Tracked, Protocol):
    """A job whose methods the blocking form runs one by one; their arguments are those of `Job`."""

    _settled: bool

    @property
    def id(self) -> UUID:
        """The job's id."""

    @property
    def token(self) -> UUID:
        """The claim token."""

    @property
    def _channel(self) -> Borrowing:
        """Its way to the database."""

    @property
    def progress(self) -> Callable[..., Coro]:
        """`Job.progress`, and so on."""

    @property
    def parent_results(self) -> Callable[..., Coro]: ...

    @property
    def estimate(self) -> Callable[..., Coro]: ...

    @property
    def checkpoint(self) -> Callable[..., Coro]: ...

    @property
    def stage(self) -> Callable[..., Any]: ...

    @property
    def chunks(self) -> Callable[..., Any]: ...

    @property
    def _remaining(self) -> Callable[..., Any]: ...

    @property
    def _make_timer(self) -> Callable[..., Any]: ...

    def _final(self, result: Any) -> tuple[str | None, str | None]:
        """Return a result and the stats as JSON text."""


def json_argument(value: Any, what: str) -> str:
    """Return a value as JSON text. Raises InvalidArgument, naming `what`, if it cannot be stored."""
    try:
        return to_json_text(value)
    except NotStorable as error:
        raise InvalidArgument(f"{what} cannot be stored: {error}") from None
