"""A stale claim token is refused by every function that takes one, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from tests.sql.engine import WORKER, Engine

TAKE_A_TOKEN = """
    select proname::text from pg_proc where pronamespace = 'jobqueue'::regnamespace
    and (proargnames && '{token,_token,_tokens,tokens}' or prosrc ~ '''token''')
"""
LOST = "LEASE_LOST"
LISTED = (
    "jsonb_build_array(jsonb_build_object('id', %(id)s::text, 'token', %(token)s::text, 'pct', 50, 'to', 'succeeded'))"
)
# What each function says to a stale token: the code of its refusal, or its rows.
CALLS: dict[str, tuple[str, Any]] = {
    "acknowledge": ("%(id)s, %(token)s", LOST),
    "cancel_own": ("%(id)s, %(token)s, 'why'", LOST),
    "checkpoint": ("%(id)s, %(token)s, 's', '{}'", LOST),
    "complete": ("%(id)s, %(token)s", LOST),
    "complete_many": (LISTED, [("lost",)]),
    "estimate_units": ("%(id)s, %(token)s, 5", LOST),
    "fail": ("%(id)s, %(token)s, '{}'", LOST),
    "fail_many": (LISTED, [("lost", None)]),
    "fail_one": ("%(id)s, %(token)s, '{}', null", [(None,)]),
    "heartbeat": (f"%(worker)s, {LISTED}", [("lost",)]),
    "last_checkpoint": ("%(id)s, %(token)s", []),
    "lock_claim": ("%(id)s, %(token)s", LOST),
    "mark_done": ("%(id)s, %(token)s, '{k}'", LOST),
    "procrastinate_retry": ("%(id)s, %(token)s, '{}'", LOST),
    "procrastinate_settle": (LISTED, [("lost",)]),
    "procrastinate_start": ("%(id)s, %(token)s", [(False,)]),
    "progress": ("%(id)s, %(token)s, 50", LOST),
    "refused_of": ("array[%(id)s::uuid], array[%(token)s::uuid], null, null", [(True, "lost")]),
    "reject_checkpoint": ("%(id)s, %(token)s, 'why'", LOST),
    "release": ("%(id)s, %(token)s", LOST),
    "release_many": ("array[%(id)s::uuid], array[%(token)s::uuid]", [(0,)]),
    "settle": ("%(worker)s, array[%(id)s::uuid], array[%(token)s::uuid], null, null, null", [(True, "lost")]),
    "snooze": ("%(id)s, %(token)s, '1 s'", LOST),
    "stage": ("%(id)s, %(token)s, 's', 'completed'", LOST),
    "stage_output": ("%(id)s, %(token)s, 's'", [(None,)]),
    "store_progress": ("%(id)s, %(token)s, 50, 'm', '{}'", [(None,)]),
    "store_reports": (LISTED, [([],)]),
}
KEPT = ("job", "attempt", "stage", "checkpoint", "done_key", "pace", "claim_batch", "audit", "statistics_note")


def contents(engine: Engine) -> list[Any]:
    """All that a job has."""
    return [
        engine.value(f"select jsonb_agg(to_jsonb(t) order by to_jsonb(t)) from jobqueue.{table} t") for table in KEPT
    ]


def paused(engine: Engine, job: UUID) -> None:
    engine.call("release", job, engine.claim()[0].token)
    engine.call("pause", job, "not now")


NOW_IT_IS: dict[str, Callable[[Engine, UUID], Any]] = {
    "claimed by another": lambda engine, _: engine.claim(worker=UUID(int=1)),
    "waiting": lambda _engine, _job: None,
    "completed by another": lambda engine, job: engine.call("complete", job, engine.claim()[0].token),
    "failed by another": lambda engine, _: engine.fail(engine.claim()[0], {"class": "permanent"}),
    "paused": paused,
}


def test_it_is_known_which_functions_take_a_token(engine: Engine) -> None:
    assert set(engine.values(TAKE_A_TOKEN)) == set(CALLS)


@pytest.mark.parametrize("now", NOW_IT_IS)
def test_a_stale_token_changes_nothing_whatever_it_is_used_for(engine: Engine, now: str) -> None:
    claim = engine.claimed(stages=["s"])
    engine.call("checkpoint", claim.id, claim.token, "s", {"n": 1})
    engine.call("stage", claim.id, claim.token, "s", "in_progress", {"output": {"n": 1}})
    engine.lose_worker(claim.id)
    NOW_IT_IS[now](engine, claim.id)
    before = contents(engine)
    parameters = {"id": claim.id, "token": claim.token, "worker": WORKER}
    for function, (arguments, expected) in CALLS.items():
        call = f"select x.* from jobqueue.{function}({arguments}) x".encode()
        if expected == LOST:
            refusal = engine.refused(engine.connection.execute, call, parameters)
            assert (refusal.sqlstate, refusal.code) == ("JQ409", LOST), function
        else:
            rows = engine.connection.execute(call, parameters).fetchall()
            # the id comes first where there is one
            answers = [row[1:] if row and row[0] == claim.id else row for row in rows]
            assert [tuple(answer) for answer in answers] == [
                tuple(claim.token if value is True else value for value in row) for row in expected
            ], function
        assert contents(engine) == before, f"{function} changed something"
