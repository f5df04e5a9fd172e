"""Dead letters go back to where they failed, one by one, and none of them keeps the others."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from tests.sql.engine import PERMANENT, Engine

NONE = {"redriven": 0, "sent": 0, "conflicts": 0, "unroutable": 0}


@pytest.fixture
def dead(engine: Engine) -> Engine:
    """An engine whose queue q has the dead letter queue dead."""
    engine.call("create_queue", "q", {"dead_letter": "dead"})
    return engine


def failed(engine: Engine, queue: str = "q", **options: Any) -> tuple[UUID, UUID]:
    """A job that failed, and its copy."""
    payload = options.pop("payload", None)
    job = engine.send(queue, payload, **options)
    (claim,) = engine.claim(1, queue)
    assert claim.id == job
    engine.fail(claim, PERMANENT)
    return job, engine.value("select id from jobqueue.job where dead_letter_of = %s and status = 'pending'", job)


def redrive(engine: Engine, **options: Any) -> dict[str, int]:
    """What redrive did, without zeros; a preview must have said the same."""
    said = engine.rows("select * from jobqueue.preview_redrive('dead', %s)", options)
    done = engine.row("select * from jobqueue.redrive('dead', %s)", options)
    routed = [row for row in said if row["destination"] is not None]
    if not done["conflicts"]:
        assert sum(row["originals"] for row in routed) == done["redriven"]
        assert sum(row["new_jobs"] for row in routed) == done["sent"]
    return {name: count for name, count in done.items() if count}


def test_an_original_goes_back_under_its_own_id_with_a_fresh_budget(dead: Engine) -> None:
    job, copy = failed(dead, max_retries=2)
    assert redrive(dead) == {"redriven": 1}
    assert (dead.status(job), dead.job(job)["retry_count"], dead.job(job)["max_retries"]) == ("pending", 1, 3)
    assert (dead.status(copy), dead.job(copy)["status_reason"]) == ("cancelled", "redriven")
    assert [claim.id for claim in dead.claim()] == [job]
    assert redrive(dead) == {}
    assert dead.audit(job)[-1]["reason"] == "redriven from dead"


def test_if_the_original_is_gone_a_new_job_is_sent(dead: Engine) -> None:
    job, copy = failed(dead, payload={"page": 3}, priority=4, subject="document:1", metadata={"a": None})
    dead.call("delete_job", job, "tidy")
    assert redrive(dead) == {"sent": 1}
    (new,) = dead.claim()
    assert new.id not in (job, copy)
    assert (new.row["payload"], new.row["priority"], new.row["subject"]) == ({"page": 3}, 4, "document:1")
    assert (new.row["job_type"], new.row["metadata"], new.row["retry_count"]) == ("q", {"a": None}, 0)


def test_another_destination_gets_a_new_job_and_the_original_stays(dead: Engine) -> None:
    job, copy = failed(dead)
    assert redrive(dead, destination="elsewhere") == {"sent": 1}
    assert (dead.status(job), dead.status(copy)) == ("failed", "cancelled")
    (new,) = dead.claim(1, "elsewhere")
    assert new.row["job_type"] == "q"


def test_the_queue_itself_as_destination_takes_the_original_back(dead: Engine) -> None:
    job, _ = failed(dead)
    assert redrive(dead, destination="q") == {"redriven": 1}
    assert dead.status(job) == "pending"


def test_what_has_nowhere_to_go_stays(dead: Engine) -> None:
    job, copy = failed(dead)
    dead.call("delete_job", job, "tidy")
    dead.call("update_queue", "q", {"dead_letter": None})
    assert redrive(dead) == {"unroutable": 1}
    assert dead.status(copy) == "pending"
    assert redrive(dead, destination="q") == {"sent": 1}


def test_a_key_that_is_taken_keeps_one_back_and_not_the_others(dead: Engine) -> None:
    first, copy = failed(dead, singleton_key="k")
    second, _ = failed(dead)
    gone, copy_of_gone = failed(dead, payload={"n": 1})
    dead.call("delete_job", gone, "tidy")
    dead.send(singleton_key="k")
    assert redrive(dead) == {"redriven": 1, "sent": 1, "conflicts": 1}
    assert (dead.status(first), dead.status(copy)) == ("failed", "pending")
    assert (dead.status(second), dead.status(copy_of_gone)) == ("pending", "cancelled")


def test_a_destination_whose_policy_refuses_is_a_conflict(dead: Engine) -> None:
    dead.call("create_queue", "one", {"policy": "exclusive"})
    copies = [failed(dead)[1] for _ in range(2)]
    assert redrive(dead, destination="one") == {"sent": 1, "conflicts": 1}
    assert [dead.status(copy) for copy in copies] == ["cancelled", "pending"]


@pytest.mark.parametrize("by", ["source", "payload", "created_before", "copy", "original", "max_jobs"])
def test_options_choose_which(dead: Engine, by: str) -> None:
    dead.call("create_queue", "p", {"dead_letter": "dead"})
    job, copy = failed(dead, payload={"kind": "a", "n": 1})
    other, other_copy = failed(dead, "p", payload={"kind": "b"})
    dead.run("update jobqueue.job set created_at = created_at - interval '1 day' where id = %s", copy)
    choices: dict[str, dict[str, Any]] = {
        "source": {"source": "q"},
        "payload": {"payload": {"kind": "a"}},
        "created_before": {"created_before": dead.value("select (now() - interval '1 h')::text || ':00'")},
        "copy": {"ids": [str(copy)]},
        "original": {"ids": [str(job)]},
        "max_jobs": {"max_jobs": 1},
    }
    assert redrive(dead, **choices[by]) == {"redriven": 1}
    assert (dead.status(job), dead.status(other), dead.status(other_copy)) == ("pending", "failed", "pending")


@pytest.mark.parametrize(
    "options",
    [{"max_jobs": 0}, {"ids": "x"}, {"ids": ["x"]}, {"destination": "dead"}, {"created_before": "x"}, {"limit": 5}],
)
def test_wrong_options_are_refused(dead: Engine, options: dict[str, Any]) -> None:
    for function in ("redrive", "preview_redrive"):
        assert dead.refused(dead.call, function, "dead", options).sqlstate == "JQ400"
    assert dead.refused(dead.call, "redrive", "nowhere").code == "QUEUE_NOT_FOUND"


def test_only_waiting_copies_are_taken(dead: Engine) -> None:
    job, _ = failed(dead)
    dead.claim(1, "dead")
    dead.send("dead")
    assert redrive(dead) == {}
    assert dead.status(job) == "failed"
    assert dead.row("select * from jobqueue.redrive('dead')") == NONE


def test_another_tenants_dead_letters_stay(dead: Engine) -> None:
    job, _ = failed(dead, tenant="a")
    dead.run("set jobqueue.tenants = 'b'")
    assert redrive(dead) == {}
    dead.run("set jobqueue.tenants = 'a'")
    assert redrive(dead) == {"redriven": 1}
    assert dead.status(job) == "pending"
