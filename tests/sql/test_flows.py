"""Flows: jobs wait for jobs, are released by the last of their parents, and end as their edges ask."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import PERMANENT, Engine
from tests.support.waiting import wait_until

Job = dict[str, Any]


def send_flow(engine: Engine, *jobs: Job, queue: str = "q") -> dict[str, UUID]:
    """Send a flow; ids by ref."""
    elements = [{"queue": queue, **job} for job in jobs]
    return {row["ref"]: row["id"] for row in engine.rows("select * from jobqueue.send_flow(%s)", Jsonb(elements))}


def complete(engine: Engine, job: UUID, result: Any = None) -> None:
    """Claim a job and complete it."""
    claim = next(claim for claim in engine.claim(100, engine.job(job)["queue"]) if claim.id == job)
    engine.call("complete", claim.id, claim.token, Jsonb(result))


def fail(engine: Engine, job: UUID) -> None:
    """Claim a job and fail it for good."""
    (claim,) = (claim for claim in engine.claim(100, engine.job(job)["queue"]) if claim.id == job)
    assert engine.fail(claim, PERMANENT) == "failed"


def test_a_child_is_released_by_the_last_parent_in_the_same_transaction_across_queues(engine: Engine) -> None:
    ids = send_flow(
        engine,
        {"ref": "a", "queue": "one"},
        {"ref": "b", "queue": "two"},
        {"ref": "c", "queue": "three", "depends_on": ["a", "b"], "payload": {"n": 1}},
    )
    assert [engine.status(ids[ref]) for ref in "abc"] == ["pending", "pending", "blocked"]
    complete(engine, ids["a"], {"pages": 3})
    assert engine.status(ids["c"]) == "blocked"
    with engine.undone():
        complete(engine, ids["b"])
        assert engine.status(ids["c"]) == "pending"
    complete(engine, ids["b"], [1])
    (claim,) = engine.claim(1, "three")
    assert (claim.id, claim.row["payload"]) == (ids["c"], {"n": 1})
    parents = {row["ref"]: row for row in engine.rows("select * from jobqueue.parents(%s)", ids["c"])}
    assert {ref: row["result"] for ref, row in parents.items()} == {"a": {"pages": 3}, "b": [1]}
    assert {row["on_failure"] for row in parents.values()} == {"wait"}
    children = engine.rows("select * from jobqueue.children(%s)", ids["a"])
    assert [(row["id"], row["ref"], row["status"]) for row in children] == [(ids["c"], "c", "processing")]
    assert engine.refused(engine.rows, "select * from jobqueue.parents(%s)", uuid4()).code == "JOB_NOT_FOUND"
    assert engine.refused(engine.rows, "select * from jobqueue.children(%s)", uuid4()).code == "JOB_NOT_FOUND"


def test_send_takes_parents_that_are_there_and_honours_those_that_have_ended(engine: Engine) -> None:
    waits = engine.send("q")
    done = engine.in_status("completed", "done")
    failed = engine.in_status("failed", "bad")
    child = engine.send("c", depends_on=[str(waits), str(done)])
    assert (engine.status(child), engine.job(child)["unfinished_parents"]) == ("blocked", 1)
    assert engine.status(engine.send("c", depends_on=[str(done)])) == "pending"
    assert engine.status(engine.send("c", depends_on=[str(failed)], on_failure="run")) == "pending"
    assert engine.status(engine.send("c", depends_on=[str(failed)])) == "blocked"
    struck = engine.job(engine.send("c", depends_on=[{"id": str(failed), "on_failure": "fail"}], dead_letter="dlq"))
    assert (struck["status"], struck["error_code"]) == ("failed", "PARENT_FAILED")
    assert engine.value("select dead_letter_of from jobqueue.job where queue = 'dlq'") == struck["id"]
    assert engine.status(engine.send("c", depends_on=[str(failed)], on_failure="cancel")) == "cancelled"
    later = engine.send("c", depends_on=[str(waits)], delay=3600, expires_in=60)
    assert engine.job(later)["expires_at"] is None
    complete(engine, waits)
    assert engine.status(child) == "pending"
    row = engine.job(later)
    assert (row["status"], row["ready_seq"], row["wait_until"]) == ("pending", None, row["run_at"])
    assert (row["expires_at"] - row["run_at"]).total_seconds() == 60


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"depends_on": [str(uuid4())]}, "JOB_NOT_FOUND"),
        ({"depends_on": "x"}, "INVALID_ARGUMENT"),
        ({"depends_on": ["x"]}, "INVALID_ARGUMENT"),
        ({"depends_on": [{"id": str(uuid4()), "on_failure": "x"}]}, "INVALID_ARGUMENT"),
        ({"depends_on": [{"it": str(uuid4())}]}, "UNKNOWN_OPTION"),
        ({"depends_on": [str(uuid4())], "on_failure": "explode"}, "INVALID_ARGUMENT"),
    ],
)
def test_what_cannot_be_waited_for_is_refused(engine: Engine, options: dict[str, Any], code: str) -> None:
    assert engine.refused(engine.send, "q", **options).code == code
    assert engine.count() == 0


def test_a_parent_of_another_tenant_is_not_found(engine: Engine) -> None:
    parent = engine.send("q", tenant="a")
    refusal = engine.refused(engine.send, "q", tenant="b", depends_on=[str(parent)])
    assert (refusal.sqlstate, refusal.code) == ("JQ404", "JOB_NOT_FOUND")
    crossing = [{"ref": "x", "options": {"tenant": "a"}}, {"ref": "y", "options": {"tenant": "b"}, "depends_on": ["x"]}]
    assert engine.refused(send_flow, engine, *crossing).sqlstate == "JQ404"
    for function in ("parents", "children", "flow_status"):
        with engine.acting_as("jobqueue_api", "b"):
            assert engine.refused(engine.rows, f"select * from jobqueue.{function}(%s)", parent).sqlstate == "JQ404"


@pytest.mark.parametrize(
    ("jobs", "words"),
    [
        ([{"ref": "a", "depends_on": ["b"]}, {"ref": "b", "depends_on": ["a"]}], "a -> b -> a"),
        ([{"ref": "a", "depends_on": ["a"]}], "a -> a"),
        (
            [{"ref": "x"}, {"ref": "a", "depends_on": ["x", "c"]}, {"ref": "b", "depends_on": ["a"]},
             {"ref": "c", "depends_on": ["b"]}, {"ref": "d", "depends_on": ["c"]}],
            "a -> c -> b -> a",
        ),
        ([{"ref": "a"}, {"ref": "b", "depends_on": ["c"]}], 'Element 1 ("b"): depends_on names "c"'),
        ([{"ref": "a"}, {"ref": "a"}], 'Element 1 ("a"): its ref is there twice'),
        ([{"ref": "a"}, {"ref": "b", "depends_on": ["a", "a"]}], 'depends_on names "a" twice'),
        ([{"ref": "a"}, {"ref": "b", "options": {"priorty": 1}}], 'Element 1 ("b")'),
        ([{"ref": "a"}, {"ref": "b", "depends": ["a"]}], 'Element 1 ("b")'),
        ([{"ref": "a", "queue": ""}], 'Element 0 ("a")'),
        ([{"ref": "a", "queue": "no queue"}], 'Element 0 ("a")'),
        ([{"ref": 7}], "Element 0"),
        ([{"ref": "a", "depends_on": [7]}], 'Element 0 ("a")'),
        ([{"ref": "a"}, {"ref": "b", "depends_on": [{"ref": "a", "on_failure": "x"}]}], 'Element 1 ("b")'),
        ([{"ref": "a"}, {"ref": "b", "options": {"id": "x"}}], "not a uuid"),
    ],
)  # fmt: skip
def test_a_flow_that_cannot_be_is_refused_whole_and_says_where(engine: Engine, jobs: list[Job], words: str) -> None:
    refusal = engine.refused(send_flow, engine, *jobs)
    assert refusal.sqlstate == "JQ400"
    assert words in refusal.message
    assert engine.count() == engine.count("flow") == engine.count("edge") == 0


def test_a_collision_refuses_the_whole_flow_and_names_the_holder(engine: Engine) -> None:
    holder = engine.send("q", singleton_key="k")
    refusal = engine.refused(send_flow, engine, {"ref": "a"}, {"ref": "b", "options": {"singleton_key": "k"}})
    assert (refusal.sqlstate, refusal.code) == ("JQ409", "CONFLICT")
    assert refusal.detail | {"index": 1, "ref": "b", "id": str(holder), "reason": "singleton"} == refusal.detail
    assert engine.count() == 1
    assert engine.refused(engine.rows, "select * from jobqueue.send_flow('[]')").sqlstate == "JQ400"
    assert engine.refused(engine.rows, "select * from jobqueue.send_flow('[7]')").sqlstate == "JQ400"


def test_a_flow_goes_on_from_jobs_that_are_there_and_has_options_and_limits(engine: Engine) -> None:
    engine.call("create_queue", "slow", {"concurrency": 1})
    outside, bad = engine.send("q"), engine.in_status("failed", "bad")
    own = uuid4()
    ids = send_flow(
        engine,
        {"ref": "a", "options": {"id": str(own), "priority": 3, "depends_on": [str(outside)]}},
        {"ref": "b", "queue": "slow", "depends_on": ["a"], "options": {"stages": ["s"]}},
        {"ref": "c", "depends_on": [{"id": str(bad), "on_failure": "fail"}, "a"]},
        {"ref": "d", "depends_on": [{"ref": "c"}], "on_failure": "cancel"},
        {"queue": "free"},
    )
    assert ids["a"] == own
    statuses = {ref: engine.status(job) for ref, job in ids.items() if ref}
    assert statuses == {"a": "blocked", "b": "blocked", "c": "failed", "d": "cancelled"}
    complete(engine, outside)
    complete(engine, own)
    assert (engine.status(ids["b"]), engine.job(ids["b"])["ready_seq"]) == ("pending", None)
    assert engine.job(ids["b"])["inbox_seq"] is not None


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_each_edge_does_what_it_says_when_its_parent_ends_badly(engine: Engine, end: str) -> None:
    edges = [{"ref": how, "depends_on": [{"ref": "p", "on_failure": how}]} for how in ("wait", "fail", "cancel", "run")]
    grandchild = {"ref": "after_fail", "depends_on": ["fail"], "on_failure": "fail", "options": {"dead_letter": "dlq"}}
    ids = send_flow(engine, {"ref": "p"}, *edges, grandchild, {"ref": "waits", "depends_on": ["cancel"]})
    if end == "failed":
        fail(engine, ids["p"])
    else:
        engine.call("cancel", ids["p"], "not needed")
    statuses = {ref: engine.status(job) for ref, job in ids.items()}
    assert statuses == {"p": end, "wait": "blocked", "fail": "failed", "cancel": "cancelled", "run": "pending",
                        "after_fail": "failed", "waits": "blocked"}  # fmt: skip
    failed = engine.view(ids["fail"])
    assert (failed["error_class"], failed["error_code"]) == ("permanent", "PARENT_FAILED")
    assert str(ids["p"]) in failed["error_message"]
    assert engine.value("select dead_letter_of from jobqueue.job where queue = 'dlq'") == ids["after_fail"]
    # the parent comes back: those that ended stay as they are, the one that waits goes on
    engine.call("retry" if end == "failed" else "resume", ids["p"], "again")
    assert [engine.status(ids[ref]) for ref in ("fail", "cancel", "wait")] == ["failed", "cancelled", "blocked"]
    assert engine.call("retry", ids["fail"], "again") == "blocked"
    assert engine.call("resume", ids["cancel"], "again") == "blocked"
    complete(engine, ids["p"])
    assert [engine.status(ids[ref]) for ref in ("fail", "cancel", "wait")] == ["pending"] * 3
    assert engine.job(ids["run"])["unfinished_parents"] == 0
    assert engine.job(ids["after_fail"])["unfinished_parents"] == 1


def test_skipping_a_failed_parent_releases_with_result_null_and_explain_names_what_is_waited_for(
    engine: Engine,
) -> None:
    ids = send_flow(engine, {"ref": "a"}, {"ref": "b", "queue": "other"}, {"ref": "c", "depends_on": ["a", "b"]})
    fail(engine, ids["a"])
    rows = engine.rows("select * from jobqueue.explain(%s)", ids["c"])
    assert [row["reason"] for row in rows] == ["parent_failed", "blocked", "waits_for"]
    assert str(ids["a"]) in rows[0]["detail"]
    assert "jobqueue.skip" in rows[0]["what_to_do"]
    assert str(ids["b"]) in rows[2]["detail"]
    engine.call("skip", ids["a"], "go on")
    engine.call("cancel", ids["b"], "no")
    assert engine.values("select reason from jobqueue.explain(%s) limit 1", ids["c"]) == ["parent_cancelled"]
    engine.call("resume", ids["b"], "yes")
    complete(engine, ids["b"], {"x": 1})
    assert engine.status(ids["c"]) == "pending"
    results = {row["ref"]: row["result"] for row in engine.rows("select * from jobqueue.parents(%s)", ids["c"])}
    assert results == {"a": None, "b": {"x": 1}}


def test_a_parent_is_not_deleted_while_a_child_may_need_it(engine: Engine) -> None:
    engine.call("create_queue", "short", {"keep_completed": 0, "keep_ended": 0})
    ids = send_flow(engine, {"ref": "a", "queue": "short"}, {"ref": "b", "queue": "short", "depends_on": ["a"]})
    complete(engine, ids["a"], 7)
    refusal = engine.refused(engine.call, "delete_job", ids["a"], "tidy")
    assert (refusal.sqlstate, "wait for it" in refusal.message) == ("JQ409", True)
    assert engine.refused(engine.run, "delete from jobqueue.job where id = %s", ids["a"]).sqlstate == "JQ409"
    engine.value("select done from jobqueue.maintain(null, '{retention}')")
    assert engine.status(ids["a"]) == "completed"
    assert engine.row("select * from jobqueue.flow_status(%s)", ids["b"])["pct"] == 50
    complete(engine, ids["b"])
    flow = engine.row("select * from jobqueue.flow_status(%s)", ids["b"])
    assert (flow["total"], flow["ended"], flow["completed"], flow["pct"]) == (2, 2, 2, 100)
    assert flow["ended_at"] is not None
    engine.call("delete_job", ids["a"], "tidy")
    assert engine.row("select * from jobqueue.flow_status(%s)", flow["flow_id"])["total"] == 2
    engine.value("select done from jobqueue.maintain(null, '{retention}')")
    assert [engine.count(table) for table in ("job", "edge", "flow", "flow_member")] == [0, 0, 0, 0]
    assert engine.refused(engine.rows, "select * from jobqueue.flow_status(%s)", ids["a"]).code == "FLOW_NOT_FOUND"


def test_a_child_that_failed_with_its_parent_does_not_wait_for_a_parent_that_was_deleted(engine: Engine) -> None:
    ids = send_flow(engine, {"ref": "a"}, {"ref": "b", "depends_on": ["a"], "on_failure": "fail"})
    fail(engine, ids["a"])
    engine.call("delete_job", ids["a"], "tidy")
    assert engine.call("retry", ids["b"], "again") == "pending"


def test_a_parent_is_not_deleted_while_its_child_is_being_taken_up_again(engine: Engine) -> None:
    ids = send_flow(engine, {"ref": "a"}, {"ref": "b", "depends_on": ["a"], "on_failure": "fail"})
    fail(engine, ids["a"])
    assert engine.status(ids["b"]) == "failed"
    deleter = engine.another()
    with psycopg.connect(engine.dsn) as person, ThreadPoolExecutor(1) as pool:
        assert Engine(person, engine.dsn).call("retry", ids["b"], "again") == "blocked"
        deleting = pool.submit(deleter.refused, deleter.call, "delete_job", ids["a"], "tidy")
        waiting = "select exists (select from pg_locks where not granted and pid = %s)"
        wait_until(lambda: engine.value(waiting, deleter.connection.info.backend_pid), what="the deletion waits")
        person.commit()
        assert (deleting.result(60).sqlstate, engine.status(ids["a"])) == ("JQ409", "failed")
    assert engine.row("select status, unfinished_parents from jobqueue.job where id = %s", ids["b"]) == {
        "status": "blocked",
        "unfinished_parents": 1,
    }


def test_purging_a_queue_cancels_a_flow_whatever_its_edges_say(engine: Engine) -> None:
    send_flow(
        engine, {"ref": "a"}, {"ref": "b", "depends_on": ["a"], "on_failure": "fail"}, {"ref": "c", "depends_on": ["b"]}
    )
    purged = engine.row("select * from jobqueue.purge_queue('q', 'over')")
    assert (purged["cancelled"], purged["deleted"], engine.count(), engine.count("edge")) == (2, 3, 0, 0)


def test_parents_that_complete_at_the_same_time_release_their_child_once(engine: Engine) -> None:
    parents = [{"ref": f"p{n}"} for n in range(48)]
    children = [{"ref": f"c{n}", "queue": "c", "depends_on": [f"p{k}" for k in range(n % 5, 48)]} for n in range(24)]
    send_flow(engine, *parents, *children)
    claims = engine.claim(48)
    random.Random(7).shuffle(claims)
    barrier = Barrier(6)

    def settle(part: int) -> None:
        with psycopg.connect(engine.dsn, autocommit=True) as connection:
            barrier.wait(20)
            for start in range(part, 48, 12):
                pair = [claims[start], claims[start + 6]]
                connection.execute(
                    "select * from jobqueue.settle(null, %s::uuid[], %s::uuid[], null, null, null)",
                    ([claim.id for claim in pair], [claim.token for claim in pair]),
                )

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(settle, range(6)))
    assert engine.rows(
        "select status, unfinished_parents, version, count(*) from jobqueue.job where queue = 'c' group by 1, 2, 3"
    ) == [{"status": "pending", "unfinished_parents": 0, "version": 2, "count": 24}]
    assert engine.value("select deadlocks from pg_stat_database where datname = current_database()") == 0


def test_a_child_that_comes_while_its_parent_completes_is_released(engine: Engine) -> None:
    claim, ender = engine.claimed(), engine.another()
    with psycopg.connect(engine.dsn) as sender, ThreadPoolExecutor(1) as pool:
        child = Engine(sender, engine.dsn).send("c", depends_on=[str(claim.id)])
        ending = pool.submit(ender.call, "complete", claim.id, claim.token)
        waiting = "select exists (select from pg_locks where not granted and pid = %s)"
        wait_until(lambda: engine.value(waiting, ender.connection.info.backend_pid), what="the completion waits")
        sender.commit()
        assert ending.result(60) == "ok"
    assert engine.status(child) == "pending"


@pytest.mark.slow
def test_ten_thousand_children_of_one_parent_are_sent_and_released_as_a_set(engine: Engine) -> None:
    children = [{"ref": f"c{n}", "queue": "c", "depends_on": ["root"]} for n in range(10_000)]
    ids = send_flow(engine, {"ref": "root"}, *children)
    assert len(ids) == 10_001
    (claim,) = engine.claim(1)
    call = "explain (analyze, buffers, format json) select jobqueue.complete(%s, %s)"
    (plan,) = engine.value(call, claim.id, claim.token)
    # Two seconds, and not longer than the shortest lease: no child is looked for among the others.
    assert plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"] < 30 * len(children)
    assert engine.status(ids["root"]) == "completed"
    assert engine.value("select count(*) from jobqueue.job where queue = 'c' and ready_seq is not null") == 10_000
    # in the order in which they were given
    (first,) = engine.claim(1, "c")
    assert first.id == ids["c0"]


def test_a_chain_of_failures_goes_through_many_generations(engine: Engine) -> None:
    chain = [{"ref": f"{n}", "depends_on": [f"{n - 1}"] if n else [], "on_failure": "fail"} for n in range(300)]
    ids = send_flow(engine, *chain)
    fail(engine, ids["0"])
    assert engine.values("select distinct status from jobqueue.job") == ["failed"]


@pytest.mark.parametrize("seed", [1, 2])
def test_random_graphs_with_random_ends_on_three_threads_agree_with_the_model(engine: Engine, seed: int) -> None:
    chance = random.Random(seed)
    jobs, edges = random_graph(chance, 60)
    ends = {ref: chance.choices(("completed", "failed"), (4, 1))[0] for ref in edges}
    ids = send_flow(engine, *jobs)
    refs = {job: ref for ref, job in ids.items()}

    def work(worker: int) -> None:
        with psycopg.connect(engine.dsn, autocommit=True) as connection:
            mine = Engine(connection, engine.dsn)
            while claims := mine.claim(3, worker=UUID(int=worker + 1)):
                done = [claim for claim in claims if ends[refs[claim.id]] == "completed"]
                failures = [
                    {"id": str(c.id), "token": str(c.token), "error": PERMANENT} for c in claims if c not in done
                ]
                retried(mine, "select jobqueue.settle(null, %s::uuid[], %s::uuid[], null, null, null)",
                        [c.id for c in done], [c.token for c in done])  # fmt: skip
                retried(mine, "select jobqueue.fail_many(%s)", Jsonb(failures))

    while engine.value("select count(*) from jobqueue.job where ready_seq is not null"):
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, range(3)))
    assert {refs[row["id"]]: row["status"] for row in engine.rows("select id, status from jobqueue.job")} == outcome(
        edges, ends
    )


def retried(engine: Engine, query: str, *parameters: Any) -> None:
    """Run a statement as a worker does: a deadlock with others is tried again."""
    for _ in range(5):
        try:
            engine.connection.execute(query.encode(), parameters)
            return
        except psycopg.errors.DeadlockDetected:
            continue
    raise AssertionError("five deadlocks in a row")


Edges = dict[str, dict[str, str]]


def random_graph(chance: random.Random, size: int) -> tuple[list[Job], Edges]:
    """A flow without cycles: its jobs as send_flow takes them, shuffled, and its edges {child: {parent: on_failure}}."""
    edges: Edges = {}
    for n in range(size):
        parents = chance.sample(range(n), min(n, chance.choice((0, 1, 1, 2, 3))))
        # with both in one child it would matter which of two parents ends first
        strike = chance.choice(("fail", "cancel"))
        edges[f"j{n}"] = {f"j{parent}": chance.choice(("wait", strike, "run")) for parent in parents}
    jobs = [
        {"ref": child, "depends_on": [{"ref": parent, "on_failure": how} for parent, how in parents.items()]}
        for child, parents in edges.items()
    ]
    chance.shuffle(jobs)
    return jobs, edges


def outcome(edges: Edges, ends: dict[str, str]) -> dict[str, str]:
    """The statuses in the end, by the rules: a parent that ended badly decides, else all must have ended as asked."""
    found: dict[str, str] = {}
    for child, parents in edges.items():
        bad = {how for parent, how in parents.items() if found[parent] in ("failed", "cancelled")}
        if "fail" in bad or "cancel" in bad:
            found[child] = "failed" if "fail" in bad else "cancelled"
        elif "wait" in bad or any(found[parent] == "blocked" for parent in parents):
            found[child] = "blocked"
        else:
            found[child] = ends[child]
    return found
