-- Bulk operations are listed: with what was meant, and how many jobs that was.
alter table jobqueue.bulk_operation
    -- as it was given, but for a list of ids, which is there already: their number; null for operations begun before
    add column filter jsonb,
    -- ids are 16 bytes a job: to count them would read all of them for every row of a list
    add column total int generated always as (cardinality(ids)) stored;
