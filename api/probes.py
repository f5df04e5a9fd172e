"""Probes: is the process alive, and can it do its work?"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from starlette.responses import Response

from jobqueue.api.context import Call
from jobqueue.api.database import Database
from jobqueue.api.encoding import dump_json
from jobqueue.api.errors import ApiError
from jobqueue.api.models import Health
from jobqueue.api.operations import Operation, Reply
from jobqueue.database.migrations import check_schema_async
from jobqueue.errors import SchemaOutdated, SchemaTooNew

logger = logging.getLogger(__name__)

CHECK_TIMEOUT = 1.0
KEPT_SECONDS = 1.0
"""A check's outcome is answered to everybody for this long, so that probes cost the database nothing."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check found: `problem` is None if all is well, else what stands in the way."""

    problem: str | None
    expires: float


class Readiness:
    """The readiness of one process: the database answers within a second and its schema is this program's."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._outcome = Outcome("not checked yet", 0.0)
        self._check: asyncio.Task[str | None] | None = None

    async def problem(self) -> str | None:
        """Return what stands in the way, or None."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._outcome.expires:
            return self._outcome.problem
        if self._check is None:
            self._check = asyncio.create_task(self._look())
        # Not cancelled when its time is over: it goes on alone, and no second one is started beside it.
        check = self._check
        await asyncio.wait({check}, timeout=CHECK_TIMEOUT)
        found = check.result() if check.done() else f"the database does not answer within {CHECK_TIMEOUT:g} s"
        if check.done():
            self._check = None
        self._outcome = Outcome(found, loop.time() + KEPT_SECONDS)
        return found

    async def _look(self) -> str | None:
        try:
            # After a restart of the server all connections may be dead; that is no reason to be taken out of service.
            await self._database.reading(self._check_schema)
        except (SchemaOutdated, SchemaTooNew) as error:
            return error.message
        except Exception as error:
            logger.warning("not ready: %s", " ".join(str(error).split()))
            return "the database cannot be used"
        return None

    async def _check_schema(self) -> None:
        async with self._database.connection(CHECK_TIMEOUT) as connection:
            await check_schema_async(connection)


async def livez(call: Call) -> Response:
    """Answer, without asking the database."""
    return _healthy()


async def readyz(call: Call) -> Response:
    """Answer 200 if requests can be served now, else 503."""
    problem = "the process is going down" if call.services.hub.ending else await call.services.readiness.problem()
    if problem is not None:
        raise ApiError("UNAVAILABLE", f"Not ready: {problem}.", details={"reason": problem})
    return _healthy()


def _healthy() -> Response:
    return Response(dump_json({"status": "ok"}), headers={"Cache-Control": "no-store"}, media_type="application/json")


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        name="livez",
        method="GET",
        path="/livez",
        summary="Is the process alive?",
        handler=livez,
        tag="probes",
        replies={200: Reply("It is", (Health,))},
        is_probe=True,
    ),
    Operation(
        name="readyz",
        method="GET",
        path="/readyz",
        summary="Can requests be served?",
        description="The database answers within a second, and its schema is this program's. Looked at once a second.",
        handler=readyz,
        tag="probes",
        replies={200: Reply("They can", (Health,))},
        is_probe=True,
    ),
)
