"""Progress, stages, checkpoints and done keys: seen by pollers when something visible changed, and only then."""

from __future__ import annotations

import hashlib

import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import PERMANENT, Claim, Engine


def version(engine: Engine, claim: Claim) -> int:
    """The version of a job."""
    return int(engine.job(claim.id)["version"])


def test_progress_is_stored_and_clamped(engine: Engine) -> None:
    claim = engine.claimed()
    assert (
        engine.call(
            "progress", claim.id, claim.token, 30, "Processing", {"done": 3, "total": 10, "substage": "ocr", "k": 1}
        )
        is None
    )
    row = engine.view(claim.id)
    assert (row["progress_pct"], row["progress_message"], row["substage"]) == (30, "Processing", "ocr")
    assert (row["progress_done"], row["progress_total"], row["metadata"]) == (3, 10, {"k": 1})
    for given, stored in ((250, 100), (-3, 0)):
        engine.call("progress", claim.id, claim.token, given)
        assert engine.view(claim.id)["progress_pct"] == stored
    assert engine.view(claim.id)["progress_message"] == "Processing"


def test_the_version_rises_with_a_visible_change_and_not_without(engine: Engine) -> None:
    claim = engine.claimed()
    report = (claim.id, claim.token, 30, "m", {"done": 3, "k": {"a": 1}})
    engine.call("progress", *report)
    seen = version(engine, claim)
    engine.run("update jobqueue.job set life_at = null")
    engine.call("progress", *report)
    engine.call("progress", claim.id, claim.token)
    engine.call("mark_done", claim.id, claim.token, ["k"])
    assert version(engine, claim) == seen
    assert engine.job(claim.id)["life_at"] is not None
    engine.call("progress", claim.id, claim.token, 31)
    assert version(engine, claim) == seen + 1


def test_progress_answers_with_what_is_asked(engine: Engine) -> None:
    claim = engine.claimed()
    engine.call("cancel", claim.id, "stop")
    assert engine.call("progress", claim.id, claim.token, 1) == "cancel"


def test_metadata_is_capped_at_1_mb_however_well_it_compresses(engine: Engine) -> None:
    claim = engine.claimed()
    for key in ("a", "b"):
        engine.call("progress", claim.id, claim.token, None, None, {key: "x" * 400_000})
    before = engine.job(claim.id)
    refusal = engine.refused(lambda: engine.call("progress", claim.id, claim.token, None, None, {"c": "x" * 400_000}))
    assert (refusal.sqlstate, refusal.code) == ("JQ413", "TOO_LARGE")
    assert engine.job(claim.id) == before


@pytest.mark.parametrize(
    "data", [[1], "text", {"done": "3"}, {"total": -1}, {"done": 1e30}, {"estimated_completion": "soon"}]
)
def test_progress_of_a_wrong_type_is_refused(engine: Engine, data: object) -> None:
    claim = engine.claimed()
    assert (
        engine.refused(lambda: engine.call("progress", claim.id, claim.token, 1, None, Jsonb(data))).sqlstate == "JQ400"
    )


def test_stages_make_up_the_overall_percentage(engine: Engine) -> None:
    claim = engine.claimed()
    for name, pct in (("scan", 25), ("ocr", 50), ("merge", 75)):
        engine.call("stage", claim.id, claim.token, name, "in_progress", {"of": 4})
        assert engine.view(claim.id)["current_stage"] == name
        engine.call("stage", claim.id, claim.token, name, "completed")
        assert engine.view(claim.id)["progress_pct"] == pct
    row = engine.view(claim.id)
    assert (row["total_stages"], row["completed_stages"]) == (4, 3)
    stages = engine.rows("select * from jobqueue.stages order by position")
    assert [(s["name"], s["position"], s["status"]) for s in stages] == [
        ("scan", 1, "completed"),
        ("ocr", 2, "completed"),
        ("merge", 3, "completed"),
    ]
    assert all(s["started_at"] and s["completed_at"] for s in stages)


def test_weights_decide_the_share_of_a_stage(engine: Engine) -> None:
    claim = engine.claimed(stages=[{"name": "scan", "weight": 1}, {"name": "index", "weight": 9}])
    engine.call("stage", claim.id, claim.token, "scan", "completed")
    assert engine.view(claim.id)["progress_pct"] == 10
    engine.call("stage", claim.id, claim.token, "index", "completed")
    assert engine.view(claim.id)["progress_pct"] == 99


def test_a_stage_under_way_fails_with_its_attempt(engine: Engine) -> None:
    claim = engine.claimed(stages=["a"])
    engine.call("stage", claim.id, claim.token, "a", "in_progress", {"metadata": {"pages": 4}})
    engine.fail(claim, {**PERMANENT, "message": "broken page"})
    stage = engine.row("select * from jobqueue.stages")
    assert (stage["status"], stage["error"], stage["metadata"]) == ("failed", "broken page", {"pages": 4})


def test_a_stage_under_way_does_not_stay_so_after_a_forced_cancel(engine: Engine) -> None:
    claim = engine.claimed()
    engine.call("stage", claim.id, claim.token, "a", "in_progress")
    engine.call("cancel", claim.id, "now", force=True)
    assert engine.values("select status from jobqueue.stages") == ["pending"]


