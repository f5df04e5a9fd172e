"""Lists of jobs: `GET /jobs`, `/jobs/active`, `/jobs/stats`. Each is one SQL statement (sql/functions/http_lists.sql)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from starlette.responses import Response

from jobqueue.api.context import Call
from jobqueue.api.encoding import dump_json
from jobqueue.api.errors import ApiError
from jobqueue.api.job_state import ID, job_json
from jobqueue.api.operations import Operation, Parameter, Reply
from jobqueue.api.parameters import (
    CREATED_AFTER,
    CREATED_BEFORE,
    CURSOR,
    FILTERS,
    JOB_FIELDS,
    JOB_TYPE,
    LAST_BY_PAGE,
    LIMIT,
    MOST_PER_PAGE,
    PAGE,
    PER_PAGE,
    QUEUE,
    SUBJECT,
    TENANT,
)
from jobqueue.api.resources import JobPage, Stats
from jobqueue.api.statements import read

PER_PAGE_DEFAULT = 20
MOST_COUNTED = 10_000

_JOBS = "select total, id::text, created_at, body, open from jobqueue.http_jobs(%s, %s, %s::jsonb, %s, %s, %s, %s, %s)"
_ACTIVE = "select total, id::text, created_at, body from jobqueue.http_active(%s, %s, %s, %s, %s)"
_STATS = "select counts, capped from jobqueue.http_stats(%s, %s, %s::jsonb)"


# -- GET /jobs --------------------------------------------------------------------------------------------------------


async def get_jobs(call: Call) -> Response:
    """Answer with a page of jobs, newest first."""
    wanted = filter_of(call)
    per_page = _per_page(call)
    page = call.query.get("page", 1)
    after = _read_cursor(call, wanted)
    if page * per_page > LAST_BY_PAGE:
        raise ApiError(
            "INVALID_ARGUMENT",
            f"Pages by number end at the job {LAST_BY_PAGE:,}.",
            hint="Go on with cursor=<meta.next_cursor>, or filter.",
        )
    parameters = (json.dumps(wanted), *after, per_page, (page - 1) * per_page, call.query.get("fields"))
    rows = await read(call, _JOBS, *parameters)
    jobs = [row for row in rows if row[3] is not None]
    last = last_seen(rows, jobs, per_page)
    following = _make_cursor(call, wanted, last) if last is not None else None
    meta = {
        **_total(rows[0][0], is_open=rows[0][4]),
        "page": None if "cursor" in call.query else page,
        "per_page": per_page,
        "next_cursor": following,
    }
    return _page(call, jobs, meta, _link(call, following))


def last_seen(
    rows: Sequence[tuple[Any, ...]], jobs: Sequence[tuple[Any, ...]], per_page: int
) -> tuple[Any, ...] | None:
    """Return the row behind which a list goes on; None if it does not.

    A last row without a body says that it does. If the page is not full, looking ended there: see jobqueue.look_back().
    """
    if rows[-1][1] is None or rows[-1][3] is not None:
        return None
    return jobs[-1] if len(jobs) == per_page else rows[-1]


def filter_of(call: Call) -> dict[str, Any]:
    """Return the filters among the query parameters, as jobqueue.http_conditions reads them.

    Raises ApiError (403) for a tenant that is not the caller's, or not the path's.
    """
    wanted = {filter.name: call.query[filter.name] for filter in FILTERS if filter.name in call.query}
    tenant = wanted.get("tenant")
    if tenant is not None and not (tenant == call.tenant if call.tenant else call.principal.may_use(tenant)):
        raise ApiError("FORBIDDEN", "This tenant is not yours.", details={"tenant": tenant[:200]})
    return wanted


def _per_page(call: Call) -> int:
    if "limit" in call.query and "per_page" in call.query:
        raise ApiError("INVALID_ARGUMENT", "limit and per_page are the same: give one.", status=400)
    return int(call.query.get("limit") or call.query.get("per_page") or PER_PAGE_DEFAULT)


def _total(total: int, *, is_open: bool = False) -> dict[str, Any]:
    return {"total": min(total, MOST_COUNTED), "total_capped": is_open or total > MOST_COUNTED}


def _page(
    call: Call, rows: list[tuple[Any, ...]], meta: dict[str, Any], headers: dict[str, str] | None = None
) -> Response:
    fields = call.query.get("fields")
    data = b",".join(job_json(call, body, job_id, fields) for _, job_id, _, body, *_ in rows)
    content = b'{"data":[' + data + b'],"meta":' + dump_json(meta) + b"}"
    return Response(content, headers={"Cache-Control": "no-store", **(headers or {})}, media_type="application/json")


def _link(call: Call, cursor: str | None) -> dict[str, str]:
    if cursor is None:
        return {}
    given = call.scope["query_string"].decode("ascii")
    kept = [pair for pair in given.split("&") if pair and pair.split("=")[0] not in {"cursor", "page"}]
    return {"Link": f'<{call.base}/jobs?{"&".join([*kept, urlencode({"cursor": cursor})])}>; rel="next"'}


# -- Cursors ----------------------------------------------------------------------------------------------------------


def _make_cursor(call: Call, wanted: dict[str, Any], last: tuple[Any, ...]) -> str:
    _, job_id, created_at, *_ = last
    return _encoded([created_at.isoformat(), job_id, _fingerprint(call, wanted)])


def _read_cursor(call: Call, wanted: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return where the list goes on. A cursor is no secret and gives no right; it must only fit the list."""
    text = call.query.get("cursor")
    if text is None:
        return None, None
    if "page" in call.query:
        raise ApiError("INVALID_ARGUMENT", "page and cursor exclude each other: give one.", status=400)
    try:
        at, job_id, fingerprint = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        is_ours = _encoded([at, job_id, fingerprint]) == text and ID.fullmatch(job_id) and _is_time(at)
    except (ValueError, TypeError, RecursionError, binascii.Error):
        is_ours = False
    if not is_ours or fingerprint != _fingerprint(call, wanted):
        raise ApiError(
            "CURSOR_MISMATCH",
            "This cursor is not one of this list.",
            hint="Send the filters of the page that gave it, or begin anew without a cursor.",
        )
    return at, job_id


