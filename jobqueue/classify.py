"""Which class an error has: what is tried again, and what is said about it.

The classes are closed: transient, permanent, quota, invalid, lost. The order of the rules matters:

1. what the handler said itself (`Retry`, `PermanentError`, `InvalidInput`, `QuotaExceeded`),
2. validation errors: invalid,
3. words of quota, billing or credits, or HTTP 402: quota, also when the status is 429,
4. everything else, time-outs, connection errors and HTTP 429, 503 and 504 among it: transient.

An app replaces or extends this with `App(classify=…)` or `@app.job(classify=…)`: a function that takes the exception
and returns a `Failure`, the name of a class, or None to leave it to these rules.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from jobqueue.errors import BadRequest, HandlerError, Retry, TooLarge
from jobqueue.json_text import clean_text

ErrorClass = Literal["transient", "permanent", "quota", "invalid", "lost"]

CLASSES: tuple[ErrorClass, ...] = ("transient", "permanent", "quota", "invalid", "lost")
CODE_LIMIT = 200
MESSAGE_LIMIT = 2_000
DETAIL_LIMIT = 64_000
# A server that asks for more than a day of patience is not believed: the queue's own backoff applies then.
LONGEST_RETRY_AFTER = 86_400.0

_QUOTA_WORDS = re.compile(
    r"(?<![a-z])(quotas?|billing|credits|insufficient[ _]credit|credit balance|payment required)(?![a-z])",
    re.IGNORECASE,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """How an attempt failed.

    `retry_in`: seconds until the next attempt; None leaves it to the class and the queue's backoff. A class that is not
    retried by default is retried if it is given. `detail`: the stack trace, for those who may see it.
    """

    error_class: ErrorClass
    code: str
    message: str
    retry_in: float | None = None
    detail: str | None = None

    def as_error(self) -> dict[str, Any]:
        """The `error` object of `jobqueue.fail`."""
        return {"class": self.error_class, "code": self.code, "message": self.message, "detail": self.detail}


Classifier = Callable[[BaseException], Failure | ErrorClass | None]


class ChunkFailed(Exception):
    """A chunk of a document failed; the class of the error is that of its cause.

    The message is for people, so chunks count from 1: `Chunk 5 (pages 101-125) failed: …`.
    """


def classify(exception: BaseException) -> Failure:
    """Apply the default rules; never raises, whatever the exception's attributes do."""
    if isinstance(exception, ChunkFailed) and exception.__cause__ is not None:
        return replace(classify(exception.__cause__), message=_message(exception))
    if isinstance(exception, BaseExceptionGroup):
        return _classify_group(exception)
    code = type(exception).__name__
    message = _message(exception)
    if isinstance(exception, Retry):
        return Failure("transient", code, message, exception.after)
    if isinstance(exception, HandlerError):
        return Failure(_known_class(exception.error_class), exception.code, message, exception.after)
    if isinstance(exception, BadRequest | TooLarge):
        return Failure("permanent", exception.code, message)
    if _is_validation_error(exception):
        return Failure("invalid", code, message)
    if _is_about_quota(exception, code, message):
        return Failure("quota", code, message)
    return Failure("transient", code, message, _retry_after(exception))


def failure_of(exception: BaseException, classifier: Classifier | None = None) -> Failure:
    """Classify with the app's classifier, or the default rules, and clean and cut the texts so that they can be stored.

    A classifier that raises or answers nonsense is logged and the default rules apply.
    """
    found = classify(exception)
    if classifier is not None:
        found = _ask(classifier, exception, found)
    detail = found.detail if found.detail is not None else _stack_trace(exception)
    return Failure(
        found.error_class,
        clean_text(found.code, CODE_LIMIT) or "ERROR",
        clean_text(found.message, MESSAGE_LIMIT) or found.code,
        found.retry_in,
        _cut_middle(detail, DETAIL_LIMIT),
    )


