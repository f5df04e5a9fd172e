"""Tasks: Django takes only functions at the top of a module."""

from __future__ import annotations

from typing import Any

from jobqueue import current_job
from jobqueue.integrations.django.interface import TaskContext, task


class Unlucky(Exception):
    """What a task raises."""


@task
def add(one: int, other: int) -> int:
    return one + other


@task(queue_name="mail", priority=7)
async def greet(name: str, *, loudly: bool = False) -> str:
    return f"hello {name}{'!' if loudly else ''}"


@task(takes_context=True)
def describe(context: TaskContext) -> dict[str, Any]:
    job = current_job()
    assert job is not None
    job.sync.progress(1, 2, "half way")
    return {"attempt": context.attempt, "id": context.task_result.id, "job": str(job.id)}


@task
def fail(kind: str) -> None:
    raise Unlucky(kind) if kind == "own" else ValueError(kind)
