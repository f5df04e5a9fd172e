"""Limits and keys with many clients at once: nothing is exceeded, nobody is held up, and nothing gets dearer with use."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.sql.engine import Engine
from tests.sql.test_limits import GROUP, KEY, complete, limited, send_all, used


@dataclass(slots=True)
class History:
    """Who ran when, as seen by the clients: from after the claim to before the result was given."""

    runs: list[tuple[str, int, float, float]] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)

    def overlaps(self) -> dict[str, int]:
        """The most jobs of a line that ran at the same time."""
        events = defaultdict(list)
        for line, _, begin, end in self.runs:
            events[line] += [(begin, 1), (end, -1)]
        most: dict[str, int] = {}
        for line, changes in events.items():
            running = high = 0
            for _, change in sorted(changes):
                running += change
                high = max(high, running)
            most[line] = high
        return most


def work(dsn: str, claimers: int, jobs: int, batch: int = 10, queue: str = "q", released: float = 0.0) -> History:
    """Claim and complete until all jobs are completed, with so many claimers at once; some claims are given back."""
    history, done, lock = History(), [0], threading.Lock()

    def claimer(seed: int) -> None:
        chance, me = random.Random(seed), uuid4()
        with psycopg.connect(dsn, autocommit=True) as connection:
            deadline = time.monotonic() + 300
            while done[0] < jobs:
                assert time.monotonic() < deadline, f"only {done[0]} of {jobs} jobs completed"
                rows = connection.execute(
                    "select id, claim_token, coalesce(group_key, singleton_key, ''), (payload ->> 'n')::int "
                    "from jobqueue.claim(%s, %s, %s)",
                    ([queue], me, batch),
                ).fetchall()
                begin = time.monotonic()
                if not rows:
                    time.sleep(0.02)
                    continue
                back = rows if chance.random() < released else []
                kept = [] if back else rows
                end = time.monotonic()
                for job, token, _, _ in back:
                    connection.execute("select jobqueue.release(%s, %s)", (job, token))
                if kept:
                    results = [{"id": str(job), "token": str(token)} for job, token, _, _ in kept]
                    connection.execute("select count(*) from jobqueue.complete_many(%s)", (Jsonb(results),))
                with lock:
                    history.runs += [(line, n, begin, end) for _, _, line, n in rows]
                    done[0] += len(kept)

    with ThreadPoolExecutor(claimers) as pool:
        for result in [pool.submit(claimer, seed) for seed in range(claimers)]:
            result.result()
    return history


@pytest.mark.parametrize(("options", "key", "lines", "most"), [
    ({"group_concurrency": {"default": 1}}, GROUP, 3, 1),
    ({"group_concurrency": {"default": 5}, "concurrency": 8}, GROUP, 4, 5),
    ({"policy": "key_strict_fifo"}, KEY, 20, 1),
])  # fmt: skip
def test_32_claimers_exceed_no_limit_and_lose_no_job(
    engine: Engine, options: dict[str, Any], key: str, lines: int, most: int
) -> None:
    jobs = 400
    limited(engine, **options)
    send_all(engine, [{key: f"k{n % lines}"} for n in range(jobs)])
    history = work(engine.dsn, 32, jobs, released=0.05)
    overlaps = history.overlaps()
    assert max(overlaps.values()) <= most
    if "concurrency" in options:
        every = History([("all", n, begin, end) for _, n, begin, end in history.runs])
        assert every.overlaps()["all"] <= options["concurrency"]
    if key == KEY:
        for line in overlaps:
            order = [n for name, n, begin, _ in sorted(history.runs, key=lambda run: run[2]) if name == line]
            assert order == sorted(order), "a key runs in the order of sending, given back or not"
    engine.value("select jobqueue.admit(q, 10, true) from jobqueue.queue q")
    assert used(engine) == {}


def test_a_rate_holds_under_many_claimers_in_every_window(engine: Engine) -> None:
    limited(engine, rate_limit={"limit": 20, "period": 0.3})
    send_all(engine, [{}] * 100)
    work(engine.dsn, 8, 100, batch=3)
    starts = engine.values("select started_at from jobqueue.job order by started_at")
    for first, after in zip(starts, starts[20:], strict=False):
        assert (after - first).total_seconds() >= 0.3, "the 21st of any 21 starts is a period after the first"


def test_an_open_transaction_of_a_user_holds_nobody_up(engine: Engine) -> None:
    limited(engine, group_concurrency={"default": 1})
    send_all(engine, [{GROUP: "g"}] * 3)
    (first,) = engine.claim(10)
    other = engine.another()
    with other.connection.transaction():
        other.call("complete", first.id, first.token)
        other.send(group="g")
        waiting = other.values("select id from jobqueue.job where status = 'pending' order by id")[0]
        other.call("prioritize", waiting, 5, "held open")
        engine.run("set statement_timeout = '60 s'")
        assert engine.claim(10) == [], "and it comes back while the transaction is open"
        send_all(engine, [{GROUP: "h"}])
        assert [claim.row["group_key"] for claim in engine.claim(10)] == ["h"]
    (second,) = engine.claim(10)
    assert second.id == waiting


def test_a_claim_in_a_transaction_that_stays_open_blocks_no_other_claim(engine: Engine) -> None:
    limited(engine, group_concurrency={"default": 1})
    send_all(engine, [{GROUP: "a"}, {GROUP: "b"}])
    other = engine.another()
    with other.connection.transaction():
        (first,) = other.claim(1, worker=uuid4())
        engine.run("set statement_timeout = '60 s'")
        assert engine.claim(10) == []
        send_all(engine, [{GROUP: "c"}])
        assert engine.claim(10) == [], "nobody else can give slots away meanwhile, and nobody hangs"
    assert len(engine.claim(10)) == 2
    complete(engine, first)


@pytest.fixture
def snapshot(engine: Engine) -> Iterator[None]:
    """An old snapshot is open all the while."""
    with psycopg.connect(engine.dsn) as holder:
        holder.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        holder.execute("select count(*) from jobqueue.job")
        yield


def buffers(engine: Engine, query: str) -> int:
    """Shared buffers that a statement touches; it is rolled back."""
    with engine.undone():
        (plan,) = engine.value(f"explain (analyze, buffers, format json) {query}")
        return int(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"])


@pytest.mark.usefixtures("snapshot")
def test_a_key_that_is_used_thousands_of_times_stays_cheap_under_an_old_snapshot(engine: Engine) -> None:
    send = """select * from jobqueue.send('q', '{}', '{"singleton_key": "hot"}')"""
    engine.call("create_queue", "q")
    use = """
        do $$ declare c record; begin
            for i in 1 .. %s loop
                perform jobqueue.send('q', '{}', '{"singleton_key": "hot"}');
                for c in select id, claim_token from jobqueue.claim_queue('q', '00000000-0000-4000-8000-00000000000a',
                    '{-2147483648}', array[(select last_value - 3 from jobqueue.ready_seq)], '{2147483647}', null,
                    1, 1, 0, null) loop
                    perform jobqueue.complete(c.id, c.claim_token);
                end loop;
                commit;
            end loop; end $$"""
    engine.run(use % 50)
    few = buffers(engine, send)
    engine.run(use % 1500)
    assert engine.value("select generation from jobqueue.key_generation") > 3
    assert engine.value("select count(*) from jobqueue.job where status = 'completed'") == 1550
    many = buffers(engine, send)
    # the index entries of the holders of one generation lie before it: 64 of them on average
    assert many < few + 600, "it would be 1,500 more without generations"


def test_a_key_has_one_holder_whoever_starts_a_generation(engine: Engine) -> None:
    engine.call("create_queue", "q")
    engine.run("insert into jobqueue.key_generation (queue, key, generation) values ('q', 'key:7:default:k', 1)")
    holders: list[UUID] = []
    lock = threading.Lock()

    def sender(seed: int) -> None:
        chance = random.Random(seed)
        with psycopg.connect(engine.dsn, autocommit=True) as connection:
            for _ in range(40):
                with connection.transaction():
                    row = connection.execute(
                        "select id, created from jobqueue.send('q', '{}', '{\"singleton_key\": \"k\"}')"
                    ).fetchone()
                    # every so often, as the sender does by chance
                    assert row is not None
                    if row[1] and chance.random() < 0.5:
                        connection.execute("update jobqueue.key_generation set generation = generation + 1")
                        connection.execute(
                            "update jobqueue.job set held_key = jobqueue.held_name('q', 'key:7:default:k') where id = %s",
                            (row[0],),
                        )
                    unended = connection.execute(
                        "select count(*) from jobqueue.job where status = 'pending' and singleton_key = 'k'"
                    ).fetchone()
                    assert unended is not None
                    assert unended[0] <= 1
                if row[1]:
                    connection.execute("select jobqueue.cancel(%s, 'next')", (row[0],))
                    with lock:
                        holders.append(row[0])

    with ThreadPoolExecutor(6) as pool:
        for result in [pool.submit(sender, seed) for seed in range(6)]:
            result.result()
    assert len(holders) == len(set(holders)) > 10