def http_status(exception: BaseException) -> int | None:
    """The HTTP status that an exception carries (`.status_code`, `.status`, `.response.status_code`), or None."""
    response = _attribute(exception, "response")
    for holder, name in (
        (exception, "status_code"), (exception, "status"), (response, "status_code"), (response, "status"),
    ):  # fmt: skip
        value = _attribute(holder, name)
        if isinstance(value, int) and not isinstance(value, bool) and 100 <= value <= 599:
            return int(value)
    return None


def _ask(classifier: Classifier, exception: BaseException, default: Failure) -> Failure:
    try:
        answer = classifier(exception)
    except Exception:
        logger.exception("the classifier failed; the default rules apply")
        return default
    if isinstance(answer, Failure) and answer.error_class in CLASSES:
        return answer
    if isinstance(answer, str) and answer in CLASSES:
        return replace(default, error_class=answer, retry_in=default.retry_in if answer == "transient" else None)
    if answer is not None:
        logger.error("the classifier returned %r; expected a Failure, one of %s, or None", answer, ", ".join(CLASSES))
    return default


def _classify_group(group: BaseExceptionGroup[BaseException]) -> Failure:
    """A group is what its members agree on; members that disagree leave it transient."""
    members = [classify(member) for member in group.exceptions]
    first = members[0]
    if len(members) == 1 or all(member.error_class == first.error_class for member in members):
        return replace(
            first, message=f"{first.message} (and {len(members) - 1} more)" if members[1:] else first.message
        )
    return Failure("transient", type(group).__name__, "; ".join(member.message for member in members))


def _known_class(name: str) -> ErrorClass:
    return next((known for known in CLASSES if known == name), "permanent")


def _message(exception: BaseException) -> str:
    try:
        text = str(exception).strip()
    except Exception:
        text = ""
    name = type(exception).__name__
    if not text:
        return name
    # The text of a KeyError is only the key.
    return f"{name}: {text}" if isinstance(exception, KeyError) else text


def _is_validation_error(exception: BaseException) -> bool:
    """By name: pydantic, jsonschema, marshmallow and Django all call it so, and none of them needs to be imported."""
    return any(kind.__name__ in {"ValidationError", "RequestValidationError"} for kind in type(exception).__mro__)


def _is_about_quota(exception: BaseException, code: str, message: str) -> bool:
    if http_status(exception) == 402:
        return True
    own_code = _attribute(exception, "code")
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", code)
    texts = [message, words, own_code.replace("_", " ") if isinstance(own_code, str) else ""]
    return any(_QUOTA_WORDS.search(text) for text in texts)


def _retry_after(exception: BaseException) -> float | None:
    """The server's `Retry-After` in seconds, given as seconds or as a date; None without a usable one."""
    for holder in (exception, _attribute(exception, "response")):
        headers = _attribute(holder, "headers")
        if not isinstance(headers, Mapping) and not hasattr(headers, "get"):
            continue
        try:
            value = headers.get("Retry-After") or headers.get("retry-after")
            seconds = _seconds_of(str(value)) if value else None
        except Exception:
            seconds = None
        if seconds is not None and 0 <= seconds <= LONGEST_RETRY_AFTER:
            return seconds
    return None


def _seconds_of(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        pass
    moment = parsedate_to_datetime(value)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _attribute(holder: object, name: str) -> Any:
    try:
        return getattr(holder, name, None)
    except Exception:
        return None


def _stack_trace(exception: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(exception))
    except Exception:
        return f"{type(exception).__name__} (its stack trace could not be written)"


def _cut_middle(text: str, limit: int) -> str:
    """Both ends of a stack trace matter: where it began and what happened."""
    clean = clean_text(text, 4 * len(text) + 4)
    data = clean.encode()
    if len(data) <= limit:
        return clean
    half = (limit - 32) // 2
    return data[:half].decode(errors="ignore") + "\n… cut …\n" + data[-half:].decode(errors="ignore")
