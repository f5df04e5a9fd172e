"""Payloads: checked against the handler's own type before they are stored, and again before the handler runs."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from jobqueue.errors import InvalidArgument, InvalidInput
from jobqueue.json_text import RAW, NotStorable, check_text, from_json, to_json_text

INVALID_PAYLOAD = "INVALID_PAYLOAD"

Decode = Callable[[Any], Any]


class Payload:
    """What a handler accepts as payload.

    `typed`: a model, a dataclass or any other type that pydantic can check; otherwise JSON as it is.
    """

    __slots__ = ("_adapter", "_job_type", "_only_objects", "typed")

    def __init__(self, job_type: str, annotation: Any) -> None:
        self._job_type = job_type
        self._only_objects = _is_plain_object(annotation)
        self.typed = not self._only_objects and annotation is not Any and annotation is not None
        self._adapter = _adapter(annotation, job_type) if self.typed else None

    @property
    def decode(self) -> Decode | None:
        """Turns stored JSON into the handler's argument, raising InvalidInput; None if nothing is to be done."""
        if self.typed:
            return self._decode_typed
        return self._decode_object if self._only_objects else None

    def encode(self, value: Any) -> str:
        """Return a payload as JSON text; None is `{}`. Raises InvalidArgument if it is not valid or storable."""
        if self._adapter is not None and not isinstance(value, dict | None):
            return self._encode_instance(value)
        text = encode_payload(value, self._job_type)
        if self._adapter is not None:
            self._validate(text, InvalidArgument)
        elif self._only_objects and not text.startswith("{"):
            raise InvalidArgument(f"the payload of {self._job_type} must be an object, not {type(value).__name__}")
        return text

    def validated(self, text: str) -> Any:
        """Return the handler's argument for JSON text that `encode` made."""
        import json

        return json.loads(text) if self._adapter is None else self._adapter.validate_json(text)

    def _encode_instance(self, value: Any) -> str:
        """With aliases if the type can be read back by them, as it is stored; otherwise by the names of the fields."""
        assert self._adapter is not None
        problem: InvalidArgument | None = None
        for by_alias in (True, False):
            text = self._dump(value, by_alias)
            try:
                self._validate(text, InvalidArgument)
            except InvalidArgument as error:
                problem = problem or error
            else:
                return text
        assert problem is not None
        raise problem

    def _dump(self, value: Any, by_alias: bool) -> str:
        from pydantic_core import PydanticSerializationError

        assert self._adapter is not None
        try:
            text: str = self._adapter.dump_json(value, by_alias=by_alias, warnings="none").decode()
            check_text(text)
        except (PydanticSerializationError, UnicodeError, NotStorable) as error:
            reason = "it contains a lone surrogate" if "surrogates" in str(error) else str(error)
            raise InvalidArgument(f"the payload of {self._job_type} cannot be stored: {reason}") from None
        return text

    def _decode_typed(self, stored: Any) -> Any:
        text = bytes(stored) if type(stored) in RAW else to_json_text(stored)
        return self._validate(text, InvalidInput)

    def _decode_object(self, stored: Any) -> Any:
        value = from_json(stored)
        if type(value) is not dict:
            raise InvalidInput(
                f"the payload of {self._job_type} must be an object, not {type(value).__name__}", code=INVALID_PAYLOAD
            )
        return value

    def _validate(self, text: str | bytes, error_type: type[InvalidArgument] | type[InvalidInput]) -> Any:
        from pydantic import ValidationError

        assert self._adapter is not None
        try:
            return self._adapter.validate_json(text)
        except ValidationError as error:
            message = f"the payload of {self._job_type} is not valid: {_problems(error)}"
            if error_type is InvalidInput:
                raise InvalidInput(message, code=INVALID_PAYLOAD) from None
            raise InvalidArgument(message, details={"job_type": self._job_type}) from None


def encode_payload(value: Any, what: str) -> str:
    """Return any payload as JSON text; None is `{}`. Raises InvalidArgument if it cannot be stored."""
    if value is None:
        return "{}"
    try:
        return to_json_text(value)
    except NotStorable as error:
        raise InvalidArgument(f"the payload of {what} cannot be stored: {error}") from None


def _problems(error: Any) -> str:
    """What is wrong where, at most five; never the values: they may be secrets."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    shown = [f"{'.'.join(map(str, problem['loc'])) or 'it'}: {problem['msg']}" for problem in found[:5]]
    more = [f"and {len(found) - 5} more"] if len(found) > 5 else []
    return "; ".join(shown + more)


def _is_plain_object(annotation: Any) -> bool:
    """dict, Mapping and dict[str, Any] take any JSON object as it is."""
    origin = typing.get_origin(annotation) or annotation
    if origin not in (dict, Mapping, MutableMapping):
        return False
    return typing.get_args(annotation) in ((), (str, Any), (str, object))


def _adapter(annotation: Any, job_type: str) -> Any:
    from pydantic import PydanticSchemaGenerationError, PydanticUndefinedAnnotation, TypeAdapter

    try:
        return TypeAdapter(annotation)
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation) as error:
        raise TypeError(
            f"the handler of {job_type} takes {annotation!r}, which cannot be checked: "
            f"use a pydantic model, a dataclass or a dict ({error})"
        ) from None


def without_none(annotation: Any) -> Any:
    """Return X for `X | None`, anything else as it is."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return annotation
