"""`jobqueue keys`: who may use the HTTP API."""

from __future__ import annotations

from typing import Any

import click

from jobqueue.cli.options import dsn_option, output_option, reason_option
from jobqueue.cli.output import emit_object, emit_rows

COLUMNS = ("id", "name", "state", "tenants", "scopes", "subject", "quota_reads", "expires_at", "last_used_at")
EVERYWHERE = "every API process knows within a second"


def _duration(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    from jobqueue.durations import parse_duration

    try:
        return None if value is None else parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx=ctx, param=parameter) from None


@click.group()
def group() -> None:
    """Who may use the HTTP API. Without any key it answers this machine only; with one, nobody without a key."""


@group.command()
@click.option("--name", metavar="TEXT", help="Whose it is, or what it is for.  [default: its id]")
@click.option(
    "--tenant", "--tenants", "tenants", multiple=True, help="A tenant it may use, or *: all; more than once or with "
    "commas.  [default: default; * with the scope admin]"
)  # fmt: skip
@click.option(
    "--scope", "--scopes", "scopes", multiple=True, help="jobs:read, jobs:write, jobs:act, metrics or admin; more than "
    "once or with commas.  [default: the first three]"
)  # fmt: skip
@click.option("--subject", metavar="TEXT", help="Who created_by names in its jobs.")
@click.option("--act-as", is_flag=True, help="It may name another created_by.")
@click.option(
    "--quota", type=click.IntRange(1), help="Reads, writes and streams per hour, each.  [default: any number]"
)
@click.option("--quota-writes", type=click.IntRange(1), help="Writes per hour, if not the same.")
@click.option("--quota-streams", type=click.IntRange(1), help="Streams opened per hour, if not the same.")
@click.option("--expires-in", callback=_duration, metavar="TIME", help='For example "90 days".  [default: never]')
@dsn_option
@output_option
def create(dsn: str | None, output: str, **given: Any) -> None:
    """Make a key and print it, this once: only its hash is stored."""
    from jobqueue.cli.session import as_actor, rows_of, session
    from jobqueue.keys import make_key

    key = make_key()
    query = "select jobqueue.create_api_key(%s, %s, %s::jsonb)"
    with session(dsn) as connection, as_actor(connection):
        rows_of(connection, query, (key.id, key.hash, _options(given)))
    _show(key.id, key.text, output, "created")


@group.command("list")
@click.option("--all", "everyone", is_flag=True, help="Also revoked and expired ones.")
@dsn_option
@output_option
def list_(dsn: str | None, everyone: bool, output: str) -> None:
    """Print the keys, the newest first; never a secret."""
    from jobqueue.cli.session import rows_of, session

    query = "select * from jobqueue.api_keys where %s or state in ('active', 'rotating') order by created_at desc, id"
    with session(dsn) as connection:
        rows = rows_of(connection, query, (everyone,))
    emit_rows(rows, COLUMNS, output)


@group.command()
@click.argument("key", metavar="ID")
@click.option(
    "--overlap",
    callback=_duration,
    metavar="TIME",
    default="1 day",
    show_default=True,
    help="The old one works as long.",
)
@dsn_option
@output_option
def rotate(key: str, overlap: float, dsn: str | None, output: str) -> None:
    """Give a key a new secret and print it, this once. Its quota and its rights stay."""
    from jobqueue.cli.session import as_actor, rows_of, session
    from jobqueue.keys import make_key

    fresh = make_key(_id_of(key))
    query = "select jobqueue.rotate_api_key(%s, %s, %s * interval '1 s')"
    with session(dsn) as connection, as_actor(connection):
        rows_of(connection, query, (fresh.id, fresh.hash, overlap))
    _show(fresh.id, fresh.text, output, f"rotated, the old secret works for {overlap:g} s")


@group.command()
@click.argument("key", metavar="ID")
@dsn_option
@reason_option
def revoke(key: str, dsn: str | None, reason: str) -> None:
    """Let a key in no more, for good."""
    from jobqueue.cli.session import as_actor, rows_of, session

    with session(dsn) as connection, as_actor(connection):
        rows_of(connection, "select jobqueue.revoke_api_key(%s, %s)", (_id_of(key), reason))
    click.echo(f"key {_id_of(key)} is revoked: {EVERYWHERE}", err=True)


def _id_of(given: str) -> str:
    """The id in what was given: an id, or a whole key."""
    from jobqueue.keys import PREFIX

    return given.removeprefix(PREFIX).split("_")[0]


def _show(key_id: str, text: str, output: str, what: str) -> None:
    if output == "table":
        click.echo(text)
    else:
        emit_object({"id": key_id, "key": text}, output)
    click.echo(f"key {key_id} is {what}: {EVERYWHERE}. It is not shown again.", err=True)


def _options(given: dict[str, Any]) -> str:
    from jobqueue.cli.output import to_json

    tenants, scopes = _split(given["tenants"]), _split(given["scopes"])
    if not tenants and "admin" in scopes:
        tenants = ["*"]
    quota = given["quota"]
    options = {
        "name": given["name"],
        "tenants": tenants or None,
        "scopes": scopes or None,
        "subject": given["subject"],
        "act_as": given["act_as"] or None,
        "quota_reads": quota,
        "quota_writes": given["quota_writes"] or quota,
        "quota_streams": given["quota_streams"] or quota,
        "expires_in": given["expires_in"],
    }
    return to_json({name: value for name, value in options.items() if value is not None})


def _split(values: tuple[str, ...]) -> list[str]:
    return [part.strip() for value in values for part in value.split(",") if part.strip()]
