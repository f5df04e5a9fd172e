"""With `frozen` every rule of jobqueue reads the clock of the test, in every session, and afterwards the real one again."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobqueue import App, Conflict, Job
from jobqueue.keys import make_key
from jobqueue.testing import drain, frozen, rewriting, travel, unfreeze
from tests.support.application import Connection, has, rows, seen

ROOT = Path(__file__).parents[2]
START = datetime(2026, 3, 28, 23, 30, tzinfo=UTC)
# What can read a clock besides what `frozen` rewrites: if one of them does, it must learn to.
OTHERS = """
    select 'check', conname::text, pg_get_constraintdef(oid) from pg_constraint
    where connamespace = 'jobqueue'::regnamespace and contype <> 'n'
    union all
    select 'trigger', tgname::text, pg_get_triggerdef(t.oid)
    from pg_trigger t join pg_class c on c.oid = t.tgrelid and c.relnamespace = 'jobqueue'::regnamespace where not tgisinternal
    union all
    select 'policy', policyname::text, concat(qual, with_check) from pg_policies where schemaname = 'jobqueue'
    union all
    select 'rule', rulename::text, definition from pg_rules where schemaname = 'jobqueue'
    union all
    select 'domain', typname::text, typdefault from pg_type where typnamespace = 'jobqueue'::regnamespace and typdefault <> ''
