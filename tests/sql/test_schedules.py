"""Schedules: one job per tick whoever looks, no tick lost, and what is made up for after a gap."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from threading import Barrier
from typing import Any

import pytest

from tests.sql.engine import Engine

LONG_AGO = "2020-01-01T00:00:00Z"


def schedule(
    engine: Engine, expression: str = "0 0 1 1 *", name: str = "nightly", queue: str = "q", **options: Any
) -> Any:
    return engine.value("select jobqueue.schedule(%s, %s, %s, '{\"n\": 1}', %s)", name, queue, expression, options)


def run(engine: Engine) -> int:
    return int(engine.value("select sent from jobqueue.run_schedules()"))


def stored(engine: Engine, name: str = "nightly") -> dict[str, Any]:
    return engine.row("select * from jobqueue.schedules where name = %s", name)


def wind_back(engine: Engine, by: str, name: str = "nightly") -> datetime:
    """As if nobody had run schedules since the tick before that time; returns that tick, the first that is due."""
    engine.run(
        "update jobqueue.schedule set next_at = jobqueue.tick_after(spec, now() - %s::interval) where name = %s",
        by,
        name,
    )
    tick = stored(engine, name)["next_at"]
    assert isinstance(tick, datetime)
    return tick


def due_now(engine: Engine, name: str = "nightly") -> None:
    engine.run("update jobqueue.schedule set next_at = date_trunc('second', now()) where name = %s", name)


def ticks(engine: Engine, name: str = "nightly") -> list[datetime]:
    """The ticks that have a job, one entry for each job."""
    found = engine.values(
        "select metadata #>> '{schedule,tick}' from jobqueue.jobs where metadata #>> '{schedule,name}' = %s order by 1",
        name,
    )
    return [datetime.fromisoformat(tick) for tick in found]


def now(engine: Engine) -> datetime:
    moment = engine.value("select now()")
    assert isinstance(moment, datetime)
    return moment


# -- one job per tick -----------------------------------------------------------------------------------------------


def test_a_tick_sends_the_job_with_its_options_and_says_which_tick(engine: Engine) -> None:
    tick = schedule(
        engine, "0 0 1 1 *", priority=5, subject="report", metadata={"a": 1}, time_zone="europe/berlin", missed="all"
    )
    assert stored(engine)["time_zone"] == "Europe/Berlin"
    assert tick.astimezone(UTC).strftime("%m-%d %H:%M:%S") == "12-31 23:00:00"
    assert run(engine) == 0
    due_now(engine)
    due = stored(engine)["next_at"]
    assert run(engine) == 1
    row = engine.row("select * from jobqueue.jobs")
    assert (row["queue"], row["payload"], row["priority"], row["subject"]) == ("q", {"n": 1}, 5, "report")
    assert row["metadata"] == {
        "a": 1,
        "schedule": {"name": "nightly", "tick": f"{due.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"},
    }
    after = stored(engine)
    assert (after["last_job_id"], after["last_at"], after["next_at"]) == (row["id"], due, tick)
    assert run(engine) == 0


def test_each_tick_has_one_job_with_eight_workers_at_once(engine: Engine) -> None:
    names = [f"s{n}" for n in range(20)]
    for name in names:
        schedule(engine, "* * * * * *", name=name, missed="all")
        wind_back(engine, "20 s", name)
    workers = [engine.another() for _ in range(8)]
    start = Barrier(8)

    def work(worker: Engine) -> int:
        start.wait(timeout=60)
        return sum(run(worker) for _ in range(10))

    with ThreadPoolExecutor(8) as pool:
        sent = sum(pool.map(work, workers))
    assert sent == engine.count()
    for name in names:
        found = ticks(engine, name)
        first, last = found[0], found[-1]
        assert found == [first + timedelta(seconds=n) for n in range(len(found))]
        assert len(found) >= 20
        assert last == stored(engine, name)["last_at"]


def test_a_worker_that_dies_in_the_middle_takes_no_tick_along(engine: Engine) -> None:
    schedule(engine)
    due_now(engine)
    rival = engine.another()
    with rival.undone():
        assert run(rival) == 1
        engine.run("set statement_timeout = '60 s'")
        assert run(engine) == 0
    assert run(engine) == 1
    assert len(ticks(engine)) == 1


def test_maintenance_runs_schedules_and_is_due_with_the_next_one(engine: Engine) -> None:
    schedule(engine)
    due_now(engine)
    row = engine.row(
        "select done, next_due <= now() + interval '1 s' as soon from jobqueue.maintain(null, '{schedules}')"
    )
    assert row == {"done": 1, "soon": True}


def test_next_tick_is_the_earliest_of_those_that_wait(engine: Engine) -> None:
    assert engine.call("next_tick") is None
    schedule(engine, name="far")
    near = schedule(engine, "* * * * *", name="near")
    assert engine.call("next_tick") == near
    engine.call("pause_schedule", "near", "quiet")
    assert engine.call("next_tick") == stored(engine, "far")["next_at"]


def test_an_idle_worker_hears_of_a_scheduled_job(engine: Engine) -> None:
    schedule(engine)
    due_now(engine)
    listener = engine.another()
    listener.run("listen jobqueue_ready")
    listener.value("select jobqueue.watch('queue:q')::text")
    run(engine)
    assert [notice.payload for notice in listener.connection.notifies(timeout=60, stop_after=1)] == ["q"]


# -- after a gap ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missed", ["skip", "once", "all"])
def test_up_to_a_minute_late_no_tick_is_missed_whatever_the_policy(engine: Engine, missed: str) -> None:
    schedule(engine, "*/10 * * * * *", missed=missed)
    first = wind_back(engine, "45 s")
    assert run(engine) >= 4
    found = ticks(engine)
    assert found[0] == first
    assert {later - earlier for earlier, later in pairwise(found)} == {timedelta(seconds=10)}


def test_skip_is_the_default_and_sends_nothing_that_is_older_than_a_minute(engine: Engine) -> None:
    opposite = now(engine).astimezone(UTC) + timedelta(hours=12)
    schedule(engine, f"{opposite.minute} {opposite.hour} * * *")
    wind_back(engine, "5 days")
    assert run(engine) == 0
    after = stored(engine)
    assert after["next_at"] > now(engine)
    assert (after["last_at"], after["gap_from"] < after["gap_until"] <= now(engine)) == (None, True)


def test_skip_sends_the_last_tick_if_it_has_only_just_been(engine: Engine) -> None:
    schedule(engine, "* * * * * *")
    wind_back(engine, "2 h")
    assert run(engine) == 1
    assert ticks(engine)[0] > now(engine) - timedelta(seconds=60)


def test_once_sends_one_job_for_all_missed_ticks_that_of_the_last(engine: Engine) -> None:
    schedule(engine, "0 * * * *", missed="once")
    wind_back(engine, "2 days")
    assert run(engine) == 1
    (tick,) = ticks(engine)
    assert now(engine) - timedelta(hours=1) <= tick <= now(engine)
    assert run(engine) == 0


def test_all_sends_every_missed_tick(engine: Engine) -> None:
    schedule(engine, "0 * * * *", missed="all")
    first = wind_back(engine, "2 days")
    sent = run(engine)
    assert sent in (48, 49)
    assert ticks(engine) == [first + timedelta(hours=n) for n in range(sent)]


@pytest.mark.parametrize(("expression", "step"), [("* * * * * *", 1), ("*/7 * * * *", None)])
def test_all_is_bounded_by_the_last_hundred_and_fast(engine: Engine, expression: str, step: int | None) -> None:
    schedule(engine, expression, missed="all")
    wind_back(engine, "400 days")
    engine.run("set statement_timeout = '60 s'")
    assert run(engine) == 100
    found = ticks(engine)
    assert len(set(found)) == 100
    spec = "(select spec from jobqueue.schedule)"
    assert engine.value(f"select jobqueue.tick_after({spec}, %s)", found[-1]) == stored(engine)["next_at"]
    if step:
        assert found[-1] - found[0] == timedelta(seconds=99)


# -- a send that fails ----------------------------------------------------------------------------------------------


def test_a_tick_whose_send_fails_is_kept_and_tried_again_and_the_others_go_on(engine: Engine) -> None:
    engine.run("insert into jobqueue.setting values ('create_queues', 'true')")
    schedule(engine, name="broken", queue="gone")
    schedule(engine, name="fine")
    due_now(engine, "broken")
    due_now(engine, "fine")
    tick = stored(engine, "broken")["next_at"]
    engine.run("update jobqueue.setting set value = 'false' where name = 'create_queues'")
    engine.run("delete from jobqueue.queue where name = 'gone'")
    with engine.connection.transaction():
        assert run(engine) == 1
        broken = stored(engine, "broken")
        assert broken["retry_at"] - now(engine) == timedelta(seconds=1)
    assert (broken["state"], broken["failures"], broken["next_at"], broken["last_at"]) == ("failing", 1, tick, None)
    assert 'no queue "gone"' in broken["last_error"]
    assert stored(engine, "fine")["state"] == "active"
    engine.run("update jobqueue.setting set value = 'true' where name = 'create_queues'")
    engine.run("update jobqueue.schedule set retry_at = now() where name = 'broken'")
    assert run(engine) == 1
    mended = stored(engine, "broken")
    assert ticks(engine, "broken") == [tick]
    assert (mended["state"], mended["failures"], mended["retry_at"], mended["last_error"]) == ("active", 0, None, None)


def test_ticks_that_come_while_sending_fails_are_sent_later_even_with_skip(engine: Engine) -> None:
    schedule(engine, "0 * * * *", missed="skip")
    first = wind_back(engine, "5 hours")
    engine.run("update jobqueue.schedule set failures = 3, retry_at = now(), last_error = 'it failed'")
    sent = run(engine)
    assert sent >= 5
    assert ticks(engine) == [first + timedelta(hours=n) for n in range(sent)]


def test_the_pause_between_two_attempts_grows_to_a_minute(engine: Engine) -> None:
    schedule(engine)
    engine.run("update jobqueue.setting set value = 'false' where name = 'create_queues'")
    engine.run("insert into jobqueue.setting values ('create_queues', 'false') on conflict do nothing")
    engine.run("delete from jobqueue.queue")
    due_now(engine)
    waits = []
    for _ in range(8):
        with engine.connection.transaction():
            run(engine)
            waits.append((stored(engine)["retry_at"] - now(engine)).total_seconds())
        engine.run("update jobqueue.schedule set retry_at = now()")
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_collision_is_no_failure_and_is_shown(engine: Engine) -> None:
    schedule(engine, "* * * * * *", singleton_key="only")
    for _ in range(2):
        due_now(engine)
        assert run(engine) >= 1
    (job,) = engine.values("select id from jobqueue.jobs")
    after = stored(engine)
    assert (after["last_job_id"], after["last_reason"], after["state"]) == (job, "singleton", "active")


# -- making, changing, removing -------------------------------------------------------------------------------------


def test_making_it_again_keeps_what_is_due_and_a_new_expression_begins_anew(engine: Engine) -> None:
    schedule(engine)
    due_now(engine)
    due = stored(engine)["next_at"]
    engine.call("pause_schedule", "nightly", "quiet")
    assert schedule(engine, priority=7, missed="once") == due
    kept = stored(engine)
    assert (kept["options"], kept["missed"], kept["state"]) == ({"priority": 7}, "once", "paused")
    assert schedule(engine, "0 0 2 1 *") > due
    assert engine.count("schedule") == 1


def test_a_rule_that_is_over_may_be_made_again_but_not_anew(engine: Engine) -> None:
    rule = f"DTSTART:{now(engine).astimezone(UTC) + timedelta(days=1):%Y%m%dT%H%M%SZ}\nRRULE:FREQ=DAILY;COUNT=1"
    schedule(engine, rule)
    engine.run("update jobqueue.schedule set next_at = null")
    assert stored(engine)["state"] == "finished"
    assert schedule(engine, rule) is None
    refusal = engine.refused(lambda: schedule(engine, "DTSTART:20200101\nRRULE:FREQ=DAILY;COUNT=2", name="old"))
    assert "never happens" in refusal.message


def test_a_schedule_joins_the_transaction_of_its_maker(engine: Engine) -> None:
    with engine.undone():
        schedule(engine)
    assert engine.count("schedule") == 0


def test_what_send_would_refuse_is_refused_at_once(engine: Engine) -> None:
    for options, code in (
        ({"priorty": 1}, "UNKNOWN_OPTION"),
        ({"priority": "high"}, "INVALID_ARGUMENT"),
        ({"id": "00000000-0000-0000-0000-000000000007"}, "UNKNOWN_OPTION"),
        ({"missed": "never"}, "INVALID_ARGUMENT"),
        ({"time_zone": "Mars/Base"}, "INVALID_ARGUMENT"),
        ({"time_zone": 1}, "INVALID_ARGUMENT"),
    ):
        refusal = engine.refused(lambda given=options: schedule(engine, **given))
        assert (refusal.sqlstate, refusal.code) == ("JQ400", code), options
    assert engine.refused(lambda: schedule(engine, name="a b")).detail["option"] == "name"
    assert engine.refused(lambda: engine.call("schedule", "n", "q", None)).detail["option"] == "expression"
    assert engine.count("schedule") == 0


def test_unschedule_says_whether_there_was_one_and_leaves_the_jobs(engine: Engine) -> None:
    schedule(engine)
    due_now(engine)
    run(engine)
    assert [engine.call("unschedule", "nightly") for _ in range(2)] == [True, False]
    assert (engine.count("schedule"), engine.count()) == (0, 1)


# -- pause ----------------------------------------------------------------------------------------------------------


def test_a_paused_schedule_sends_nothing_and_does_not_make_up_for_it(engine: Engine) -> None:
    schedule(engine, "* * * * * *", missed="all")
    wind_back(engine, "30 s")
    engine.run("select set_config('jobqueue.actor', 'ada', false)")
    engine.call("pause_schedule", "nightly", "the archive is full")
    engine.call("pause_schedule", "nightly", "again")
    assert run(engine) == 0
    paused = stored(engine)
    assert (paused["state"], paused["pause_reason"], paused["paused_by"]) == ("paused", "the archive is full", "ada")
    engine.call("resume_schedule", "nightly", "room again")
    engine.call("resume_schedule", "nightly", "again")
    assert stored(engine)["state"] == "active"
    resumed_at = engine.value("select updated_at from jobqueue.schedule")
    assert stored(engine)["next_at"] > resumed_at
    audit = engine.rows("select action, target, reason, actor from jobqueue.actions_taken order by id")
    assert [tuple(row.values()) for row in audit] == [
        ("pause_schedule", "nightly", "the archive is full", "ada"),
        ("resume_schedule", "nightly", "room again", "ada"),
    ]


@pytest.mark.parametrize("action", ["pause_schedule", "resume_schedule"])
def test_an_action_needs_a_reason_and_a_schedule(engine: Engine, action: str) -> None:
    refusal = engine.refused(lambda: engine.call(action, "nothing", "why"))
    assert (refusal.sqlstate, refusal.code) == ("JQ404", "SCHEDULE_NOT_FOUND")
    schedule(engine)
    assert engine.refused(lambda: engine.call(action, "nightly", " ")).detail["option"] == "reason"


# -- tenants and roles ----------------------------------------------------------------------------------------------


def test_a_schedule_belongs_to_its_tenant(engine: Engine) -> None:
    schedule(engine, tenant="acme")
    with engine.acting_as("jobqueue_producer", "other"):
        assert engine.call("unschedule", "nightly") is False
        assert engine.refused(lambda: schedule(engine, tenant="other")).code == "CONFLICT"
    with engine.acting_as("jobqueue_producer", "other"):
        assert engine.refused(lambda: schedule(engine, name="mine", tenant="acme")).sqlstate == "JQ403"
    with engine.acting_as("jobqueue_api", "other"):
        assert engine.rows("select * from jobqueue.schedules") == []
        assert engine.refused(lambda: engine.call("pause_schedule", "nightly", "why")).sqlstate == "JQ404"
    with engine.acting_as("jobqueue_api", "acme"):
        assert engine.values("select name from jobqueue.schedules") == ["nightly"]
        engine.call("pause_schedule", "nightly", "why")


def test_a_worker_of_some_tenants_keeps_the_schedules_of_all(engine: Engine) -> None:
    schedule(engine, tenant="acme")
    due_now(engine)
    with engine.acting_as("jobqueue_worker", "other"):
        assert run(engine) == 1
        assert engine.value("select current_setting('jobqueue.tenants')") == "other"


@pytest.mark.parametrize(
    ("role", "may"),
    [
        ("jobqueue_producer", {"schedule", "unschedule", "preview"}),
        ("jobqueue_worker", {"schedule", "unschedule", "preview", "run"}),
        ("jobqueue_api", {"pause"}),
        ("jobqueue_support", {"schedule", "unschedule", "preview", "pause"}),
        ("jobqueue_support_readonly", set()),
    ],
)
def test_each_role_can_do_its_part(engine: Engine, role: str, may: set[str]) -> None:
    functions = {
        "schedule": "schedule(text, text, text, jsonb, jsonb)",
        "unschedule": "unschedule(text)",
        "preview": "preview_schedule(text, text, int, timestamptz)",
        "pause": "pause_schedule(text, text)",
        "run": "run_schedules(int)",
    }
    granted = {
        verb
        for verb, function in functions.items()
        if engine.value("select has_function_privilege(%s, 'jobqueue.' || %s, 'execute')", role, function)
    }
    assert granted == may


def test_a_spec_is_read_the_same_with_any_settings_of_the_session(engine: Engine) -> None:
    engine.run("set datestyle = 'SQL, DMY'; set timezone = 'Asia/Tokyo'; set intervalstyle = 'postgres_verbose'")
    rule = "DTSTART:20300203T040506Z\nRRULE:FREQ=DAILY;UNTIL=20300206T000000Z\nRDATE:20300304T050607Z\nEXDATE:20300204T040506Z"
    engine.run("select jobqueue.schedule('nightly', 'q', %s)::text", rule)
    other = engine.another()
    spec = "(select spec from jobqueue.schedule)"
    found = other.value(f"select jobqueue.first_ticks({spec}, '2029-01-01', 'infinity', 9)")
    assert [tick.astimezone(UTC).isoformat() for tick in found] == [
        "2030-02-03T04:05:06+00:00", "2030-02-05T04:05:06+00:00", "2030-03-04T05:06:07+00:00",
    ]  # fmt: skip
