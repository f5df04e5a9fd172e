"""Statistics: exact counts for every client, percentiles within 4.9 %, backlog by the minute, and warnings."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from jobqueue import App
from jobqueue.errors import InvalidArgument, QueueNotFound
from tests.sql.engine import PERMANENT, TRANSIENT, Engine, Row
from tests.support.command import run
from tests.support.waiting import wait_until

FOLD = ("fold_statistics", "sample_statistics", "keep_statistics")


def maintain(engine: Engine, *steps: str) -> dict[str, int]:
    """Run maintenance steps now; what each has done."""
    found = engine.rows("select step, done from jobqueue.maintain(null, %s)", list(steps))
    return {row["step"]: row["done"] for row in found}


def latest(engine: Engine, queue: str | None = None, **more: Any) -> Row:
    """The sums of the last hour in one row, whatever the minute is just now."""
    (row,) = engine.rows(
        "select sum(sent)::int as sent, sum(completed)::int as completed, sum(failed)::int as failed, "
        "sum(failed_attempts)::int as failed_attempts, sum(retried)::int as retried from jobqueue.queue_stats(%s)",
        queue,
    )
    return row


def now(engine: Engine, queue: str | None = None) -> Row:
    """The bucket that is now."""
    return engine.rows("select * from jobqueue.queue_stats(%s, now() - interval '2 min')", queue)[-1]


def test_every_way_of_ending_an_attempt_is_counted_once_for_every_client(engine: Engine) -> None:
    for _ in range(9):
        engine.send("q", max_retries=1)
    engine.send("other")
    one, two, three, four, five, six, seven, eight, nine = engine.claim(9)
    (other,) = engine.claim(1, "other")
    engine.call("complete", one.id, one.token)
    assert engine.call("complete", one.id, one.token) == "already"
    pairs = [{"id": str(c.id), "token": str(c.token)} for c in (two, three, other)]
    engine.rows("select * from jobqueue.complete_many(%s)", Jsonb(pairs))
    engine.rows(
        "select * from jobqueue.settle(null, %s, %s, null, null, null)", [four.id, five.id], [four.token, five.token]
    )
    assert engine.fail(six, TRANSIENT) == "pending"
    assert engine.fail(seven, PERMANENT) == "failed"
    engine.call("snooze", eight.id, eight.token, "1 h")
    engine.lose_worker(nine.id)
    with engine.undone():
        (again,) = engine.claim(1)
        engine.call("complete", again.id, again.token)
    expected = {"sent": 9, "completed": 5, "failed": 1, "failed_attempts": 3, "retried": 2}
    assert latest(engine, "q") == expected
    assert latest(engine, "other") == dict.fromkeys(expected, 0) | {"sent": 1, "completed": 1}
    assert latest(engine) == expected | {"sent": 10, "completed": 6}
    assert maintain(engine, "fold_statistics")["fold_statistics"] > 0
    assert engine.count("statistics_note") == 0
    assert latest(engine, "q") == expected
    # in the notes and in the table
    expired = engine.send("q", expires_in=60)
    engine.run("update jobqueue.job set expires_at = now() - interval '1 s' where id = %s", expired)
    assert engine.call("expire", 10) == 1
    assert latest(engine, "q") == expected | {"sent": 10, "failed": 2}


def test_a_job_that_is_kept_for_no_time_is_counted_too(engine: Engine) -> None:
    claim = engine.claimed(keep_completed=0)
    engine.call("complete", claim.id, claim.token)
    assert engine.count() == 0
    assert latest(engine, "q")["completed"] == 1


def test_percentiles_are_within_five_percent_and_means_exact(engine: Engine) -> None:
    draw = random.Random(7)
    waits = [draw.lognormvariate(-1, 2) for _ in range(2000)]
    runs = [draw.lognormvariate(0, 1.5) for _ in range(2000)]
    for start in range(0, 2000, 500):
        engine.run(
            "insert into jobqueue.statistics_note (queue, completed, waits, runs) values ('q', 500, %s::real[], %s::real[])",
            waits[start : start + 500],
            runs[start : start + 500],
        )
    engine.run("insert into jobqueue.queue (name) values ('q')")

    def check() -> None:
        row = engine.row(
            "select * from jobqueue.queue_stats('q', now() - interval '90 min', now(), '1 day') where completed > 0"
        )
        for name, values in (("wait", waits), ("run", runs)):
            assert row[f"{name}_mean"] == pytest.approx(sum(values) / 2000, rel=1e-4)
            for share in (50, 95, 99):
                exact = sorted(values)[math.ceil(share / 100 * 2000) - 1]
                assert row[f"{name}_p{share}"] == pytest.approx(exact, rel=0.049)

    check()
    # in two portions, which are added to the same minute
    engine.run("update jobqueue.statistics_note set noted_at = date_trunc('minute', now()) - interval '5 min'")
    for _ in range(2):
        assert engine.value("select folded from jobqueue.fold_statistics(null, 2)") == 2
    check()
    # a week later the minutes are an hour
    engine.run("update jobqueue.statistic set begins_at = begins_at - interval '8 days'")
    minutes = engine.count("statistic")
    assert maintain(engine, "keep_statistics") == {"keep_statistics": minutes}
    assert engine.values("select distinct minutes from jobqueue.statistic") == [60]
    engine.run("update jobqueue.statistic set begins_at = begins_at + interval '8 days'")
    check()
    engine.run("update jobqueue.statistic set begins_at = begins_at - interval '91 days'")
    assert maintain(engine, "keep_statistics")["keep_statistics"] > 0
    assert engine.count("statistic") == 0


def test_the_scale_covers_tenths_of_a_millisecond_to_a_month(engine: Engine) -> None:
    for seconds in (0.0001, 0.0003, 0.02, 1.0, 900.0, 86400.0, 30 * 86400.0):
        middle = engine.value("select jobqueue.percentile(array[jobqueue.bin_of(%s::float8) + 256], 0.5)", seconds)
        assert middle == pytest.approx(seconds, rel=0.049)
    assert engine.value("select jobqueue.bin_of(0)") == 0
    assert engine.value("select jobqueue.bin_of(1e12)") == 254
    assert engine.value("select jobqueue.percentile('{}', 0.5)") is None
    assert engine.value("select jobqueue.add_bins('{257, 256, 513}')") == [256, 769]


def test_a_note_that_becomes_visible_late_is_not_lost(engine: Engine) -> None:
    late = engine.another()
    first, second, third = (engine.claimed() for _ in range(3))
    with late.connection.transaction():
        late.call("complete", first.id, first.token)
        engine.call("complete", second.id, second.token)
        for _ in range(3):
            maintain(engine, "fold_statistics")
        floor = engine.value(
            "select (state ->> 'floor')::bigint from jobqueue.maintenance where step = 'fold_statistics'"
        )
        assert floor == 0
    engine.call("complete", third.id, third.token)
    for _ in range(3):
        maintain(engine, "fold_statistics")
    assert engine.count("statistics_note") == 0
    assert latest(engine, "q")["completed"] == 3
    # folded notes lie below the floor, where nobody looks again
    floor = engine.value("select (state ->> 'floor')::bigint from jobqueue.maintenance where step = 'fold_statistics'")
    assert floor == 3


def test_how_many_jobs_stand_where(engine: Engine) -> None:
    for status in ("blocked", "paused", "processing", "failed"):
        engine.in_status(status)
    engine.send(delay=3600)
    for priority in (0, 5):
        for _ in range(2):
            engine.send(priority=priority)
    engine.run(
        "update jobqueue.job set run_at = now() - interval '5 min', created_at = now() - interval '5 min' "
        "where id = (select id from jobqueue.job where ready_seq is not null order by ready_seq limit 1)"
    )
    assert now(engine)["blocked"] == 0
    maintain(engine, "retention")
    row = now(engine, "q")
    gauges = ("ready", "scheduled", "blocked", "processing", "paused", "failed_jobs")
    assert [row[name] for name in gauges] == [4, 1, 1, 1, 1, 1]
    assert 299 < row["oldest_ready_seconds"] < 400
    assert [now(engine)[name] for name in gauges] == [4, 1, 1, 1, 1, 1]
    # sampled, and read when it is past
    maintain(engine, *FOLD)
    engine.run("update jobqueue.statistic set begins_at = begins_at - interval '10 min'")
    (past,) = engine.rows(
        "select * from jobqueue.queue_stats('q', now() - interval '40 min', now() - interval '5 min') where ready is not null"
    )
    assert [past[name] for name in gauges] == [4, 1, 1, 1, 1, 1]
    # an idle queue was looked at, a minute without a sample was not
    engine.run("insert into jobqueue.queue (name) values ('idle')")
    idle = engine.rows(
        "select ready from jobqueue.queue_stats('idle', now() - interval '40 min', now() - interval '5 min')"
    )
    assert sorted({row["ready"] is None for row in idle}) == [False, True]
    engine.run("delete from jobqueue.job where status = 'failed'")
    engine.call("cancel", engine.value("select id from jobqueue.job where status = 'paused'"), "no longer")
    maintain(engine, "retention")
    assert (now(engine, "q")["paused"], now(engine, "q")["failed_jobs"]) == (0, 0)


def test_jobs_that_wait_for_a_limit_are_ready_in_statistics(engine: Engine) -> None:
    engine.run("insert into jobqueue.queue (name, concurrency) values ('narrow', 1)")
    for _ in range(3):
        engine.send("narrow")
    assert now(engine, "narrow")["ready"] == 3
    assert now(engine, "narrow")["oldest_ready_seconds"] is not None


def test_sent_jobs_are_counted_by_the_minute_of_their_ids(engine: Engine) -> None:
    engine.run("insert into jobqueue.queue (name) values ('q')")
    minute = engine.value("select date_trunc('minute', now()) - interval '1 min'")
    for second in (0, 20, 59):
        first = engine.value("select jobqueue.first_id(%s::timestamptz + make_interval(secs => %s))", minute, second)
        engine.run(
            "insert into jobqueue.job (id, queue, job_type, ready_seq) values (%s, 'q', 'q', jobqueue.next_ready())",
            first,
        )
    assert latest(engine, "q")["sent"] == 3
    maintain(engine, "sample_statistics")
    maintain(engine, "sample_statistics")
    assert engine.values("select sent from jobqueue.statistic where queue = 'q' and begins_at = %s", minute) == [3]
    assert latest(engine, "q")["sent"] == 3


def test_buckets_are_aligned_to_the_epoch_and_complete(engine: Engine) -> None:
    engine.run("insert into jobqueue.queue (name) values ('q')")
    rows = engine.rows(
        "select * from jobqueue.queue_stats('q', '2026-01-05 10:03+00', '2026-01-05 11:01+00', '15 min')"
    )
    begins = datetime(2026, 1, 5, 10, tzinfo=UTC)
    assert [row["begins_at"] for row in rows] == [begins + n * timedelta(minutes=15) for n in range(5)]
    assert all(row["ends_at"] - row["begins_at"] == timedelta(minutes=15) for row in rows)
    assert {(row["completed"], row["ready"], row["run_p50"], row["throughput"]) for row in rows} == {
        (0, None, None, 0.0)
    }
    assert len(engine.rows("select * from jobqueue.queue_stats()")) in (60, 61)
    for wrong in (
        "'nowhere'",
        "'q', now() + interval '1 h'",
        "'q', bucket => '90 s'",
        "'q', bucket => '-1 min'",
        "'q', now() - interval '1 year'",
        "'q', '-infinity'",
    ):
        refusal = engine.refused(engine.rows, f"select * from jobqueue.queue_stats({wrong})")
        assert refusal.sqlstate == ("JQ404" if wrong == "'nowhere'" else "JQ400")


def test_readers_need_no_table(engine: Engine) -> None:
    engine.send()
    for role in ("jobqueue_api", "jobqueue_support_readonly", "jobqueue_worker", "jobqueue_producer"):
        with engine.acting_as(role):
            assert now(engine, "q")["ready"] == 1


def warned(engine: Engine) -> dict[str, str]:
    """What is wrong, by name."""
    return {row["name"]: row["detail"] for row in engine.rows("select * from jobqueue.warnings()")}


def test_slow_jobs_handlers_and_statements_are_warned_of(engine: Engine) -> None:
    # as if a worker had kept house all the while
    engine.run("update jobqueue.maintenance set next_at = now() + interval '1 hour'")
    assert warned(engine) == {}
    claim = engine.claimed()
    engine.run("update jobqueue.job set started_at = now() - interval '40 min', updated_at = now() - interval '31 min'")
    assert str(claim.id) in warned(engine)["slow jobs"]
    engine.call("progress", claim.id, claim.token, 10)
    assert warned(engine) == {}
    for ago, seconds in (("1 min", 50), ("5 h", 10)):
        engine.run(
            "insert into jobqueue.statistic (queue, begins_at, minutes, completed, run_seconds) "
            "values ('q', now() - %s::interval, 1, 10, %s)",
            ago,
            seconds,
        )
    assert "5.0 s on average in the last 15 minutes, 1.0 s in the day before" in warned(engine)["slow handlers: q"]
    engine.run("delete from jobqueue.statistic")
    assert warned(engine) == {}
    # a statement that hangs
    engine.run("insert into jobqueue.setting values ('warn_slow_statement', '\"0 s\"')")
    other = engine.another()
    other.run("set application_name = 'jobqueue results'")
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(other.run, "select pg_sleep(600)")
        try:
            wait_until(lambda: "jobqueue results" in warned(engine).get("slow statements", ""), what="a warning")
        finally:
            other.connection.cancel()
        assert isinstance(hanging.exception(), psycopg.errors.QueryCanceled)
    assert {row["name"] for row in engine.rows("select * from jobqueue.health()")} >= {"slow jobs", "slow statements"}


async def test_an_app_and_the_command_line_read_them(engine: Engine, dsn: str) -> None:
    claim = engine.claimed()
    engine.call("complete", claim.id, claim.token)
    async with App(dsn) as app:
        stats = await app.queue_stats("q", since=timedelta(minutes=5), bucket=timedelta(minutes=10))
        assert sum(row.completed for row in stats) == 1
        assert stats[-1].ready == 0
        with pytest.raises(QueueNotFound):
            await app.queue_stats("nowhere")
        with pytest.raises(InvalidArgument):
            await app.queue_stats(since=datetime(2026, 1, 1))
        assert len(app.queue_stats_sync(since=timedelta(hours=3), bucket=timedelta(hours=1))) in (3, 4)
        app.close_sync()
    shown = run("queues", "stats", "q", "--since", "10 min", "--bucket", "5 min", dsn=dsn)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[0].split()[:4] == ["begins_at", "sent", "completed", "failed"]
    assert run("queues", "stats", "nowhere", dsn=dsn).returncode == 3
