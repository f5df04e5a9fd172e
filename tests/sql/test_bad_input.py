"""Whatever is wrong with a call, the answer says what, in the queue's own codes, and nothing is stored."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import Engine

DEEP: Any = 1
for _ in range(500):
    DEEP = [DEEP]

VALUES: dict[str, list[Any]] = {
    "priority": ["5", 1.5, 2**31, -(2**31), [], True],
    "max_retries": [-1, "3", 2_000_000, 0.5],
    "delay": [-1, "-1 s", "soon", True, [], 1e300, "2000 years", "infinity"],
    "run_at": [
        "2030-01-01T00:00:00",
        "2030-01-01",
        "tomorrow",
        5,
        "2030-02-31T00:00:00Z",
        "infinity",
        "9999-12-31T23:59:59-10:00",
        "0001-01-01T00:00:00+14:00",
    ],
    "timeout": [0, -5, "x"],
    "lease": [9.9, None, "5 s"],
    "retry_delay": [None, -1],
    "expires_in": [-1, "x"],
    "keep_completed": [-1, "for ever"],
    "retry_backoff": ["yes", 1],
    "id": ["x", 5, {}, ""],
    "metadata": [[1], "text", 5],
    "tenant": ["", 5, "*", "a,b", "x" * 201],
    "job_type": ["", 5, "x" * 201],
    "dead_letter": ["no spaces", "", 5, "x" * 201],
    "stages": [{}, [""], [None], ["a", "a"], [{"name": "a", "weight": 0}], [{"name": "a", "weight": "x"}], [DEEP]],
    **{name: [5, ""] for name in ("subject", "display_name", "created_by", "group", "tier")},
}
WRONG = [(option, value) for option, values in VALUES.items() for value in values]


def test_a_wrong_value_of_an_option_is_refused_by_name(engine: Engine) -> None:
    for option, value in WRONG:
        refusal = engine.refused(engine.send, **{option: value})
        assert refusal.sqlstate == "JQ400", (option, value)
        assert option in refusal.message or option == refusal.detail.get("option"), (option, value, refusal)
    assert engine.count() == 0


@pytest.mark.parametrize(
    ("given", "nearest"), [("prioritty", "priority"), ("maxretries", "max_retries"), ("Delay", "delay")]
)
def test_an_unknown_option_is_refused_with_the_nearest_name(engine: Engine, given: str, nearest: str) -> None:
    options: dict[str, Any] = {given: 1}
    refusal = engine.refused(lambda: engine.send(**options))
    assert (refusal.sqlstate, refusal.code) == ("JQ400", "UNKNOWN_OPTION")
    assert (refusal.detail["option"], refusal.detail["nearest"]) == (given, nearest)
    assert nearest in refusal.hint
    assert engine.count() == 0


def test_an_unknown_option_of_claim_is_refused_too(engine: Engine) -> None:
    refusal = engine.refused(lambda: engine.claim(job_typs=["a"]))
    assert (refusal.code, refusal.detail["nearest"]) == ("UNKNOWN_OPTION", "job_types")


@pytest.mark.parametrize("options", ["[]", "5", '"x"', "null"])
def test_options_are_an_object(engine: Engine, options: str) -> None:
    assert engine.refused(lambda: engine.run("select jobqueue.send('q', '{}', %s::jsonb)", options)).sqlstate == "JQ400"
    assert engine.count() == 0


@pytest.mark.parametrize("queue", ["", "a b", "x" * 201, "ä", "q;drop", None])
def test_a_queue_has_a_plain_name(engine: Engine, queue: str | None) -> None:
    for call in ("select jobqueue.send(%s)", "select * from jobqueue.send_many(%s, '[{}]')"):
        assert engine.refused(engine.run, call, queue).sqlstate == "JQ400"
    assert engine.count("queue") == 0


@pytest.mark.parametrize("jobs", ["{}", "5", "null"])
def test_send_many_takes_a_list(engine: Engine, jobs: str) -> None:
    assert (
        engine.refused(lambda: engine.run("select * from jobqueue.send_many('q', %s::jsonb)", jobs)).sqlstate == "JQ400"
    )


def test_nul_characters_cannot_be_stored(engine: Engine) -> None:
    with pytest.raises(psycopg.errors.UntranslatableCharacter):
        engine.send(payload={"a": "\0"})
    assert engine.count() == 0


@pytest.mark.parametrize("many", [False, True])
def test_a_payload_of_more_than_8_mb_is_refused(engine: Engine, many: bool) -> None:
    large = "x" * (8 * 1024 * 1024)
    call = "select * from jobqueue.send_many('q', %s)" if many else "select * from jobqueue.send('q', %s)"
    refusal = engine.refused(lambda: engine.run(call, Jsonb([{"payload": large}] if many else large)))
    assert (refusal.sqlstate, refusal.code, refusal.detail["what"]) == ("JQ413", "TOO_LARGE", "payload")
    assert engine.count() == 0


def test_a_payload_that_lies_compressed_in_a_table_is_measured_unpacked(engine: Engine) -> None:
    engine.run("create table document as select to_jsonb(repeat('x', 9000000)) as body")
    assert engine.value("select pg_column_size(body) from document") < 1_000_000
    assert engine.refused(lambda: engine.run("select jobqueue.send('q', body) from document")).sqlstate == "JQ413"


def test_metadata_of_more_than_1_mb_is_refused_and_the_setting_moves_the_limit(engine: Engine) -> None:
    large = {"x": "y" * 1_100_000}
    assert engine.refused(lambda: engine.send(metadata=large)).sqlstate == "JQ413"
    engine.run("insert into jobqueue.setting values ('max_metadata_bytes', '2000000')")
    engine.send(metadata=large)


def test_a_checkpoint_of_more_than_8_mb_is_refused(engine: Engine) -> None:
    claim = engine.claimed()
    large = Jsonb("x" * (8 * 1024 * 1024))
    assert engine.refused(lambda: engine.call("checkpoint", claim.id, claim.token, "s", large)).sqlstate == "JQ413"
    assert engine.count("checkpoint") == 0


CLAIMS = [
    "select * from jobqueue.claim('{q}', null, 1)",
    "select * from jobqueue.claim('{q}', gen_random_uuid(), 0)",
    "select * from jobqueue.claim('{q}', gen_random_uuid(), null)",
    "select * from jobqueue.claim('{q}', gen_random_uuid(), 10001)",
    "select * from jobqueue.claim('{}', gen_random_uuid(), 1)",
    "select * from jobqueue.claim(null, gen_random_uuid(), 1)",
    "select * from jobqueue.claim('{q}', gen_random_uuid(), 1, null)",
    """select * from jobqueue.claim('{q}', gen_random_uuid(), 1, '{"job_types": "a"}')""",
    """select * from jobqueue.claim('{q}', gen_random_uuid(), 1, '{"job_types": {"a": 1}}')""",
    """select * from jobqueue.claim('{q}', gen_random_uuid(), 1, '{"min_priority": "1"}')""",
]


@pytest.mark.parametrize("call", CLAIMS)
def test_a_malformed_claim_is_refused_and_registers_nobody(engine: Engine, call: str) -> None:
    job = engine.send()
    assert engine.refused(lambda: engine.run(call)).sqlstate == "JQ400"
    assert engine.status(job) == "pending"
    assert engine.count("worker") == 0


def test_prioritize_within_bounds_only(engine: Engine) -> None:
    job = engine.send()
    for priority in (-2147483648, -2147483647, None):
        call = "select jobqueue.prioritize(%s, %s::int, 'r')"
        assert engine.refused(engine.run, call, job, priority).sqlstate == "JQ400"


@pytest.mark.parametrize(
    ("topic", "duration"), [("x", "1 min"), ("job:", "1 min"), ("all", "0 s"), ("all", "2 h"), (None, "1 s")]
)
def test_a_watch_has_a_known_topic_and_ends(engine: Engine, topic: str | None, duration: str) -> None:
    assert (
        engine.refused(lambda: engine.run("select jobqueue.watch(%s, %s::interval)", topic, duration)).sqlstate
        == "JQ400"
    )


def test_job_types_are_checked_when_they_are_registered(engine: Engine) -> None:
    for kind in ({"options": {"priorty": 1}}, {"options": {"lease": 1}}, {"stages": "x"}):
        call = Jsonb([{"name": "t", **kind}])
        assert engine.refused(engine.call, "register_job_types", call).sqlstate == "JQ400"
    assert engine.count("job_type") == 0


def test_every_refusal_says_what_to_do(engine: Engine) -> None:
    for attempt in (
        lambda: engine.send("no such name!"),
        lambda: engine.send(lease=1),
        lambda: engine.call("cancel", uuid4(), "r"),
        lambda: engine.call("cancel", engine.in_status("completed"), "r"),
        lambda: engine.call("complete", engine.in_status("pending"), uuid4()),
    ):
        refusal = engine.refused(attempt)
        assert refusal.hint
        assert refusal.message.endswith(".")
        assert refusal.code
