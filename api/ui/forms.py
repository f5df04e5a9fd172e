"""What a page sends: is it one of ours, and what is in its form?"""

from __future__ import annotations

import asyncio
import re
from urllib.parse import parse_qsl, unquote

from starlette.requests import Request
from starlette.types import Receive, Scope

from jobqueue.api.errors import ApiError
from jobqueue.api.limits import BODY_SECONDS

MOST_BYTES = 1_000_000
MOST_FIELDS = 2_000
FORM_TYPE = "application/x-www-form-urlencoded"

Form = dict[str, list[str]]

# What follows /ui; its address is put together behind our own prefix, so it leads nowhere else.
_PATH = re.compile(r"/(?!/)[A-Za-z0-9._~!$&'()*+,;=:@%/?-]{0,2000}")


def require_own_page(scope: Scope) -> None:
    """Raise ApiError (403) unless the browser says that one of this server's own pages sends the request.

    Browsers say so by Sec-Fetch-Site; those that are old, and all on plain HTTP but to this machine, only by Origin. A
    request with neither is refused: a session's cookie goes with it whoever made it.
    """
    sites = _values(scope, b"sec-fetch-site")
    origins = _values(scope, b"origin")
    if sites != ["same-origin"] if sites else len(origins) != 1 or origins[0] != _own_origin(scope):
        raise ApiError(
            "FORBIDDEN",
            "This was not sent by a page of this dashboard.",
            hint="Open the page in this browser and send its form. Programs use the API.",
        )


async def read_form(scope: Scope, receive: Receive) -> Form:
    """Return the fields of a form, each with its values. Raises ApiError: 415, 413, 408, 422."""
    request = Request(scope, receive)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != FORM_TYPE:
        raise ApiError("UNSUPPORTED_MEDIA_TYPE", "A form is expected.", hint=f"Send Content-Type: {FORM_TYPE}.")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await _body(request)
    except TimeoutError:
        raise ApiError("TIMED_OUT", "The form did not arrive in time.", status=408) from None
    try:
        pairs = parse_qsl(body.decode("utf-8"), keep_blank_values=True, errors="strict", max_num_fields=MOST_FIELDS)
    except ValueError:
        raise ApiError("INVALID_ARGUMENT", "The form cannot be read.") from None
    form: Form = {}
    for name, value in pairs:
        if "\0" in value:
            raise ApiError("INVALID_ARGUMENT", "NUL characters cannot be stored.")
        form.setdefault(name, []).append(value.replace("\r\n", "\n"))
    return form


async def _body(request: Request) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MOST_BYTES:
            raise ApiError(
                "TOO_LARGE", f"The form has more than {MOST_BYTES:,} bytes.", headers={"Connection": "close"}
            )
        chunks.append(chunk)
    return b"".join(chunks)


def first(form: Form, name: str) -> str:
    """Return a field's first value, or nothing."""
    return form.get(name, [""])[0]


def own_path(given: str | None) -> str:
    """Return a path below `/ui` that a request names, if it is one; else the front page."""
    if given is None or not _PATH.fullmatch(given):
        return "/"
    # A browser walks up by these, also if they are escaped: out of the dashboard, to any page of the same host.
    walks_up = any(unquote(part) in {".", ".."} for part in given.partition("?")[0].split("/"))
    return "/" if walks_up else given


def _own_origin(scope: Scope) -> str | None:
    hosts = _values(scope, b"host")
    return f"{scope['scheme']}://{hosts[0]}" if len(hosts) == 1 else None


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for given, value in scope["headers"] if given == name]
