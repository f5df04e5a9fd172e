"""An event becomes a job in every queue that subscribed to it, all or none."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sql.engine import Engine, Row


def publish(engine: Engine, event: str = "paid", payload: Any = None, **options: Any) -> list[Row]:
    return engine.rows("select * from jobqueue.publish(%s, %s, %s)", event, payload or {}, options)


def test_every_subscribed_queue_gets_one_job(engine: Engine) -> None:
    for queue in ("mail", "books", "other"):
        assert engine.call("subscribe", "paid" if queue != "other" else "sent", queue) is True
    assert engine.call("subscribe", "paid", "mail") is False
    told = publish(engine, payload={"invoice": 7}, priority=3, subject="invoice:7")
    assert [(row["queue"], row["created"], row["reason"]) for row in told] == [
        ("books", True, None),
        ("mail", True, None),
    ]
    for row in told:
        job = engine.view(row["id"])
        assert (job["queue"], job["job_type"], job["payload"]) == (row["queue"], row["queue"], {"invoice": 7})
        assert (job["priority"], job["subject"]) == (3, "invoice:7")
    assert engine.count() == 2


def test_nobody_subscribed_is_no_error(engine: Engine) -> None:
    assert publish(engine) == []


def test_an_unsubscribed_queue_gets_no_more(engine: Engine) -> None:
    engine.call("subscribe", "paid", "mail")
    publish(engine)
    assert engine.call("unsubscribe", "paid", "mail") is True
    assert engine.call("unsubscribe", "paid", "mail") is False
    assert publish(engine) == []
    assert engine.count() == 1


def test_it_is_all_or_none(engine: Engine) -> None:
    engine.call("subscribe", "paid", "books")
    engine.call("subscribe", "paid", "mail")
    engine.call("register_job_types", "[]")
    # the second queue's job_type asks for what cannot be
    engine.run("insert into jobqueue.job_type (name, options) values ('mail', '{\"priority\": \"high\"}')")
    assert engine.refused(publish, engine).sqlstate == "JQ400"
    assert engine.count() == 0
    with engine.undone():
        engine.run("delete from jobqueue.job_type")
        assert len(publish(engine)) == 2
    assert engine.count() == 0


def test_a_collision_in_one_queue_is_told_and_the_others_get_theirs(engine: Engine) -> None:
    engine.call("create_queue", "mail", {"policy": "exclusive"})
    engine.call("subscribe", "paid", "mail")
    engine.call("subscribe", "paid", "books")
    holder = engine.send("mail")
    assert [(row["queue"], row["created"], row["reason"]) for row in publish(engine)] == [
        ("books", True, None),
        ("mail", False, "policy"),
    ]
    assert publish(engine)[1]["id"] == holder


@pytest.mark.parametrize("event", ["", "a b", None])
def test_a_name_that_no_event_can_have_is_refused(engine: Engine, event: str | None) -> None:
    assert engine.refused(engine.call, "subscribe", event, "q").detail["option"] == "event"
    assert engine.refused(engine.call, "publish", event).detail["option"] == "event"


def test_options_are_those_of_send_without_an_id(engine: Engine) -> None:
    assert engine.refused(publish, engine, id="00000000-0000-4000-8000-000000000001").code == "UNKNOWN_OPTION"
    assert engine.refused(publish, engine, colour="red").code == "UNKNOWN_OPTION"


def test_idle_workers_of_the_queues_are_woken(engine: Engine) -> None:
    engine.call("subscribe", "paid", "mail")
    sleeper = engine.another()
    sleeper.run("listen jobqueue_ready")
    sleeper.run(
        "select pg_advisory_lock_shared(27249, %s)",
        engine.value("select number from jobqueue.queue where name = 'mail'"),
    )
    publish(engine)
    (note,) = sleeper.connection.notifies(timeout=60, stop_after=1)
    assert note.payload == "mail"


def test_a_producer_publishes_for_its_tenants_only(engine: Engine) -> None:
    engine.call("subscribe", "paid", "mail")
    with engine.acting_as("jobqueue_producer", "a"):
        assert publish(engine, tenant="a")[0]["created"]
        assert engine.refused(publish, engine, tenant="b").sqlstate == "JQ403"
