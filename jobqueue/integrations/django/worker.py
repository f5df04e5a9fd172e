"""The worker's side of the tasks: `manage.py jobqueue_worker`, or with all of its options

```
DJANGO_SETTINGS_MODULE=shop.settings jobqueue worker jobqueue.integrations.django.worker:app
```

Tasks run in threads, each with Django connections of its own; coroutines among them get an event loop in their thread.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, cast

import django
from django.apps import apps
from django.db import close_old_connections

from jobqueue.app import App
from jobqueue.classify import Failure, classify
from jobqueue.errors import HandlerError, HandlerSignal
from jobqueue.hooks import FailedAttempt
from jobqueue.integrations.django.connection import conninfo_of
from jobqueue.integrations.django.interface import (
    TaskContext,
    TaskResultStatus,
    task_backends,
    task_finished,
    task_started,
)
from jobqueue.integrations.django.tasks import JOB_TYPE, JobqueueBackend, find_task
from jobqueue.job import Job


def make_app(database: str | None = None) -> App:
    """Return an app that runs the tasks of Django's settings.

    `database`: the alias where the jobs live; default: the one of the backends in TASKS. Raises ConfigurationError if
    that is no PostgreSQL.
    """
    made = App(conninfo_of(database or _database()), classify=classify_with_path)
    made.job(JOB_TYPE)(run_task)
    made.on_failure(_tell_failed)
    return made


def run_task(job: Job) -> Any:
    """Run one task, between Django's own signals. What it raises ends the attempt like that of any handler."""
    close_old_connections()
    try:
        task, backend = find_task(job.payload["task"]), _backend(job)
        result = backend.get_result(str(job.id))
        task_started.send(type(backend), task_result=result)
        arguments: list[Any] = [TaskContext(task_result=result)] if task.takes_context else []
        value = task.call(*arguments, *result.args, **result.kwargs)
        object.__setattr__(result, "_return_value", value)
        object.__setattr__(result, "status", TaskResultStatus.SUCCESSFUL)
        task_finished.send(type(backend), task_result=result)
        return value
    finally:
        close_old_connections()


def classify_with_path(error: BaseException) -> Failure | None:
    """The usual rules; but the code is the path of the exception's class, by which Django finds the class again."""
    kind = type(error)
    if isinstance(error, HandlerError | HandlerSignal) or kind.__module__ == "builtins" or "<" in kind.__qualname__:
        return None
    found = classify(error)
    if found.code != kind.__name__:
        return None
    return replace(found, code=f"{kind.__module__}.{kind.__qualname__}")


async def _tell_failed(job: Job, failure: FailedAttempt) -> None:
    if not failure.will_retry and failure.status != "paused":
        await asyncio.to_thread(_send_finished, job)


def _send_finished(job: Job) -> None:
    backend = _backend(job)
    try:
        task_finished.send(type(backend), task_result=backend.get_result(str(job.id)))
    finally:
        close_old_connections()


def _backend(job: Job) -> JobqueueBackend:
    return cast("JobqueueBackend", task_backends[job.payload["backend"]])


def _database() -> str:
    found = {backend.database for backend in task_backends.all() if isinstance(backend, JobqueueBackend)}
    if len(found) != 1:
        from django.core.exceptions import ImproperlyConfigured

        places = ", ".join(sorted(found)) or "none"
        raise ImproperlyConfigured(
            f"TASKS names {places} as databases of jobs: a worker needs exactly one, "
            f"in a backend {JobqueueBackend.__module__}.{JobqueueBackend.__qualname__}"
        )
    return found.pop()


def __getattr__(name: str) -> Any:
    """`app`, made when the command line asks for it: settings may come from DJANGO_SETTINGS_MODULE only then."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not apps.ready:
        django.setup()
    globals()["app"] = made = make_app()
    return made
