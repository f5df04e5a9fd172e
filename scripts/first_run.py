"""What `scripts/run` runs: all of jobqueue on this machine, and one real job on the files of this repository."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from jobqueue.cli import report
from jobqueue.cli.following import exit_code_of, follow
from jobqueue.cli.output import emit_object
from jobqueue.cli.progress import progress_view
from jobqueue.cli.stack import Stack
from jobqueue.client import Sent
from jobqueue.database.dsn import mask_dsn
from jobqueue.records import JobRecord
from jobqueue.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / ".jobqueue" / "logs"
APP = "examples.index_repository.app:app"


def main() -> int:
    """Run the main job; stay up afterwards unless `--exit` was given. Returns the job's exit code."""
    parser = argparse.ArgumentParser(prog="scripts/run", description="See jobqueue index its own repository.")
    parser.add_argument("--exit", action="store_true", help="end with the job's exit code instead of staying up")
    stays = not parser.parse_args().exit
    try:
        return _run(stays)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        exit_code = report(error)
        if exit_code is None:
            raise
        return exit_code


def _run(stays: bool) -> int:
    settings = load_settings()
    with Stack(settings, logs=LOGS, directory=ROOT) as stack:
        for line in stack.open_database():
            _say(line)
        _say(f"database: {mask_dsn(stack.dsn) or 'as the PG* variables say'}")
        address = stack.start_api()
        stack.start_worker(APP)
        record = _run_job(stack)
        _print_result(record)
        if stays:
            _say(f"API: {address}/jobs/{record.id}")
            if dashboard := stack.dashboard(address):
                _say(f"dashboard: {dashboard}")
            _say("ctrl-C stops everything")
            stack.wait()
    return exit_code_of(record)


def _run_job(stack: Stack) -> JobRecord:
    sent = _send(stack.dsn)
    record = None
    with progress_view() as show:
        for record in follow(stack.settings, sent.id, check=stack.check):
            show(record)
    assert record is not None
    return record


def _send(dsn: str) -> Sent:
    os.environ["JOBQUEUE_DSN"] = dsn
    sys.path.insert(0, str(ROOT))
    from examples.index_repository.app import app

    return app.send_sync("index_repository", {"path": ".", "ref": "HEAD"})


def _print_result(record: JobRecord) -> None:
    result = record.result if isinstance(record.result, dict) else {"result": record.result}
    emit_object({"status": record.status, **result, **(record.stats or {})})


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