"""
# Functions that measure how long something really takes. With a clock that stands a loop with a bound would be endless.
STAY_REAL = {"keep_senders_out", "send", "wake", "check_horizon", "check_statements", "metric_database"}


def readers(connection: Connection) -> list[str]:
    """What reads the clock of the server, and is not meant to."""
    found = [*rewriting._definitions(connection), *rows(connection, OTHERS)]
    left = [(kind, name, rewriting.STAYS_REAL.sub("", text)) for kind, name, text in found]
    return [f"{kind} {name}" for kind, name, text in left if rewriting.READS_A_CLOCK.search(text)]


@pytest.fixture(scope="module")
def clock_dsn(databases: Any) -> Iterator[str]:
    """A database whose functions can read the clock of a test: to change them takes longer than all that is done here."""
    with databases.lend() as conninfo:
        with psycopg.connect(conninfo, autocommit=True) as connection:
            rewriting.install(connection)
        yield conninfo


@pytest.fixture
def clock_connection(clock_dsn: str) -> Iterator[Connection]:
    with psycopg.connect(clock_dsn, autocommit=True) as opened:
        yield opened


def test_every_function_default_view_and_condition_reads_the_frozen_clock_and_afterwards_is_what_it_was(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rewriting._definitions(connection)
    assert len(readers(connection)) > 100
    with frozen(dsn):
        assert readers(connection) == [], "see STAYS_REAL in jobqueue/testing/rewriting.py"
        real = {name for _, name, text in rewriting._definitions(connection) if rewriting.STAYS_REAL.search(text)}
        assert {re.sub(r".*\.(\w+)\(.*", r"\1", name) for name in real} <= STAY_REAL
        connection.execute("create function jobqueue.late() returns date language sql as 'select current_date'")
        connection.execute("alter table jobqueue.setting add constraint c check (name <> now()::text) not valid")
        assert sorted(readers(connection)) == ["check c", "function jobqueue.late()"]
        connection.execute("alter table jobqueue.setting drop constraint c; drop function jobqueue.late()")
    assert rewriting._definitions(connection) == before
    assert rows(connection, "select to_regnamespace('jobqueue_testing')") == [(None,)]
    with frozen(dsn):
        # A new version of a function, made while time stands, stays; a killed process leaves the rest to unfreeze.
        connection.execute("create or replace function jobqueue.now_minus(_duration interval) returns timestamptz "
                           "language sql stable as $$ select null::timestamptz $$")  # fmt: skip
    assert rows(connection, "select jobqueue.now_minus('1 s')") == [(None,)]
    rewriting.install(connection)
    unfreeze(dsn)
    unfreeze(dsn)
    assert [each for each in rewriting._definitions(connection) if each not in before][1:] == []
    with psycopg.connect(dsn) as open_transaction:
        open_transaction.execute("select count(*) from jobqueue.jobs")
        monkeypatch.setattr(rewriting, "LOCK_TIMEOUT", "10ms")
        with pytest.raises(Conflict, match="for 10ms an open transaction"):
            rewriting.install(connection)


def test_no_statement_of_the_program_reads_a_clock_of_its_own() -> None:
    clock = re.compile(r"\b(now|clock_timestamp|statement_timestamp)\(\)|current_timestamp", re.IGNORECASE)
    files = [*(ROOT / "jobqueue").rglob("*.py"), *(ROOT / "api").rglob("*.py")]
    assert len(files) > 100
    reading = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.parts[-2] != "testing" and clock.search(re.sub(r"[.\w]\.now\(\)", "", path.read_text()))
    }
    # Times of applied migrations; no rule looks at them.
    assert reading <= {"jobqueue/database/ledger.py"}, "ask the database: sql/functions/clock.sql"


def test_rows_ids_windows_limits_leases_and_expiry_follow_the_clock_in_every_session(
    clock_dsn: str, clock_connection: Connection
) -> None:
    me = clock_connection
    # This session has used the functions before, so it has plans of them.
    rows(me, "select * from jobqueue.send('before', '{}', '{\"throttle_seconds\": 60, \"singleton_key\": \"k\"}')")
    with frozen(clock_dsn, at="2026-03-29T00:30+01:00") as clock:
        assert clock.now == START
        with psycopg.connect(clock_dsn) as worker:
            worker.execute("set role jobqueue_worker")
            for _ in range(3):
                worker.execute("select * from jobqueue.send('q', '{}', '{\"delay\": \"1 hour\"}')")
            clock.move(5)
            assert worker.execute("select jobqueue.now_minus('5 s')").fetchone() == (START,)
            worker.rollback()
        sent = [rows(me, "select id from jobqueue.send('q', '{}', '{\"delay\": \"1 hour\"}')")[0][0] for _ in range(5)]
        assert sent == sorted(sent)
        at = START + timedelta(seconds=5)
        assert {row[:3] for row in rows(me, "select created_at, updated_at, run_at from jobqueue.jobs where queue = 'q'")} == {
            (at, at, at + timedelta(hours=1))
        }  # fmt: skip
        assert rows(me, "select jobqueue.first_id(%s) <= %s and %s < jobqueue.first_id(%s + interval '1 ms')",
                    at, sent[0], sent[4], at) == [(True,)]  # fmt: skip
        windows_and_limits(me, clock)
        leases_and_keys(me, clock)
        with frozen(clock_dsn, at="2030-01-01T00:00Z") as inner:
            assert inner.now.year == 2030
            inner.run()
            running = inner.now
            assert running >= datetime(2030, 1, 1, tzinfo=UTC)
            inner.stop()
            assert inner.now == inner.now > running
            inner.run()
            assert inner.set("2031-01-01T00:00Z").year == 2031
        assert clock.now.year == 2026
        with pytest.raises(ValueError, match="no offset"):
            clock.set("2026-03-29T00:30")
        with pytest.raises(ValueError, match="negative"):
            clock.move(-1)
    ((late,),) = rows(me, "select id from jobqueue.send('q')")
    assert rows(me, "select now() - created_at < '1 min' from jobqueue.jobs where id = %s", late) == [(True,)]
    assert rows(me, "select count(*) from jobqueue.maintenance where next_at > now() + every") == [(0,)]


def windows_and_limits(me: Connection, clock: Any) -> None:
    """A throttle window is closed until it ends, and a rate limit gives a place back after its period."""
    throttle = "select created, reason from jobqueue.send('t', '{}', '{\"throttle_seconds\": 60}')"
    clock.set("2026-03-29T12:00:00Z")
    assert rows(me, "select jobqueue.seconds_until('2026-03-29T12:01Z'), jobqueue.now_minus('1 min')") == [
        (60.0, clock.now - timedelta(minutes=1))
    ]
    assert rows(me, throttle) == [(True, None)]
    clock.move(59)
    assert rows(me, throttle) == [(False, "throttled")]
    clock.move(1)
    assert rows(me, throttle) == [(True, None)]
    me.execute('select jobqueue.create_queue(\'rated\', \'{"rate_limit": {"limit": 1, "period": "1 hour"}}\')')
    me.execute("select jobqueue.send_many('rated', '[{}, {}]')")
    claim = "select started_at, lease_until from jobqueue.claim('{rated}', gen_random_uuid(), 5)"
    assert rows(me, claim) == [(clock.now, clock.now + timedelta(seconds=30))]
    clock.move("59 min 59 s")
    assert rows(me, claim) == []
    clock.move("1 s")
    assert len(rows(me, claim)) == 1


def leases_and_keys(me: Connection, clock: Any) -> None:
    """A lease lasts as long as the clock stands; keys and quotas end by it, and statistics are of its minutes."""
    rescue = "select jobqueue.rescue(100)"
    me.execute("select jobqueue.send('leased'); select jobqueue.claim('{leased}', gen_random_uuid(), 1)")
    clock.move(29)
    assert rows(me, rescue) == [(1,)]  # the first job of the rated queue, of an hour ago
    clock.move(1)
    assert rows(me, rescue) == [(2,)]
    key = make_key()
    me.execute('select jobqueue.create_api_key(%s, %s, \'{"expires_in": "1 day"}\')', [key.id, key.hash])
    assert rows(me, "select jobqueue.api_key_is_live(%s)", key.id) == [(True,)]
    quota = "select granted, ends from jobqueue.take_quota('o', 'reads', 1, 1)"
    assert rows(me, quota) == [(1, int(clock.now.timestamp()) + 3600)]
    assert rows(me, quota)[0][0] == 0
    clock.move("1 hour")
    assert rows(me, quota)[0][0] == 1
    clock.move("23 hours")
    assert rows(me, "select jobqueue.api_key_is_live(%s)", key.id) == [(False,)]
    assert rows(me, "select max(ends_at) from jobqueue.queue_stats('leased')") == [
        (clock.now.replace(second=0, microsecond=0) + timedelta(minutes=1),)
    ]


async def test_a_schedule_a_retry_and_retention_run_by_the_frozen_clock(clock_dsn: str) -> None:
    app = App(clock_dsn)
    ran: list[datetime] = []

    @app.job(max_retries=2, retry_delay=600, retry_backoff=False)
    async def flaky(job: Job) -> None:
        ran.append(clock.now)
        if job.retry_count < 2:
            raise ConnectionError

    @app.job
    async def report(job: Job) -> None:
        ran.append(datetime.fromisoformat(job.metadata["schedule"]["tick"]))

    with frozen(app, at=START) as clock:
        async with app:
            # 2026-03-29 has no 02:30 in Berlin: the clocks go from 02:00 to 03:00, which is 01:00 UTC.
            await app.schedule("nightly", "report", "30 2 * * *", time_zone="Europe/Berlin")
            ticks = await app.preview_schedule("30 2 * * *", "Europe/Berlin", 2)
            assert [tick.isoformat() for tick in ticks] == ["2026-03-29T01:00:00+00:00", "2026-03-30T00:30:00+00:00"]
            for tick in ticks:
                clock.set(tick - timedelta(seconds=1))
                assert (await drain(app)).completed == 0
                travel(app, 1)
                assert (await drain(app)).completed == 1
            assert ran == ticks
            await app.unschedule("nightly")

            ran.clear()
            sent = await app.send("flaky")
            begun = clock.now
            assert (await drain(app)).completed == 0
            drained = await drain(app, delayed=True)
            assert (drained.completed, len(drained.failures)) == (1, 1)
            assert ran == [begun, begun + timedelta(minutes=10), begun + timedelta(minutes=20)]
            stats = await app.queue_stats("flaky", since=timedelta(hours=1))
            assert (len(stats), stats[-1].ends_at) == (60, begun.replace(second=0) + timedelta(minutes=20))

            clock.move("7 days")
            assert (await app.get(sent.id)).completed_at == begun + timedelta(minutes=20)
            clock.move("1 s")
            async with app._lend(None) as lent:
                await lent.execute("select jobqueue.maintain(null, '{retention}')")
            assert await app.find(queue="flaky") == []


async def test_a_worker_that_runs_sees_the_clock_move_and_keeps_its_lease_while_it_stands(clock_dsn: str) -> None:
    app, go_on = App(clock_dsn), asyncio.Event()

    @app.job(lease=10)
    async def long() -> datetime:
        await asyncio.wait_for(go_on.wait(), 60)
        return clock.now

    with frozen(app, at="2027-01-01T00:00Z") as clock:
        async with app:
            worker = await app.make_worker(["long"], 1, poll=0.05)
            task = asyncio.create_task(worker.run())
            try:
                late = await app.send("long", delay="1 hour")
                clock.move("1 hour")
                running = await seen(app, late.id, has("processing"))
                assert running.started_at == clock.now
                async with app._lend(None) as lent:
                    await lent.execute("select jobqueue.rescue(100)")
                go_on.set()
                ended = await seen(app, late.id, has("completed"))
                assert (ended.attempt, ended.completed_at, ended.result) == (1, clock.now, "2027-01-01T01:00:00+00:00")
            finally:
                worker.release_now()
                await task
