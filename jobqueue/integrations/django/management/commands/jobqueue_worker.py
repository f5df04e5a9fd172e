"""`manage.py jobqueue_worker`: run Django's tasks until told to stop."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandParser


class Command(BaseCommand):
    """Hands over to `jobqueue worker`: signals, draining and systemd are the same."""

    help = "Run the tasks of jobqueue's backend until SIGTERM or SIGINT."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--queues", help="comma-separated; default: all")
        parser.add_argument("--concurrency", type=int, default=10, help="tasks at a time, each in a thread (10)")
        parser.add_argument("--processes", type=int, help="worker processes (1)")
        parser.add_argument("--until-idle", action="store_true", help="end when no task is ready")

    def handle(self, *args: Any, **options: Any) -> None:
        from jobqueue.cli import main

        arguments = ["worker", "jobqueue.integrations.django.worker:app", "--concurrency", str(options["concurrency"])]
        for name in ("queues", "processes"):
            if options[name] is not None:
                arguments += [f"--{name}", str(options[name])]
        arguments += ["--until-idle"] if options["until_idle"] else []
        main(arguments, prog_name="jobqueue")
