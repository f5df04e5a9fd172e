"""Six clients do random things at once on the same few queues: they are refused at most, and afterwards the invariants hold.

Each client does a quarter of `JOBQUEUE_PROPERTY_STEPS` (600); `JOBQUEUE_PROPERTY_SEED` is the seed. What runs at once differs
from run to run; the choices of each client follow from the seed and the rows that it finds.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

from tests.property.clients import Client, Shared, prepare
from tests.property.drain import drain, settle_counts, unpause
from tests.property.invariants import violations
from tests.property.test_lifecycle import check_batches, end_batches
from tests.sql.engine import Engine, Row

CLIENTS = 6
STEPS = max(150, int(os.environ.get("JOBQUEUE_PROPERTY_STEPS", "600")) // 4)
SEED = int(os.environ.get("JOBQUEUE_PROPERTY_SEED", "1"))


class Watcher:
    """Looks at the rows while the clients are at work: what may never be seen, whatever is going on."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.versions: dict[UUID, tuple[int, int]] = {}

    def look(self) -> None:
        """One look; versions and attempts never fall, limits that nobody changes are never exceeded.

        Raises:
            AssertionError: they did, or were.
        """
        for row in self._engine.rows("select id, version, attempt from jobqueue.job"):
            seen = (row["version"], row["attempt"])
            before = self.versions.get(row["id"], (0, 0))
            assert seen >= before, f"{row['id']} went back from {before} to {seen}"
            self.versions[row["id"]] = seen
        for rule, query in STANDING.items():
            found: list[Row] = self._engine.rows(query)
            assert found == [], f"{rule}: {found}"


STANDING = {
    "more than 3 dead letters run":
        "select 1 from jobqueue.job where queue = 'dead' and status = 'processing' having count(*) > 3",
    "more than 4 jobs of the fair queue run":
        "select 1 from jobqueue.job where queue = 'fair' and status = 'processing' having count(*) > 4",
    "two jobs of a key run where one may": """
        select queue, tenant, singleton_key from jobqueue.job
        where queue in ('fifo', 'singleton', 'stately') and status = 'processing'
        group by 1, 2, 3 having count(*) > 1""",
    "two jobs have one key": """
        select queue, tenant, singleton_key from jobqueue.job
        where queue in ('exclusive') and status in ('blocked', 'pending', 'paused', 'processing')
        group by 1, 2, 3 having count(*) > 1""",
}  # fmt: skip


def test_six_clients_at_once_break_nothing_and_meet_no_deadlock(engine: Engine) -> None:
    prepare(engine)
    shared = Shared()
    clients = [Client(engine.another(), SEED, number, shared) for number in range(CLIENTS)]
    watcher = Watcher(engine.another())

    def work(client: Client) -> None:
        watches = random.Random(f"{SEED}/watch")
        for _ in range(STEPS):
            client.step()
            if client is clients[0] and watches.random() < 0.2:
                watcher.look()

    with ThreadPoolExecutor(CLIENTS) as pool:
        for result in [pool.submit(work, client) for client in clients]:
            result.result()
    refusals = sum((client.refusals for client in clients), Counter[str]())
    deadlocks = [text for client in clients for text in client.deadlocks]
    print(f"{CLIENTS * STEPS} steps, refused: {dict(refusals.most_common())}, deadlocks: {len(deadlocks)}")
    assert deadlocks == [], "\n\n".join(deadlocks[:3])
    # what the end of a pause overlooks at the very moment is left to maintenance
    unpause(engine)
    engine.rows("select * from jobqueue.maintain(null, '{admission,batches}')")
    settle_counts(engine)
    broken = violations(engine)
    assert broken == [], "; ".join(f"{row['rule']}: {row['job']}" for row in broken)
    drain(engine)
    check_batches(engine, clients)
    end_batches(engine, shared.batches)
