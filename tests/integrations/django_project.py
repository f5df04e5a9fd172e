"""A minimal Django project: settings, and tasks at the top of a module as Django asks for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import django
from django.conf import settings
from django.db import connections
from psycopg.conninfo import conninfo_to_dict


def set_up(*, procrastinate: bool = True) -> None:
    """Configure Django once per process, with or without procrastinate's Django app."""
    if settings.configured:
        return
    theirs = ["django.contrib.contenttypes", "procrastinate.contrib.django"] if procrastinate else []
    settings.configure(
        SECRET_KEY="only for tests",
        USE_TZ=True,
        INSTALLED_APPS=["jobqueue.integrations.django", *theirs],
        PROCRASTINATE_ON_APP_READY="jobqueue.procrastinate.django.use_jobqueue",
        DATABASES={
            "default": options_of(os.environ.get("DJANGO_TEST_DSN", "dbname=none")),
            "other": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
        },
        TASKS={
            "default": {
                "BACKEND": "jobqueue.integrations.django.tasks.JobqueueBackend",
                "QUEUES": ["default", "mail"],
                "OPTIONS": {"send": {"max_retries": 1, "retry_delay": 0}},
            },
        },
    )
    django.setup()


def options_of(dsn: str) -> dict[str, Any]:
    """An entry of DATABASES."""
    given = conninfo_to_dict(dsn)
    return {
        "ENGINE": "django.db.backends.postgresql", "NAME": given["dbname"], "HOST": given.get("host", ""),
        "PORT": given.get("port", ""), "USER": given.get("user", ""),
    }  # fmt: skip


@contextlib.contextmanager
def database(dsn: str) -> Iterator[None]:
    """Point Django's default connection to a test's database, in all threads."""
    connections.close_all()
    for name, value in options_of(dsn).items():
        connections["default"].settings_dict[name] = value
        connections.settings["default"][name] = value
    try:
        yield
    finally:
        connections.close_all()
