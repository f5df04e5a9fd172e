"""No client, a superuser's hand included, can make a change of status that the product does not know."""

from __future__ import annotations

import psycopg
import pytest

from tests.sql.engine import STATUSES, Engine, new_token

ALLOWED = {
    "blocked": {"pending", "cancelled", "failed"},
    "pending": {"processing", "paused", "cancelled", "failed"},
    "processing": {"completed", "failed", "cancelled", "paused", "pending"},
    "paused": {"pending", "cancelled"},
    "failed": {"pending", "blocked", "skipped"},
    "cancelled": {"pending", "blocked"},
    "completed": set(),
    "skipped": set(),
}
# nothing is left over of what another status brought along
BARE = "ready_seq = null, wait_until = null, claim_token = null, lease_until = null, requested_action = null, "
ENDED = BARE + "completed_at = now(), failed_at = null"
UNENDED = BARE + "completed_at = null, failed_at = null"
# all that must go with a status, by hand
BY_HAND = {
    "blocked": UNENDED,
    "pending": UNENDED.replace("ready_seq = null", "ready_seq = nextval('jobqueue.ready_seq')"),
    "processing": UNENDED.replace("claim_token = null", "claim_token = gen_random_uuid()").replace(
        "lease_until = null", "lease_until = now() + interval '30 s'"
    )
    + ", worker_id = gen_random_uuid(), started_at = now(), attempt = attempt + 1",
    "paused": UNENDED + ", paused_at = now()",
    "completed": ENDED + ", progress_pct = 100, error_class = null, error_code = null, error_message = null",
    "failed": ENDED.replace("failed_at = null", "failed_at = now()") + ", error_class = 'permanent'",
    "cancelled": ENDED,
    "skipped": ENDED,
}
CHANGES = [(old, new) for old in STATUSES for new in STATUSES if old != new]
OUTSIDE = [(old, new) for old, new in CHANGES if new not in ALLOWED[old]]
INSIDE = [(old, new) for old, new in CHANGES if new in ALLOWED[old]]


def test_there_are_56_changes_between_different_statuses() -> None:
    assert len(CHANGES) == 56
    assert len(INSIDE) == 19


@pytest.mark.parametrize("old", STATUSES)
def test_a_consistent_update_by_hand_outside_the_table_is_refused(engine: Engine, old: str) -> None:
    job = engine.in_status(old)
    before = engine.job(job)
    for new in targets(OUTSIDE, old):
        update = f"update jobqueue.job set status = %s, {BY_HAND[new]} where id = %s"
        refusal = engine.refused(engine.run, update, new, job)
        assert (refusal.sqlstate, refusal.code) == ("JQ409", "INVALID_TRANSITION")
        assert f"from {old} to {new}" in refusal.message
        assert (refusal.detail["status"], refusal.detail["to"]) == (old, new)
        assert set(refusal.detail["allowed"]) == ALLOWED[old]
        assert all(status in refusal.message for status in ALLOWED[old])
        assert engine.job(job) == before


@pytest.mark.parametrize("old", STATUSES)
def test_a_bare_update_of_the_status_outside_the_table_is_refused(engine: Engine, old: str) -> None:
    job = engine.in_status(old)
    before = engine.job(job)
    for new in targets(OUTSIDE, old):
        update = "update jobqueue.job set status = %s where id = %s"
        refusal = engine.refused(engine.run, update, new, job)
        assert (refusal.sqlstate, refusal.code) == ("JQ409", "INVALID_TRANSITION")
        assert f"from {old} to {new}" in refusal.message
        assert engine.job(job) == before


@pytest.mark.parametrize("old", STATUSES)
def test_a_change_inside_the_table_passes_by_hand_if_the_row_stays_consistent(engine: Engine, old: str) -> None:
    job = engine.in_status(old)
    for new in targets(INSIDE, old):
        with engine.undone():
            assert engine.run(f"update jobqueue.job set status = %s, {BY_HAND[new]} where id = %s", new, job) == 1
            assert engine.status(job) == new


