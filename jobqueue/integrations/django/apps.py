"""The Django application: it has no models, only the command `manage.py jobqueue_worker`."""

from __future__ import annotations

from django.apps import AppConfig


class JobqueueConfig(AppConfig):
    """`"jobqueue.integrations.django"` in INSTALLED_APPS."""

    name = "jobqueue.integrations.django"
    label = "jobqueue"
    verbose_name = "jobqueue"
