"""Queues are made, changed, paused, emptied and taken away, and nothing of it happens in silence."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from tests.sql.engine import PERMANENT, WORKER, Engine

PAUSES = {"queue": "q", "job_type": "q", "tenant": "default"}
MANAGERS = {"jobqueue_producer", "jobqueue_worker", "jobqueue_support"}
MAY = {
    "create_queue": MANAGERS,
    "update_queue": {"jobqueue_support"},
    "delete_queue": {"jobqueue_support"},
    "purge_queue": {"jobqueue_support"},
    "purge_tenant": {"jobqueue_support"},
    "redrive": {"jobqueue_support"},
    "publish": {"jobqueue_producer", "jobqueue_worker"},
    "upsert": {"jobqueue_producer", "jobqueue_worker"},
    "update_jobs": {"jobqueue_producer", "jobqueue_worker"},
    "subscribe": MANAGERS,
    "unsubscribe": MANAGERS,
    "doctor": {"jobqueue_support", "jobqueue_support_readonly"},
    **{
        f"{verb}_{what}": {"jobqueue_api", "jobqueue_support"}
        for verb in ("pause", "resume")
        for what in ("queue", "job_type", "tenant")
    },
    "bulk": {"jobqueue_api", "jobqueue_support"},
    **{
        name: {"jobqueue_api", "jobqueue_support", "jobqueue_support_readonly"}
        for name in ("explain", "find_jobs", "help", "health", "preview_redrive")
    },
}


def queue(engine: Engine, name: str = "q") -> dict[str, Any]:
    """What people read of a queue."""
    return engine.row("select * from jobqueue.queues where name = %s", name)


def audited(engine: Engine) -> list[tuple[str, str, str]]:
    """Action, target and reason of what is not about one job."""
    rows = engine.rows("select action, target, reason from jobqueue.actions_taken where job_id is null order by id")
    return [(row["action"], row["target"], row["reason"]) for row in rows]


def test_a_new_queue_has_the_options_given_and_the_defaults_for_the_rest(engine: Engine) -> None:
    options = {"policy": "short", "max_retries": 7, "timeout": "PT1H", "max_runtime": 5, "keep_ended": None}
    assert engine.call("create_queue", "q", {**options, "retry_backoff": False, "warn_backlog": 10}) is True
    made = queue(engine)
    assert (made["policy"], made["max_retries"], made["warn_backlog"], made["retry_backoff"]) == ("short", 7, 10, False)
    assert (made["timeout"].total_seconds(), made["max_runtime"].total_seconds()) == (3600, 5)
    assert (made["keep_ended"], made["lease"].total_seconds()) == (None, 30)


def test_making_a_queue_again_is_fine_with_the_same_values_and_a_conflict_with_others(engine: Engine) -> None:
    engine.call("create_queue", "q", {"max_retries": 7})
    assert engine.call("create_queue", "q") is False
    assert engine.call("create_queue", "q", {"max_retries": 7, "keep_completed": "168 h", "timeout": 900}) is False
    refusal = engine.refused(engine.call, "create_queue", "q", {"max_retries": 8, "timeout": None, "lease": 30})
    assert (refusal.sqlstate, refusal.code) == ("JQ409", "CONFLICT")
    assert refusal.detail["options"] == ["max_retries", "timeout"]
    assert "update_queue" in refusal.hint
    assert queue(engine)["max_retries"] == 7


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"policy": "state"}, "exclusive"),
        ({"policy": None}, "policy"),
        ({"max_retries": None}, "max_retries"),
        ({"max_retries": -1}, "max_retries"),
        ({"lease": 9}, "lease"),
        ({"lease": None}, "lease"),
        ({"timeout": 0}, "timeout"),
        ({"expires_in": 0}, "expires_in"),
        ({"expires_in": "soon"}, "expires_in"),
        ({"warn_backlog": 0}, "warn_backlog"),
        ({"dead_letter": "q"}, "dead letter"),
        ({"dead_letter": "no spaces"}, "no spaces"),
        ({"tenant": "a"}, "tenant"),
    ],
)
def test_a_wrong_option_is_refused_and_nothing_is_made(engine: Engine, options: dict[str, Any], named: str) -> None:
    refusal = engine.refused(engine.call, "create_queue", "q", options)
    assert refusal.sqlstate == "JQ400"
    assert named in refusal.message + refusal.hint
    assert engine.count("queue") == 0


@pytest.mark.parametrize("name", ["", "a b", "x" * 201, None])
def test_a_name_that_no_queue_can_have_is_refused(engine: Engine, name: str | None) -> None:
    assert engine.refused(engine.call, "create_queue", name).code == "INVALID_ARGUMENT"


def test_many_programs_may_make_the_same_queue_at_once(engine: Engine) -> None:
    others = [engine.another() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda each: each.call("create_queue", "q", {"max_retries": 9}), others))
    assert sorted(made) == [False, False, False, True]
    assert queue(engine)["max_retries"] == 9


def test_a_changed_queue_reaches_the_waiting_jobs_that_did_not_say_otherwise(engine: Engine) -> None:
    engine.call("create_queue", "q", {"max_retries": 0})
    follows, own = engine.send(), engine.send(max_retries=0, keep_ended=3600, priority=-1)
    engine.call("update_queue", "q", {"max_retries": 2, "keep_ended": 0, "timeout": 77})
    assert [engine.job(job)["settle_flags"] for job in (follows, own)] == [16, 0]
    first, second = engine.claim(2)
    assert (first.id, first.row["timeout"]) == (follows, 77)
    assert [engine.fail(claim) for claim in (first, second)] == ["pending", "failed"]
    engine.call("cancel", follows, "to end it")
    assert engine.values("select id from jobqueue.job") == [own]


def test_a_changed_time_of_expiry_reaches_the_jobs_that_have_it_from_the_queue(engine: Engine) -> None:
    engine.call("create_queue", "q", {"expires_in": 3600})
    ids = {
        "follows": engine.send(),
        "later": engine.send(delay=600),
        "own": engine.send(expires_in=60),
        "never": engine.send(expires_in=None),
        "running": engine.claimed("other").id,
    }
    before = {name: engine.job(job) for name, job in ids.items()}
    engine.call("update_queue", "q", {"expires_in": 7200})
    after = {name: engine.job(job) for name, job in ids.items()}
    for name in ("follows", "later"):
        assert (after[name]["expires_at"] - before[name]["run_at"]).total_seconds() == 7200, name
    for name in ("own", "never", "running"):
        assert after[name]["expires_at"] == before[name]["expires_at"], name
    engine.call("update_queue", "q", {"expires_in": None})
    assert engine.job(ids["follows"])["expires_at"] is None
    assert engine.job(ids["own"])["expires_at"] is not None


def test_a_job_that_has_run_does_not_begin_to_expire(engine: Engine) -> None:
    claim = engine.claimed()
    engine.fail(claim, retry_in="1 h")
    engine.call("update_queue", "q", {"expires_in": 1})
    assert engine.job(claim.id)["expires_at"] is None
    assert engine.call("expire", 10) == 0


def test_a_policy_cannot_change_while_jobs_have_not_ended(engine: Engine) -> None:
    for status in ("pending", "processing", "paused", "blocked"):
        with engine.undone():
            engine.in_status(status)
            if status == "blocked":
                engine.call("create_queue", "q")
            refusal = engine.refused(engine.call, "update_queue", "q", {"policy": "short"})
            assert (refusal.sqlstate, refusal.code) == ("JQ409", "CONFLICT"), status
    engine.in_status("completed")
    engine.call("update_queue", "q", {"policy": "short"})
    assert queue(engine)["policy"] == "short"


def test_a_sender_under_way_cannot_slip_past_a_change_of_policy_or_a_deletion(engine: Engine) -> None:
    engine.call("create_queue", "q")
    sender = engine.another()
    with sender.connection.transaction():
        sender.send()
        for call in (("update_queue", "q", {"policy": "short"}), ("delete_queue", "q")):
            refusal = engine.refused(engine.call, *call)
            assert (refusal.sqlstate, refusal.code) == ("JQ409", "CONFLICT")
            assert "Try again" in refusal.hint
    assert queue(engine)["policy"] == "standard"
    assert "not ended" in engine.refused(engine.call, "delete_queue", "q").message


@pytest.mark.parametrize(("before", "after"), [(0, 3600), (3600, 0)])
def test_a_job_that_is_sent_while_its_queue_is_changed_is_kept_as_the_queue_says_by_then(
    engine: Engine, before: int, after: int
) -> None:
    """The sender has read the queue before, and is not seen by the change."""
    engine.call("create_queue", "q", {"keep_completed": before, "keep_ended": before})
    sender = engine.another()
    with sender.connection.transaction():
        done, cancelled, own = sender.send(), sender.send(), sender.send(keep_completed=before)
        engine.call("update_queue", "q", {"keep_completed": after, "keep_ended": after})
    engine.call("cancel", cancelled, "not needed")
    for claim in engine.claim(2):
        engine.call("complete", claim.id, claim.token)
    engine.run("select jobqueue.remove_old('00000000-0000-0000-0000-000000000000', 1000)")
    assert set(engine.values("select id from jobqueue.job")) == ({done, cancelled} if after else {own})


def test_what_is_not_there_cannot_be_changed(engine: Engine) -> None:
    calls: list[tuple[Any, ...]] = [("update_queue", "q", {"max_retries": 1}), ("delete_queue", "q")]
    calls += [("pause_queue", "q", "r"), ("resume_queue", "q", "r"), ("purge_queue", "q", "r")]
    for call in calls:
        assert engine.refused(engine.call, *call).code == "QUEUE_NOT_FOUND", call
    assert engine.refused(engine.call, "resume_job_type", "t", "r").code == "JOB_TYPE_NOT_FOUND"
    engine.call("create_queue", "q")
    assert engine.refused(engine.call, "update_queue", "q", {}).sqlstate == "JQ400"


def test_a_queue_goes_with_its_ended_jobs_once_nothing_names_it(engine: Engine) -> None:
    job = engine.in_status("failed")
    engine.call("create_queue", "other", {"dead_letter": "q"})
    engine.call("schedule", "nightly", "q", "0 3 * * *")
    engine.call("subscribe", "paid", "q")
    refusal = engine.refused(engine.call, "delete_queue", "q")
    assert refusal.detail["named_by"] == ["queue other", "schedule nightly"]
    engine.call("update_queue", "other", {"dead_letter": None})
    engine.call("unschedule", "nightly")
    engine.call("retry", job, "once more")
    assert "not ended" in engine.refused(engine.call, "delete_queue", "q").message
    engine.call("cancel", job, "enough")
    assert engine.call("delete_queue", "q") == 1
    assert engine.values("select name::text from jobqueue.queue") == ["other"]
    assert (engine.count(), engine.count("attempt"), engine.count("subscription")) == (0, 0, 0)
    assert audited(engine)[-1][:2] == ("delete_queue", "q")


@pytest.mark.parametrize("what", PAUSES)
def test_a_pause_stops_claims_until_it_is_resumed_and_is_audited_once(engine: Engine, what: str) -> None:
    job = engine.send()
    name = PAUSES[what]
    for _ in range(2):
        engine.call(f"pause_{what}", name, " the moon is full ")
    assert engine.claim() == []
    if what != "queue":
        assert engine.claim(1, ["q", "other"]) == []
    for _ in range(2):
        engine.call(f"resume_{what}", name, "it is not")
    assert [claim.id for claim in engine.claim()] == [job]
    assert audited(engine) == [(f"pause_{what}", name, "the moon is full"), (f"resume_{what}", name, "it is not")]


@pytest.mark.parametrize("what", PAUSES)
@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_a_pause_needs_a_reason(engine: Engine, what: str, verb: str) -> None:
    engine.send()
    assert engine.refused(engine.call, f"{verb}_{what}", PAUSES[what], " ").detail["option"] == "reason"


@pytest.mark.parametrize("what", PAUSES)
def test_what_runs_goes_on_through_a_pause_and_a_resume_wakes_idle_workers(engine: Engine, what: str) -> None:
    claim = engine.claimed()
    engine.send()
    engine.call(f"pause_{what}", PAUSES[what], "r")
    assert engine.call("complete", claim.id, claim.token) == "ok"
    sleeper = engine.another()
    sleeper.run("listen jobqueue_ready")
    number = engine.value("select number from jobqueue.queue where name = 'q'")
    sleeper.run("select pg_advisory_lock_shared(27249, %s)", number)
    engine.call(f"resume_{what}", PAUSES[what], "r")
    (note,) = sleeper.connection.notifies(timeout=60, stop_after=1)
    assert note.payload == "q"


def test_the_one_who_paused_is_named_as_the_application_says(engine: Engine) -> None:
    engine.send()
    with engine.connection.transaction():
        engine.run("select set_config('jobqueue.actor', 'anna', true)")
        engine.call("pause_queue", "q", "r")
    assert queue(engine)["paused_by"] == "anna"
    assert engine.value("select actor from jobqueue.actions_taken") == "anna"


def test_a_purge_cancels_what_waits_deletes_what_ended_and_leaves_what_runs(engine: Engine) -> None:
    for status in ("completed", "failed", "cancelled", "skipped", "paused", "blocked", "processing"):
        engine.in_status(status)
    engine.send(delay=60)
    engine.send()
    other = engine.send("other")
    purged = engine.row("select * from jobqueue.purge_queue('q', 'moving house')")
    assert purged == {"cancelled": 4, "deleted": 8, "running": 1}
    assert engine.values("select status from jobqueue.job where queue = 'q'") == ["processing"]
    assert engine.status(other) == "pending"
    assert audited(engine) == [("purge_queue", "q", "moving house")]


def test_a_purge_of_a_tenant_touches_no_other(engine: Engine) -> None:
    engine.send(tenant="a")
    engine.send("other", tenant="a")
    kept = engine.send(tenant="b")
    assert engine.row("select * from jobqueue.purge_tenant('a', 'left us')") == {
        "cancelled": 2,
        "deleted": 2,
        "running": 0,
    }
    assert engine.values("select id from jobqueue.job") == [kept]
    assert engine.refused(engine.call, "purge_tenant", "b", "").detail["option"] == "reason"


def test_who_is_bound_to_some_tenants_changes_nothing_that_others_share(engine: Engine) -> None:
    engine.send(tenant="b")
    shared: list[tuple[Any, ...]] = [
        ("pause_queue", "q", "r"),
        ("resume_queue", "q", "r"),
        ("pause_job_type", "q", "r"),
    ]
    shared += [("pause_tenant", "b", "r"), ("resume_tenant", "b", "r")]
    for tenants in (None, "a"):
        for call in shared:
            with engine.acting_as("jobqueue_api", tenants):
                assert engine.refused(engine.call, *call).sqlstate == "JQ403", call
    engine.run("set jobqueue.tenants = 'a'")
    for call in (("update_queue", "q", {"max_retries": 1}), ("delete_queue", "q"), ("purge_queue", "q", "r")):
        assert engine.refused(engine.call, *call).sqlstate == "JQ403", call
    assert engine.refused(engine.call, "purge_tenant", "b", "r").sqlstate == "JQ403"
    with engine.acting_as("jobqueue_api", "a,b"):
        engine.call("pause_tenant", "b", "mine")


def test_each_role_manages_what_it_may(engine: Engine) -> None:
    for role in (
        "jobqueue_producer",
        "jobqueue_worker",
        "jobqueue_api",
        "jobqueue_support_readonly",
        "jobqueue_support",
    ):
        may = {
            row["proname"]: row["may"]
            for row in engine.rows(
                "select proname, bool_or(has_function_privilege(%s, oid, 'execute')) as may from pg_proc "
                "where pronamespace = 'jobqueue'::regnamespace group by proname",
                role,
            )
        }
        for function, roles in MAY.items():
            assert may[function] == (role in roles), (role, function)
        for function in (
            "keep_senders_out",
            "delete_ended",
            "cancel_waiting",
            "bulk_one",
            "redrive_one",
            "store_queue",
        ):
            assert not may[function], (role, function)


def test_support_really_can_and_readonly_support_really_cannot(engine: Engine) -> None:
    engine.send()
    with engine.acting_as("jobqueue_support"):
        engine.call("pause_queue", "q", "r")
        engine.call("purge_queue", "q", "r")
        engine.call("delete_queue", "q")
    with engine.acting_as("jobqueue_producer"):
        assert engine.call("create_queue", "mine") is True
    with engine.acting_as("jobqueue_support_readonly"), pytest.raises(psycopg.errors.InsufficientPrivilege):
        engine.call("pause_queue", "q", "r")


# health and doctor


def checks(engine: Engine, function: str = "doctor") -> dict[str, tuple[str, str]]:
    """Status and detail by name; every row that is not ok says what to do."""
    rows = engine.rows(f"select * from jobqueue.{function}()")
    assert all(row["status"] == "ok" or row["what_to_do"] for row in rows)
    return {row["name"]: (row["status"], row["detail"]) for row in rows}


def test_all_is_well_with_a_new_installation(engine: Engine) -> None:
    # new, and not as old as the template of the tests
    engine.run("update jobqueue.maintenance set next_at = now()")
    found = checks(engine)
    assert {status for status, _ in found.values()} == {"ok"}, found
    assert found.keys() > checks(engine, "health").keys()
    assert all(row["call"].startswith("select") for row in engine.rows("select * from jobqueue.help()"))


def test_doctor_finds_what_is_wrong(engine: Engine) -> None:
    engine.run("update jobqueue.maintenance set next_at = now()")
    claim = engine.claimed()
    engine.run("update jobqueue.job set lease_until = now() - interval '3 min' where id = %s", claim.id)
    engine.run("update jobqueue.claim_batch set check_at = now() - interval '3 min'")
    engine.run("update jobqueue.worker set heartbeat_at = now() - interval '1 h' where id = %s", WORKER)
    engine.call("update_queue", "q", {"warn_backlog": 1})
    engine.send()
    engine.send()
    engine.call("pause_queue", "q", "too much")
    engine.run(
        "update jobqueue.maintenance set last_at = now(), state = jsonb_build_object('error', 'no room', 'failed_at', now()) "
        "where step = 'expire'"
    )
    engine.run("update jobqueue.maintenance set next_at = now() - interval '1 day' where step = 'rescue'")
    engine.run("alter table jobqueue.stage set (autovacuum_enabled = off)")
    engine.run("grant select on jobqueue.job to public")
    engine.run("update pg_index set indisvalid = false where indexrelid = 'jobqueue.job_list'::regclass")
    found = checks(engine)
    wrong = {name: status for name, (status, _) in found.items() if status != "ok"}
    assert wrong == {
        "leases": "fail",
        "workers": "warn",
        "backlog: q": "warn",
        "paused: queue q": "warn",
        "maintenance: expire": "fail",
        "maintenance: rescue": "warn",
        "autovacuum": "fail",
        "grants": "fail",
        "indexes": "fail",
    }
    assert "no room" in found["maintenance: expire"][1]
    assert "job_list" in found["indexes"][1]
    assert "stage" in found["autovacuum"][1]


def test_a_step_that_works_again_is_well(engine: Engine) -> None:
    engine.run(
        "update jobqueue.maintenance set state = jsonb_build_object('error', 'no room', 'failed_at', now()) "
        "where step = 'expire'"
    )
    engine.rows("select * from jobqueue.maintain(null, array['expire'])")
    assert checks(engine, "health")["maintenance: expire"][0] == "ok"


def test_doctor_names_the_transaction_that_holds_the_horizon(engine: Engine) -> None:
    other = engine.another()
    with other.connection.transaction():
        other.run("set transaction isolation level repeatable read")
        other.count()
        (row,) = [r for r in engine.rows("select * from jobqueue.doctor()") if r["name"] == "oldest transaction"]
        assert f"pid {other.connection.info.backend_pid}," in row["detail"]


def test_a_failed_job_is_no_reason_to_worry_but_a_line_without_workers_is(engine: Engine) -> None:
    engine.in_status("failed")
    engine.run("delete from jobqueue.worker")
    assert checks(engine, "health")["workers"][0] == "ok"
    engine.send()
    assert checks(engine, "health")["workers"][0] == "warn"
    assert engine.fail(engine.claim()[0], PERMANENT) == "failed"