@pytest.mark.parametrize("old", STATUSES)
def test_a_change_inside_the_table_that_leaves_the_row_inconsistent_is_refused(engine: Engine, old: str) -> None:
    job = engine.in_status(old)
    before = engine.job(job)
    for new in targets(INSIDE, old):
        with pytest.raises(psycopg.errors.CheckViolation):
            engine.run(_spoiled(new), new, job)
        assert engine.job(job) == before


def targets(changes: list[tuple[str, str]], old: str) -> list[str]:
    """Where the changes lead from a status."""
    return [new for start, new in changes if start == old]


def _spoiled(new: str) -> str:
    """An update into a status with one thing missing or too much."""
    spoiled = {
        "blocked": BY_HAND["blocked"].replace("completed_at = null", "completed_at = now()"),
        "pending": BY_HAND["pending"].replace("wait_until = null", "wait_until = now()"),
        "processing": BY_HAND["processing"].replace("claim_token = gen_random_uuid()", "claim_token = null"),
        "paused": BY_HAND["paused"].replace("paused_at = now()", "paused_at = null"),
        "completed": BY_HAND["completed"].replace("progress_pct = 100", "progress_pct = 99"),
        "failed": BY_HAND["failed"].replace("error_class = 'permanent'", "error_class = null"),
        "cancelled": BY_HAND["cancelled"].replace("completed_at = now()", "completed_at = null"),
        "skipped": BY_HAND["skipped"].replace("failed_at = null", "failed_at = now()"),
    }[new]
    return f"update jobqueue.job set status = %s, {spoiled} where id = %s"


VERBS = {
    "cancel": "select jobqueue.cancel(%(id)s, 'r')",
    "force": "select jobqueue.cancel(%(id)s, 'r', force => true)",
    "pause": "select jobqueue.pause(%(id)s, 'r')",
    "resume": "select jobqueue.resume(%(id)s, 'r')",
    "retry": "select jobqueue.retry(%(id)s, 'r')",
    "restart": "select jobqueue.retry(%(id)s, 'r', from_start => true)",
    "skip": "select jobqueue.skip(%(id)s, 'r')",
    "run_now": "select jobqueue.run_now(%(id)s, 'r')",
    "prioritize": "select jobqueue.prioritize(%(id)s, 7, 'r')",
    "claim": "select * from jobqueue.claim('{q}', gen_random_uuid(), 10)",
    "complete": "select jobqueue.complete(%(id)s, %(token)s)",
    "fail": """select jobqueue.fail(%(id)s, %(token)s, '{"class": "transient"}')""",
    "fail for good": """select jobqueue.fail(%(id)s, %(token)s, '{"class": "invalid"}')""",
    "snooze": "select jobqueue.snooze(%(id)s, %(token)s, '1 min')",
    "release": "select jobqueue.release(%(id)s, %(token)s)",
    "acknowledge": "select jobqueue.acknowledge(%(id)s, %(token)s)",
}
LEADS_TO = {
    ("blocked", "cancel"): "cancelled",
    ("blocked", "force"): "cancelled",
    ("pending", "cancel"): "cancelled",
    ("pending", "force"): "cancelled",
    ("pending", "pause"): "paused",
    ("pending", "claim"): "processing",
    ("processing", "force"): "cancelled",
    ("processing", "complete"): "completed",
    ("processing", "fail"): "pending",
    ("processing", "fail for good"): "failed",
    ("processing", "snooze"): "pending",
    ("processing", "release"): "pending",
    ("paused", "resume"): "pending",
    ("paused", "cancel"): "cancelled",
    ("paused", "force"): "cancelled",
    ("failed", "retry"): "pending",
    ("failed", "restart"): "pending",
    ("failed", "skip"): "skipped",
    ("cancelled", "resume"): "pending",
}


