-- Bulk actions: one action on many jobs.

-- What is to be done, and how far it is. A large one is worked off in portions under a job of the same id in the queue jobqueue.bulk;
-- the rights are those of this row, so that nobody gets others by sending a job there.
create table jobqueue.bulk_operation (
    id uuid primary key default jobqueue.new_id(),
    tenant text collate "C" not null,
    action text not null,
    reason text not null,
    actor text,
    -- never changed, so a portion does not write it again; not compressed, uuids cannot be
    ids uuid[] not null,
    done int not null default 0,
    counts jsonb not null default '{}',
    created_at timestamptz not null default now(),
    ended_at timestamptz,
    constraint bulk_operation_action_is_known
        check (action in ('cancel', 'pause', 'resume', 'retry', 'restart', 'skip', 'run_now', 'delete')),
    constraint bulk_operation_is_counted check (done between 0 and cardinality(ids))
) with (fillfactor = 70);
alter table jobqueue.bulk_operation alter column ids set storage external;

-- those under way, and those to be forgotten
create index bulk_operation_ended on jobqueue.bulk_operation (ended_at);

insert into jobqueue.maintenance (step, every) values ('bulk', '1 s');
