"""The options of `send` as Python passes them, and as the database reads them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

from jobqueue.errors import InvalidArgument, UnknownOption
from jobqueue.json_text import NotStorable, to_json_text

OPTIONS = frozenset(
    {
        "job_type", "priority", "run_at", "delay", "singleton_key", "throttle_seconds", "debounce_seconds",
        "slot_until", "merge_payload", "group", "tier", "tenant", "subject", "display_name", "metadata", "created_by",
        "max_retries", "retry_delay", "retry_backoff", "retry_delay_max", "timeout", "max_runtime", "lease",
        "expires_in", "keep_completed", "keep_ended", "dead_letter", "stages", "id", "depends_on", "on_failure", "batch",
        "trace_context",
    }
)  # fmt: skip
"""What `jobqueue.job_options()` knows; a test compares the two."""

NULL_MEANS_NONE = frozenset(
    {"timeout", "max_runtime", "expires_in", "keep_completed", "keep_ended", "retry_delay_max", "dead_letter"}
)
"""Options for which None is a value (no limit, for ever, nowhere); for all others None means "not given"."""


def encode_options(options: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return options with values that JSON has: durations in seconds, times in UTC; what is not given is left out.

    `what` names the call in messages. Raises UnknownOption with the nearest name, InvalidArgument for a time without an
    offset and for values that JSON cannot hold.
    """
    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        raise _unknown_option(unknown[0], what)
    return {
        name: _encode(name, value) for name, value in options.items() if value is not None or name in NULL_MEANS_NONE
    }


def merge_options(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a call over those of its job_type; `run_at` and `delay` replace each other."""
    merged = {**defaults, **given}
    if "run_at" in given and "delay" not in given:
        merged.pop("delay", None)
    elif "delay" in given and "run_at" not in given:
        merged.pop("run_at", None)
    return merged


def options_text(options: Mapping[str, Any]) -> str:
    """Return encoded options as JSON text. Raises InvalidArgument if they cannot be stored."""
    try:
        return to_json_text(options) if options else "{}"
    except NotStorable as error:
        raise InvalidArgument(f"the options cannot be stored: {error}", details={"code": "INVALID_ARGUMENT"}) from None


def encode_dependencies(parents: Iterable[Any]) -> list[Any]:
    """Return jobs to wait for as SQL takes them: refs, ids, what `send` answered, or `{"id" or "ref", "on_failure"}`."""
    found: list[Any] = [getattr(parent, "id", parent) for parent in parents]
    return [str(parent) if isinstance(parent, UUID) else parent for parent in found]


def _encode(name: str, value: Any) -> Any:
    if name == "depends_on" and not isinstance(value, str | Mapping):
        return encode_dependencies(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            raise InvalidArgument(
                f"{name} has no time zone: {value.isoformat()}",
                hint="Give an aware datetime, for example datetime.now(timezone.utc) + timedelta(hours=1).",
                details={"option": name},
            )
        return value.astimezone(UTC).isoformat()
    if isinstance(value, date):
        raise InvalidArgument(f"{name} is a date, not a time", hint="Give an aware datetime.", details={"option": name})
    return value


def _unknown_option(name: str, what: str) -> UnknownOption:
    near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.0)
    return UnknownOption(
        f'{what} has no option "{name}"',
        hint=f'Did you mean "{near[0]}"? Known are: {", ".join(sorted(OPTIONS))}.',
        details={"option": name, "nearest": near[0]},
    )
