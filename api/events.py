"""Streams: `GET /jobs/{id}/events`, `GET /events`, and the tickets that open them without a header.

A job's stream shows states, not a history of them: at its beginning the state now, unless the client has it
(Last-Event-ID = version), then each new one that it has time to send. So nothing that still matters is missed, and a
slow client costs nothing. A tenant's stream sends signals; a client that may have missed some is told to read again.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from urllib.parse import quote

import psycopg
from starlette.requests import HTTPConnection
from starlette.responses import Response

from jobqueue.api import streams
from jobqueue.api.bodies import checked_body
from jobqueue.api.conditional import ENDED
from jobqueue.api.context import Call
from jobqueue.api.encoding import dump_json
from jobqueue.api.errors import ApiError
from jobqueue.api.feed import Feed, Snapshot, Subscriber
from jobqueue.api.job_state import ID, State, job_id_of, job_json, job_not_found
from jobqueue.api.operations import Operation, Parameter, Reply
from jobqueue.api.resources import TicketRequest, TicketResource
from jobqueue.api.statements import read
from jobqueue.api.streams import BYE, GREETING, HEARTBEAT, EventStream, event
from jobqueue.errors import JobqueueError

logger = logging.getLogger(__name__)

MERGED_SECONDS = 0.05
"""States of a job that follow each other faster are merged."""
AGAIN_AFTER = 1.0
"""Seconds until a stream looks again when the database is away."""

_GET = "select etag, version, status, alive, due_in, ends_in, body from jobqueue.http_job(%s, %s, %s, %s, %s, %s, %s)"
_NUMBER = re.compile(r"\d{1,18}")


def feed_of(call: Call) -> Feed:
    """Return the feed of this process."""
    feed: Feed = call.scope["app"].state.feed
    return feed


# -- GET /jobs/{id}/events --------------------------------------------------------------------------------------------


async def get_job_events(call: Call) -> Response:
    """Stream a job until it has ended."""
    job_id = job_id_of(call)
    ((*columns,),) = await read(call, _GET, job_id, None, None, ["brief"], False)
    state = State(*columns)
    if state.version is None or state.body is None:
        raise job_not_found(job_id)
    first = Snapshot(state.version, state.status, state.alive, state.body)
    seen = _last_event_id(call)
    if first.status in ENDED and seen == first.version:
        # The client has all of it; EventSource stops at 204.
        return Response(status_code=204)
    if call.scope["method"] == "HEAD":
        return Response(headers=streams.HEADERS, media_type=streams.MEDIA_TYPE)
    return EventStream(_job_events(call, job_id, first, seen), feed_of(call), call.principal.key)


async def _job_events(call: Call, job_id: str, now: Snapshot, seen: int | None) -> AsyncIterator[bytes]:
    hub, loop, door = call.services.hub, asyncio.get_running_loop(), Door(call)
    ends = loop.time() + streams.LONGEST_SECONDS
    previous: str | None = None
    yield GREETING
    if now.version != seen:
        yield _job_event(call, job_id, now, previous)
    while now.status not in ENDED:
        previous, began = now.status, loop.time()
        changed = await hub.wait(job_id, now.version, now.alive, streams.HEARTBEAT_SECONDS)
        if hub.ending or loop.time() >= ends:
            yield BYE
            return
        if not await door.is_open():
            return
        if not changed:
            yield HEARTBEAT
            if loop.time() - began < streams.HEARTBEAT_SECONDS / 2:
                # The hub has more waiters than it looks after.
                await asyncio.sleep(AGAIN_AFTER)
            continue
        try:
            latest = await feed_of(call).job(job_id)
        except (psycopg.Error, JobqueueError):
            await asyncio.sleep(AGAIN_AFTER)
            continue
        if latest is None:
            yield event("done", dump_json({"id": job_id, "status": None, "deleted": True}))
            return
        is_new = (latest.version, latest.alive) != (now.version, now.alive)
        now = latest
        if is_new:
            yield _job_event(call, job_id, now, previous)
            await asyncio.sleep(MERGED_SECONDS)
    yield event("done", dump_json({"id": job_id, "status": now.status}), now.version)


def _job_event(call: Call, job_id: str, now: Snapshot, previous: str | None) -> bytes:
    return event("job", job_json(call, now.body, job_id, previous_status=previous), now.version)


def _last_event_id(call: Call) -> int | None:
    given = call.header(b"last-event-id") or call.query.get("last_event_id") or ""
    return int(given) if _NUMBER.fullmatch(given) else None


class Door:
    """Looks at every beat, however busy a stream is, whether who opened it would be let in again."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._next = asyncio.get_running_loop().time() + streams.HEARTBEAT_SECONDS

    async def is_open(self) -> bool:
        """Return whether they would; without looking if the last look was under a beat ago."""
        now = asyncio.get_running_loop().time()
        if now < self._next:
            return True
        self._next = now + streams.HEARTBEAT_SECONDS
        return await _is_still_let_in(self._call)


