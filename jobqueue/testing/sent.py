"""What was sent: looked up in the database, compared like a person would."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg

from jobqueue import client
from jobqueue.app import App
from jobqueue.errors import InvalidArgument
from jobqueue.options import encode_options
from jobqueue.records import COLUMNS, JobRecord

MOST_SHOWN = 5
DELAY_TOLERANCE = 1.0
"""Seconds by which a `delay` may be off: `run_at` is counted from the start of the transaction."""

# Options whose column has another name; the others have a column of their own, or lie in job.options.
_COLUMN_OF = {"group": "group_key", "batch": "batch_id"}
_NOT_KEPT = frozenset(
    {
        "depends_on",
        "on_failure",
        "stages",
        "slot_until",
        "merge_payload",
        "throttle_seconds",
        "debounce_seconds",
        "tier",
    }
)
_JOBS = f"""
    select {", ".join(f"v.{column}" for column in COLUMNS)}, coalesce(j.options, '{{}}') as options
    from jobqueue.jobs v join jobqueue.job j on j.id = v.id
    where (%s::text is null or v.queue = %s) and (%s::text is null or v.job_type = %s)
    order by v.created_at, v.id
"""  # noqa: S608


def assert_sent(
    where: App | psycopg.Connection[Any],
    name: str | Callable[..., Any] | None = None,
    payload: Any = None,
    *,
    queue: str | None = None,
    count: int | None = None,
    **options: Any,
) -> JobRecord:
    """Assert that a job was sent, and return it (the newest one that fits).

    `where`: an app; or a connection, to look inside of a transaction that is still open. `name`: the job_type, or the
    handler's function. `payload`: what the payload must contain: objects may have more members, at every level; models
    are compared by what they store. `queue`: its name. `count`: exactly so many must fit (default: at least one).
    `options`: of `send`, as they were given: `priority=5`, `tenant="acme"`, `delay="1 hour"`, `metadata={…}` (contained).

    Raises AssertionError that shows the jobs that come closest and what is different about them; InvalidArgument for an
    option that cannot be looked up.
    """
    wanted = _Wanted(_name_of(where, name), payload, queue, options)
    jobs = _read(where, None, None)
    fitting = [job for job in jobs if not wanted.differences(*job)]
    if not fitting or count not in (None, len(fitting)):
        raise AssertionError(_complaint(wanted, jobs, len(fitting), count))
    return fitting[-1][0]


def assert_not_sent(
    where: App | psycopg.Connection[Any],
    name: str | Callable[..., Any] | None = None,
    payload: Any = None,
    *,
    queue: str | None = None,
    **options: Any,
) -> None:
    """Assert that no such job was sent; arguments as of `assert_sent`. Raises AssertionError with those that were."""
    wanted = _Wanted(_name_of(where, name), payload, queue, options)
    found = [job for job, stored in _read(where, None, None) if not wanted.differences(job, stored)]
    if found:
        shown = "".join(f"\n  {_line(job)}" for job in found[:MOST_SHOWN])
        raise AssertionError(f"{len(found)} jobs were sent that are {wanted.text}:{shown}")


def sent_jobs(
    where: App | psycopg.Connection[Any], name: str | Callable[..., Any] | None = None, *, queue: str | None = None
) -> list[JobRecord]:
    """Return all jobs in the order of sending; `name` and `queue` choose among them."""
    return [job for job, _ in _read(where, queue, _name_of(where, name))]


class _Wanted:
    """What a job must be like."""

    def __init__(self, name: str | None, payload: Any, queue: str | None, options: Mapping[str, Any]) -> None:
        self._same: dict[str, Any] = {}
        if name is not None:
            self._same["job_type"] = name
        if queue is not None:
            self._same["queue"] = queue
        self._payload = None if payload is None else _as_json(payload)
        # Checks the names too, and turns durations into seconds.
        encode_options(options, "assert_sent")
        self._options = dict(options)
        if unknown := options.keys() & _NOT_KEPT:
            raise InvalidArgument(f"{min(unknown)} is not kept in a form that could be compared")
        shown = {**self._same, **({} if payload is None else {"payload": self._payload}), **options}
        self.text = ", ".join(f"{key}={value!r}" for key, value in shown.items()) or "anything"

    def differences(self, job: JobRecord, stored: Mapping[str, Any]) -> list[str]:
        found = [
            f"{name} is {getattr(job, name)!r}" for name, value in self._same.items() if getattr(job, name) != value
        ]
        if self._payload is not None:
            found += _missing("payload", self._payload, job.payload)
        for name, value in self._options.items():
            found += _option_differences(name, value, job, stored)
        return found


def _option_differences(name: str, value: Any, job: JobRecord, stored: Mapping[str, Any]) -> list[str]:
    if name == "delay":
        seconds = encode_options({"delay": value}, "assert_sent")["delay"]
        waits = (job.run_at - job.created_at).total_seconds()
        return [] if abs(waits - _seconds(seconds)) <= DELAY_TOLERANCE else [f"delay is {timedelta(seconds=waits)}"]
    column = _COLUMN_OF.get(name, name)
    if column in COLUMNS:
        actual = getattr(job, column)
        if isinstance(value, Mapping):
            return _missing(name, _as_json(value), actual or {})
        if isinstance(actual, UUID):
            value = UUID(str(value))
        if isinstance(actual, datetime) and not isinstance(value, datetime):
            value = datetime.fromisoformat(str(value))
        return [] if actual == value else [f"{name} is {actual!r}"]
    actual = stored.get(name)
    wanted = encode_options({name: value}, "assert_sent").get(name)
    if isinstance(actual, int | float) and not isinstance(wanted, bool):
        wanted = None if wanted is None else _seconds(wanted)
    shown = int(actual) if isinstance(actual, float) and actual.is_integer() else actual
    return [] if actual == wanted else [f"{name} is {shown!r}"]


def _missing(path: str, wanted: Any, actual: Any) -> list[str]:
    """What is not contained, with the place where."""
    if isinstance(wanted, dict) and isinstance(actual, dict):
        found: list[str] = []
        for key, value in wanted.items():
            place = f"{path}.{key}"
            found += _missing(place, value, actual[key]) if key in actual else [f"{place} is missing"]
        return found
    return [] if wanted == actual else [f"{path} is {actual!r}"]


def _read(
    where: App | psycopg.Connection[Any], queue: str | None, name: str | None
) -> list[tuple[JobRecord, dict[str, Any]]]:
    parameters = (queue, queue, name, name)
    if isinstance(where, App):
        with where._lend_blocking(None) as lent:
            rows = client.blocking(client.fetch(lent, _JOBS, parameters))
    else:
        rows = client.blocking(client.fetch(where, _JOBS, parameters))
    return [(JobRecord.model_validate(dict(zip(COLUMNS, row[:-1], strict=True))), row[-1]) for row in rows]


def _complaint(wanted: _Wanted, jobs: list[tuple[JobRecord, dict[str, Any]]], fitting: int, count: int | None) -> str:
    if fitting:
        return f"{fitting} jobs were sent that are {wanted.text}, not {count}"
    if not jobs:
        return f"no job was sent that is {wanted.text}: no job was sent at all"
    ranked = sorted(((wanted.differences(*job), job[0]) for job in jobs), key=lambda pair: len(pair[0]))
    shown = "".join(f"\n  {_line(job)}\n    but {'; '.join(why)}" for why, job in ranked[:MOST_SHOWN])
    more = f"\n  and {len(jobs) - MOST_SHOWN} more" if len(jobs) > MOST_SHOWN else ""
    return f"no job was sent that is {wanted.text}; the closest:{shown}{more}"


def _line(job: JobRecord) -> str:
    text = json.dumps(job.payload, ensure_ascii=False)
    return f"{job.job_type} in {job.queue}, {job.status}: {text if len(text) <= 200 else text[:200] + '…'}"


def _name_of(where: object, name: Any) -> str | None:
    if name is None or isinstance(name, str):
        return name
    handler = where.registry.of_function(name) if isinstance(where, App) else None
    return handler.name if handler is not None else str(getattr(name, "__name__", name))


def _as_json(value: Any) -> Any:
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value)


def _seconds(value: Any) -> float:
    from jobqueue.durations import parse_duration

    return parse_duration(value)
