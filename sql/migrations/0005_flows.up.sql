-- Flows: jobs that wait for jobs. Batches: jobs that are counted together, with a job for their end.
-- What was measured: docs/decisions/0005-flows.md.

-- Who waits for whom. The child knows how many it still waits for (job.unfinished_parents); a completed or skipped parent is final, so
-- that nothing is written here when a parent completes.
create table jobqueue.edge (
    child_id uuid not null,
    parent_id uuid not null,
    tenant text collate "C" not null,
    on_failure text not null default 'wait',
    -- the parent ended badly once and the edge says run: it is not waited for again
    passed boolean not null default false,
    primary key (child_id, parent_id),
    constraint edge_on_failure_is_known check (on_failure in ('wait', 'fail', 'cancel', 'run'))
);
-- the children of a job
create index edge_of_parent on jobqueue.edge (parent_id, child_id);

-- Jobs that were sent together or came to depend on each other; gone_…: members that were deleted since.
create table jobqueue.flow (
    id uuid primary key,
    tenant text collate "C" not null,
    created_at timestamptz not null default now(),
    gone_completed bigint not null default 0,
    gone_failed bigint not null default 0,
    gone_cancelled bigint not null default 0,
    gone_skipped bigint not null default 0
) with (fillfactor = 70);

create table jobqueue.flow_member (
    job_id uuid primary key,
    flow_id uuid not null,
    tenant text collate "C" not null,
    ref text
);
-- the jobs of a flow
create index flow_member_list on jobqueue.flow_member (flow_id);

-- What send_flow works on: its jobs and edges as arrays; element i is job i, edge k goes from parents[k] (or the job parent_ids[k], which
-- is there already) to children[k]. run_order: the jobs so that parents come first. waits: how many each waits for.
create type jobqueue.flow_plan as (
    elements jsonb[],
    refs text[],
    queues text[],
    ids uuid[],
    tenant text,
    children int[],
    parents int[],
    parent_ids uuid[],
    on_failure text[],
    passed boolean[],
    run_order int[],
    waits int[]
);

create table jobqueue.batch (
    id uuid primary key,
    tenant text collate "C" not null,
    name text,
    metadata jsonb,
    callback jsonb,
    callback_on text not null default 'ended',
    created_at timestamptz not null default now(),
    closed_at timestamptz,
    -- a member that has not ended; its end is when the batch is looked at again
    witness_id uuid,
    first_failed_at timestamptz,
    ended_at timestamptz,
    callback_at timestamptz,
    callback_job_id uuid,
    callback_error text,
    gone_completed bigint not null default 0,
    gone_failed bigint not null default 0,
    gone_cancelled bigint not null default 0,
    gone_skipped bigint not null default 0,
    constraint batch_callback_on_is_known check (callback_on in ('ended', 'first_failure', 'either')),
    constraint batch_ends_once_closed check (ended_at is null or closed_at is not null)
) with (fillfactor = 50);
-- the batches of a tenant, newest first
create index batch_list on jobqueue.batch (tenant, created_at, id);
-- batches that may end
create index batch_running on jobqueue.batch (id) where closed_at is not null and ended_at is null;

-- Batches that somebody has to look at once more: whoever could not do it at once, without waiting for others, only adds a row.
create table jobqueue.batch_note (
    id bigint generated always as identity primary key,
    batch_id uuid not null,
    failed boolean not null default false
);

insert into jobqueue.maintenance (step, every) values ('batches', '2 s');
