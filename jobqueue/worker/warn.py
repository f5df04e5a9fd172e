"""Warnings of a worker: what `jobqueue.warnings()` says, once per process and cause, in the log and to the app's hooks.

A cause that has gone and comes back is warned of again.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from jobqueue.hooks import WorkerWarning
from jobqueue.worker.hooks import tell

if TYPE_CHECKING:
    from psycopg import AsyncConnection

    from jobqueue.hooks import Hooks

WARNINGS = "select name, status, detail, what_to_do from jobqueue.warnings()"
BLOCKED_SECONDS = 1.0
"""An event loop that is late by this much was most likely kept from running by a handler that does not wait."""

logger = logging.getLogger(__name__)


class Warnings:
    """What this process has warned of already."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._known: set[str] = set()
        self._blocked = False

    async def look(self, connection: AsyncConnection[Any]) -> None:
        """Ask the database, and warn of what is new."""
        rows = await (await connection.execute(WARNINGS)).fetchall()
        found = [WorkerWarning(*row) for row in rows]
        fresh = [warning for warning in found if warning.name not in self._known]
        self._known = {warning.name for warning in found}
        for warning in fresh:
            await self.warn(warning)

    async def blocked(self, seconds: float) -> None:
        """Warn once that the event loop could not run for so long."""
        if seconds < BLOCKED_SECONDS or self._blocked:
            return
        self._blocked = True
        await self.warn(
            WorkerWarning(
                "blocked event loop",
                "warn",
                f"nothing ran in this process for {seconds:.1f} s: a handler or hook did not wait, or the machine was busy",
                "Make the handler a plain def: then it runs in a thread. In async def, await what takes time.",
            )
        )

    async def warn(self, warning: WorkerWarning) -> None:
        """Warn in the log and by the app's hooks."""
        hint = f" {warning.what_to_do}" if warning.what_to_do else ""
        logger.warning(
            "%s: %s.%s", warning.name, warning.detail, hint, extra={"event": "worker.warning", "cause": warning.name}
        )
        await tell(self._hooks.of("on_warning"), warning)
