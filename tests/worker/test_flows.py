"""Flows and batches from Python, run by a real worker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

from jobqueue import App, Job, NullJob
from jobqueue.errors import Conflict, InvalidArgument, JobNotFound, NotFound, QueueNotFound, UnknownOption
from tests.support.server import rows, value

Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
async def app(dsn: str) -> AsyncIterator[App]:
    app = App(dsn)

    @app.job
    async def scan(payload: dict[str, Any]) -> dict[str, Any]:
        return {"files": payload["files"]}

    @app.job(queue="parsing")
    def parse(job: Job, payload: dict[str, Any]) -> int:
        files: int = job.sync.parent_results()["scan"]["files"]
        return files + int(payload["part"])

    @app.job
    async def report(job: Job) -> dict[str, Any]:
        return await job.parent_results()

    async with app:
        yield app


async def run(app: App) -> None:
    await app.run_worker(until_idle=True, concurrency=5)


async def test_children_read_the_results_of_their_parents(app: App, connection: Connection) -> None:
    flow = app.flow()
    scan = flow.add("scan", {"files": 10})
    parts = [flow.add("parse", {"part": n}, depends_on=[scan], priority=n) for n in range(3)]
    flow.add(app.registry["report"].function, depends_on=parts)
    assert parts == ["parse", "parse-3", "parse-4"]
    ids = await flow.send()
    assert [(await app.get(ids[ref])).status for ref in ("scan", "parse", "report")] == [
        "pending",
        "blocked",
        "blocked",
    ]
    await run(app)
    assert (await app.get(ids["report"])).result == {"parse": 10, "parse-3": 11, "parse-4": 12}
    status = await app.flow_status(ids["parse"])
    assert (status.total, status.ended, status.completed, status.pct) == (5, 5, 5, 100)
    assert await app.flow_status(status.id) == status
    late = await app.send("report", depends_on=[ids["scan"]])
    await run(app)
    assert (await app.get(late.id)).result == {"scan": {"files": 10}}
    assert await NullJob().parent_results() == {}


async def test_a_flow_can_be_given_as_mappings_and_go_on_from_what_send_answered(app: App) -> None:
    first = app.send_sync("scan", {"files": 1})
    ids = app.send_flow_sync(
        [
            {"name": "report", "ref": "r", "depends_on": [first, {"ref": "s", "on_failure": "run"}]},
            {"name": "scan", "ref": "s", "payload": {}, "max_retries": 0},
        ]
    )
    await run(app)
    assert (await app.get(ids["s"])).status == "failed"
    assert (await app.get(ids["r"])).result == {str(first.id): {"files": 1}, "s": None}


async def test_a_flow_that_cannot_be_is_refused(app: App, connection: Connection) -> None:
    flow = app.flow()
    flow.add("scan", {"files": 1}, ref="a", depends_on=["b"])
    flow.add("scan", {"files": 1}, ref="b", depends_on=["a"], on_failure="fail")
    with pytest.raises(InvalidArgument, match="a -> b -> a"):
        await flow.send()
    with pytest.raises(InvalidArgument, match="twice"):
        flow.add("scan", {}, ref="a")
    with pytest.raises(QueueNotFound):
        flow.add("scam")
    with pytest.raises(UnknownOption):
        flow.add("scan", {}, priorty=1)
    with pytest.raises(InvalidArgument, match="no name"):
        await app.send_flow([{"ref": "a"}])
    with pytest.raises(JobNotFound):
        await app.send("scan", {}, depends_on=["00000000-0000-4000-8000-000000000000"])
    with pytest.raises(NotFound):
        await app.flow_status("00000000-0000-4000-8000-000000000000")
    assert value(connection, "select count(*) from jobqueue.job") == 0


async def test_a_batch_sends_its_callback_when_its_block_and_its_jobs_have_ended(
    app: App, connection: Connection
) -> None:
    async with app.batch(
        "import", callback="report", callback_options={"priority": 3}, metadata={"by": "anna"}
    ) as batch:
        await app.send_many("scan", [{"files": n} for n in range(5)], batch=batch)
        await run(app)
        status = await app.batch_status(batch)
        assert (status.state, status.total, status.completed, status.pct) == ("open", 5, 5, 100)
        await app.send("scan", {"files": 5}, batch=str(batch))
    with pytest.raises(Conflict):
        await app.send("scan", {"files": 6}, batch=batch)
    assert await app.close_batch(batch) is False
    await run(app)
    status = app.batch_status_sync(batch)
    assert (status.state, status.name, status.total, status.ended) == ("ended", "import", 6, 6)
    assert status.callback_job_id is not None
    callback = await app.get(status.callback_job_id)
    assert (callback.status, callback.priority) == ("completed", 3)
    assert callback.metadata == {"batch_id": str(batch), "batch_name": "import"}
    with pytest.raises(ZeroDivisionError):
        async with app.batch(callback="report") as failed:
            1 / 0  # noqa: B018
    assert (await app.batch_status(failed)).state == "open"
    other = app.create_batch_sync(callback="report", callback_on="either")
    assert app.close_batch_sync(other) is True
    assert rows(connection, "select count(*) from jobqueue.job where job_type = 'report'") == [(2,)]
