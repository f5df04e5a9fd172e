"""`jobqueue schedules`: what sends jobs at their times."""

from __future__ import annotations

import click

from jobqueue.cli.options import dsn_option, output_option, reason_option
from jobqueue.cli.output import emit_object, emit_rows, to_json
from jobqueue.cli.send import parse_options, parse_payload

COLUMNS = ("name", "queue", "expression", "time_zone", "missed", "state", "next_at", "last_at", "last_error")

_name = click.argument("name")
_time_zone = click.option("--time-zone", metavar="ZONE", help="A name such as Europe/Berlin.  [default: UTC]")


@click.group()
def group() -> None:
    """What sends jobs at their times."""


@group.command("list")
@dsn_option
@output_option
def list_(dsn: str | None, output: str) -> None:
    """Print the schedules by name."""
    from jobqueue.cli.session import rows_of, session

    with session(dsn) as connection:
        rows = rows_of(connection, "select * from jobqueue.schedules order by name")
    emit_rows(rows, COLUMNS, output)


@group.command()
@_name
@click.argument("queue")
@click.argument("expression")
@click.argument("payload", default="{}")
@dsn_option
@_time_zone
@click.option("--missed", type=click.Choice(["skip", "once", "all"]), help="Ticks to make up for.  [default: skip]")
@click.option("--option", "pairs", multiple=True, metavar="KEY=VALUE", help="Any option of send; may be repeated.")
@output_option
def add(
    name: str,
    queue: str,
    expression: str,
    payload: str,
    dsn: str | None,
    time_zone: str | None,
    missed: str | None,
    pairs: tuple[str, ...],
    output: str,
) -> None:
    """Send a job to QUEUE at every tick of EXPRESSION; a schedule of this NAME is replaced.

    EXPRESSION is cron with 5 fields, or 6 with seconds first, or a rule such as 'RRULE:FREQ=DAILY;BYHOUR=9'. PAYLOAD is
    JSON, or - for stdin.
    """
    from jobqueue.cli.session import as_actor, rows_of, session

    given = {"time_zone": time_zone, "missed": missed}
    options = parse_options(pairs) | {key: value for key, value in given.items() if value is not None}
    arguments = (name, queue, expression, parse_payload(payload), to_json(options))
    with session(dsn) as connection, as_actor(connection):
        query = "select jobqueue.schedule(%s, %s, %s, %s::text::jsonb, %s::text::jsonb) as next_at"
        (row,) = rows_of(connection, query, arguments)
    emit_object({"name": name, **row}, output)


@group.command()
@_name
@dsn_option
def remove(name: str, dsn: str | None) -> None:
    """Remove a schedule; the jobs that it has sent stay."""
    from jobqueue.cli.session import as_actor, rows_of, session
    from jobqueue.errors import NotFound

    with session(dsn) as connection, as_actor(connection):
        (row,) = rows_of(connection, "select jobqueue.unschedule(%s) as removed", (name,))
    if not row["removed"]:
        raise NotFound(f'There is no schedule "{name}".', hint="`jobqueue schedules list` lists them.")
    click.echo(f"removed schedule {name}", err=True)


@group.command()
@click.argument("expression")
@dsn_option
@_time_zone
@click.option("--count", type=int, default=5, show_default=True, metavar="N", help="How many ticks, at most 1000.")
@output_option
def preview(expression: str, dsn: str | None, time_zone: str | None, count: int, output: str) -> None:
    """Print when EXPRESSION would happen next, in the session's time zone (PGTZ)."""
    from jobqueue.cli.session import rows_of, session

    with session(dsn) as connection:
        query = "select tick from jobqueue.preview_schedule(%s, %s, %s)"
        rows = rows_of(connection, query, (expression, time_zone, count))
    emit_rows(rows, ("tick",), output)


@group.command()
@_name
@dsn_option
@reason_option
def pause(name: str, dsn: str | None, reason: str) -> None:
    """Send nothing until it is resumed; ticks that come meanwhile are not made up for."""
    from jobqueue.cli.session import as_actor, rows_of, session

    with session(dsn) as connection, as_actor(connection):
        rows_of(connection, "select jobqueue.pause_schedule(%s, %s)", (name, reason))
    click.echo(f"paused schedule {name}", err=True)


@group.command()
@_name
@dsn_option
@reason_option
def resume(name: str, dsn: str | None, reason: str) -> None:
    """Go on with the next tick from now on."""
    from jobqueue.cli.session import as_actor, rows_of, session

    with session(dsn) as connection, as_actor(connection):
        rows_of(connection, "select jobqueue.resume_schedule(%s, %s)", (name, reason))
    click.echo(f"resumed schedule {name}", err=True)
