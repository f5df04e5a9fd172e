"""Which class an error has (S14), and that it can always be stored."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from jobqueue.classify import DETAIL_LIMIT, MESSAGE_LIMIT, ChunkFailed, Failure, classify, failure_of
from jobqueue.errors import InvalidInput, PermanentError, QuotaExceeded, Retry


class HttpError(Exception):
    """As the clients of the web raise them."""

    def __init__(self, message: str, **attributes: Any) -> None:
        super().__init__(message)
        self.__dict__.update(attributes)


class Response:
    def __init__(self, status_code: int, headers: dict[str, str] | None = None) -> None:
        self.status_code = status_code
        self.headers = headers or {}


def validation_error() -> ValidationError:
    class Model(BaseModel):
        quota: int

    with pytest.raises(ValidationError) as caught:
        Model.model_validate({"quota": "many"})
    return caught.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TimeoutError("read timed out"), "transient"),
        (TimeoutError(), "transient"),
        (ConnectionResetError("peer"), "transient"),
        (HttpError("too many requests", status_code=429), "transient"),
        (HttpError("unavailable", status=503), "transient"),
        (HttpError("gateway", response=Response(504)), "transient"),
        (ValueError("nobody knows"), "transient"),
        (validation_error(), "invalid"),
        (HttpError("You exceeded your current quota", status_code=429), "quota"),
        (HttpError("insufficient credits left", response=Response(429)), "quota"),
        (HttpError("billing is not active"), "quota"),
        (HttpError("no", code="insufficient_quota", status_code=429), "quota"),
        (HttpError("pay", status_code=402), "quota"),
        (ValueError("an accredited quotation"), "transient"),
        (Retry("later", after=5), "transient"),
        (PermanentError("never"), "permanent"),
        (InvalidInput("bad"), "invalid"),
        (QuotaExceeded("spent"), "quota"),
    ],
)
def test_errors_have_their_class(error: BaseException, expected: str) -> None:
    assert classify(error).error_class == expected


def test_retry_after_is_a_hint_for_transient_errors_only() -> None:
    busy = HttpError("busy", response=Response(429, {"Retry-After": "17"}))
    broke = HttpError("quota exceeded", response=Response(429, {"Retry-After": "17"}))
    assert classify(busy).retry_in == 17
    assert classify(broke).retry_in is None
    assert (
        classify(HttpError("busy", response=Response(503, {"Retry-After": "Mon, 01 Jan 2001 00:00:00 GMT"}))).retry_in
        == 0
    )
    assert classify(HttpError("busy", response=Response(503, {"Retry-After": "soon"}))).retry_in is None


def test_handlers_may_name_code_and_delay() -> None:
    failure = classify(PermanentError("no such file", code="FILE_GONE", after="5 min"))
    assert (failure.code, failure.message, failure.retry_in) == ("FILE_GONE", "no such file", 300)


def test_a_chunk_has_its_own_text_and_the_class_of_its_cause() -> None:
    error = ChunkFailed("Chunk 5 (pages 101-125) failed: quota exceeded")
    error.__cause__ = HttpError("quota exceeded")
    failure = classify(error)
    assert (failure.error_class, failure.code) == ("quota", "HttpError")
    assert failure.message == "Chunk 5 (pages 101-125) failed: quota exceeded"


def test_what_is_stored_is_clean_and_bounded() -> None:
    failure = failure_of(ValueError("a\0b\ud800" + "ü" * 100_000))
    assert len(failure.message.encode()) <= MESSAGE_LIMIT
    assert failure.detail is not None
    assert len(failure.detail.encode()) <= DETAIL_LIMIT
    assert "\0" not in failure.message + failure.detail
    assert "ValueError" in failure.detail


def test_an_error_without_text_still_says_something() -> None:
    assert failure_of(ValueError()).message == "ValueError"
    assert failure_of(KeyError("path")).message == "KeyError: 'path'"


def test_an_app_can_replace_the_classifier_and_its_bugs_do_not_lose_the_error() -> None:
    def broken(error: BaseException) -> Failure:
        raise RuntimeError("bug")

    def nonsense(error: BaseException) -> Any:
        return "fatal"

    assert failure_of(ValueError("x"), lambda error: "permanent").error_class == "permanent"
    assert failure_of(ValueError("x"), lambda error: None).error_class == "transient"
    assert failure_of(ValueError("x"), lambda error: Failure("quota", "MINE", "text")).code == "MINE"
    assert failure_of(ValueError("x"), broken).error_class == "transient"
    assert failure_of(ValueError("x"), nonsense).error_class == "transient"


def test_a_group_is_what_its_members_agree_on() -> None:
    same = ExceptionGroup("both", [InvalidInput("a"), InvalidInput("b")])
    mixed = ExceptionGroup("both", [InvalidInput("a"), ValueError("b")])
    assert classify(same).error_class == "invalid"
    assert classify(mixed).error_class == "transient"
