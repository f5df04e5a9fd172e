"""The tables of the history, in the database that is tormented: a change and its record are committed together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import psycopg

from chaos_lab.history import Effect, Final, History, Move, Past, Run
from chaos_lab.plan import QUEUES

ROLE = "chaos"
"""Whom workers, senders and the API connect as: no superuser, who would have connections in reserve."""

TABLES = """
create schema chaos;
create table chaos.move (
    id bigint generated always as identity primary key,
    job_id uuid not null, attempt int not null, token uuid, worker_id uuid, was text not null, became text not null,
    at timestamptz not null default clock_timestamp()
);
create table chaos.effect (job_id uuid not null, token uuid not null);
create table chaos.run (job_id uuid not null, token uuid not null, what text not null,
    at timestamptz not null default clock_timestamp());
create function chaos.note() returns trigger language plpgsql security definer
set search_path = pg_catalog, chaos, pg_temp as $$
begin
    if tg_op = 'INSERT' then
        insert into move (job_id, attempt, was, became) values (new.id, new.attempt, '', new.status);
    else
        insert into move (job_id, attempt, token, worker_id, was, became)
        values (new.id, new.attempt, coalesce(new.claim_token, old.claim_token), coalesce(new.worker_id, old.worker_id),
            old.status, new.status);
    end if;
    return null;
end $$;
create trigger chaos_made after insert on jobqueue.job for each row execute function chaos.note();
create trigger chaos_moved after update of status on jobqueue.job for each row
    when (old.status is distinct from new.status) execute function chaos.note();
"""
RIGHTS = """
grant usage on schema chaos to {role};
grant insert on chaos.effect, chaos.run to {role};
grant jobqueue_worker, jobqueue_producer, jobqueue_api to {role};
"""
MAKE_ROLE = """
do $$ begin
    create role {role} login;
exception when duplicate_object or unique_violation then null;
end $$;
"""
UNENDED = "select count(*) from jobqueue.job where status not in ('completed', 'failed', 'cancelled', 'skipped')"

Connection = psycopg.Connection[tuple[Any, ...]]


def prepare(connection: Connection, lease: float) -> None:
    """Make the tables, the role and the queues."""
    for text in (TABLES, MAKE_ROLE.format(role=ROLE), RIGHTS.format(role=ROLE)):
        connection.execute(text.encode())
    for name, given in QUEUES.items():
        options = {**given, "lease": lease}
        connection.execute("select jobqueue.create_queue(%s, %s::jsonb)", (name, json.dumps(options)))


def read(connection: Connection, history: History) -> None:
    """Fill in what the database knows."""
    at = "extract(epoch from at)::float8"
    history.moves = [
        Move(*row)
        for row in _rows(
            connection,
            f"select job_id::text, attempt, token::text, worker_id::text, was, became, {at} from chaos.move order by at, id",
        )
    ]
    history.runs = [
        Run(*row) for row in _rows(connection, f"select job_id::text, token::text, what, {at} from chaos.run")
    ]
    history.effects = [Effect(*row) for row in _rows(connection, "select job_id::text, token::text from chaos.effect")]
    history.pasts = [
        Past(*row)
        for row in _rows(connection, "select job_id::text, attempt, claim_token::text, outcome from jobqueue.attempt")
    ]
    history.finals = [
        Final(*row)
        for row in _rows(connection, "select id::text, queue, status, attempt, error_code from jobqueue.job")
    ]


def _rows(connection: Connection, query: str) -> Sequence[tuple[Any, ...]]:
    return connection.execute(query.encode()).fetchall()
