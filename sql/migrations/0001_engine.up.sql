-- The engine: queues, job types, jobs and what hangs on a job.
-- Layout and its measurements: docs/decisions/0002-table-layout.md and 0003-claims.md.

-- Becomes ready in this order. Cache 1: a number must never be older than the transaction that uses it.
create sequence jobqueue.ready_seq as bigint cache 1;

-- Version 7 ids sort by time, so that new rows go to the end of the primary key. Servers before 18 have none of their own.
do $$
begin
    if exists (select from pg_catalog.pg_proc where proname = 'uuidv7' and pronamespace = 'pg_catalog'::regnamespace) then
        execute 'create function jobqueue.new_id() returns uuid language sql volatile parallel safe
                 as ''select pg_catalog.uuidv7()''';
    else
        execute $f$
            create function jobqueue.new_id() returns uuid language sql volatile parallel safe as $s$
                select encode(
                    set_bit(set_bit(
                        overlay(uuid_send(gen_random_uuid())
                            placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
                            from 1 for 6),
                        52, 1), 53, 1),
                    'hex')::uuid
            $s$ $f$;
    end if;
end
$$;

create table jobqueue.setting (
    name text primary key,
    value jsonb not null
);

create table jobqueue.queue (
    name text collate "C" primary key,
    number int generated always as identity unique,
    policy text not null default 'standard',
    max_retries int not null default 3,
    retry_delay interval not null default interval '60 s',
    retry_backoff boolean not null default true,
    retry_delay_max interval default interval '30 min',
    timeout interval default interval '15 min',
    max_runtime interval,
    lease interval not null default interval '30 s',
    expires_in interval,
    keep_completed interval default interval '7 days',
    keep_ended interval default interval '30 days',
    dead_letter text collate "C",
    concurrency int,
    group_concurrency jsonb,
    key_concurrency int,
    rate_limit jsonb,
    ageing interval,
    fair_by text,
    warn_backlog int,
    paused_at timestamptz,
    pause_reason text,
    paused_by text,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    constraint queue_name_is_plain check (name ~ '^[A-Za-z0-9_./:-]{1,200}$'),
    constraint queue_policy_is_known
        check (policy in ('standard', 'short', 'singleton', 'stately', 'exclusive', 'key_strict_fifo')),
    constraint queue_options_are_sane check (
        max_retries between 0 and 1000000
        and retry_delay >= interval '0'
        and retry_delay_max >= interval '0'
        and timeout > interval '0'
        and max_runtime > interval '0'
        and lease >= interval '10 s'
        and expires_in > interval '0'
        and keep_completed >= interval '0'
        and keep_ended >= interval '0'
        and concurrency > 0
        and key_concurrency > 0
        and warn_backlog > 0
        and dead_letter <> name)
);

create table jobqueue.job_type (
    name text collate "C" primary key,
    queue text collate "C",
    label text,
    options jsonb not null default '{}',
    stages jsonb,
    pausable boolean not null default false,
    -- whether it says anything about its jobs; if not, sending takes the short way
    applies boolean generated always as (options <> '{}' or label is not null or stages is not null or pausable) stored,
    paused_at timestamptz,
    pause_reason text,
    paused_by text,
    registered_at timestamptz not null default now()
);
-- Read by every claim; empty almost always.
create index job_type_paused on jobqueue.job_type (name) where paused_at is not null;

create table jobqueue.tenant_pause (
    tenant text collate "C" primary key,
    paused_at timestamptz not null default now(),
    pause_reason text not null,
    paused_by text not null
);

-- Named by a CHECK below; sql/functions/guard.sql has the body.
create function jobqueue.refuse_inconsistent(_id uuid, _status text) returns boolean language sql as $$ select false $$;

-- Columns are in this order for a reason: those that never change stand first, so that the write-ahead log of an update holds
-- only the changed rest of the row.
create table jobqueue.job (
    id uuid not null default jobqueue.new_id(),
    created_at timestamptz not null default now(),
    priority int not null default 0,
    hold_mask smallint,
    queue text collate "C" not null,
    job_type text collate "C" not null,
    tenant text collate "C" not null default 'default',
    payload jsonb not null default '{}',
    subject text,
    display_name text,
    created_by text,
    singleton_key text,
    group_key text,
    tier text,
    batch_id uuid,
    dead_letter_of uuid,
    options jsonb,
    run_at timestamptz not null default now(),
    max_retries int,
    retry_budget int,
    settle_flags int not null default 0,
    pausable boolean not null default false,
    suspect boolean not null default false,
    status text not null default 'pending',
    version bigint not null default 1,
    ready_seq bigint,
    wait_until timestamptz,
    inbox_seq bigint,
    park_seq bigint,
    expires_at timestamptz,
    held_key text collate "C",
    attempt int not null default 0,
    retry_count int not null default 0,
    lost_count smallint not null default 0,
    progress_pct smallint not null default 0,
    handler_started boolean,
    claim_token uuid,
    worker_id uuid,
    started_at timestamptz,
    lease_until timestamptz,
    heartbeat_at timestamptz,
    life_at timestamptz,
    completed_at timestamptz,
    failed_at timestamptz,
    updated_at timestamptz not null default now(),
    requested_action text,
    status_reason text,
    result jsonb,
    stats jsonb,
    metadata jsonb,
    progress_done bigint,
    progress_total bigint,
    progress_message text,
    current_stage text,
    substage text,
    total_stages int,
    completed_stages int,
    estimated_completion timestamptz,
    error_class text,
    error_code text,
    error_message text,
    pause_reason text,
    paused_at timestamptz,
    resumed_at timestamptz,
    resume_count int not null default 0,
    checkpoint_id bigint,
    unfinished_parents int not null default 0,
    constraint job_pkey primary key (id),
    -- One word per row: its status, and how many there are of: places in a line (ready_seq, wait_until, inbox_seq, park_seq), lease,
    -- claim token, time of the end, time of the failure. Written like this because the server parses the text of a CHECK for every
    -- statement: a condition per status costs twice as much there as the insert itself (docs/decisions/0002-table-layout.md).
    constraint job_is_consistent check (
        concat(status, num_nonnulls(ready_seq, wait_until, inbox_seq, park_seq), num_nonnulls(lease_until), num_nonnulls(claim_token),
            num_nonnulls(completed_at), num_nonnulls(failed_at))
            in ('blocked00000', 'pending10000', 'processing01100', 'paused00000', 'completed00010', 'completed00110', 'failed00011',
                'cancelled00010', 'skipped00010')
        and (claim_token is null or num_nulls(worker_id, started_at) = 0)
        and (failed_at is null or error_class is not null)
        and (requested_action is null or lease_until is not null and requested_action in ('cancel', 'pause'))
        and case status when 'completed' then progress_pct = 100 and error_class is null when 'paused' then paused_at is not null else true end
        -- reached by inconsistent rows only: one that would also be an illegal transition says so (JQ409 instead of 23514)
        or jobqueue.refuse_inconsistent(id, status)),
    constraint job_counts_are_sane check (priority > -2147483647 and least(retry_count, attempt, progress_pct, 100 - progress_pct) >= 0),
    constraint job_tenant_is_named check (tenant <> '')
) with (
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 50000,
    autovacuum_vacuum_insert_scale_factor = 0.02,
    autovacuum_analyze_scale_factor = 0,
    autovacuum_analyze_threshold = 100000
);

-- No index below names the status: a completion changes no indexed column and can stay on its page (HOT).
-- claims, in order of priority, then of becoming ready
create index job_claim on jobqueue.job (queue, (-priority), ready_seq) where ready_seq is not null;
-- the claim of jobs that have lost a worker, one at a time
create index job_suspects on jobqueue.job (queue, (-priority), ready_seq) where suspect and ready_seq is not null;
-- the promoter: what becomes due next
create index job_waiting on jobqueue.job (wait_until) where wait_until is not null;
-- expiry of jobs that never ran
create index job_expiring on jobqueue.job (expires_at) where expires_at is not null;
-- every uniqueness that is decided when a job is sent
create unique index job_held_key on jobqueue.job (queue, held_key) where held_key is not null;
-- lists of a tenant, newest first
create index job_list on jobqueue.job (tenant, created_at, id);
-- a person's recent jobs (GET /jobs/active)
create index job_creator on jobqueue.job (tenant, created_by, created_at) where created_by is not null;
-- jobs about one thing
create index job_subject on jobqueue.job (tenant, subject, created_at) where subject is not null;
-- failed jobs, newest first, per queue
create index job_failed on jobqueue.job (queue, failed_at) where failed_at is not null;
-- the jobs of a batch
create index job_batch on jobqueue.job (batch_id) where batch_id is not null;
-- the dead letters of a job
create index job_dead_letter on jobqueue.job (dead_letter_of) where dead_letter_of is not null;

-- What only a few jobs have lies in tables of its own. No foreign keys: they would put four row triggers on every update of a job;
-- job_children_go (functions/guard.sql) removes the rows of deleted jobs, one statement for all of them.
create table jobqueue.attempt (
    job_id uuid not null,
    attempt int not null,
    tenant text collate "C" not null,
    claim_token uuid,
    worker_id uuid,
    started_at timestamptz,
    ended_at timestamptz not null default now(),
    outcome text not null,
    error_class text,
    error_code text,
    error_message text,
    error_detail text,
    next_run_at timestamptz,
    primary key (job_id, attempt),
    constraint attempt_outcome_is_known check (outcome in (
        'failed', 'timed_out', 'lost', 'released', 'snoozed', 'cancelled', 'paused', 'expired'))
);

create table jobqueue.stage (
    job_id uuid not null,
    name text not null,
    tenant text collate "C" not null,
    position int not null,
    status text not null default 'pending',
    weight double precision not null default 1,
    attempt int,
    started_at timestamptz,
    completed_at timestamptz,
    error text,
    metadata jsonb,
    output jsonb,
    primary key (job_id, name),
    constraint stage_status_is_known check (status in ('pending', 'in_progress', 'completed', 'failed', 'skipped')),
    constraint stage_weight_is_positive check (weight > 0)
);

create table jobqueue.checkpoint (
    id bigint generated always as identity primary key,
    job_id uuid not null,
    tenant text collate "C" not null,
    attempt int not null,
    stage text not null,
    data jsonb,
    reference text,
    hash text,
    pause_safe boolean not null,
    created_at timestamptz not null default now(),
    constraint checkpoint_hash_is_sha256 check (hash ~ '^[0-9a-f]{64}$'),
    constraint checkpoint_reference_has_hash check (reference is null or hash is not null)
);
create index checkpoint_of_job on jobqueue.checkpoint (job_id, id);

create table jobqueue.done_key (
    job_id uuid not null,
    key text collate "C" not null,
    tenant text collate "C" not null,
    done_at timestamptz not null default now(),
    primary key (job_id, key)
);

create table jobqueue.worker (
    id uuid primary key,
    name text,
    hostname text,
    pid int,
    version text,
    queues text[],
    job_types text[],
    concurrency int,
    running int not null default 0,
    started_at timestamptz not null default now(),
    heartbeat_at timestamptz not null default now(),
    stopped_at timestamptz,
    drain_reason text,
    drain_requested_at timestamptz
) with (fillfactor = 50);

-- One row per claim, not per job: where jobs under way may be found. Rescue reads it when the lease of a claim could have run out;
-- whether a job is really lost is decided by the job's own lease. So no index holds the lease of a job and a completion stays HOT.
create table jobqueue.claim_batch (
    id bigint generated always as identity primary key,
    worker_id uuid not null,
    check_at timestamptz not null,
    job_ids uuid[] not null
);
create index claim_batch_due on jobqueue.claim_batch (check_at);

create table jobqueue.audit (
    id bigint generated always as identity primary key,
    at timestamptz not null default now(),
    action text not null,
    job_id uuid,
    tenant text collate "C",
    target text,
    from_status text,
    to_status text,
    reason text not null,
    session_user_name text not null,
    actor text,
    application_name text,
    client_addr inet,
    details jsonb
);
create index audit_of_job on jobqueue.audit (job_id, id) where job_id is not null;
create index audit_of_tenant on jobqueue.audit (tenant, id) where tenant is not null;

create table jobqueue.maintenance (
    step text primary key,
    every interval not null,
    next_at timestamptz not null default now(),
    last_at timestamptz,
    last_done bigint,
    state jsonb
) with (fillfactor = 50);

-- Who listens, and until when. Lost in a crash together with the listeners' sessions.
create unlogged table jobqueue.watch (
    topic text collate "C" primary key,
    until timestamptz not null
) with (fillfactor = 50);

create table jobqueue.idempotency_key (
    owner text not null,
    key text not null,
    fingerprint text not null,
    job_ids uuid[] not null,
    created_at timestamptz not null default now(),
    primary key (owner, key)
);
create index idempotency_key_age on jobqueue.idempotency_key (created_at);

insert into jobqueue.maintenance (step, every) values
    ('rescue', '2 s'),
    ('expire', '2 s'),
    ('retention', '60 s'),
    ('housekeeping', '60 s');
