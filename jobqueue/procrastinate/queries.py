"""Which queries of procrastinate the connector knows, and whether the installed version has exactly those.

procrastinate hands its connector the text of a query. The texts are not documented, so they are compared at the start:
their names and parameters must be the ones below. To raise the pin: install the new version, run
`python -m jobqueue.procrastinate`, look at what changed upstream, adapt `statements.py` and this table, and run
tests/procrastinate, which compares both engines call by call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from types import MappingProxyType

from procrastinate import sql

from jobqueue.errors import ConfigurationError

TESTED = "3.10"
"""The version of procrastinate that the table was made from."""

_LIST = ("lock", "queue_name", "status", "task_name")
_PERIODIC = ("args", "defer_timestamp", "lock", "periodic_id", "priority", "queue", "queueing_lock", "task_name")

KNOWN: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        name: frozenset(parameters)
        for name, parameters in {
            "defer_jobs": ("jobs",),
            "defer_periodic_job": _PERIODIC,
            "fetch_job": ("queues", "worker_id"),
            "select_stalled_jobs_by_started": ("nb_seconds", "queue", "task_name"),
            "select_stalled_jobs_by_heartbeat": ("queue", "seconds_since_heartbeat", "task_name"),
            "delete_old_jobs": ("nb_hours", "queue", "statuses"),
            "finish_job": ("delete_job", "job_id", "status"),
            "cancel_job": ("abort", "delete_job", "job_id"),
            "get_job_status": ("job_id",),
            "retry_job": ("job_id", "new_lock", "new_priority", "new_queue_name", "retry_at"),
            "listen_queue": (),
            "check_connection": (),
            "count_jobs_status": (),
            "list_jobs": ("id", *_LIST, "queueing_lock", "worker_id"),
            "list_queues": _LIST,
            "list_tasks": _LIST,
            "list_locks": _LIST,
            "list_jobs_to_abort": ("queue_name",),
            "register_worker": (),
            "unregister_worker": ("worker_id",),
            "update_heartbeat": ("worker_id",),
            "prune_stalled_workers": ("seconds_since_heartbeat",),
        }.items()
    }
)


def check_queries(installed: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the names of procrastinate's queries by their text.

    `installed`: name → text (default: those of the installed procrastinate). Raises ConfigurationError if they are not
    the ones that the connector knows, with what differs.
    """
    found = dict(sql.queries) if installed is None else dict(installed)
    problems = [f"{name} is new" for name in sorted(found.keys() - KNOWN.keys())]
    problems += [f"{name} is gone" for name in sorted(KNOWN.keys() - found.keys())]
    for name in sorted(found.keys() & KNOWN.keys()):
        parameters = parameters_of(found[name])
        if parameters != KNOWN[name]:
            problems.append(f"{name} takes {', '.join(sorted(parameters)) or 'nothing'}")
    if problems:
        raise ConfigurationError(
            f"procrastinate {version('procrastinate')} has other queries than the connector knows: {'; '.join(problems)}",
            hint=f"Install a version that it was tested with: pip install 'procrastinate=={TESTED}.*'.",
        )
    return {text: name for name, text in found.items()}


def parameters_of(query: str) -> frozenset[str]:
    """Return the names of a query's parameters."""
    return frozenset(re.findall(r"%\((\w+)\)s", query))