async def _is_still_let_in(call: Call) -> bool:
    """Whether the key is still good, with the rights that it had."""
    try:
        # Not "has a ticket in its query": any parameter's value may read so.
        if call.scope.get("jobqueue.by_ticket"):
            return await call.services.tickets.is_still_good(call.principal)
        # A page of the dashboard comes with a session's cookie, which the API's authenticator does not know.
        identify = call.scope.get("jobqueue.identify", call.services.authenticate)
        return bool(await identify(HTTPConnection(call.scope)) == call.principal)
    except ApiError:
        return False
    except (psycopg.Error, JobqueueError):
        # The database is away; that is no reason to send clients away.
        return True


# -- GET /events ------------------------------------------------------------------------------------------------------


async def get_events(call: Call) -> Response:
    """Stream what changes for the caller's tenants."""
    if call.scope["method"] == "HEAD":
        return Response(headers=streams.HEADERS, media_type=streams.MEDIA_TYPE)
    return await tenant_stream(call)


async def tenant_stream(call: Call) -> EventStream:
    """Return the stream of what changes for the tenants that a request sees."""
    first = await feed_of(call).summary(call.tenants)
    return EventStream(_tenant_events(call, first), feed_of(call), call.principal.key)


async def _tenant_events(call: Call, first: str) -> AsyncIterator[bytes]:
    hub, feed, loop, door = call.services.hub, feed_of(call), asyncio.get_running_loop(), Door(call)
    ends = loop.time() + streams.LONGEST_SECONDS
    next_summary = 0.0
    with feed.subscribe(call.tenants) as subscriber:
        # What the client has read before was read too early.
        yield GREETING + event("summary", first.encode()) + event("resync", b"{}")
        while loop.time() < ends:
            await _wait(subscriber, next_summary)
            if hub.ending:
                break
            if not await door.is_open():
                return
            said = _signals(subscriber)
            if subscriber.summary_is_old and loop.time() >= next_summary:
                said += await _summary(feed, subscriber)
                next_summary = loop.time() + 2.0
            yield said or HEARTBEAT
    yield BYE


async def _wait(subscriber: Subscriber, next_summary: float) -> None:
    """Wait until there is something to say, or it is time for a sign of life."""
    loop = asyncio.get_running_loop()
    until = streams.HEARTBEAT_SECONDS
    if subscriber.summary_is_old:
        until = min(until, max(next_summary - loop.time(), 0.0))
    try:
        async with asyncio.timeout(until):
            await subscriber.woken.wait()
    except TimeoutError:
        return
    subscriber.woken.clear()


def _signals(subscriber: Subscriber) -> bytes:
    if subscriber.resync:
        subscriber.resync = False
        return event("resync", b"{}")
    if not subscriber.pending:
        return b""
    signals = ",".join(subscriber.pending.values())
    subscriber.pending.clear()
    return event("jobs", f"[{signals}]".encode())


