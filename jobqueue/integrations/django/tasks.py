"""A backend for Django's tasks: `django.tasks` of Django 6, or the package `django-tasks` before it.

```python
TASKS = {"default": {"BACKEND": "jobqueue.integrations.django.tasks.JobqueueBackend", "QUEUES": ["default", "mail"]}}
```

A task is a job of the type `django_task`; its queue is the task's. `enqueue` runs in the transaction of Django's own
connection: a task that is enqueued inside `transaction.atomic()` begins after the commit, and a rollback takes it back.
So `transaction.on_commit(task.enqueue)` is not needed, and does no harm.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections
from django.utils import timezone
from django.utils.module_loading import import_string

from jobqueue.app import App
from jobqueue.client import blocking as run_blocking
from jobqueue.client import fetch
from jobqueue.integrations.django.connection import DjangoAdapter
from jobqueue.integrations.django.interface import (
    BaseTaskBackend,
    Task,
    TaskError,
    TaskResult,
    TaskResultDoesNotExist,
    TaskResultStatus,
    task_enqueued,
)

JOB_TYPE = "django_task"
KNOWN_OPTIONS = frozenset({"database", "send"})
OWN_CODES: Mapping[str, str] = {"TIMEOUT": "builtins.TimeoutError"}
OTHER_CODE = "jobqueue.errors.JobqueueError"
STATUSES: Mapping[str, str] = {"processing": "RUNNING", "completed": "SUCCESSFUL", "failed": "FAILED",
                               "cancelled": "FAILED", "skipped": "FAILED"}  # fmt: skip
JOB = """
    select queue, payload::text, status, result::text, priority, run_at, created_at, started_at, completed_at
    from jobqueue.jobs where id = %s and job_type = %s
"""
ATTEMPTS = """
    select worker_id::text, started_at, outcome, error_code, error_message, error_detail
    from jobqueue.attempts where job_id = %s order by attempt
"""


class JobqueueBackend(BaseTaskBackend):
    """Tasks of Django as jobs. Supports run_after, priorities, coroutines and results.

    QUEUES: as of any backend (default: `["default"]`; an empty list allows all). OPTIONS: `database`: the alias of the
    database where the jobs live (default "default"); its user needs the role jobqueue_producer, and for `get_result`
    jobqueue_support_readonly. `send`: options of send for all tasks, for example `{"max_retries": 0}`; the queue's own
    apply otherwise, so that a task that failed is tried again up to 3 times.
    """

    supports_defer = True
    supports_async_task = True
    supports_get_result = True
    supports_priority = True

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)
        unknown = sorted(self.options.keys() - KNOWN_OPTIONS)
        if unknown:
            raise ImproperlyConfigured(
                f"TASKS[{alias!r}] has an OPTION {unknown[0]!r}; known are: {', '.join(sorted(KNOWN_OPTIONS))}"
            )
        self.database: str = self.options.get("database", DEFAULT_DB_ALIAS)
        self._send_options: dict[str, Any] = dict(self.options.get("send", {}))
        self._app = App()

    def enqueue(self, task: Task[Any, Any], args: Any, kwargs: Any) -> TaskResult[Any, Any]:
        """Send the job, in the transaction of Django's connection if one is open. Raises InvalidTask, JobqueueError."""
        self.validate_task(task)
        result = _result(task, self.alias, "", "READY", args=list(args), kwargs=dict(kwargs))
        sent = self._app.send_sync(
            JOB_TYPE,
            {"task": task.module_path, "backend": self.alias, "args": result.args, "kwargs": result.kwargs},
            queue=task.queue_name,
            connection=connections[self.database],
            **{"display_name": task.module_path, **self._send_options, **_when(task)},
        )
        _set(result, id=str(sent.id), enqueued_at=timezone.now())
        task_enqueued.send(type(self), task_result=result)
        return result

    def get_result(self, result_id: str) -> TaskResult[Any, Any]:
        """Return how a task is now. Raises TaskResultDoesNotExist."""
        try:
            job_id = UUID(result_id)
        except ValueError:
            raise TaskResultDoesNotExist(result_id) from None
        adapter: Any = DjangoAdapter(connections[self.database])
        job = run_blocking(fetch(adapter, JOB, (job_id, JOB_TYPE)))
        if not job:
            raise TaskResultDoesNotExist(result_id)
        return self._result_of(result_id, job[0], run_blocking(fetch(adapter, ATTEMPTS, (job_id,))))

    def check(self, **kwargs: Any) -> list[checks.CheckMessage]:
        """For `manage.py check`: the database must be PostgreSQL."""
        vendor = connections[self.database].vendor
        if vendor == "postgresql":
            return []
        hint = 'Name another one: "OPTIONS": {"database": "<alias>"}.'
        return [
            checks.Error(f"the jobs of TASKS[{self.alias!r}] cannot live in {vendor}", hint=hint, id="jobqueue.E001")
        ]

    def _result_of(self, id: str, job: tuple[Any, ...], attempts: list[tuple[Any, ...]]) -> TaskResult[Any, Any]:
        queue, payload_text, status, result_text, priority, run_at, created_at, _, completed_at = job
        payload = json.loads(payload_text)
        task = find_task(payload["task"]).using(
            priority=priority, queue_name=queue, backend=self.alias, run_after=run_at if run_at > created_at else None
        )
        result = _result(
            task, self.alias, id, STATUSES.get(status, "READY"), args=payload["args"], kwargs=payload["kwargs"]
        )
        starts = [attempt[1] for attempt in attempts if attempt[1] is not None]
        _set(
            result,
            enqueued_at=created_at,
            started_at=min(starts, default=None),
            last_attempted_at=max(starts, default=None),
            finished_at=completed_at,
            worker_ids=[attempt[0] for attempt in attempts if attempt[0] is not None],
            errors=[_error(*attempt[3:]) for attempt in attempts if attempt[3] is not None],
            _return_value=None if result_text is None else json.loads(result_text),
        )
        return result


def find_task(path: str) -> Task[Any, Any]:
    """Return the task of a path such as `shop.tasks.send_receipt`. Raises ImportError, also if it is no task there."""
    found = import_string(path)
    if not isinstance(found, Task):
        raise ImportError(f"{path} is no task: decorate it with @task")
    return found


def _when(task: Task[Any, Any]) -> dict[str, Any]:
    """The task's own options of send."""
    run_at = task.run_after
    if run_at is not None and timezone.is_naive(run_at):
        run_at = timezone.make_aware(run_at)
    return {"priority": task.priority, **({} if run_at is None else {"run_at": run_at})}


def _result(
    task: Task[Any, Any], backend: str, id: str, status: str, *, args: list[Any], kwargs: dict[str, Any]
) -> TaskResult[Any, Any]:
    return TaskResult(
        task=task, id=id, status=TaskResultStatus[status], enqueued_at=None, started_at=None, finished_at=None,
        last_attempted_at=None, args=args, kwargs=kwargs, backend=backend, errors=[], worker_ids=[],
    )  # fmt: skip


def _set(result: TaskResult[Any, Any], **values: Any) -> None:
    """Results are frozen, and Django's own backends fill them in like this."""
    for name, value in values.items():
        object.__setattr__(result, name, value)


def _error(code: str, message: str | None, detail: str | None) -> TaskError:
    """jobqueue's own codes (LOST, TIMEOUT, …) are no exceptions; there must be a class for each."""
    path = code if "." in code else f"builtins.{code}" if hasattr(builtins, code) else OWN_CODES.get(code, OTHER_CODE)
    return TaskError(exception_class_path=path, traceback=detail or message or code)
