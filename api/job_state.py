"""A job in an answer: its representation, its headers, its id in a path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from jobqueue.api.conditional import retry_after
from jobqueue.api.encoding import dump_json, with_members
from jobqueue.api.errors import ApiError
from jobqueue.records import COLUMNS

if TYPE_CHECKING:
    from jobqueue.api.context import Call

FIELDS = (*COLUMNS, "done", "allowed_actions", "refused_actions", "queue_position", "links")
ID = re.compile(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}")


class State(NamedTuple):
    """The columns of jobqueue.http_job_state: `body` is JSON text, or None if the caller has it (its ETag) already."""

    etag: str | None
    version: int | None
    status: str
    alive: bool | None
    due_in: float | None
    ends_in: float | None
    body: str | None

    @property
    def poll_after(self) -> int | None:
        """Seconds until the next poll is worth while; None once the job has ended."""
        return retry_after(self.status, self.due_in, self.ends_in)


def headers_of(state: State) -> dict[str, str]:
    """Return ETag, Cache-Control and, until the job has ended, Retry-After."""
    headers = {"ETag": state.etag or "", "Cache-Control": "private, no-cache"}
    seconds = state.poll_after
    if seconds is not None:
        headers["Retry-After"] = str(seconds)
    return headers


def job_json(call: Call, body: str, job_id: str, fields: Sequence[str] | None = None, **members: Any) -> bytes:
    """Return a job's JSON with its links (unless `fields` leaves them out) and other members."""
    if fields is None or "links" in fields:
        links = _links(call.base, tuple(call.scope["app"].state.job_links.items())).replace("{id}", job_id)
        body = f'{body[:-1]}{"," if len(body) > 2 else ""}"links":{links}}}'
    return with_members(body, members)


@lru_cache(maxsize=256)
def _links(base: str, paths: tuple[tuple[str, str], ...]) -> str:
    """The paths of everything that hangs on a job, as JSON text with {id}; one per tenant, made once for all its jobs."""
    return dump_json({name: base + path for name, path in paths}).decode()


def job_id_of(call: Call) -> str:
    """Return the path's id in lower case. Raises ApiError: 404 if it cannot be one."""
    given = call.path["id"]
    if not ID.fullmatch(given):
        raise ApiError(
            "JOB_NOT_FOUND",
            "There is no such job: this is not the id of a job.",
            hint="An id looks like 0198c5a0-1c2d-7e3f-8a4b-5c6d7e8f9a0b.",
            details={"reason": "malformed_id", "id": given[:100].encode("utf-8", "replace").decode()},
        )
    return given.lower()


def job_not_found(job_id: str) -> ApiError:
    """Return the 404 for a job that is unknown, deleted, or another tenant's; which of them is not said."""
    return ApiError(
        "JOB_NOT_FOUND",
        f"There is no job {job_id}.",
        hint="It may have been deleted after its time of keeping, or it belongs to a tenant that you do not see.",
        details={"reason": "unknown_id", "id": job_id},
    )
