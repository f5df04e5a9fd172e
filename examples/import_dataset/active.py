"""The jobs that a user wants to see: unfinished ones, and those that have ended in the last five minutes.

It is what `GET /jobs/active` answers to the user's own key; a program with a connection asks the view.
"""

from __future__ import annotations

from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import dict_row

ACTIVE = """
select id, job_type as type, status, progress_pct, progress_message, display_name, error_message, created_at
from jobqueue.jobs
where tenant = %s
    and created_by = %s
    and created_at > now() - interval '1 hour'
    and (completed_at is null or completed_at > now() - interval '5 minutes')
order by created_at desc, id desc"""


async def active_jobs(connection: AsyncConnection[Any], user: str, tenant: str = "default") -> list[dict[str, Any]]:
    """Return the jobs that a user sent in the last hour and that are unfinished or have just ended, newest first."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(ACTIVE, (tenant, user))
        return await cursor.fetchall()
