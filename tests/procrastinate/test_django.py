"""An application of procrastinate's Django app keeps its tasks and has its jobs here, in Django's own transactions."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.integrations.django_project import database, set_up
from tests.support.application import Connection, rows

set_up()

from asgiref.sync import sync_to_async  # noqa: E402
from django.db import connections, transaction  # noqa: E402
from procrastinate import exceptions  # noqa: E402
from procrastinate.contrib.django import app  # noqa: E402
from procrastinate.jobs import Status  # noqa: E402

from jobqueue.procrastinate import job_uuid  # noqa: E402
from jobqueue.procrastinate.django import DjangoJobqueueConnector  # noqa: E402

SCRIPT = """
import sys
from tests.integrations.django_project import set_up
set_up()
import tests.procrastinate.test_django
if sys.argv[1] == "manage.py":
    from django.core.management import execute_from_command_line
    execute_from_command_line(sys.argv[1:])
else:
    from jobqueue.cli import main
    main(sys.argv[1:])
"""


@app.task(queue="django", pass_context=True)
def add(context, one: int, other: int) -> int:  # type: ignore[no-untyped-def]
    assert context.job.task_kwargs == {"one": one, "other": other}
    if one < 3:
        add.defer(one=one + 1, other=other)
    return one + other


@pytest.fixture(autouse=True)
def django_database(dsn: str) -> Iterator[None]:
    """Django's default database is the test's."""
    with database(dsn):
        yield


def run(dsn: str, *command: str) -> None:
    """A program of the project, in a process of its own."""
    line = [sys.executable, "-W", "error::DeprecationWarning:jobqueue", "-c", SCRIPT, *command]
    environment = {**os.environ, "DJANGO_TEST_DSN": dsn, "JOBQUEUE_DSN": dsn}
    ran = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


async def status_of(id: int) -> Status:
    """The status, asked for in a coroutine; the thread in which Django does that has a connection of its own."""
    try:
        return await app.job_manager.get_job_status_async(id)
    finally:
        await sync_to_async(connections.close_all)()


def test_jobs_are_deferred_read_and_cancelled_in_djangos_transactions(connection: Connection) -> None:
    assert isinstance(app.connector, DjangoJobqueueConnector)
    with transaction.atomic():
        add.defer(one=1, other=2)
        transaction.set_rollback(True)
    assert rows(connection, "select count(*) from jobqueue.job") == [(0,)]
    with transaction.atomic():
        id = add.configure(lock="l", queueing_lock="only").defer(one=1, other=2)
        assert rows(connection, "select count(*) from jobqueue.job") == [(0,)]
    assert rows(connection, "select id, payload from jobqueue.job") == [(job_uuid(id), {"one": 1, "other": 2})]
    with pytest.raises(exceptions.AlreadyEnqueued), transaction.atomic():
        add.configure(queueing_lock="only").defer(one=1, other=2)
    (job,) = app.job_manager.list_jobs()
    assert (job.id, job.task_kwargs, job.lock) == (id, {"one": 1, "other": 2}, "l")
    assert [queue["todo"] for queue in app.job_manager.list_queues()] == [1]
    assert asyncio.run(status_of(id)) == Status.TODO
    assert app.job_manager.cancel_job_by_id(id)
    assert app.job_manager.get_job_status(id) == Status.CANCELLED
    with pytest.raises(exceptions.SyncConnectorConfigurationError):
        asyncio.run(app.job_manager.fetch_job(queues=None, worker_id=1))


def test_the_stock_worker_and_ours_run_the_tasks_of_the_project(dsn: str, connection: Connection) -> None:
    add.defer(one=2, other=2)
    run(dsn, "manage.py", "procrastinate", "worker", "--one-shot", "-q", "django")
    assert rows(connection, "select status, payload -> 'one' from jobqueue.job order by id") == [
        ("completed", 2), ("completed", 3)]  # fmt: skip
    add.defer(one=3, other=2)
    run(dsn, "worker", "jobqueue.procrastinate.django", "--queues", "django", "--until-idle")
    assert rows(connection, "select result from jobqueue.job where result is not null") == [(5,)]