async def _summary(feed: Feed, subscriber: Subscriber) -> bytes:
    try:
        text = await feed.summary(subscriber.tenants)
    except (psycopg.Error, JobqueueError):
        return b""
    subscriber.summary_is_old = False
    return event("summary", text.encode())


# -- POST /stream-tickets ---------------------------------------------------------------------------------------------


async def post_ticket(call: Call) -> Response:
    """Make a ticket for one stream."""
    body = await checked_body(call, TicketRequest)
    job_id = body.get("job_id")
    if job_id is not None and not ID.fullmatch(job_id):
        raise ApiError("INVALID_ARGUMENT", "job_id is not the id of a job.")
    path = call.base + (f"/jobs/{job_id.lower()}/events" if job_id else "/events")
    ticket, ends = await call.services.tickets.make(call.principal, _decoded(call, path))
    content = {"ticket": ticket, "url": f"{path}?ticket={ticket}", "expires_at": ends.isoformat()}
    return Response(
        dump_json(content), status_code=201, headers={"Cache-Control": "no-store"}, media_type="application/json"
    )


def _decoded(call: Call, path: str) -> str:
    """The path as a server hands it over: with the tenant's characters themselves."""
    return path if call.tenant is None else path.replace(f"/{quote(call.tenant, safe='')}/", f"/{call.tenant}/", 1)


_LAST_EVENT_ID = Parameter(
    "Last-Event-ID", "The version that the client has; EventSource sends it by itself.", {"type": "string"}
)

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        name="streamJob",
        method="GET",
        path="/jobs/{id}/events",
        summary="Follow a job (server-sent events)",
        description="`event: job` with the job and `previous_status`; `id:` is its version. At once the state now, then "
        "every change; at the end `event: done`. Comments every 15 s keep the connection. `event: bye`: come back.",
        handler=get_job_events,
        tag="streams",
        scopes=("jobs:read",),
        query=(Parameter("last_event_id", "As the header, for clients that cannot set it.", {"type": "string"}),),
        headers=(_LAST_EVENT_ID,),
        replies={
            200: Reply("Events", media=streams.MEDIA_TYPE),
            204: Reply("The job has ended and the client has its last state"),
        },
        errors=("JOB_NOT_FOUND",),
        of_tenant=True,
        is_stream=True,
        link="events",
    ),
    Operation(
        name="streamJobs",
        method="GET",
        path="/events",
        summary="Follow all jobs of the caller's tenants (server-sent events)",
        description="`event: jobs`: a list of `{id, version, status, job_type, subject, current_stage, progress_pct, "
        "estimated_completion}` of what changed; `event: summary`: as GET /jobs/stats, with the mean progress of "
        "unfinished jobs and `stages {name: {done, active}}`; `event: resync`: something may have been missed, read the list.",
        handler=get_events,
        tag="streams",
        scopes=("jobs:read",),
        replies={200: Reply("Events", media=streams.MEDIA_TYPE)},
        of_tenant=True,
        is_stream=True,
    ),
    Operation(
        name="makeStreamTicket",
        method="POST",
        path="/stream-tickets",
        summary="Make a ticket that opens one stream without a header",
        description="For EventSource in browsers. It stands for its maker, opens one stream, once, within a minute.",
        handler=post_ticket,
        tag="streams",
        scopes=("jobs:read",),
        request=(TicketRequest,),
        request_examples={
            "for the caller's jobs": {},
            "for one job": {"job_id": "0198c5a0-1c2d-7e3f-8a4b-5c6d7e8f9a0b"},
        },
        replies={201: Reply("The ticket", (TicketResource,))},
        errors=("INVALID_ARGUMENT", "UNSUPPORTED_MEDIA_TYPE"),
        of_tenant=True,
    ),
)
