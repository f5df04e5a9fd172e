-- Schedules: what sends a job at every tick of a cron expression or a recurrence rule.

create table jobqueue.schedule (
    name text collate "C" primary key,
    tenant text collate "C" not null default 'default',
    queue text collate "C" not null,
    expression text not null,
    time_zone text not null default 'UTC',
    -- what the expression was read as; written with it and never by hand
    spec jsonb not null,
    payload jsonb not null default '{}',
    options jsonb not null default '{}',
    missed text not null default 'skip',
    paused_at timestamptz,
    pause_reason text,
    paused_by text,
    -- the tick that is sent next; null: there is none any more
    next_at timestamptz,
    -- when a tick that could not be sent is tried again
    retry_at timestamptz,
    failures int not null default 0,
    last_error text,
    last_at timestamptz,
    last_job_id uuid,
    last_reason text,
    gap_from timestamptz,
    gap_until timestamptz,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    constraint schedule_name_is_plain check (name ~ '^[A-Za-z0-9_./:-]{1,200}$'),
    constraint schedule_missed_is_known check (missed in ('skip', 'once', 'all')),
    constraint schedule_tenant_is_named check (tenant <> ''),
    constraint schedule_failure_is_tried_again check ((retry_at is null) = (failures = 0))
) with (fillfactor = 70);

-- which schedule is due next
create index schedule_due on jobqueue.schedule (coalesce(retry_at, next_at)) where paused_at is null and next_at is not null;
-- the schedules of a tenant
create index schedule_list on jobqueue.schedule (tenant, name);

insert into jobqueue.maintenance (step, every) values ('schedules', '1 s');