@pytest.mark.parametrize(
    ("name", "status", "detail"),
    [
        ("", "completed", {}),
        ("s", "done", {}),
        ("s", None, {}),
        ("s", "completed", {"weight": 0}),
        ("s", "completed", {"weight": "1"}),
        ("s", "completed", {"of": 0}),
        ("s", "completed", {"ov": 3}),
        ("s", "completed", {"metadata": [1]}),
    ],
)
def test_a_malformed_stage_is_refused(engine: Engine, name: str, status: str | None, detail: dict[str, object]) -> None:
    claim = engine.claimed()
    assert engine.refused(lambda: engine.call("stage", claim.id, claim.token, name, status, detail)).sqlstate == "JQ400"
    assert engine.count("stage") == 0


def test_a_checkpoint_has_stage_data_hash_and_time(engine: Engine) -> None:
    claim = engine.claimed()
    assert engine.call("checkpoint", claim.id, claim.token, "scanned", {"files": 120}) is None
    row = engine.view(claim.id)
    assert (row["checkpoint_stage"], row["pausable"]) == ("scanned", True)
    assert row["checkpoint_hash"] == hashlib.sha256(b'{"files": 120}').hexdigest()
    assert row["checkpoint_at"] is not None
    assert engine.rows("select * from jobqueue.last_checkpoint(%s, %s)", claim.id, claim.token)[0]["intact"] is True


def test_a_corrupted_checkpoint_is_detected_by_its_hash(engine: Engine) -> None:
    claim = engine.claimed()
    engine.call("checkpoint", claim.id, claim.token, "scanned", {"files": 120})
    engine.run("""update jobqueue.checkpoint set data = '{"files": 121}'""")
    assert engine.rows("select * from jobqueue.last_checkpoint(%s, %s)", claim.id, claim.token)[0]["intact"] is False


def test_only_the_newest_checkpoint_keeps_its_data(engine: Engine) -> None:
    claim = engine.claimed()
    for n in range(3):
        engine.call("checkpoint", claim.id, claim.token, f"s{n}", {"n": n})
    assert engine.values("select data from jobqueue.checkpoints order by id") == [None, None, {"n": 2}]


def test_a_reference_needs_a_hash_and_excludes_data(engine: Engine) -> None:
    claim = engine.claimed()
    for named in (
        {"reference": "/x"},
        {"reference": "/x", "hash": "abc"},
        {"reference": "/x", "hash": "0" * 64, "data": {"n": 1}},
        {"hash": "z" * 64},
    ):
        refusal = engine.refused(engine.call, "checkpoint", claim.id, claim.token, "s", **named)
        assert refusal.sqlstate == "JQ400"
    engine.call("checkpoint", claim.id, claim.token, "s", reference="/x", hash="AB" * 32)
    assert engine.view(claim.id)["checkpoint_reference"] == "/x"
    assert engine.view(claim.id)["checkpoint_hash"] == "ab" * 32


def test_a_pause_is_delivered_at_pause_safe_checkpoints_only(engine: Engine) -> None:
    claim = engine.claimed()
    engine.call("checkpoint", claim.id, claim.token, "safe")
    engine.call("pause", claim.id, "later")
    assert engine.call("checkpoint", claim.id, claim.token, "risky", pause_safe=False) is None
    assert engine.call("checkpoint", claim.id, claim.token, "safe again") == "pause"


def test_partial_progress_survives_a_retry_and_goes_with_a_restart(engine: Engine) -> None:
    claim = engine.claimed()
    assert engine.call("mark_done", claim.id, claim.token, ["b", "a", "a"]) == 2
    assert engine.call("mark_done", claim.id, claim.token, ["a", "c"]) == 1
    engine.call("progress", claim.id, claim.token, 60)
    engine.fail(claim, PERMANENT)
    engine.call("retry", claim.id, "again")
    assert engine.values("select jobqueue.done_keys(%s)", claim.id) == ["a", "b", "c"]
    assert engine.view(claim.id)["progress_pct"] == 60
    engine.fail(engine.claim()[0], PERMANENT)
    engine.call("retry", claim.id, "afresh", from_start=True)
    assert engine.values("select jobqueue.done_keys(%s)", claim.id) == []
    assert engine.view(claim.id)["progress_pct"] == 0


@pytest.mark.parametrize("keys", [None, [""], [None], ["x" * 1001]])
def test_malformed_keys_are_refused(engine: Engine, keys: list[str] | None) -> None:
    claim = engine.claimed()
    assert (
        engine.refused(
            lambda: engine.run("select jobqueue.mark_done(%s, %s, %s::text[])", claim.id, claim.token, keys)
        ).sqlstate
        == "JQ400"
    )


def test_a_handler_may_cancel_its_own_job(engine: Engine) -> None:
    claim = engine.claimed()
    assert engine.call("cancel_own", claim.id, claim.token, "nothing to do") == "cancelled"
    assert engine.view(claim.id)["status_reason"] == "nothing to do"


def test_a_later_attempt_reads_what_a_stage_made(engine: Engine) -> None:
    claim = engine.claimed()
    engine.call("stage", claim.id, claim.token, "scan", "completed", {"output": {"pages": 4}})
    assert engine.call("stage_output", claim.id, claim.token, "scan") == {"pages": 4}