def _is_time(text: str) -> bool:
    """Whether it was written by `_make_cursor`; Postgres would take `now` and `infinity` as well."""
    at = datetime.fromisoformat(text)
    return at.tzinfo is not None and at.isoformat() == text


def _encoded(values: list[str]) -> str:
    return base64.urlsafe_b64encode(dump_json(values)).rstrip(b"=").decode()


def _fingerprint(call: Call, wanted: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([call.tenant, wanted], sort_keys=True).encode()).hexdigest()[:12]


# -- GET /jobs/active and /jobs/stats ---------------------------------------------------------------------------------


async def get_active(call: Call) -> Response:
    """Answer with the caller's jobs of the last hour that are under way or have just ended."""
    whose = call.query.get("created_by", call.principal.subject)
    if whose != call.principal.subject and not call.principal.may_act_as_others:
        raise ApiError("FORBIDDEN", "These are somebody else's jobs.", hint="This needs the scope admin, or act_as.")
    limit = call.query.get("limit", MOST_PER_PAGE)
    rows = await read(call, _ACTIVE, whose, limit, call.query.get("fields"))
    jobs = rows if rows[0][1] is not None else []
    return _page(call, jobs, {**_total(rows[0][0]), "per_page": limit})


async def get_stats(call: Call) -> Response:
    """Answer with how many jobs there are in each status."""
    ((counts, capped),) = await read(call, _STATS, json.dumps(filter_of(call)))
    content = b'{"data":' + counts.encode() + b',"meta":' + dump_json({"capped": capped}) + b"}"
    return Response(content, headers={"Cache-Control": "no-store"}, media_type="application/json")


_NO_STORE = {"Link": 'The next page: rel="next".'}

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        name="listJobs",
        method="GET",
        path="/jobs",
        summary="List jobs, newest first",
        description="Values over 16 kB are left out and named in `omitted`; GET /jobs/{id} has them. `meta.total` is "
        "exact up to 10,000; beyond that `total_capped` is true. By status, error_class, error_code, subject and "
        "created_by every job is found at once. For the rest (queue, job_type, mixtures) a page looks at no more than "
        "100,000 jobs: it may have fewer than asked for, or none, and `next_cursor` goes on behind those; `total` is then "
        "a lower bound, and `total_capped` true.",
        handler=get_jobs,
        tag="jobs",
        scopes=("jobs:read",),
        query=(*FILTERS, LIMIT, CURSOR, PAGE, PER_PAGE, JOB_FIELDS),
        replies={200: Reply("A page", (JobPage,), _NO_STORE)},
        errors=("INVALID_ARGUMENT", "CURSOR_MISMATCH"),
        of_tenant=True,
    ),
    Operation(
        name="listActiveJobs",
        method="GET",
        path="/jobs/active",
        summary="List the caller's jobs that are under way",
        description="Jobs with `created_by` = the caller that were sent in the last hour and are unfinished, or ended "
        "in the last 5 minutes. Without API keys: everybody's.",
        handler=get_active,
        tag="jobs",
        scopes=("jobs:read",),
        query=(
            Parameter("created_by", "Whose, instead of the caller's; needs admin or act_as.", {"type": "string"}),
            LIMIT,
            JOB_FIELDS,
        ),
        replies={200: Reply("The newest, at most 200", (JobPage,))},
        errors=("INVALID_ARGUMENT",),
        of_tenant=True,
    ),
    Operation(
        name="getStats",
        method="GET",
        path="/jobs/stats",
        summary="Count jobs by status",
        description="The newest 100,000 jobs are looked at; of several tenants each has its share of them, at least 1,000. "
        "`meta.capped` says that there are more.",
        handler=get_stats,
        tag="jobs",
        scopes=("jobs:read",),
        query=(QUEUE, JOB_TYPE, SUBJECT, TENANT, CREATED_AFTER, CREATED_BEFORE),
        replies={200: Reply("The counts", (Stats,))},
        errors=("INVALID_ARGUMENT",),
        of_tenant=True,
    ),
)
