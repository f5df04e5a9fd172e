"""`jobqueue worker`: run the jobs of an application until told to stop."""

from __future__ import annotations

import asyncio
import faulthandler
import importlib
import io
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from jobqueue.errors import ConfigurationError

if TYPE_CHECKING:
    from jobqueue.app import App
    from jobqueue.worker.worker import Worker

logger = logging.getLogger(__name__)


@click.command()
@click.argument("application", metavar="PKG.MODULE[:APP]", required=False)
@click.option("--queues", metavar="A,B", help="Only these queues.  [default: JOBQUEUE_QUEUES, else all of the app's]")
@click.option("--concurrency", type=click.IntRange(1), help="Jobs at a time, per process.  [default: 100]")
@click.option("--processes", type=click.IntRange(1), help="Worker processes.  [default: 1]")
@click.option("--until-idle", is_flag=True, help="End when no job is ready any more.")
@click.option("--supervised-by", type=int, hidden=True)
def command(
    application: str | None,
    queues: str | None,
    concurrency: int | None,
    processes: int | None,
    until_idle: bool,
    supervised_by: int | None,
) -> None:
    """Run jobs. The application is JOBQUEUE_APP unless it is given.

    SIGTERM or SIGINT: claim nothing more and let the running jobs finish (JOBQUEUE_DRAIN_TIMEOUT, 60 s); once more:
    give them back at once. SIGUSR1: claim nothing more, but stay. SIGUSR2: log what runs, with stacks.
    """
    from jobqueue.settings import load_settings
    from jobqueue.telemetry.log import configure_logging

    if supervised_by is not None:
        from jobqueue.worker.process_child import die_with_parent

        die_with_parent(supervised_by, signal.SIGTERM)
    settings = load_settings(queues=queues, concurrency=concurrency, processes=processes)
    configure_logging(settings.log_level, settings.log_format)
    reference = application or settings.app
    if not reference:
        raise ConfigurationError(
            "no application is named", hint="jobqueue worker pkg.module[:app], or set JOBQUEUE_APP."
        )
    app = load_app(reference)
    if settings.processes > 1 and supervised_by is None:
        raise click.exceptions.Exit(_supervise(settings.processes, reference, queues, concurrency, until_idle))
    _run(_work(app, settings.queues, settings.concurrency, until_idle))


def load_app(reference: str) -> App:
    """Import `pkg.module[:app]`. Raises ConfigurationError (exit code 78) that says what was not found."""
    from jobqueue.app import App

    module_name, _, attribute = reference.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigurationError(f"{module_name} cannot be imported: {error}", hint="Install it.") from error
        raise ConfigurationError(
            f"there is no module {error.name}",
            hint=f"It was looked for in {os.getcwd()} and among the installed packages.",
        ) from error
    found: Any = module
    for name in (attribute or "app").split("."):
        found = getattr(found, name, None)
    if "procrastinate" in sys.modules and not isinstance(found, App):
        found = _adopted(found)
    if not isinstance(found, App):
        what = "nothing" if found is None else f"a {type(found).__name__}"
        raise ConfigurationError(
            f"{module_name}:{attribute or 'app'} is {what}, not a jobqueue.App or a procrastinate.App",
            hint=f"Name it: jobqueue worker {module_name}:NAME",
        )
    return found


def _adopted(found: Any) -> Any:
    """Return a procrastinate application as one of ours; anything else as it is."""
    import procrastinate

    if not isinstance(found, procrastinate.App):
        return found
    from jobqueue.procrastinate import adopt

    return adopt(found)


def _supervise(processes: int, reference: str, queues: str | None, concurrency: int | None, until_idle: bool) -> int:
    from jobqueue.worker.supervisor import Supervisor, worker_command

    arguments = [reference]
    arguments += ["--queues", queues] if queues else []
    arguments += ["--concurrency", str(concurrency)] if concurrency else []
    arguments += ["--until-idle"] if until_idle else []

    async def supervise() -> int:
        return await Supervisor(processes, worker_command(arguments)).run()

    return asyncio.run(supervise())


def _run(main: Any) -> None:
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main)


async def _work(app: App, queues: tuple[str, ...] | None, concurrency: int, until_idle: bool) -> None:
    from jobqueue.telemetry.systemd import Notifier, Reporter
    from jobqueue.worker.process import ProcessPool

    notifier = Notifier()
    worker: Worker | None = None
    reporter = Reporter(notifier, lambda: status_line(worker))
    reporter.start()
    settings = app.settings
    needs_processes = any(handler.executor == "process" for handler in app.registry.values())
    try:
        worker = await app.make_worker(
            queues,
            concurrency,
            until_idle,
            drain_timeout=settings.drain_timeout,
            start_timeout=settings.start_timeout,
            listen_dsn=settings.listen_dsn,
            pooler=settings.pooler,
            poll=settings.poll_interval,
            classify=app.classify,
            processes=ProcessPool(os.cpu_count() or 1) if needs_processes else None,
            on_ready=reporter.ready,
        )
        await _run_with_signals(worker, reporter.stopping)
    finally:
        notifier.stopping("stopped")
        await reporter.stop()


async def _run_with_signals(worker: Worker, stopping: Any) -> None:
    loop = asyncio.get_running_loop()
    running = asyncio.ensure_future(worker.run())
    asked = 0

    def stop() -> None:
        nonlocal asked
        asked += 1
        stopping()
        if worker.status().state == "starting":
            # It may be waiting for a database; nothing is claimed yet.
            running.cancel()
        elif asked == 1:
            logger.info("draining; once more to give the jobs back at once", extra={"event": "worker.draining"})
            worker.drain()
        else:
            worker.release_now()

    def quiet() -> None:
        logger.info("quiet: no job is claimed any more", extra={"event": "worker.quiet"})
        worker.quiet()

    for number, handler in (
        (signal.SIGTERM, stop),
        (signal.SIGINT, stop),
        (signal.SIGUSR1, quiet),
        (signal.SIGUSR2, lambda: dump(worker)),
    ):
        loop.add_signal_handler(number, handler)
    try:
        await running
    except asyncio.CancelledError:
        if not asked:
            raise


def status_line(worker: Worker | None) -> str:
    """What `systemctl status` shows of a worker."""
    if worker is None:
        return "starting"
    now = worker.status()
    stuck = f", {now.stuck} stuck" if now.stuck else ""
    waiting = f"{now.prefetched} waiting here"
    return f"{now.state} · {now.running} running{stuck}, {waiting} · {now.done:,} done, {now.failed:,} failed"


def dump(worker: Worker) -> None:
    """Log the running jobs, and the stacks of all tasks and threads."""
    loop = asyncio.get_running_loop()
    for held in list(worker.held.values()):
        if held.started and not held.settled:
            logger.warning(
                "running for %.1f s",
                loop.time() - held.started_at,
                extra={"event": "worker.dump", "job_id": held.id, "job_type": held.claim.job_type},
            )
    for task in asyncio.all_tasks():
        text = io.StringIO()
        task.print_stack(file=text)
        logger.warning("%s", text.getvalue().rstrip(), extra={"event": "worker.dump"})
    faulthandler.dump_traceback(all_threads=True)
