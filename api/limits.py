"""What a request may be: size, depth and characters of its body, and the names of its query parameters.

Everything is refused before the database is asked, so nothing of a refused request is stored.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qsl

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope

from jobqueue.api.errors import ApiError

MAX_BODY_BYTES = 16 * 1024 * 1024
"""A payload of 8 MB with everything escaped, or many small jobs."""
BODY_SECONDS = 30.0
"""For all of a body, however it trickles in; 16 MB over 5 Mbit/s."""
MAX_DEPTH = 100
MAX_QUERY_BYTES = 8192
LEAST_INTEGER, MOST_INTEGER = -(2**63), 2**63 - 1

_JSON_TYPE = re.compile(r"application/(?:[a-z0-9.+-]+\+)?json\s*(?:;.*)?", re.IGNORECASE)
# An escaped NUL whose backslash is not itself escaped.
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_MAYBE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_body(scope: Scope, receive: Receive, headers: Mapping[bytes, bytes], most: int) -> bytes:
    """Return the body.

    Raises ApiError: 415 if it is not JSON by its type, or compressed; 413 over `most` bytes; 408 if it takes longer than
    30 s.
    """
    content_type = headers.get(b"content-type", b"").decode("latin-1")
    if not _JSON_TYPE.fullmatch(content_type.strip()):
        # Also what keeps foreign web pages out: a browser asks before it sends this type to another site.
        raise ApiError("UNSUPPORTED_MEDIA_TYPE", "The body must be JSON.", hint="Send Content-Type: application/json.")
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        # A kilobyte can unpack to a gigabyte.
        raise ApiError("UNSUPPORTED_MEDIA_TYPE", "A compressed body is not read.", hint="Send it as it is.")
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > most:
        raise _too_large(most)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _received(receive, most)
    except TimeoutError:
        raise ApiError(
            "TIMED_OUT", "The body did not arrive in time.", status=408, headers={"Connection": "close"}
        ) from None


async def _received(receive: Receive, most: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > most:
            raise _too_large(most)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def parse_json(body: bytes) -> Any:
    """Return the value. Raises ApiError: 400 if it is no JSON, 422 for what could not be stored exactly.

    That is: numbers beyond 64 bit (whole ones) or beyond double precision's range, NUL characters, lone surrogates, and
    more than 100 levels.
    """
    try:
        value = json.loads(
            body.decode("utf-8"), parse_int=_integer, parse_float=_number, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError as error:
        raise ApiError(
            "INVALID_ARGUMENT", "The body is not UTF-8.", status=400, details={"position": error.start}
        ) from None
    except json.JSONDecodeError as error:
        raise ApiError(
            "INVALID_ARGUMENT", f"The body is not JSON: {error.msg}.", status=400, details={"position": error.pos}
        ) from None
    _refuse_deep(value)
    if _NUL.search(body):
        raise ApiError("INVALID_ARGUMENT", "NUL characters (\\u0000) cannot be stored.")
    if _MAYBE_SURROGATE.search(body):
        _refuse_lone_surrogates(value)
    return value


def parse_query(query: bytes, known: Iterable[str]) -> dict[str, str]:
    """Return the query parameters. Raises ApiError (400) for unknown, repeated or unreadable ones."""
    if not query:
        return {}
    names = list(known)
    if len(query) > MAX_QUERY_BYTES:
        raise ApiError("INVALID_ARGUMENT", f"The query is longer than {MAX_QUERY_BYTES} bytes.", status=400)
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError:
        raise ApiError("INVALID_ARGUMENT", "The query cannot be read.", status=400) from None
    given: dict[str, str] = {}
    for name, value in pairs:
        if name not in names:
            raise ApiError("UNKNOWN_OPTION", **unknown_name("query parameter", name, names), status=400)
        if name in given or "\0" in value:
            raise ApiError("INVALID_ARGUMENT", f"{name} is given twice, or has a NUL character.", status=400)
        given[name] = value
    return given


def unknown_name(what: str, name: str, known: list[str]) -> dict[str, Any]:
    """Return message, hint and details for a name that is not known."""
    shown = name[:100].encode("utf-8", "replace").decode()
    nearest = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.0)
    listed = ", ".join(known) or "none"
    return {
        "message": f'There is no {what} "{shown}".',
        "hint": (f'Did you mean "{nearest[0]}"? ' if nearest else "") + f"Known are: {listed}.",
        "details": {"option": shown, "nearest": nearest[0] if nearest else None},
    }


def _integer(text: str) -> int:
    if len(text) > 20 or not LEAST_INTEGER <= (value := int(text)) <= MOST_INTEGER:
        raise ApiError(
            "INVALID_ARGUMENT", "A whole number does not fit into 64 bits.", hint="Send it as a string or with a point."
        )
    return value


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value) or len(text) > 400:
        raise ApiError("INVALID_ARGUMENT", "A number is beyond double precision.", hint="Send it as a string.")
    return value


def _refuse_constant(name: str) -> Any:
    raise ApiError("INVALID_ARGUMENT", f"{name} is not JSON.", status=400, hint="Send null or a string.")


def _refuse_deep(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _refuse_lone_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(
            "INVALID_ARGUMENT", "Half a surrogate pair is no character and cannot be stored.", hint="Send whole pairs."
        ) from None


def _too_large(most: int) -> ApiError:
    # What is left of the body is not read: the connection cannot be used again.
    return ApiError(
        "TOO_LARGE", f"The body is larger than {most} bytes.", details={"most": most}, headers={"Connection": "close"}
    )


def _too_deep() -> ApiError:
    return ApiError("INVALID_ARGUMENT", f"The body is nested deeper than {MAX_DEPTH} levels.")
