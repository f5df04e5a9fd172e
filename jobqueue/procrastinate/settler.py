"""Writing the ends of procrastinate's jobs, together with those that every job has (worker/settle.py)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from psycopg import AsyncConnection

from jobqueue.worker.held import Held
from jobqueue.worker.settle import Settler

SETTLE_ENDS = "select id, outcome from jobqueue.procrastinate_settle(%s::jsonb)"

logger = logging.getLogger(__name__)


class EndsSettler(Settler):
    """What `fail` takes is how the attempt ends: `{"to": "retry", "at": …}` and so on, or an error that ends it."""

    async def _fail(
        self, connection: AsyncConnection[Any], failed: Sequence[tuple[Held, dict[str, Any], float | None]]
    ) -> None:
        ends = [
            {"id": held.id, "token": held.token, **(end if "to" in end else {"to": "failed", "error": end})}
            for held, end, _ in failed
        ]
        self.statements += 1
        cursor = await connection.execute(SETTLE_ENDS, (json.dumps(ends),))
        for id, outcome in await cursor.fetchall():
            if outcome == "lost":
                logger.warning("job %s was lost before it ended", id, extra={"event": "job.lost", "job_id": id})
