"""Queues, explanations and health from the command line, and the same from an app."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from jobqueue import App
from jobqueue.errors import Conflict, InvalidArgument, JobNotFound, QueueNotFound, UnknownOption
from tests.support.command import run
from tests.support.server import rows, value

Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
async def app(dsn: str) -> AsyncIterator[App]:
    async with App(dsn) as opened:
        yield opened


def test_a_queue_is_made_changed_paused_emptied_and_deleted(dsn: str, connection: Connection) -> None:
    created = run("queues", "create", "q", "--option", "max_retries=5", "--option", "timeout=1 h", dsn=dsn)
    assert (created.returncode, created.stderr.strip()) == (0, "created queue q")
    assert run("queues", "create", "q", "--option", "max_retries=6", dsn=dsn).returncode == 4
    assert (
        run("queues", "update", "q", "--option", "max_retries=6", "--option", "timeout=null", dsn=dsn).returncode == 0
    )
    assert rows(connection, "select max_retries, timeout from jobqueue.queues") == [(6, None)]
    for dead_letter, stored in (("12", "12"), ("null", None)):
        assert run("queues", "update", "q", "--option", f"dead_letter={dead_letter}", dsn=dsn).returncode == 0
        assert value(connection, "select dead_letter from jobqueue.queues where name = 'q'") == stored
    connection.execute("select jobqueue.delete_queue('12')")
    assert run("queues", "pause", "q", "-r", "too hot", dsn=dsn).returncode == 0
    assert value(connection, "select pause_reason from jobqueue.queues") == "too hot"
    assert run("queues", "resume", "q", "-r", "cooler", dsn=dsn).returncode == 0
    assert value(connection, "select paused_at from jobqueue.queues") is None
    connection.execute("select jobqueue.send('q')")
    assert run("queues", "delete", "q", dsn=dsn).returncode == 4
    assert run("queues", "purge", "q", "-r", "moving", dsn=dsn, stdin="n\n").returncode == 1
    purged = run("queues", "purge", "q", "-r", "moving", "--yes", "-o", "json", dsn=dsn)
    assert json.loads(purged.stdout) == {"cancelled": 1, "deleted": 1, "running": 0}
    assert run("queues", "delete", "q", dsn=dsn).returncode == 0
    assert run("queues", "pause", "q", "-r", "x", dsn=dsn).returncode == 3
    assert value(connection, "select count(*) from jobqueue.actions_taken where actor is not null") == 4


def test_a_job_is_explained(dsn: str, connection: Connection) -> None:
    job = value(connection, "select id from jobqueue.send('q')")
    connection.execute("select jobqueue.pause_queue('q', 'too hot')")
    explained = json.loads(run("jobs", "explain", job, "-o", "json", dsn=dsn).stdout)
    assert [row["reason"] for row in explained] == ["queue_paused", "no_worker", "ready"]
    assert "too hot" in run("jobs", "explain", job, dsn=dsn).stdout
    assert run("jobs", "explain", "nonsense", dsn=dsn).returncode == 3


def test_health_and_doctor_exit_with_1_if_something_failed(dsn: str, connection: Connection) -> None:
    for command in ("health", "doctor"):
        assert run(command, dsn=dsn).returncode == 0
    connection.execute("grant select on jobqueue.job to public")
    assert run("health", dsn=dsn).returncode == 0
    found = run("doctor", "-o", "json", dsn=dsn)
    assert found.returncode == 1
    assert [row["name"] for row in json.loads(found.stdout) if row["status"] == "fail"] == ["grants"]


def test_top_shows_queues_workers_and_what_needs_attention(dsn: str, connection: Connection) -> None:
    connection.execute("select jobqueue.send('q') from generate_series(1, 3)")
    connection.execute("select jobqueue.pause_queue('q', 'too hot')")
    connection.execute('select jobqueue.register_worker(gen_random_uuid(), \'{"name": "w1", "concurrency": 9}\')')
    snapshot = json.loads(run("top", "-o", "json", dsn=dsn).stdout)
    assert [(row["queue"], row["ready"], row["is_paused"]) for row in snapshot["queues"]] == [("q", 3, True)]
    assert [(row["name"], row["state"], row["concurrency"]) for row in snapshot["workers"]] == [("w1", "working", 9)]
    shown = run("top", dsn=dsn).stdout
    assert "3 ready" in shown
    assert "1 workers, 0 of 9 slots busy" in shown
    assert "q (paused)" in shown
    assert "too hot" in shown


async def test_an_app_manages_queues(app: App, connection: Connection) -> None:
    assert await app.create_queue("q", policy="short", timeout=timedelta(hours=1), keep_ended=None) is True
    assert await app.create_queue("q", timeout="1 h", policy=None) is False
    with pytest.raises(Conflict):
        await app.create_queue("q", max_retries=9)
    await app.update_queue("q", max_retries=9, timeout=None, warn_backlog=None)
    assert rows(connection, "select policy, max_retries, timeout, keep_ended from jobqueue.queues") == [
        ("short", 9, None, None)
    ]
    for wrong in ({"colour": 3}, {"priority": 3}):
        with pytest.raises(UnknownOption):
            await app.update_queue("q", **wrong)
    await app.pause_queue("q", "too hot")
    sent = await app.send("q", queue="q")
    assert (await app.explain(sent.id))[0].reason == "queue_paused"
    await app.resume_queue("q", "cooler")
    with pytest.raises(Conflict):
        await app.delete_queue("q")
    await app.cancel(sent.id, "no longer needed")
    assert await app.delete_queue("q") == 1
    with pytest.raises(QueueNotFound):
        await app.delete_queue("q")
    with pytest.raises(JobNotFound):
        await app.explain(sent.id)


async def test_an_app_publishes_in_its_own_transaction(app: App, dsn: str, connection: Connection) -> None:
    assert await app.publish("paid") == []
    assert await app.subscribe("paid", "mail") is True
    assert await app.subscribe("paid", "books") is True
    told = await app.publish("paid", {"invoice": 7}, delay=timedelta(hours=1))
    assert [(row.queue, row.created) for row in told] == [("books", True), ("mail", True)]
    async with await psycopg.AsyncConnection.connect(dsn) as own:
        await app.publish("paid", connection=own)
        await own.rollback()
    assert len(app.publish_sync("paid", subject="invoice:8")) == 2
    assert value(connection, "select count(*) from jobqueue.job") == 4
    assert await app.unsubscribe("paid", "mail") is True
    with pytest.raises(InvalidArgument):
        await app.publish("paid", {"x": object()})
    app.close_sync()


async def test_an_app_sends_dead_letters_back(app: App, connection: Connection) -> None:
    await app.create_queue("q", dead_letter="dead")
    sent = await app.send("q", queue="q")
    ((token,),) = rows(connection, "select claim_token from jobqueue.claim('{q}', gen_random_uuid(), 1)")
    connection.execute('select jobqueue.fail(%s, %s, \'{"class": "permanent"}\')', (sent.id, token))
    assert (await app.redrive("dead", source="elsewhere")).redriven == 0
    assert await app.redrive("dead", ids=[sent.id], max_jobs=None) == (1, 0, 0, 0)
    assert (await app.get(sent.id)).status == "pending"
