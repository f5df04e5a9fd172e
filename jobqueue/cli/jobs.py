"""`jobqueue jobs`: look at jobs, wait for them, act on them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, LiteralString

import click

from jobqueue.cli.options import dsn_option, output_option, reason_option
from jobqueue.cli.output import emit_object, emit_rows, to_json

if TYPE_CHECKING:
    from jobqueue.client import Action
    from jobqueue.records import JobRecord

STATUSES = ("blocked", "pending", "processing", "paused", "completed", "failed", "cancelled", "skipped")
LIST_COLUMNS = ("id", "queue", "job_type", "status", "progress_pct", "display_name", "created_at")
BULK_ACTIONS = ("cancel", "pause", "resume", "retry", "restart", "skip", "run_now", "delete")
END_COLUMNS = ("id", "status", "result", "error_code", "error_message")

_job = click.argument("job_id", metavar="ID")


@click.group()
def group() -> None:
    """Look at jobs, wait for them, act on them. Every action needs a reason, which the audit keeps."""


@group.command("list")
@dsn_option
@click.option("--status", type=click.Choice(STATUSES), multiple=True, help="Only these; may be repeated.")
@click.option("--queue", help="Only this queue.")
@click.option("--job-type", help="Only this job_type.")
@click.option("--tenant", help="Only this tenant.")
@click.option("--subject", help="Only jobs about this.")
@click.option("--key", "singleton_key", help="Only jobs with this singleton_key.")
@click.option("--error-class", help="Only jobs whose last error is of this class.")
@click.option("--payload", metavar="JSON", help="Only jobs whose payload contains this.")
@click.option("--metadata", metavar="JSON", help="Only jobs whose metadata contain this.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="How many at most.")
@output_option
def list_(dsn: str | None, status: tuple[str, ...], limit: int, output: str, **filters: Any) -> None:
    """Print jobs, newest first."""
    from jobqueue.cli.session import session
    from jobqueue.client import blocking
    from jobqueue.finding import find_jobs

    contained = {name: parse_json(name, filters.pop(name)) for name in ("payload", "metadata")}
    wanted = {**filters, **contained, "status": status or None}
    with session(dsn) as connection:
        records = blocking(find_jobs(connection, wanted, max_jobs=limit, order="newest"))
    emit_rows([record.model_dump() for record in records], LIST_COLUMNS, output)


@group.command()
@_job
@dsn_option
@output_option
def get(job_id: str, dsn: str | None, output: str) -> None:
    """Print one job; as a table only what is known of it."""
    from jobqueue.cli.session import session
    from jobqueue.client import blocking
    from jobqueue.client import get as get_job

    with session(dsn) as connection:
        row = blocking(get_job(connection, job_id)).model_dump()
    emit_object({name: value for name, value in row.items() if output != "table" or value is not None}, output)


@group.command()
@_job
@dsn_option
@output_option
def explain(job_id: str, dsn: str | None, output: str) -> None:
    """Say why a job is not running, or why it ended as it did, and what to do."""
    from jobqueue.cli.session import rows_of, session
    from jobqueue.client import as_job_id

    known_id = as_job_id(job_id)
    with session(dsn) as connection:
        rows = rows_of(connection, "select * from jobqueue.explain(%s)", (known_id,))
    emit_rows(rows, ("reason", "detail", "what_to_do"), output)


@group.command()
@_job
@dsn_option
@click.option("--timeout", type=float, metavar="SECONDS", help="Give up after this time.  [default: never]")
@output_option
def watch(job_id: str, dsn: str | None, timeout: float | None, output: str) -> None:
    """Show a job's progress until it ends; with `-o jsonl` every version of it on stdout.

    Exit codes: 0 completed, 1 any other end, 3 no such job, 5 time-out.
    """
    from jobqueue.cli.following import end_of
    from jobqueue.cli.progress import progress_view
    from jobqueue.settings import load_settings

    settings = load_settings(dsn=dsn)
    if output == "jsonl":
        record = end_of(settings, job_id, timeout=timeout, show=_print_version)
        finish(record, None)
    with progress_view() as show:
        record = end_of(settings, job_id, timeout=timeout, show=show)
    finish(record, output)


@group.command()
@_job
@dsn_option
@click.option("--timeout", type=float, metavar="SECONDS", help="Give up after this time.  [default: never]")
@output_option
def wait(job_id: str, dsn: str | None, timeout: float | None, output: str) -> None:
    """Wait until a job has ended, in silence, and print how.

    Exit codes: 0 completed, 1 any other end, 3 no such job, 5 time-out.
    """
    from jobqueue.cli.following import end_of
    from jobqueue.settings import load_settings

    finish(end_of(load_settings(dsn=dsn), job_id, timeout=timeout, show=lambda record: None), output)


def finish(record: JobRecord, output: str | None) -> None:
    """Print how a job ended (None: nothing) and exit with the code that says so."""
    from jobqueue.cli.following import exit_code_of

    if output == "table":
        emit_rows([record.model_dump()], END_COLUMNS)
    elif output is not None:
        emit_object(record.model_dump(), output)
    raise click.exceptions.Exit(exit_code_of(record))


@group.command()
@_job
@dsn_option
@reason_option
@click.option("--from-start", is_flag=True, help="Also drop checkpoint, done keys and stage outputs.")
@output_option
def retry(job_id: str, dsn: str | None, reason: str, from_start: bool, output: str) -> None:
    """Run a failed job again, at once; it keeps its partial progress."""
    _act(dsn, "retry", job_id, reason, output, from_start=from_start)


@group.command()
@_job
@dsn_option
@reason_option
@click.option("--force", is_flag=True, help="At once: do not wait for the worker, whose claim becomes stale.")
@output_option
def cancel(job_id: str, dsn: str | None, reason: str, force: bool, output: str) -> None:
    """Stop a job; one that runs is asked to stop."""
    _act(dsn, "cancel", job_id, reason, output, force=force)


@group.command()
@_job
@dsn_option
@reason_option
@output_option
def skip(job_id: str, dsn: str | None, reason: str, output: str) -> None:
    """Go on without a failed job."""
    _act(dsn, "skip", job_id, reason, output)


@group.command()
@_job
@dsn_option
@reason_option
@output_option
def pause(job_id: str, dsn: str | None, reason: str, output: str) -> None:
    """Hold a waiting job; one that runs stops at its next pause-safe checkpoint."""
    _act(dsn, "pause", job_id, reason, output)


@group.command()
@_job
@dsn_option
@reason_option
@output_option
def resume(job_id: str, dsn: str | None, reason: str, output: str) -> None:
    """Take up a paused or cancelled job again, where it was."""
    _act(dsn, "resume", job_id, reason, output)


@group.command("run-now")
@_job
@dsn_option
@reason_option
@output_option
def run_now(job_id: str, dsn: str | None, reason: str, output: str) -> None:
    """Do not wait for the time that the job was sent for."""
    _act(dsn, "run_now", job_id, reason, output)


@group.command(context_settings={"ignore_unknown_options": True})
@_job
@click.argument("priority", type=int)
@dsn_option
@reason_option
@output_option
def prioritize(job_id: str, priority: int, dsn: str | None, reason: str, output: str) -> None:
    """Give a waiting job another priority; higher runs first."""
    _act(dsn, "prioritize", job_id, reason, output, priority=priority)


@group.command()
@_job
@dsn_option
@reason_option
@output_option
def delete(job_id: str, dsn: str | None, reason: str, output: str) -> None:
    """Delete an ended job with all that hangs on it; prints the status that it had."""
    _act(dsn, "delete", job_id, reason, output)


@group.command()
@click.argument("action", type=click.Choice(BULK_ACTIONS))
@dsn_option
@click.option("--status", type=click.Choice(STATUSES), multiple=True, help="Those in this status; may be repeated.")
@click.option("--id", "ids", type=click.UUID, multiple=True, help="This one; may be repeated.")
@click.option("--queue", help="Those of this queue.")
@click.option("--job-type", help="Those of this job_type.")
@click.option("--tenant", help="Those of this tenant.")
@click.option("--subject", help="Those about this.")
@click.option("--error-class", help="Those whose last error is of this class.")
@click.option("--error-code", help="Those whose last error has this code.")
@click.option("--created-before", metavar="TIME", help="RFC 3339 with an offset, such as 2030-01-31T12:00:00Z.")
@click.option("--created-after", metavar="TIME", help="Likewise.")
@click.option("--ended-after", metavar="TIME", help="Likewise.")
@click.option("--dry-run", is_flag=True, help="Count only.")
@click.option(
    "--expected-count", type=int, metavar="N", help="Refuse if it is over 10 % more than N.  [default: as asked]"
)
@reason_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_option
def bulk(
    action: str,
    dsn: str | None,
    reason: str,
    dry_run: bool,
    expected_count: int | None,
    yes: bool,
    output: str,
    **filters: Any,
) -> None:
    """Do one action with all jobs that the options name, and print how many jobs had which outcome.

    Outcomes: done, asked (its worker), unchanged (it is so already), refused, gone. Without --yes it counts first, and asks.
    """
    from jobqueue.cli.session import as_actor, rows_of, session

    query: LiteralString = "select * from jobqueue.bulk(%s, %s::text::jsonb, %s, %s, %s)"
    text = to_json({name: value for name, value in filters.items() if value not in (None, ())})
    with session(dsn) as connection:
        if not (dry_run or yes):
            seen = rows_of(connection, query, (action, text, reason, True, expected_count))
            expected_count = _confirmed(action, seen, expected_count)
        with as_actor(connection):
            rows = rows_of(connection, query, (action, text, reason, dry_run, expected_count))
    emit_rows(rows, ("outcome", "jobs"), output)


def _confirmed(action: str, seen: list[dict[str, Any]], expected_count: int | None) -> int:
    """Ask whether to go on with what a dry run has counted; return how many jobs are then expected."""
    counts = ", ".join(f"{row['outcome']} {row['jobs']}" for row in seen) or "no job"
    click.confirm(f"{action}: {counts}. Go on?", abort=True, err=True)
    return sum(row["jobs"] for row in seen) if expected_count is None else expected_count


def parse_json(name: str, text: str | None) -> Any:
    """Return the value of an option that is JSON; None if it is not given. Raises BadParameter for what is not JSON."""
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"it is not JSON: {error}", param_hint=f"--{name}") from None


def _act(dsn: str | None, action: Action, job_id: str, reason: str, output: str, **arguments: Any) -> None:
    from jobqueue.cli.session import as_actor, session
    from jobqueue.client import act, as_job_id, blocking

    known_id = as_job_id(job_id)
    with session(dsn) as connection, as_actor(connection):
        status = blocking(act(connection, action, known_id, reason, **arguments))
    emit_rows([{"id": known_id, "status": status}], ("id", "status"), output)


def _print_version(record: JobRecord) -> None:
    click.echo(to_json(record.model_dump()))
