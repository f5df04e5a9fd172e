"""What senders and support staff do beyond sending and acting on one job: from an app, and on the command line."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from pydantic import BaseModel

import jobqueue
from jobqueue import App
from jobqueue.errors import (
    BY_CODE,
    BatchNotFound,
    Conflict,
    FlowNotFound,
    InvalidArgument,
    JobNotFound,
    JobTypeNotFound,
    NotFound,
    QueueNotFound,
    ScheduleNotFound,
    UnknownOption,
    WorkerNotFound,
)
from jobqueue.support import ActionState
from tests.support.command import run
from tests.support.server import rows, value

Connection = psycopg.Connection[tuple[Any, ...]]
NOWHERE = "00000000-0000-4000-8000-000000000000"


class Export(BaseModel):
    number: int


@pytest.fixture
async def app(dsn: str) -> AsyncIterator[App]:
    app = App(dsn)

    @app.job("export", queue="exports", label="Export {payload.number}")
    async def export(payload: Export) -> None: ...

    async with app:
        yield app
    app.close_sync()


def fail_one(connection: Connection, queue: str) -> UUID:
    """Claim the next job of a queue and let it fail for good."""
    ((job_id, token),) = rows(
        connection, "select id, claim_token from jobqueue.claim(array[%s], gen_random_uuid(), 1)", (queue,)
    )
    error = '{"class": "permanent", "code": "DISK_FULL"}'
    connection.execute("select jobqueue.fail(%s, %s, %s::text::jsonb)", (job_id, token, error))
    assert isinstance(job_id, UUID)
    return job_id


async def test_jobs_are_found_by_what_they_have_and_what_is_inside(app: App, connection: Connection) -> None:
    ids = [
        (await app.send("export", {"number": n}, subject=f"report:{n}", metadata={"by": "anna", "n": n})).id
        for n in range(4)
    ]
    keyed = await app.send("other", {"tags": ["a", "b"]}, queue="others", singleton_key="k", tenant="acme")
    failed = fail_one(connection, "exports")
    assert failed == ids[0]
    cases: list[tuple[dict[str, Any], list[UUID]]] = [
        ({"queue": "exports"}, ids),
        ({"queue": ["exports", "others"]}, [*ids, keyed.id]),
        ({"id": ids[2]}, [ids[2]]),
        ({"id": str(ids[2]), "queue": "others"}, []),
        ({"singleton_key": "k"}, [keyed.id]),
        ({"subject": ["report:1", "report:3"]}, [ids[1], ids[3]]),
        ({"tenant": "acme", "job_type": "other"}, [keyed.id]),
        ({"payload": {"number": 2}}, [ids[2]]),
        ({"payload": Export(number=2)}, [ids[2]]),
        ({"payload": {"tags": ["b"]}}, [keyed.id]),
        ({"metadata": {"by": "anna"}, "status": "pending"}, ids[1:]),
        ({"metadata": {"by": "anna", "n": 3}}, [ids[3]]),
        ({"status": ["failed", "paused"], "error_class": "permanent", "error_code": "DISK_FULL"}, [failed]),
        ({"subject": None}, [*ids, keyed.id]),
    ]
    for filters, found in cases:
        assert [job.id for job in await app.find_jobs(**filters)] == found, filters
    assert [job.id for job in app.find_jobs_sync("exports", payload={"number": 1})] == [ids[1]]
    with pytest.raises(UnknownOption) as caught:
        await app.find_jobs(singelton_key="k")  # type: ignore[call-arg]
    assert caught.value.details["nearest"] == "singleton_key"
    wrong: list[dict[str, Any]] = [{"max_jobs": 0}, {"max_jobs": 10_001}, {"id": "x"}, {"after": "x"}]
    for each in wrong:
        with pytest.raises(InvalidArgument):
            await app.find_jobs("exports", **each)


async def test_pages_are_stable_while_jobs_come_and_go(app: App) -> None:
    ids = [sent.id for sent in await app.send_many("export", [Export(number=n) for n in range(6)])]
    first = await app.find_jobs("exports", max_jobs=2)
    assert [job.id for job in first] == ids[:2]
    for gone in (ids[1], ids[3]):
        await app.cancel(gone, "r")
        await app.delete(gone, "r")
    second = await app.find_jobs("exports", max_jobs=2, after=first[-1].id)
    assert [job.id for job in second] == [ids[2], ids[4]]
    late = (await app.send("export", Export(number=9))).id
    assert [job.id for job in app.find_jobs_sync("exports", after=str(second[-1].id))] == [ids[5], late]
    assert await app.find_jobs("exports", after=late) == []


async def test_waiting_jobs_are_changed_by_id_and_by_key(app: App, dsn: str, connection: Connection) -> None:
    sent = [await app.send("export", Export(number=n), singleton_key="k", throttle_seconds=100 + n) for n in range(3)]
    ids = [job.id for job in sent]
    later = datetime.now(UTC) + timedelta(hours=1)
    assert await app.update_jobs("exports", ids[0], payload=Export(number=7), run_at=later, max_retries=9) == [ids[0]]
    job = await app.get(ids[0])
    assert (job.payload, job.run_at, job.max_retries, job.singleton_key) == ({"number": 7}, later, 9, "k")
    assert await app.update_jobs("exports", {"singleton_key": "k"}, priority=5, subject="s") == [ids[2]]
    assert await app.update_jobs("exports", str(ids[2]), subject=None, timeout=None) == [ids[2]]
    job = await app.get(ids[2])
    assert (job.priority, job.subject, job.payload) == (5, None, {"number": 2})
    everyone = {"singleton_key": "k", "match": "all"}
    assert app.update_jobs_sync("exports", everyone, delay=timedelta(minutes=5)) == sorted(ids)
    async with await psycopg.AsyncConnection.connect(dsn) as own:
        assert len(await app.update_jobs("exports", everyone, connection=own, priority=8)) == 3
        await own.rollback()
    assert {job.priority for job in await app.find_jobs("exports")} == {0, 5}
    assert await app.update_jobs("exports", NOWHERE, priority=1) == []
    with pytest.raises(QueueNotFound):
        await app.update_jobs("nowhere", ids[0], priority=1)
    for wrong in ({"singleton_key": "l"}, {"prioritty": 1}):
        with pytest.raises(UnknownOption):
            await app.update_jobs("exports", ids[0], **wrong)
    for target in ({}, {"singleton_key": "k", "match": "some"}, "x"):
        with pytest.raises(InvalidArgument):
            await app.update_jobs("exports", target, priority=1)


async def test_upsert_sends_a_job_or_changes_the_one_that_waits(app: App, connection: Connection) -> None:
    first = await app.upsert("export", Export(number=1), singleton_key="k", subject="s")
    assert (first.created, first.updated, first.reason) == (True, False, None)
    second = app.upsert_sync("export", {"number": 2}, singleton_key="k", priority=4)
    assert (second.id, second.created, second.updated) == (first.id, False, True)
    job = await app.get(first.id)
    assert (job.payload, job.priority, job.subject, job.display_name) == ({"number": 2}, 4, "s", "Export 2")
    connection.execute("select jobqueue.claim('{exports}', gen_random_uuid(), 1)")
    third = await app.upsert("export", Export(number=3), singleton_key="k")
    assert third == (first.id, False, False, "singleton")
    own = uuid4()
    assert (await app.upsert("export", Export(number=4), id=own)).created
    assert (await app.upsert("export", Export(number=5), id=own)).updated
    with pytest.raises(InvalidArgument):
        await app.upsert("export", {"number": "many"}, singleton_key="k")
    with pytest.raises(InvalidArgument):
        await app.upsert("export", Export(number=1))
    with pytest.raises(QueueNotFound):
        await app.upsert("exprot", {}, singleton_key="k")


async def test_one_action_on_many_is_counted_first(app: App, connection: Connection) -> None:
    ids = [sent.id for sent in await app.send_many("export", [Export(number=n) for n in range(12)])]
    fail_one(connection, "exports")
    seen = await app.bulk("cancel", "not needed", queue="exports", status=["pending", "failed"], dry_run=True)
    assert (seen.done, seen.refused, seen.total) == (11, 1, 12)
    assert value(connection, "select count(*) from jobqueue.jobs where status = 'cancelled'") == 0
    with pytest.raises(Conflict) as caught:
        await app.bulk("cancel", "not needed", queue="exports", expected_count=10)
    assert caught.value.details["count"] == 12
    assert await app.bulk("cancel", "not needed", ids=ids[1:3], expected_count=2) == (2, 0, 0, 0, 0)
    past = datetime(2020, 1, 1, tzinfo=UTC)
    assert (await app.bulk("retry", "r", error_class="permanent", ended_after=past)).done == 1
    assert (await app.bulk("retry", "r", queue="exports", created_before=past)).total == 0
    with pytest.raises(InvalidArgument, match="time zone"):
        await app.bulk("retry", "r", created_before=datetime(2020, 1, 1))
    for reason, filters in ((" ", {"queue": "exports"}), ("r", {})):
        with pytest.raises(InvalidArgument):
            await app.bulk("cancel", reason, **filters)  # type: ignore[arg-type]
    with pytest.raises(UnknownOption):
        await app.bulk("cancel", "r", colour="red")  # type: ignore[call-arg]


async def test_queues_and_tenants_are_emptied(app: App, connection: Connection) -> None:
    for tenant in ("acme", "acme", "default"):
        await app.send("export", Export(number=1), tenant=tenant)
    connection.execute("select jobqueue.claim('{exports}', gen_random_uuid(), 1)")
    assert await app.purge_tenant("acme", "they left") == (1, 1, 1)
    assert await app.purge_queue("exports", "test data") == (1, 1, 1)
    with pytest.raises(QueueNotFound):
        await app.purge_queue("nowhere", "r")
    with pytest.raises(InvalidArgument):
        await app.purge_tenant("acme", " ")


async def test_job_types_tenants_and_schedules_are_paused_and_resumed(app: App, connection: Connection) -> None:
    sent = await app.send("export", Export(number=1), tenant="acme")
    await app.schedule("nightly", "export", "0 3 * * *", Export(number=2))
    await app.pause_job_type("export", "wrong tax rate")
    await app.pause_tenant("acme", "asked us to")
    await app.pause_schedule("nightly", "month end")
    reasons = {row.reason for row in await app.explain(sent.id)}
    assert {"job_type_paused", "tenant_paused"} <= reasons
    warned = {check.name: check.status for check in await app.health() if check.name.startswith("paused")}
    assert warned["paused: job_type export"] == warned["paused: tenant acme"] == "warn"
    assert value(connection, "select pause_reason from jobqueue.schedules") == "month end"
    await app.resume_job_type("export", "repaired")
    await app.resume_tenant("acme", "go on")
    await app.resume_schedule("nightly", "over")
    assert value(connection, "select paused_at from jobqueue.schedules") is None
    assert not {"job_type_paused", "tenant_paused"} & {row.reason for row in await app.explain(sent.id)}
    assert {check.status for check in await app.doctor()} <= {"ok", "warn"}


async def test_dead_letters_are_previewed_before_they_go_back(app: App, dsn: str, connection: Connection) -> None:
    await app.create_queue("exports", dead_letter="dead")
    for number in range(3):
        await app.send("export", Export(number=number))
        fail_one(connection, "exports")
    assert await app.preview_redrive("dead") == [("exports", 3, 0)]
    assert await app.preview_redrive("dead", payload={"number": 1}, destination="elsewhere") == [("elsewhere", 0, 1)]
    with pytest.raises(QueueNotFound):
        await app.preview_redrive("nowhere")
    seen = run("queues", "redrive", "dead", "--preview", "--payload", '{"number": 1}', "-o", "json", dsn=dsn)
    assert json.loads(seen.stdout) == [{"destination": "exports", "originals": 1, "new_jobs": 0}]
    assert await app.preview_redrive("dead") == [("exports", 3, 0)]
    done = run("queues", "redrive", "dead", "--max-jobs", "2", "-o", "json", dsn=dsn)
    assert json.loads(done.stdout) == {"redriven": 2, "sent": 0, "conflicts": 0, "unroutable": 0}
    assert run("queues", "redrive", "dead", "--payload", "{", dsn=dsn).returncode == 2
    assert run("queues", "redrive", "nowhere", dsn=dsn).returncode == 3


async def test_a_job_names_its_parents_its_children_and_what_can_be_done_with_it(app: App) -> None:
    flow = app.flow()
    flow.add("export", Export(number=1), ref="first")
    flow.add("export", Export(number=2), ref="second", depends_on=["first"], on_failure="run")
    ids = await flow.send()
    (parent,) = await app.parents(ids["second"])
    (child,) = await app.children(str(ids["first"]))
    assert (parent.id, parent.ref, parent.status, parent.result) == (ids["first"], "first", "pending", None)
    assert (child.id, child.ref, child.on_failure, child.unfinished_parents) == (ids["second"], "second", "run", 1)
    assert [*await app.parents(ids["first"]), *await app.children(ids["second"])] == []
    assert app.flow_status_sync(ids["first"]) == await app.flow_status(ids["second"])
    assert await app.allowed_actions(ids["second"]) == ["cancel", "prioritize"]
    known = await app.actions(ids["second"])
    assert ActionState("cancel", True, None) in known
    assert [row.reason for row in known if row.action == "retry"] != [None]


async def test_a_worker_is_asked_to_drain(app: App, connection: Connection) -> None:
    worker = uuid4()
    connection.execute('select jobqueue.register_worker(%s, \'{"name": "press"}\')', (worker,))
    await app.drain_worker(str(worker), "new machine")
    assert rows(connection, "select id, command from jobqueue.heartbeat(%s)", (worker,)) == [(None, "drain")]


async def test_what_is_not_there_has_an_error_of_its_own(app: App) -> None:
    for missing, call in (
        (JobTypeNotFound, app.resume_job_type("nothing", "r")),
        (FlowNotFound, app.flow_status(NOWHERE)),
        (BatchNotFound, app.batch_status(NOWHERE)),
        (ScheduleNotFound, app.pause_schedule("nothing", "r")),
        (ScheduleNotFound, app.resume_schedule("nothing", "r")),
        (WorkerNotFound, app.drain_worker(NOWHERE, "r")),
        (WorkerNotFound, app.drain_worker("press", "r")),
        (JobNotFound, app.parents(NOWHERE)),
        (JobNotFound, app.children("x")),
        (JobNotFound, app.actions(NOWHERE)),
        (JobNotFound, app.allowed_actions(NOWHERE)),
    ):
        with pytest.raises(NotFound) as caught:
            await call
        assert type(caught.value) is missing
        assert caught.value.exit_code == 3
    for code in ("JOB_TYPE", "FLOW", "BATCH", "SCHEDULE", "WORKER", "BULK"):
        known = BY_CODE[f"{code}_NOT_FOUND"]
        assert getattr(jobqueue, known.__name__) is known


async def test_the_command_line_lists_by_what_is_inside_and_acts_on_many(
    app: App, dsn: str, connection: Connection
) -> None:
    for number in range(3):
        await app.send("export", Export(number=number), metadata={"by": "anna"}, singleton_key=f"k{number}")

    def listed(*arguments: str) -> list[int]:
        return [
            job["payload"]["number"]
            for job in json.loads(run("jobs", "list", *arguments, "-o", "json", dsn=dsn).stdout)
        ]

    assert listed("--queue", "exports", "--metadata", '{"by": "anna"}') == [2, 1, 0]
    assert listed("--payload", '{"number": 1}') == listed("--key", "k1") == [1]
    assert listed("--status", "pending", "--status", "failed", "--limit", "1") == [2]
    assert run("jobs", "list", "--payload", "{", dsn=dsn).returncode == 2

    bulk = ("jobs", "bulk", "cancel", "--status", "pending", "--queue", "exports", "-r", "not needed")
    seen = run(*bulk, "--dry-run", "-o", "json", dsn=dsn)
    assert json.loads(seen.stdout) == [{"outcome": "done", "jobs": 3}]
    refused = run(*bulk, dsn=dsn, stdin="n\n")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "cancel: done 3. Go on?" in refused.stderr
    assert run(*bulk, "--expected-count", "2", "--yes", dsn=dsn).returncode == 4
    assert run("jobs", "bulk", "cancel", "--queue", "", "-r", "r", "--yes", dsn=dsn).stdout.split() == [
        "outcome",
        "jobs",
    ]
    assert value(connection, "select count(*) from jobqueue.jobs where status = 'pending'") == 3
    assert run(*bulk, dsn=dsn, stdin="y\n").returncode == 0
    assert value(connection, "select count(*) from jobqueue.actions_taken where actor is not null") == 3
    assert run("jobs", "bulk", "cancel", "-r", "everything", "--yes", dsn=dsn).returncode == 2


async def test_the_command_line_prints_the_keys_that_stand_still(app: App, dsn: str, connection: Connection) -> None:
    await app.create_queue("accounts", policy="key_strict_fifo", max_retries=0)
    first = await app.send("book", queue="accounts", singleton_key="account:7")
    await app.send("book", queue="accounts", singleton_key="account:7")
    assert fail_one(connection, "accounts") == first.id
    (key,) = json.loads(run("queues", "blocked-keys", "accounts", "-o", "json", dsn=dsn).stdout)
    assert (key["singleton_key"], key["job_id"], key["waiting"]) == ("account:7", str(first.id), 1)
    assert run("queues", "blocked-keys", "nowhere", dsn=dsn).returncode == 3
