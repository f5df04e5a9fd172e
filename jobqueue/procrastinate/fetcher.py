"""Claims for a stock worker, which asks for one job and must hear of every job there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import tuple_row

from jobqueue.job import Claim
from jobqueue.worker.claim import Claimer, Room
from jobqueue.worker.wake import Wake

PROMOTE = "select promoted from jobqueue.promote(1000)"
QUEUES = "select name from jobqueue.procrastinate_queues() name"


class Fetcher(Claimer):
    """`take` claims at once, from procrastinate's queues only; there is no loop. `given`: the worker's queues."""

    def __init__(self, dsn: str, worker_id: str, queues: Sequence[str] | None, room: Room) -> None:
        super().__init__(dsn, worker_id, queues, None, room, Wake(None, None))
        self.given = list(queues) if queues is not None else None

    async def take(self, wanted: int) -> list[Claim]:
        """Return up to `wanted` jobs. None means that there is none: what has just come due and what lies below the
        floors is looked for too, because a worker that is not to wait ends at that answer.
        """
        claims = await self._claim(wanted)
        if claims:
            if len(claims) < wanted:
                claims += await self._sweep_if_due(wanted - len(claims))
            return claims
        connection = await self._connect()
        cursor = await connection.cursor(row_factory=tuple_row).execute(PROMOTE)
        row: Any = await cursor.fetchone()
        if await self._has_new_queues(connection) or row[0]:
            claims = await self._claim(wanted)
        if not claims:
            self._next_sweep = self._next_full = 0.0
            claims = await self._sweep_if_due(wanted)
        return claims

    async def _has_new_queues(self, connection: AsyncConnection[Any]) -> bool:
        known, self._queues = self._queues, []
        return await self._current_queues(connection) != known

    async def _current_queues(self, connection: AsyncConnection[Any]) -> list[str]:
        if self.given is not None:
            return self.given
        if not self._queues or self._now() >= self._next_sweep:
            cursor = await connection.cursor(row_factory=tuple_row).execute(QUEUES)
            self._queues = [row[0] for row in await cursor.fetchall()]
        return self._queues
