"""Pages of jobs: what is rare is found along an index; the rest is looked for so far, and the page says where to go on."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.sql.engine import Engine

Place = tuple[Any, Any] | tuple[None, None]

ENDED = """
insert into jobqueue.job (queue, job_type, tenant, subject, created_by, status, status_reason, progress_pct, created_at,
    completed_at, paused_at, failed_at, error_class, error_code)
select 'q' || n %% 3, 't' || n %% 5, 'tenant' || n %% %s, 's' || n %% 7, 'u' || n %% 4, s.status,
    case when s.status in ('cancelled', 'skipped', 'paused') then 'test' end,
    case when s.status = 'completed' then 100 else 0 end,
    -- jobs of one transaction have one time
    now() - n / 3 * interval '1 min', case when s.status <> 'paused' then now() end,
    case when s.status = 'paused' then now() end,
    case when s.status = 'failed' then now() end,
    case when s.status in ('failed', 'skipped') then (array['transient', 'quota', 'lost'])[1 + n %% 3] end,
    case when s.status in ('failed', 'skipped') then 'E' || n %% 2 end
from generate_series(1, %s) n
cross join lateral (
    select (array['completed', 'failed', 'cancelled', 'skipped', 'paused', 'completed', 'completed'])[1 + n * 13 %% 7] as status
    ) s
