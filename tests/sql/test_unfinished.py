"""The unfinished jobs are found from their end, however many have ended."""

from __future__ import annotations

import json

from tests.sql.engine import Engine

UNFINISHED = ("blocked", "pending", "processing", "paused")


def seen(engine: Engine, filter_: dict[str, object] | None = None, most: int = 100) -> list[tuple[int, str | None]]:
    """What the dashboard gets."""
    found = engine.rows(
        "select total, id::text as id from jobqueue.http_unfinished(null, '*', %s::jsonb, null, null, %s, array['id'])",
        json.dumps(filter_ or {}),
        most,
    )
    engine.run("reset role")
    return [(row["total"], row["id"]) for row in found]


def test_every_way_of_being_unfinished_is_found_and_nothing_else(engine: Engine) -> None:
    """Ready, due later, waiting for a limit, running, paused in each way, blocked; all against the table itself."""
    engine.run("select jobqueue.create_queue('limited', '{\"concurrency\": 1}'), jobqueue.create_queue('q', '{}')")
    for _ in range(3):
        engine.run("select jobqueue.send('limited', '{}')")
    sent = [engine.value("select id::text from jobqueue.send('q', '{}')") for _ in range(12)]
    engine.run("select jobqueue.send('q', '{}', '{\"run_at\": \"2099-01-01T00:00:00Z\"}')")
    engine.run(
        'select jobqueue.send_flow(\'[{"queue": "q", "ref": "a"}, {"queue": "q", "ref": "b", "depends_on": ["a"]}]\')'
    )
    claimed = engine.rows("select id::text as id, claim_token from jobqueue.claim(array['q'], gen_random_uuid(), 5)")
    engine.run("select jobqueue.complete(%s, %s)", claimed[0]["id"], claimed[0]["claim_token"])
    engine.run('select jobqueue.fail(%s, %s, \'{"class": "permanent"}\')', claimed[1]["id"], claimed[1]["claim_token"])
    engine.run('select jobqueue.fail(%s, %s, \'{"class": "transient"}\')', claimed[2]["id"], claimed[2]["claim_token"])
    engine.run("select jobqueue.checkpoint(%s, %s, 'half')", claimed[3]["id"], claimed[3]["claim_token"])
    engine.run("select jobqueue.pause(%s, 'lunch')", claimed[3]["id"])
    engine.run("select jobqueue.acknowledge(%s, %s)", claimed[3]["id"], claimed[3]["claim_token"])
    engine.run("select jobqueue.pause(%s, 'wait'), jobqueue.cancel(%s, 'no')", sent[8], sent[9])
    engine.run("select jobqueue.pause(%s, 'a'), jobqueue.resume(%s, 'b'), jobqueue.pause(%s, 'c')", *[sent[10]] * 3)
    statuses = set(engine.values("select distinct status from jobqueue.job"))
    assert set(UNFINISHED) | {"completed", "failed", "cancelled"} == statuses
    expected = engine.values(
        "select id::text from jobqueue.job where status in ('blocked', 'pending', 'processing', 'paused') "
        "order by created_at desc, id desc"
    )
    assert [found for _, found in seen(engine)] == expected
    assert {total for total, _ in seen(engine, most=2)} == {len(expected)}
    assert [found for _, found in seen(engine, most=2)] == expected[:3], "one more says that there is a next page"
    assert seen(engine, {"queue": "nothing"}) == [(0, None)]
    engine.run("select jobqueue.pause(id, 'all') from jobqueue.job where status = 'pending' and queue = 'limited'")
    assert {found for _, found in seen(engine)} == set(expected)
    assert engine.value("select jobqueue.unfinished_ids(3)") is None, "too many to be looked at one by one"
    after = engine.value("select created_at from jobqueue.job where id = %s", expected[3])
    rest = engine.values(
        "select id::text from jobqueue.http_unfinished(null, '*', '{}', %s, %s, 100, array['id'])", after, expected[3]
    )
    assert rest == expected[4:]


def test_very_many_unfinished_jobs_are_read_along_the_list(engine: Engine) -> None:
    """As for lists in general; the answer is the same."""
    engine.run("select jobqueue.create_queue('q', '{}')")
    sent = [engine.value("select id::text from jobqueue.send('q', '{}')") for _ in range(4)]
    engine.run("select jobqueue.pause(%s, 'wait'), jobqueue.cancel(%s, 'no')", sent[0], sent[1])
    before, paused = seen(engine), seen(engine, {"status": "paused"})
    assert {found for _, found in before} == {sent[0], *sent[2:]}
    assert paused == [(1, sent[0])]
    with engine.connection.transaction(force_rollback=True):
        engine.run(
            "create or replace function jobqueue.unfinished_ids(_most int default 20000) returns uuid[] "
            "language sql stable as 'select null::uuid[]'"
        )
        assert (seen(engine), seen(engine, {"status": "paused"})) == (before, paused)


def test_finished_jobs_cost_nothing(engine: Engine) -> None:
    """Counted in buffers: those that have ended are not touched."""

    def buffers() -> int:
        plan = engine.value(
            "explain (analyze, buffers, format json, timing off) "
            "select * from jobqueue.http_unfinished(null, '*', '{}', null, null, 50, array['id'])"
        )
        engine.run("reset role")
        return int(plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"])

    engine.run("select jobqueue.create_queue('q', '{}')")
    engine.run(
        "select count(s.id) from generate_series(1, 20) n cross join lateral jobqueue.send('q', jsonb_build_object('n', n)) s"
    )
    buffers()
    few = buffers()
    many = "select count(s.id) from generate_series(1, 400) n cross join lateral jobqueue.send('old', to_jsonb(n)) s"
    engine.run(many)
    engine.run("select count(jobqueue.cancel(id, 'done with')) from jobqueue.job where queue = 'old'")
    buffers()
    assert buffers() < few + 200
