"""`jobqueue send`: add a job."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from jobqueue.cli.options import dsn_option, output_option
from jobqueue.cli.output import emit_object, to_json

if TYPE_CHECKING:
    from jobqueue.client import Sent

# These stay text even if they look like a number; all others are read as JSON where that is possible.
TEXT_OPTIONS = frozenset(
    {"created_by", "dead_letter", "display_name", "group", "id", "job_type", "singleton_key"}
    | {"slot_until", "subject", "tenant", "tier"}
)


@click.command()
@click.argument("queue")
@click.argument("payload", default="{}")
@dsn_option
@click.option("--job-type", metavar="NAME", help="Which handler runs it.  [default: the queue's name]")
@click.option("--delay", metavar="DURATION", help="Run it after this time: 90, '5 min', PT5M.")
@click.option("--priority", type=int, metavar="N", help="Higher runs first.  [default: 0]")
@click.option("--option", "pairs", multiple=True, metavar="KEY=VALUE", help="Any option of send; may be repeated.")
@click.option("--wait", is_flag=True, help="Show its progress until it has ended; exit codes as of `jobs wait`.")
@click.option("--timeout", type=float, metavar="SECONDS", help="With --wait: give up after this time.")
@output_option
def command(
    queue: str,
    payload: str,
    dsn: str | None,
    job_type: str | None,
    delay: str | None,
    priority: int | None,
    pairs: tuple[str, ...],
    wait: bool,
    timeout: float | None,
    output: str,
) -> None:
    """Add a job to QUEUE and print its id. PAYLOAD is JSON, or - for stdin."""
    from jobqueue.cli.session import session
    from jobqueue.client import blocking, send

    options = parse_options(pairs) | _given(job_type=job_type, delay=_seconds(delay), priority=priority)
    text = parse_payload(payload)
    with session(dsn) as connection:
        sent = blocking(send(connection, queue, text, to_json(options)))
    if not sent.created:
        click.echo(f"jobqueue: no new job ({sent.reason}): another one stands in its place", err=True)
    if wait and sent.id is not None:
        _wait(dsn, sent, timeout, output)
    elif output == "table":
        click.echo(sent.id or "")
    else:
        emit_object(sent._asdict(), output)


def _wait(dsn: str | None, sent: Sent, timeout: float | None, output: str) -> None:
    from jobqueue.cli.following import end_of
    from jobqueue.cli.jobs import finish
    from jobqueue.cli.progress import progress_view
    from jobqueue.settings import load_settings

    with progress_view() as show:
        record = end_of(load_settings(dsn=dsn), sent.id, timeout=timeout, show=show)
    finish(record, output)


def parse_payload(given: str) -> str:
    """Return a payload as JSON text; `-` reads stdin. Raises BadParameter for what is not JSON."""
    text = sys.stdin.read() if given == "-" else given
    try:
        json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"it is not JSON: {error}", param_hint="PAYLOAD") from None
    return text


def parse_options(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Return `KEY=VALUE` pairs as options, for the database to judge. Raises BadParameter for what is no pair."""
    options = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--option")
        options[name] = value if name in TEXT_OPTIONS else _value(value)
    return options


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _seconds(delay: str | None) -> float | None:
    from jobqueue.durations import parse_duration

    if delay is None:
        return None
    try:
        return parse_duration(delay)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--delay") from None
