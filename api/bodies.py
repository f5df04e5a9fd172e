"""Bodies of requests: checked by a model, and answered with every problem that it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from jobqueue.api.context import Call
from jobqueue.api.errors import ApiError

MOST_PROBLEMS = 20


def check_body(model: type[BaseModel], body: Any) -> None:
    """Raise ApiError (422) with a JSON pointer per problem unless the body has the model's form."""
    try:
        model.model_validate(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        listed = [
            {"pointer": "".join(f"/{_readable(str(part))}" for part in problem["loc"]), "message": problem["msg"]}
            for problem in problems[:MOST_PROBLEMS]
        ]
        first = listed[0]
        raise ApiError(
            "INVALID_ARGUMENT", f"{first['pointer'] or 'The body'}: {first['message']}.", details={"errors": listed}
        ) from None


async def checked_body(call: Call, model: type[BaseModel], *, optional: bool = False) -> Mapping[str, Any]:
    """Return the body, an object of the model's form. `optional`: a request without a body is `{}`.

    Raises ApiError: as of `Call.json`, 422 for another form, and 403 for a bodiless request from a foreign web page.
    """
    if optional and _has_no_body(call):
        refuse_foreign_pages(call)
        return {}
    _, body = await call.json()
    check_body(model, body)
    assert isinstance(body, dict)
    return body


def refuse_foreign_pages(call: Call) -> None:
    """Raise ApiError (403) if a web page of another site sent this by itself.

    A browser asks before it sends JSON or a key to another site; a request without both it sends at once. A server
    without keys would obey it.
    """
    if call.header(b"authorization") is not None:
        return
    origin, host = call.header(b"origin"), call.header(b"host")
    foreign = origin is not None and urlsplit(origin).netloc != host
    if foreign or call.header(b"sec-fetch-site") in {"cross-site", "same-site"}:
        raise ApiError(
            "FORBIDDEN", "A page of another site may not do this.", hint="Send Content-Type and a JSON body."
        )


def _has_no_body(call: Call) -> bool:
    length = call.header(b"content-length")
    return length in {None, "0"} and call.header(b"transfer-encoding") is None


def _readable(text: str) -> str:
    return text[:200].encode("utf-8", "replace").decode()
