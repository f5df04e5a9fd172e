-- Tracking: what estimates are learned from, and what they have learned.

-- How jobs get on that are under way: one row per job and stage that counts, names its units or was picked as a sample; stage '' is the
-- whole job. Written once per attempt and stage, not per report, and read into jobqueue.estimate by maintenance, which deletes it then.
create table jobqueue.pace (
    job_id uuid not null,
    stage text collate "C" not null,
    job_type text collate "C" not null,
    attempt int not null,
    -- the count when the attempt began: what an earlier attempt had done says nothing about the speed of this one
    base bigint,
    units double precision,
    seconds double precision,
    counted double precision,
    primary key (job_id, stage),
    constraint pace_is_sane check (units >= 0 and seconds >= 0 and counted >= 0)
) with (fillfactor = 70);

-- What runs have taken, per job_type and stage ('' is the whole job), exponentially weighted.
create table jobqueue.estimate (
    job_type text collate "C" not null,
    stage text collate "C" not null,
    seconds double precision,
    runs bigint not null default 0,
    unit_seconds double precision,
    unit_runs bigint not null default 0,
    updated_at timestamptz not null default now(),
    primary key (job_type, stage)
) with (fillfactor = 50);

insert into jobqueue.maintenance (step, every) values
    ('estimates', '5 s'),
    ('stage_history', '10 min');
