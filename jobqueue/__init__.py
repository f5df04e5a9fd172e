"""A job queue that lives in the Postgres you already run.

The names here are the public ones; each is imported when it is first used, so that `import jobqueue` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobqueue.app import App as App
    from jobqueue.checkpoints import Checkpoint as Checkpoint
    from jobqueue.classify import Failure as Failure
    from jobqueue.classify import classify as classify
    from jobqueue.client import Sent as Sent
    from jobqueue.errors import BadRequest as BadRequest
    from jobqueue.errors import BatchNotFound as BatchNotFound
    from jobqueue.errors import BulkNotFound as BulkNotFound
    from jobqueue.errors import Cancelled as Cancelled
    from jobqueue.errors import ConfigurationError as ConfigurationError
    from jobqueue.errors import Conflict as Conflict
    from jobqueue.errors import ConflictError as ConflictError
    from jobqueue.errors import DatabaseUnavailable as DatabaseUnavailable
    from jobqueue.errors import FlowNotFound as FlowNotFound
    from jobqueue.errors import Forbidden as Forbidden
    from jobqueue.errors import InvalidArgument as InvalidArgument
    from jobqueue.errors import InvalidInput as InvalidInput
    from jobqueue.errors import InvalidTransition as InvalidTransition
    from jobqueue.errors import JobNotFound as JobNotFound
    from jobqueue.errors import JobqueueError as JobqueueError
    from jobqueue.errors import JobTypeNotFound as JobTypeNotFound
    from jobqueue.errors import LeaseLost as LeaseLost
    from jobqueue.errors import LimitReached as LimitReached
    from jobqueue.errors import NotAllowed as NotAllowed
    from jobqueue.errors import NotFound as NotFound
    from jobqueue.errors import PermanentError as PermanentError
    from jobqueue.errors import QueueNotFound as QueueNotFound
    from jobqueue.errors import QuotaExceeded as QuotaExceeded
    from jobqueue.errors import Retry as Retry
    from jobqueue.errors import ScheduleNotFound as ScheduleNotFound
    from jobqueue.errors import SchemaOutdated as SchemaOutdated
    from jobqueue.errors import SchemaTooNew as SchemaTooNew
    from jobqueue.errors import Snooze as Snooze
    from jobqueue.errors import TimedOut as TimedOut
    from jobqueue.errors import TooLarge as TooLarge
    from jobqueue.errors import UnknownOption as UnknownOption
    from jobqueue.errors import WorkerNotFound as WorkerNotFound
    from jobqueue.hooks import FailedAttempt as FailedAttempt
    from jobqueue.hooks import WorkerInfo as WorkerInfo
    from jobqueue.hooks import WorkerWarning as WorkerWarning
    from jobqueue.job import Job as Job
    from jobqueue.job import current_job as current_job
    from jobqueue.null_job import NullJob as NullJob
    from jobqueue.records import JobRecord as JobRecord
    from jobqueue.settings import Settings as Settings
    from jobqueue.stages import Stage as Stage
    from jobqueue.statistics import QueueStats as QueueStats

_ERRORS = (
    "BadRequest", "BatchNotFound", "BulkNotFound", "Cancelled", "ConfigurationError", "Conflict", "ConflictError",
    "DatabaseUnavailable", "FlowNotFound", "Forbidden", "InvalidArgument", "InvalidInput", "InvalidTransition",
    "JobNotFound", "JobTypeNotFound", "JobqueueError", "LeaseLost", "LimitReached", "NotAllowed", "NotFound",
    "PermanentError", "QueueNotFound", "QuotaExceeded", "Retry", "ScheduleNotFound", "SchemaOutdated", "SchemaTooNew",
    "Snooze", "TimedOut", "TooLarge", "UnknownOption", "WorkerNotFound",
)  # fmt: skip
_HOME = {
    "App": "app",
    "Checkpoint": "checkpoints",
    "FailedAttempt": "hooks",
    "Failure": "classify",
    "Job": "job",
    "JobRecord": "records",
    "NullJob": "null_job",
    "QueueStats": "statistics",
    "Sent": "client",
    "Settings": "settings",
    "Stage": "stages",
    "WorkerInfo": "hooks",
    "WorkerWarning": "hooks",
    "current_job": "job",
    **dict.fromkeys(_ERRORS, "errors"),
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("jobqueue")
    elif name in _HOME:
        value = getattr(importlib.import_module(f"jobqueue.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'jobqueue' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
