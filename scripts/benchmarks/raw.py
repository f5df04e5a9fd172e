"""The raw SQL limit: a minimal table, claimed and completed in batches by one psycopg client that does nothing else.

The statements are as good as we could make them: rows are found once through a partial index that a completion does
not touch, joined by their place in the table, with planner settings that keep one plan with and without statistics.
Ids stay text and payloads stay JSON text: a limit decodes nothing.
"""

from __future__ import annotations

import json
from typing import Any

from psycopg.types.string import TextLoader

from benchmarks.children import answer, arguments, say_ready, wait_for_word
from benchmarks.payloads import QUEUE, payload
from benchmarks.places import Connection, connect, value

TABLE = """
create table raw_job (
    id uuid primary key default gen_random_uuid(),
    queue text not null,
    status text not null default 'pending',
    priority int not null default 0,
    seq bigint generated always as identity,
    payload jsonb not null,
    attempt int not null default 0,
    token uuid,
    started_at timestamptz,
    finished_at timestamptz
) with (fillfactor = 80)
"""
CLAIM_INDEX = "create index raw_job_claim on raw_job (queue, priority desc, seq) where token is null"
FILL = "insert into raw_job (queue, payload) select %s, p::jsonb from unnest(%s::text[]) p"
ONE_PLAN = """
set enable_seqscan = off; set enable_bitmapscan = off; set enable_hashjoin = off; set enable_mergejoin = off;
set enable_sort = off; set jit = off
"""
CLAIM = """
with next as materialized (
    select ctid as place from raw_job
    where queue = %s and token is null
    order by priority desc, seq
    limit %s
    for update skip locked)
update raw_job j set status = 'processing', attempt = j.attempt + 1, token = gen_random_uuid(), started_at = now()
from next where j.ctid = next.place
returning j.id, j.token, j.payload
"""
COMPLETE = """
update raw_job j set status = 'completed', finished_at = now()
from unnest(%s::uuid[], %s::uuid[]) x (id, token)
where j.id = x.id and j.token = x.token
"""
RATE = "select count(*) / greatest(extract(epoch from max(finished_at) - min(started_at)), 1e-6)::float8 from raw_job"


def create(connection: Connection) -> None:
    """Create the minimal table."""
    connection.execute(TABLE)
    connection.execute(CLAIM_INDEX)


def fill(connection: Connection, jobs: int) -> None:
    """Add waiting jobs, 5,000 per statement."""
    for start in range(0, jobs, 5000):
        texts = [json.dumps(payload(i)) for i in range(start, min(start + 5000, jobs))]
        connection.execute(FILL, (QUEUE, texts))


def read_plainly(connection: Connection) -> None:
    """Leave uuids and JSON as the text that they come as, and keep one plan."""
    for name in ("uuid", "jsonb"):
        connection.adapters.register_loader(name, TextLoader)
    connection.execute(ONE_PLAN.encode(), prepare=False)


def drain(connection: Connection, batch: int) -> int:
    """Claim and complete until nothing is left; return how many jobs that were."""
    done = 0
    while rows := connection.execute(CLAIM, (QUEUE, batch)).fetchall():
        connection.execute(COMPLETE, ([row[0] for row in rows], [row[1] for row in rows]))
        done += len(rows)
    return done


def rate(connection: Connection) -> float:
    """Jobs per second from the first claim to the last completion, by the database's clock."""
    return float(value(connection, RATE))


def main() -> None:
    """A client process: drains when it is told to."""
    given: dict[str, Any] = arguments()
    with connect(given["dsn"]) as connection:
        read_plainly(connection)
        say_ready()
        wait_for_word()
        answer({"done": drain(connection, given["batch"])})


if __name__ == "__main__":
    main()