"""
FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"queue": "q1"},
    {"queue": ["q1", "q2"], "status": "completed"},
    {"queue": "none"},
    {"job_type": "t3", "error_class": "quota"},
    {"status": "failed"},
    {"status": ["paused", "cancelled"]},
    {"status": "skipped", "subject": ["s1", "s2"]},
    {"status": ["failed", "completed"]},
    {"error_code": "E1"},
    {"error_class": ["lost", "quota"], "queue": "q0"},
    {"created_by": "u1", "queue": "q2"},
    {"tenant": ["tenant0", "tenant1"], "job_type": "t0"},
)


def look_back(engine: Engine, jobs: int) -> None:
    """Let pages look at so many jobs only; the transaction of the test ends it."""
    engine.run(
        "create or replace function jobqueue.look_back() returns int language sql immutable parallel safe "
        f"as 'select {jobs}'"
    )


def page(engine: Engine, wanted: dict[str, Any], after: Place = (None, None), most: int = 5) -> list[dict[str, Any]]:
    """What the API gets, as the owner for all tenants."""
    # it makes its transaction one that only reads
    with engine.connection.transaction(force_rollback=True):
        return engine.rows(
            "select total, open, id::text as id, created_at, body "
            "from jobqueue.http_jobs(null, '*', %s::jsonb, %s, %s, %s, 0, array['id'])",
            json.dumps(wanted),
            *after,
            most,
        )


def walk(engine: Engine, wanted: dict[str, Any], most: int) -> tuple[list[str], int]:
    """The ids of all pages, one after the other, and how many pages they were."""
    found: list[str] = []
    after: Place = (None, None)
    listed = "select id::text as id, created_at, more from jobqueue.http_found(%s::jsonb, %s, %s, %s, 0)"
    for pages in range(1, 1000):
        rows = engine.rows(listed, json.dumps(wanted), *after, most)
        found += [row["id"] for row in rows if not row["more"]]
        if len(rows) < most and not any(row["more"] for row in rows):
            return found, pages
        after = (rows[-1]["created_at"], rows[-1]["id"])
    raise AssertionError("the list does not end")


def expected(engine: Engine, wanted: dict[str, Any]) -> list[str]:
    """The same by reading the whole table."""
    return [
        str(one)
        for one in engine.values(
            "select j.id::text from jobqueue.job j where jobqueue.matches(j, %s::jsonb) and "
            "(%s::jsonb -> 'created_by' is null or j.created_by = %s::jsonb ->> 'created_by') "
            "order by j.created_at desc, j.id desc",
            json.dumps({name: value for name, value in wanted.items() if name != "created_by"}),
            *[json.dumps(wanted)] * 2,
        )
    ]


@pytest.mark.parametrize("tenants", [1, 4, 30])
def test_pages_one_after_the_other_have_every_job_once_and_in_order_however_far_each_looks(
    engine: Engine, tenants: int
) -> None:
    chance = random.Random(tenants)
    with engine.connection.transaction(force_rollback=True):
        engine.run(ENDED, tenants, 300 + 40 * tenants)
        engine.run("set local jobqueue.tenants = '*'")
        look_back(engine, 200 * tenants)
        for wanted in FILTERS:
            found, _ = walk(engine, wanted, chance.choice([20, 40, 60]))
            assert found == expected(engine, wanted), wanted


def test_a_page_that_has_looked_at_enough_says_so_and_where_to_go_on(engine: Engine) -> None:
    with engine.connection.transaction(force_rollback=True):
        engine.run(ENDED, 1, 900)
        engine.run(
            "update jobqueue.job set queue = 'rare' where id in (select id from jobqueue.job order by created_at limit 2)"
        )
        look_back(engine, 200)
        (only,) = page(engine, {"queue": "rare"})
        assert (only["total"], only["open"], only["body"]) == (0, True, None)
        assert only["id"] == engine.value(
            "select id::text from jobqueue.job order by created_at desc, id desc offset 199 limit 1"
        )
        engine.run("set local jobqueue.tenants = '*'")
        found, pages = walk(engine, {"queue": "rare"}, 5)
        assert (len(found), pages) == (2, 5)
        full = page(engine, {"queue": "q1"}, most=5)
        assert (len(full), full[0]["open"], full[-1]["body"]) == (6, True, None)
        look_back(engine, 1000)
        assert [(row["total"], row["open"]) for row in page(engine, {"queue": "rare"})] == [(2, False)] * 2


def test_what_an_index_answers_is_counted_to_the_end(engine: Engine) -> None:
    with engine.connection.transaction(force_rollback=True):
        engine.run(ENDED, 3, 900)
        look_back(engine, 200)
        for wanted in ({}, {"error_class": "quota"}, {"subject": "s1"}, {"created_by": "u1"}):
            (total,) = {(row["total"], row["open"]) for row in page(engine, wanted)}
            assert total == (len(expected(engine, wanted)), False)


def buffers(engine: Engine, statement: str) -> int:
    """How many pages a statement reads once its plans are made."""
    for _ in range(2):
        plan = engine.value("explain (analyze, buffers, format json, timing off) " + statement)
        engine.run("reset role")
    return int(plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"])


RARE: tuple[dict[str, Any], ...] = (
    {"status": "failed"},
    {"status": "paused"},
    {"status": "cancelled"},
    {"status": "skipped"},
    {"status": ["paused", "skipped"]},
    {"error_class": "quota"},
    {"error_code": "E1"},
    {"error_class": "lost", "queue": "q1"},
    {"subject": "s1"},
)


def test_lists_by_what_is_rare_do_not_read_what_has_completed(engine: Engine) -> None:
    def cost() -> dict[str, int]:
        listed = "select * from jobqueue.http_jobs(null, '*', '{}'::jsonb, null, null, 5, 0, array['id'])"
        return {json.dumps(f): buffers(engine, listed.replace("'{}'", f"'{json.dumps(f)}'")) for f in RARE}

    engine.run(ENDED, 1, 140)
    before = cost()
    engine.run(
        "insert into jobqueue.job (queue, job_type, tenant, status, progress_pct, completed_at) "
        "select 'q1', 't1', 'tenant0', 'completed', 100, now() from generate_series(1, 6000)"
    )
    engine.run("analyze jobqueue.job")
    after = cost()
    # along job_list it would be more than 6,000
    assert {name: after[name] - before[name] for name in before if after[name] > before[name] + 100} == {}


def test_a_job_without_trouble_has_no_entry_in_the_indexes_of_trouble(engine: Engine) -> None:
    """Then its claim and its completion cost what they did before there were these indexes."""
    engine.run("select jobqueue.create_queue('q', '{}')")
    for _ in range(3):
        engine.send("q")
    for claim in engine.claim(3, "q"):
        engine.call("complete", claim.id, claim.token)
    plain = "select count(*) from jobqueue.job where error_class is not null or status_reason is not null"
    assert engine.value(plain) == 0
    assert engine.value("select count(*) from jobqueue.job where status = 'completed'") == 3


def test_what_a_hand_pauses_or_cancels_is_listed_as_well(engine: Engine) -> None:
    sent = [engine.send("q") for _ in range(3)]
    engine.run(
        "update jobqueue.job set status = 'cancelled', completed_at = now(), ready_seq = null where id = %s", sent[0]
    )
    engine.run("update jobqueue.job set status = 'paused', paused_at = now(), ready_seq = null where id = %s", sent[1])
    for status, job in (("cancelled", sent[0]), ("paused", sent[1])):
        assert [row["id"] for row in page(engine, {"status": status})] == [str(job)]
    assert set(engine.values("select status_reason from jobqueue.job where status <> 'pending'")) == {"changed by hand"}


def test_an_index_of_the_owners_own_finds_a_rare_queue_and_a_rare_job_type(engine: Engine) -> None:
    """As docs/guide/finding-jobs.md makes them, and without a bound."""
    with engine.connection.transaction(force_rollback=True):
        engine.run(ENDED, 1, 900)
        engine.run(
            "update jobqueue.job set queue = 'rare', job_type = 'odd' "
            "where id in (select id from jobqueue.job order by created_at limit 2)"
        )
        look_back(engine, 200)
        for column, index, wanted in (("queue", "job_by_queue", "rare"), ("job_type", "job_by_type", "odd")):
            assert page(engine, {column: wanted})[0]["open"]
            engine.run(f"create index {index} on jobqueue.job (tenant, {column}, created_at, id)")
            assert engine.value("select jobqueue.has_own_index(%s)", index)
            rows = page(engine, {column: wanted})
            assert [(row["total"], row["open"], row["body"] is None) for row in rows] == [(2, False, False)] * 2


def test_queues_in_which_nothing_waits_or_failed_cost_the_dashboard_nothing(engine: Engine) -> None:
    engine.run("select jobqueue.create_queue('busy', '{}'), jobqueue.create_queue('limited', '{\"concurrency\": 1}')")
    for queue in ("busy", "limited"):
        engine.send(queue)
    gauges = "select queue, ready, scheduled, failed_jobs from jobqueue.queue_gauges(null)"
    rows = "select * from jobqueue.http_queue_rows(null)"
    before = buffers(engine, gauges), buffers(engine, rows)
    found = engine.rows(gauges)
    engine.run("insert into jobqueue.queue (name) select 'idle' || n from generate_series(1, 400) n")
    engine.run("analyze jobqueue.queue")
    assert engine.rows(gauges) == found
    assert [(row["queue"], row["ready"]) for row in found] == [("busy", 1), ("limited", 1)]
    # a look into job_claim, job_failed and the line for each would be 6 and more
    assert buffers(engine, gauges) < before[0] + 3 * 400
    assert buffers(engine, rows) < before[1] + 400
    ready = {row["name"]: row["ready"] for row in map(json.loads, engine.values(rows))}
    assert (ready["busy"], ready["idle7"], len(ready)) == (1, 0, 402)
