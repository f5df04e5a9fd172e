"""Random clients use policies, limits, schedules, flows and batches together; after every step the invariants hold.

`JOBQUEUE_PROPERTY_STEPS` is the number of steps of all runs together (600; a long run has 10,000), `JOBQUEUE_PROPERTY_SEED` the
first seed (1). A failing run prints how to repeat it.
"""

from __future__ import annotations

import os
from uuid import UUID

import pytest

from tests.property.clients import Client, Shared, prepare
from tests.property.drain import drain, settle_counts
from tests.property.invariants import Model
from tests.sql.engine import Engine

RUNS = 3
STEPS = int(os.environ.get("JOBQUEUE_PROPERTY_STEPS", "600")) // RUNS
SEED = int(os.environ.get("JOBQUEUE_PROPERTY_SEED", "1"))


def check_batches(engine: Engine, clients: list[Client]) -> None:
    """Each batch counts all jobs that were sent into it, those deleted since among them."""
    for batch in clients[0].shared.batches:
        counts = engine.row("select * from jobqueue.batch_status(%s)", batch)
        assert counts["total"] == sum(client.members[batch] for client in clients), counts
        if counts["state"] == "ended":
            assert counts["ended"] == counts["total"] or engine.value(
                "select count(*) from jobqueue.audit where action in ('retry', 'restart', 'resume') and job_id in "
                "(select id from jobqueue.job where batch_id = %s)",
                batch,
            )


def end_batches(engine: Engine, batches: list[UUID]) -> None:
    """Every batch ends once it is closed and its jobs have ended; its callback is sent once."""
    for batch in batches:
        engine.call("close_batch", batch)
    engine.rows("select * from jobqueue.maintain(null, '{batches}')")
    for batch in batches:
        assert engine.row("select * from jobqueue.batch_status(%s)", batch)["state"] == "ended"
    # a callback that failed has a copy among the dead letters
    callbacks = engine.values(
        "select metadata ->> 'batch_id' from jobqueue.job where metadata ? 'batch_id' and dead_letter_of is null"
    )
    assert len(callbacks) == len(set(callbacks))


def run(engine: Engine, seed: int, steps: int) -> Client:
    """So many steps of three clients, and the end of everything."""
    prepare(engine)
    shared, model = Shared(), Model(engine)
    clients = [Client(each, seed, n, shared) for n, each in enumerate((engine, engine.another(), engine.another()))]
    history: list[str] = []
    try:
        for n in range(steps):
            client = clients[0].chance.choice(clients)
            name = client.step()
            history.append(f"{n}: client {clients.index(client)}: {name}")
            model.look(name, client.last_claimed)
            if n % 25 == 24:
                settle_counts(engine)
                check_batches(engine, clients)
            if n % 100 == 99:
                with engine.undone():
                    drain(engine)
        drain(engine)
        check_batches(engine, clients)
        end_batches(engine, shared.batches)
    except Exception as error:
        error.add_note(
            f"seed {seed}, last steps: {'; '.join(history[-15:])}\nrepeat: JOBQUEUE_PROPERTY_SEED={seed} "
            f"JOBQUEUE_PROPERTY_STEPS={steps * RUNS} pytest 'tests/property/test_lifecycle.py' -k 'number0'"
        )
        raise
    assert all(client.deadlocks == [] for client in clients)
    return clients[0]


@pytest.mark.parametrize("number", range(RUNS), ids=lambda n: f"number{n}")
def test_whatever_clients_do_the_invariants_hold(engine: Engine, number: int) -> None:
    run(engine, SEED + number, STEPS)
