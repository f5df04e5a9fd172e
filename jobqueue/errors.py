"""Every error of jobqueue, in one table.

Three families:

* `JobqueueError`: what the library raises. One base class per SQLSTATE (`NotFound` for JQ404, …) and one class per
  `code` that the database reports in an error's DETAIL. `from_postgres` is the only translation.
* Operational errors (`DatabaseUnavailable`, `SchemaOutdated`, …): also `JobqueueError`, raised before any job runs.
* What a *handler* raises to say how its attempt ends (`Retry`, `Snooze`, `PermanentError`, …).

`exit_code` is the command line's: 1 failed, 2 usage, 3 not found, 4 conflict, 5 time-out, 69 no database,
75 try again, 78 configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from jobqueue.durations import DurationLike, parse_duration

if TYPE_CHECKING:
    import psycopg


class JobqueueError(Exception):
    """Base of everything the library raises.

    `code` is stable and for programs, `str(error)` for people, `hint` says what to do (or None), `details` holds what
    the database or the library knows about the case (empty by default).
    """

    code: str = "ERROR"
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str = "",
        *,
        code: str | None = None,
        hint: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code
        self.hint = hint
        self.details: dict[str, Any] = dict(details or {})

    @property
    def message(self) -> str:
        """The text for people, without the hint."""
        return str(self)


# -- One base class per SQLSTATE --------------------------------------------------------------------------------------


class BadRequest(JobqueueError):
    """JQ400: an argument is wrong; nothing was changed."""

    code = "INVALID_ARGUMENT"
    exit_code = 2


class NotAllowed(JobqueueError):
    """JQ403: the caller has no right to this."""

    code = "FORBIDDEN"


class NotFound(JobqueueError):
    """JQ404: no such thing, or it is hidden from the caller."""

    code = "NOT_FOUND"
    exit_code = 3


class ConflictError(JobqueueError):
    """JQ409: the present state does not allow this; nothing was changed."""

    code = "CONFLICT"
    exit_code = 4


class TooLarge(JobqueueError):
    """JQ413 `TOO_LARGE`: payload, result, metadata or checkpoint data is over its bound."""

    code = "TOO_LARGE"


class LimitReached(JobqueueError):
    """JQ429 `LIMIT_REACHED`: a limit is used up; the same call may work later."""

    code = "LIMIT_REACHED"
    exit_code = 75


# -- One class per code -----------------------------------------------------------------------------------------------


class InvalidArgument(BadRequest):
    """`INVALID_ARGUMENT`: the message names the argument and what it may be."""


class UnknownOption(BadRequest):
    """`UNKNOWN_OPTION`: no option of that name; the hint has the nearest known one."""

    code = "UNKNOWN_OPTION"


class Forbidden(NotAllowed):
    """`FORBIDDEN`: another tenant's, or outside the role's rights."""


class JobNotFound(NotFound):
    """`JOB_NOT_FOUND`: unknown, deleted, or another tenant's."""

    code = "JOB_NOT_FOUND"


class QueueNotFound(NotFound):
    """`QUEUE_NOT_FOUND`: no such queue."""

    code = "QUEUE_NOT_FOUND"


class JobTypeNotFound(NotFound):
    """`JOB_TYPE_NOT_FOUND`: no such job_type; workers register theirs when they start."""

    code = "JOB_TYPE_NOT_FOUND"


class FlowNotFound(NotFound):
    """`FLOW_NOT_FOUND`: no such flow, and no job of that id is in one."""

    code = "FLOW_NOT_FOUND"


class BatchNotFound(NotFound):
    """`BATCH_NOT_FOUND`: no such batch."""

    code = "BATCH_NOT_FOUND"


class ScheduleNotFound(NotFound):
    """`SCHEDULE_NOT_FOUND`: no such schedule."""

    code = "SCHEDULE_NOT_FOUND"


class WorkerNotFound(NotFound):
    """`WORKER_NOT_FOUND`: no worker of that id runs."""

    code = "WORKER_NOT_FOUND"


class BulkNotFound(NotFound):
    """`BULK_NOT_FOUND`: no such bulk operation of the HTTP API, or its 7 days are over."""

    code = "BULK_NOT_FOUND"


class InvalidTransition(ConflictError):
    """`INVALID_TRANSITION`: `details` has the present `status` and the `allowed` ones."""

    code = "INVALID_TRANSITION"


class LeaseLost(ConflictError):
    """`LEASE_LOST`: the claim token is stale: the job was rescued, cancelled by force, or belongs to another claim."""

    code = "LEASE_LOST"


class Conflict(ConflictError):
    """`CONFLICT`: something with that name or id exists, or changed in the meantime."""


# -- Operational ------------------------------------------------------------------------------------------------------


class ConfigurationError(JobqueueError):
    """A setting, a file or an installation is wrong; trying again does not help."""

    code = "CONFIGURATION"
    exit_code = 78


class DatabaseUnavailable(JobqueueError):
    """No connection within the start time-out (`JOBQUEUE_START_TIMEOUT`, 60 s)."""

    code = "UNAVAILABLE"
    exit_code = 69


