"""A worker says in the database, too, that handlers outlived their attempts and keep its slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jobqueue import App
from tests.worker.test_stuck import Gate, short_grace
from tests.worker.test_worker import app, eventually, query, running

__all__ = ["app", "query", "short_grace"]

STUCK = "select (select stuck from jobqueue.worker)"


async def test_health_shows_the_slot_of_a_handler_that_outlived_its_attempt_until_it_ends(
    app: App, query: Callable[..., Any]
) -> None:
    gate = Gate()

    @app.job("hangs", timeout=1, max_retries=0)
    def hangs() -> None:
        gate.hold("hangs")

    sent = await app.send("hangs")
    async with running(app, concurrency=1):
        await eventually(lambda: query(STUCK) is not None)
        told = query(STUCK)
        assert (told["slots"], told["jobs"][0].pop("since") is not None) == (1, True)
        assert told["jobs"] == [{"id": str(sent.id), "job_type": "hangs", "why": "timeout"}]
        status = "select status, detail from jobqueue.health() where name = 'stuck handlers'"
        assert query(status)[0] == "fail"
        assert f"job {sent.id} (hangs) since" in query(status)[1]
        waiting = await app.send("hangs")
        reasons = "select array_agg(reason) from jobqueue.explain(%s)"
        assert query(reasons, waiting.id) == ["workers_stuck", "ready"]
        gate.opened.set()
        await eventually(lambda: query(STUCK) is None)
        assert query(status)[0] == "ok"
