"""Django's tasks run as jobs: enqueued in its transactions, with its results, errors and signals."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from jobqueue import App
from tests.integrations.django_project import database, set_up
from tests.support.application import Connection, rows, work

set_up()

from asgiref.sync import sync_to_async  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.db import connections, transaction  # noqa: E402
from django.utils import timezone  # noqa: E402

from jobqueue.errors import ConfigurationError  # noqa: E402
from jobqueue.integrations.django.connection import conninfo_of  # noqa: E402
from jobqueue.integrations.django.interface import (  # noqa: E402
    TaskResultDoesNotExist,
    TaskResultStatus,
    task_backends,
    task_enqueued,
    task_finished,
    task_started,
)
from jobqueue.integrations.django.tasks import JobqueueBackend  # noqa: E402
from jobqueue.integrations.django.worker import make_app  # noqa: E402
from tests.integrations import django_tasks_of_tests as tasks  # noqa: E402


@pytest.fixture(autouse=True)
def django_database(dsn: str) -> Iterator[None]:
    """Django's default database is the test's."""
    with database(dsn):
        yield


def run_tasks() -> None:
    """A worker for what is enqueued, in this process."""

    async def run(app: App) -> None:
        async with app:
            await work(app)

    asyncio.run(run(make_app()))


def test_a_task_is_enqueued_with_the_transaction_and_runs_after_its_commit(connection: Connection) -> None:
    with transaction.atomic():
        tasks.add.enqueue(1, 2)
        transaction.set_rollback(True)
    assert rows(connection, "select count(*) from jobqueue.job") == [(0,)]
    with transaction.atomic():
        result = tasks.add.enqueue(1, other=2)
        transaction.on_commit(lambda: tasks.greet.enqueue("on commit"))
        assert rows(connection, "select count(*) from jobqueue.job") == [(0,)]
    assert rows(connection, "select count(*) from jobqueue.job") == [(2,)]
    assert (result.status, result.is_finished) == (TaskResultStatus.READY, False)
    run_tasks()
    result.refresh()
    assert (result.status, result.return_value, result.attempts) == (TaskResultStatus.SUCCESSFUL, 3, 1)
    assert result.enqueued_at <= result.started_at == result.last_attempted_at <= result.finished_at


def test_queue_priority_time_and_coroutines_are_supported(connection: Connection) -> None:
    later = timezone.now() + timedelta(hours=1)
    tasks.greet.enqueue("Ada", loudly=True)
    waiting = tasks.greet.using(run_after=later, priority=-3).enqueue("Bob")
    found = rows(connection, "select queue, job_type, display_name, priority from jobqueue.jobs order by priority desc")
    path = f"{tasks.__name__}.greet"
    assert found == [("mail", "django_task", path, 7), ("mail", "django_task", path, -3)]
    run_tasks()
    assert rows(connection, "select result from jobqueue.job where status = 'completed'") == [("hello Ada!",)]
    read = tasks.greet.get_result(waiting.id)
    assert (read.status, read.task.run_after, read.task.priority) == (TaskResultStatus.READY, later, -3)
    with pytest.raises(Exception, match="Queue 'elsewhere' is not valid"):
        tasks.greet.using(queue_name="elsewhere")


def test_a_task_with_context_knows_its_attempt_and_its_job() -> None:
    result = tasks.describe.enqueue()
    run_tasks()
    assert tasks.describe.get_result(result.id).return_value == {"attempt": 1, "id": result.id, "job": result.id}


def test_a_failed_task_keeps_the_errors_of_all_attempts_by_their_classes() -> None:
    own, builtin = tasks.fail.enqueue("own"), tasks.fail.enqueue("builtin")
    run_tasks()
    own.refresh()
    builtin.refresh()
    assert (own.status, own.attempts) == (TaskResultStatus.FAILED, 2)
    assert [error.exception_class for error in own.errors] == [tasks.Unlucky, tasks.Unlucky]
    assert "Unlucky: own" in own.errors[0].traceback
    assert [error.exception_class for error in builtin.errors] == [ValueError, ValueError]
    with pytest.raises(ValueError, match="Task failed"):
        _ = own.return_value


def test_signals_are_sent_once_per_task() -> None:
    seen: list[tuple[str, str, Any]] = []

    def note(name: str) -> Any:
        return lambda sender, task_result, **_: seen.append((name, task_result.task.name, task_result.status.name))

    receivers = {name: note(name) for name in ("enqueued", "started", "finished")}
    signals = {"enqueued": task_enqueued, "started": task_started, "finished": task_finished}
    for name, receiver in receivers.items():
        signals[name].connect(receiver)
    try:
        tasks.add.enqueue(1, 2)
        run_tasks()
        assert seen == [("enqueued", "add", "READY"), ("started", "add", "RUNNING"), ("finished", "add", "SUCCESSFUL")]
        seen.clear()
        tasks.fail.enqueue("own")
        run_tasks()
        assert [name for name, *_ in seen] == ["enqueued", "started", "started", "finished"]
        assert seen[-1] == ("finished", "fail", "FAILED")
    finally:
        for name, receiver in receivers.items():
            signals[name].disconnect(receiver)


async def test_tasks_are_enqueued_and_read_from_coroutines() -> None:
    result = await tasks.add.aenqueue(2, 2)
    assert (await tasks.add.aget_result(result.id)).status == TaskResultStatus.READY
    # The thread in which Django does this has a connection of its own, which would outlive the test's database.
    await sync_to_async(connections.close_all)()


def test_unknown_results_do_not_exist_and_wrong_settings_are_named() -> None:
    for unknown in ("no uuid", "0198c5a0-1c2d-7e3f-8a4b-5c6d7e8f9a0b"):
        with pytest.raises(TaskResultDoesNotExist):
            tasks.add.get_result(unknown)
    backend = task_backends["default"]
    assert (backend.supports_defer, backend.supports_get_result) == (True, True)
    assert backend.check() == []
    with pytest.raises(Exception, match="'databse'; known are: database, send"):
        JobqueueBackend("default", {"OPTIONS": {"databse": "x"}})
    assert "cannot live in sqlite" in JobqueueBackend("x", {"OPTIONS": {"database": "other"}}).check()[0].msg
    with pytest.raises(ConfigurationError, match="is sqlite"):
        conninfo_of("other")
    with pytest.raises(Exception, match="leads to sqlite"):
        App().send_sync("x", queue="q", connection=connections["other"])


def test_manage_py_runs_the_tasks(dsn: str, connection: Connection) -> None:
    result = tasks.add.enqueue(20, 22)
    code = (
        "from tests.integrations.django_project import set_up; set_up(procrastinate=False);"
        "from django.core.management import execute_from_command_line as run;"
        "run(['manage.py', 'jobqueue_worker', '--until-idle', '--queues', 'default', '--concurrency', '2'])"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    ran = subprocess.run(
        command, env={**os.environ, "DJANGO_TEST_DSN": dsn}, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    result.refresh()
    assert result.return_value == 42
    assert rows(connection, "select concurrency from jobqueue.worker") == [(2,)]
    call_command("check")
