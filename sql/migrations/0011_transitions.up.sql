-- Counters for monitoring: changes of status, ends and durations since the schema was made. docs/decisions/0012-transitions.md.

-- job_type: null if it is the queue's name; job_types: of each job, where they differ; from_status, to_status, changes: changes of status
-- that nothing else counts (changes null: one). Columns of statistics_note and not of a table of their own, so that one fold takes all up.
alter table jobqueue.statistics_note
    add column job_type text collate "C",
    add column job_types text[] collate "C",
    add column from_status text,
    add column to_status text,
    add column changes int;
alter table jobqueue.statistics_note alter column job_types set storage external;

-- What has been counted per queue and job_type. Rows are never deleted: counters do not go down.
create table jobqueue.total (
    queue text collate "C" not null,
    job_type text collate "C" not null,
    completed bigint not null default 0,
    failed bigint not null default 0,
    cancelled bigint not null default 0,
    skipped bigint not null default 0,
    failed_attempts bigint not null default 0,
    retried bigint not null default 0,
    wait_seconds double precision not null default 0,
    run_seconds double precision not null default 0,
    waits bigint[] not null default '{}',
    runs bigint[] not null default '{}',
    primary key (queue, job_type)
) with (fillfactor = 50);

-- How often a status was followed by another. Without pending -> processing: that follows from the rest (functions/metrics.sql).
create table jobqueue.transition_total (
    from_status text not null,
    to_status text not null,
    n bigint not null default 0,
    primary key (from_status, to_status)
) with (fillfactor = 50);
