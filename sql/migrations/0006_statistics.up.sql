-- Statistics: what ended and how long it took, noted once per call and folded into rows per queue and minute, later per hour.
-- Ways and measurements: docs/decisions/0006-statistics.md.

-- Written by whoever ends attempts, taken up by maintenance within seconds. Append-only: a completion changes no row of it.
create table jobqueue.statistics_note (
    id bigint generated always as identity primary key,
    noted_at timestamptz not null default now(),
    queue text collate "C" not null,
    completed int not null default 0,
    failed int not null default 0,
    failed_attempts int not null default 0,
    retried int not null default 0,
    waits real[],
    runs real[]
) with (toast_tuple_target = 8160);
-- notes of up to 900 jobs stay in one piece, larger ones are moved out as they are: compressing them would cost more than they do
alter table jobqueue.statistics_note alter column waits set storage external, alter column runs set storage external;

-- One row per queue and minute, after a week per queue and hour. No row: nothing happened and nothing waited.
create table jobqueue.statistic (
    queue text collate "C" not null,
    begins_at timestamptz not null,
    minutes smallint not null,
    sent bigint not null default 0,
    completed bigint not null default 0,
    failed bigint not null default 0,
    failed_attempts bigint not null default 0,
    retried bigint not null default 0,
    wait_seconds double precision not null default 0,
    run_seconds double precision not null default 0,
    waits bigint[] not null default '{}',
    runs bigint[] not null default '{}',
    ready int,
    scheduled int,
    blocked int,
    processing int,
    paused int,
    failed_jobs int,
    oldest_ready_seconds double precision,
    primary key (queue, begins_at, minutes),
    constraint statistic_minutes_are_known check (minutes in (1, 60))
) with (fillfactor = 70);
-- what has become old, and charts of all queues together
create index statistic_age on jobqueue.statistic (begins_at, minutes);

-- Jobs that no index counts; counted by retention, which passes every job anyway.
create table jobqueue.standing (
    queue text collate "C" primary key,
    blocked int not null default 0,
    paused int not null default 0,
    blocked_so_far int not null default 0,
    paused_so_far int not null default 0
) with (fillfactor = 50);

insert into jobqueue.maintenance (step, every) values
    ('fold_statistics', '10 s'),
    ('keep_statistics', '10 min'),
    ('sample_statistics', '60 s');
