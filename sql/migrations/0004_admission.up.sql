-- Admission: what makes limits hold (concurrency of a queue, a group, a key; rates; fairness; ageing).
-- The model and its measurements: docs/decisions/0010-admission.md.

alter table jobqueue.queue
    -- whether its jobs go through admission; looked at by every send and claim
    add column limited boolean generated always as (
        policy in ('singleton', 'stately', 'key_strict_fifo') or concurrency is not null or group_concurrency is not null
        or key_concurrency is not null or rate_limit is not null or ageing is not null or fair_by is not null) stored,
    add constraint queue_limits_are_sane check (
        fair_by in ('group', 'tenant') and ageing is null or fair_by is null and (ageing is null or ageing >= interval '1 s'));

-- One row per job that is pending and due and waits to be admitted. Narrow and apart from the job, so that waiting in line costs no index
-- of the job's table: each of those costs every send and every claim of every queue.
create table jobqueue.admission_line (
    job_id uuid primary key,
    queue_number int not null,
    -- 0 has just come, 1 waits for a slot of its key, 2 of its group, 3 for a token of its key, 4 at the gate of the queue, 5 has all it
    -- needs but its row was locked, 6 set aside: its tenant or job_type is paused
    stage smallint not null default 0,
    line text collate "C" not null default '',
    rank bigint not null default 0,
    seq bigint not null,
    -- slots that it holds already, as in job.settle_flags
    held int not null default 0,
    own_rank bigint not null,
    key_line text collate "C",
    group_line text collate "C",
    rate_line text collate "C",
    tier text,
    lane text collate "C" not null default '',
    entered_at timestamptz not null default now()
) with (fillfactor = 70);
-- the next of a line
create index admission_line_order on jobqueue.admission_line (queue_number, stage, line, rank, seq);
-- the next at the gate, and the lanes there
create index admission_gate on jobqueue.admission_line (queue_number, rank, line, seq) where stage = 4;

-- How many slots of a line are taken, by jobs that are ready or processing. Written by the one who admits, nobody else.
create table jobqueue.admission_slot (
    queue_number int not null,
    stage smallint not null,
    line text collate "C" not null,
    used int not null default 0,
    primary key (queue_number, stage, line),
    constraint admission_slot_is_not_negative check (used >= 0)
) with (fillfactor = 50);

-- Slots that were given back, or (with a time) will be: whoever ends a job only adds a row and never waits for a slot's row.
create table jobqueue.admission_note (
    queue_number int not null,
    seq bigint not null,
    stage smallint not null,
    line text collate "C" not null,
    slots int not null,
    due timestamptz
);
create index admission_note_now on jobqueue.admission_note (queue_number, seq) where due is null;
create index admission_note_due on jobqueue.admission_note (queue_number, due) where due is not null;

-- Where the one who admits goes on reading: below floor nothing can be left.
create table jobqueue.admission (
    queue_number int primary key,
    floor bigint not null default 0,
    next_floor bigint not null default 0,
    next_xid xid8 not null default '0',
    last_lane text collate "C" not null default ''
) with (fillfactor = 50);

-- Keys that are used again and again get a new generation now and then, so that the unique index never has to pass by the dead entries of
-- more than a few dozen former holders (sql/functions/hold.sql).
create table jobqueue.key_generation (
    queue text collate "C" not null,
    key text collate "C" not null,
    generation int not null default 0,
    used_at timestamptz not null default now(),
    primary key (queue, key)
) with (fillfactor = 50);

insert into jobqueue.maintenance (step, every) values ('admission', '30 s');
