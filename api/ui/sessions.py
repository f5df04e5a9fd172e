"""Sessions of browsers: an API key is shown once, and a cookie with a random token stands for it.

The database keeps the SHA-256 of the token (sql/functions/ui_sessions.sql) and answers with the key's rights as they are
now, so a session ends with its key, everywhere and at once. The cookie is sent to the dashboard only: the API's routes
know nothing of it.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from datetime import datetime

from starlette.requests import HTTPConnection
from starlette.responses import Response

from jobqueue.api.database import Database
from jobqueue.api.identity import BUCKETS, Principal
from jobqueue.keys import parse_key

COOKIE = "jobqueue_session"
HOURS = 12
"""After this long a browser has to show its key again."""

_FORM = re.compile(r"[A-Za-z0-9_-]{43}")
_START = "select jobqueue.start_ui_session(%s, %s, %s, %s * interval '1 hour')"
_FIND = """\
select key_id, subject, tenants, scopes, act_as, quota_reads, quota_writes, quota_streams, ends
from jobqueue.find_ui_session(%s)"""
_END = "select jobqueue.end_ui_session(%s)"


async def start(database: Database, key_text: str) -> tuple[str, datetime] | None:
    """Return a token for a browser that has shown this key, and when it ends; None if the key is not let in."""
    key = parse_key(key_text.strip())
    if key is None:
        return None
    token = secrets.token_urlsafe(32)
    ((ends,),) = await database.rows(_START, (_hash(token), key.id, key.hash, HOURS))
    return None if ends is None else (token, ends)


async def find(database: Database, connection: HTTPConnection) -> Principal | None:
    """Return whom the request's cookie stands for; None without one, or once it has ended."""
    token = token_of(connection)
    if token is None:
        return None
    rows = await database.rows(_FIND, (_hash(token),), read_only=True)
    if not rows:
        return None
    key_id, subject, tenants, scopes, act_as, *limits, ends = rows[0]
    quotas = {bucket: limit for bucket, limit in zip(BUCKETS, limits, strict=True) if limit is not None}
    return Principal(key_id, subject, ",".join(tenants), frozenset(scopes), act_as, quotas, ends)


async def end(database: Database, connection: HTTPConnection) -> None:
    """Forget the session of a request."""
    token = token_of(connection)
    if token is not None:
        await database.rows(_END, (_hash(token),))


def token_of(connection: HTTPConnection) -> str | None:
    """Return the token in a request's cookie, if it has the form of one."""
    token = connection.cookies.get(COOKIE, "")
    return token if _FORM.fullmatch(token) else None


def set_cookie(response: Response, token: str, ends: datetime, path: str, *, secure: bool) -> None:
    """Give a browser its token: for the dashboard's path, not for scripts, not for requests of other sites."""
    response.set_cookie(COOKIE, token, expires=ends, path=path, secure=secure, httponly=True, samesite="strict")


def clear_cookie(response: Response, path: str, *, secure: bool) -> None:
    """Take a browser's token away."""
    response.delete_cookie(COOKIE, path=path, secure=secure, httponly=True, samesite="strict")


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