@pytest.mark.parametrize("old", STATUSES)
def test_every_function_makes_only_changes_of_the_table(engine: Engine, old: str) -> None:
    job = engine.in_status(old)
    before = engine.job(job)
    names = {"id": job, "token": before["claim_token"] or new_token()}
    for verb, call in VERBS.items():
        refused = None
        with engine.undone():
            try:
                with engine.connection.transaction():
                    engine.connection.execute(call.encode(), names)
            except psycopg.Error as error:
                refused = error.sqlstate
                assert engine.job(job) == before
            assert engine.status(job) == LEADS_TO.get((old, verb), old), verb
        assert refused in (None, "JQ409"), verb


def test_a_bulk_update_of_many_jobs_is_refused_as_a_whole(engine: Engine) -> None:
    jobs = [engine.in_status(status, queue=status) for status in STATUSES]
    refusal = engine.refused(lambda: engine.run(f"update jobqueue.job set status = 'cancelled', {ENDED}"))
    assert refusal.code == "INVALID_TRANSITION"
    assert [engine.status(job) for job in jobs] == list(STATUSES)


def test_an_upsert_and_a_change_inside_a_query_are_guarded_too(engine: Engine) -> None:
    job = engine.in_status("completed")
    upsert = f"""
        insert into jobqueue.job (id, queue, job_type, ready_seq) values (%s, 'q', 'q', 1)
        on conflict (id) do update set status = 'skipped', {BY_HAND["skipped"]}"""
    assert engine.refused(lambda: engine.run(upsert, job)).code == "INVALID_TRANSITION"
    within = f"with x as (update jobqueue.job set status = 'skipped', {BY_HAND['skipped']} where id = %s) select 1"
    assert engine.refused(lambda: engine.run(within, job)).code == "INVALID_TRANSITION"


@pytest.mark.parametrize("status", [status for status in STATUSES if status not in ("blocked", "pending")])
def test_a_job_inserted_by_hand_has_to_be_consistent(engine: Engine, status: str) -> None:
    insert = "insert into jobqueue.job (queue, job_type, status, ready_seq) values ('q', 'q', %s, 1)"
    refusal = engine.refused(lambda: engine.run(insert, status))
    assert (refusal.sqlstate, refusal.code) == ("JQ409", "INVALID_TRANSITION")
    assert refusal.detail["allowed"] == ["blocked", "pending"]
    assert engine.count() == 0


@pytest.mark.parametrize("status", STATUSES)
def test_only_an_ended_job_can_be_deleted(engine: Engine, status: str) -> None:
    job = engine.in_status(status)
    if status in ("completed", "failed", "cancelled", "skipped"):
        assert engine.run("delete from jobqueue.job where id = %s", job) == 1
    else:
        refusal = engine.refused(lambda: engine.run("delete from jobqueue.job where id = %s", job))
        assert (refusal.sqlstate, refusal.code) == ("JQ409", "INVALID_TRANSITION")
        assert engine.status(job) == status


def test_what_hangs_on_a_job_goes_with_it_whoever_deletes_it(engine: Engine) -> None:
    claim = engine.claimed(stages=["a", "b"])
    engine.call("stage", claim.id, claim.token, "a", "in_progress")
    engine.call("checkpoint", claim.id, claim.token, "a", {"n": 1})
    engine.call("mark_done", claim.id, claim.token, ["1", "2"])
    engine.fail(claim, {"class": "permanent"})
    engine.run("delete from jobqueue.job")
    assert [engine.count(t) for t in ("attempt", "stage", "checkpoint", "done_key")] == [0, 0, 0, 0]


def test_the_history_of_an_expired_job_goes_with_it_even_after_a_retry(engine: Engine) -> None:
    job = engine.send(expires_in=60)
    engine.run("update jobqueue.job set expires_at = now()")
    assert engine.call("expire", 10) == 1
    engine.call("retry", job, "once more")
    engine.call("cancel", job, "or not")
    engine.call("delete_job", job, "away")
    assert engine.count("attempt") == 0


def test_the_table_of_transitions_has_one_form(engine: Engine) -> None:
    for old in STATUSES:
        assert set(engine.call("statuses_after", old)) == ALLOWED[old]
        for new in STATUSES:
            assert engine.call("can_become", old, new) == (new in ALLOWED[old])