class ServerTooOld(ConfigurationError):
    """The server is older than PostgreSQL 15."""

    code = "SERVER_TOO_OLD"


class SchemaOutdated(JobqueueError):
    """The database's schema is older than this program: run `jobqueue migrate up`."""

    code = "SCHEMA_OUTDATED"
    exit_code = 75


class SchemaTooNew(ConfigurationError):
    """The database's schema is newer than this program: upgrade the program."""

    code = "SCHEMA_TOO_NEW"


class MigrationError(JobqueueError):
    """A migration step failed and was rolled back; the steps before it stay."""

    code = "MIGRATION_FAILED"


class MigrationEdited(ConfigurationError):
    """A migration differs from the one that was applied under its number."""

    code = "MIGRATION_EDITED"


class MigrationBusy(JobqueueError):
    """Another migration of the same database is still running."""

    code = "MIGRATION_BUSY"
    exit_code = 75


class TimedOut(JobqueueError):
    """What was waited for did not happen in time; it may still happen."""

    code = "TIMED_OUT"
    exit_code = 5


# -- What handlers raise ----------------------------------------------------------------------------------------------


class HandlerSignal(Exception):
    """Base of the exceptions by which a handler says how its attempt ends."""


class Retry(HandlerSignal):
    """Fail this attempt as transient and try again.

    `after`: seconds, a duration such as `'5 min'`, or a timedelta; None (default): the queue's backoff.
    The retry is spent; with none left the job ends `failed`.
    """

    def __init__(self, message: str = "", *, after: DurationLike | None = None) -> None:
        super().__init__(message)
        self.after = None if after is None else parse_duration(after)


class Snooze(HandlerSignal):
    """Put the job back for `delay` (seconds, duration text or timedelta) without spending a retry."""

    def __init__(self, delay: DurationLike, message: str = "") -> None:
        super().__init__(delay, message)
        self.delay = parse_duration(delay)
        self.message = message

    def __str__(self) -> str:
        return self.message or f"again in {self.delay:g} s"


class Cancelled(HandlerSignal):
    """The job was asked to stop; raised by `job.raise_if_cancelled()`, or by a handler that stops by itself."""


class HandlerError(HandlerSignal):
    """An error whose class the handler knows.

    `code`: stored as `error_code`; default: the class's name. `after`: try again after this time although errors of
    this class are not retried by default; None (default): end as `failed` at once.
    """

    error_class: ClassVar[str] = "permanent"

    def __init__(self, message: str = "", *, code: str | None = None, after: DurationLike | None = None) -> None:
        super().__init__(message)
        self.code = code or type(self).__name__
        self.after = None if after is None else parse_duration(after)


class PermanentError(HandlerError):
    """It will fail the same way again (error class `permanent`)."""


class InvalidInput(HandlerError):
    """The payload is wrong (error class `invalid`)."""

    error_class = "invalid"


class QuotaExceeded(HandlerError):
    """A quota, a budget or credits are used up (error class `quota`)."""

    error_class = "quota"


# -- The one translation ----------------------------------------------------------------------------------------------

BY_SQLSTATE: Mapping[str, type[JobqueueError]] = {
    "JQ400": BadRequest,
    "JQ403": NotAllowed,
    "JQ404": NotFound,
    "JQ409": ConflictError,
    "JQ413": TooLarge,
    "JQ429": LimitReached,
}

BY_CODE: Mapping[str, type[JobqueueError]] = {
    error.code: error
    for error in (
        InvalidArgument,
        UnknownOption,
        Forbidden,
        JobNotFound,
        QueueNotFound,
        JobTypeNotFound,
        FlowNotFound,
        BatchNotFound,
        ScheduleNotFound,
        WorkerNotFound,
        BulkNotFound,
        InvalidTransition,
        LeaseLost,
        Conflict,
        TooLarge,
        LimitReached,
    )
}


def from_postgres(error: psycopg.Error) -> JobqueueError | None:
    """Return what an error of the database means, or None when it is not one of jobqueue's (SQLSTATE JQ…)."""
    sqlstate = error.sqlstate or ""
    if not sqlstate.startswith("JQ"):
        return None
    details = _details(error.diag.message_detail)
    code = details.get("code")
    base = BY_SQLSTATE.get(sqlstate, JobqueueError)
    known = BY_CODE.get(str(code), base)
    # A code of a newer schema must still be caught by the class of its SQLSTATE.
    kind = known if issubclass(known, base) else base
    return kind(
        error.diag.message_primary or str(error),
        code=str(code) if code else None,
        hint=error.diag.message_hint,
        details=details,
    )


def _details(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"detail": text}


@contextmanager
def translate() -> Iterator[None]:
    """Turn jobqueue's database errors inside the block into `JobqueueError`; others pass unchanged."""
    import psycopg

    try:
        yield
    except psycopg.Error as error:
        translated = from_postgres(error)
        if translated is None:
            raise
        raise translated from error
