-- Totals: what notes say (statistics.sql), added up for ever, per queue and job_type. Monitoring reads them as counters.
--
--   settle, end_attempt          --> statistics_note   as for the statistics
--   count_transition (guard.sql) --> statistics_note   one row per change of status that no call notes
--   maintain: fold_statistics    --> total, transition_total, in the transaction that deletes the notes
--
-- A histogram is a list of bucket + 256 * number, as in statistics; bucket i holds what is at most the bound i, and 16 what is more.

-- duration_bounds: the upper bounds of the buckets of durations, in seconds.
create or replace function jobqueue.duration_bounds()
returns real[]
language sql immutable parallel safe
as $$
    select '{0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600}'::real[]
$$;

-- bucket_of: the bucket of a duration in seconds, from 0; 16: beyond the last bound. A duration that equals a bound is within it, which
-- width_bucket only has for the lower end; hence the signs. Compared as real, as notes store them: 0.1 is within 0.1.
create or replace function jobqueue.bucket_of(_seconds real)
returns bigint
language sql immutable parallel safe
-- without a fixed search_path, so that it becomes a part of the query that calls it for every job
as $$
    select 16 - pg_catalog.width_bucket(-_seconds,
        '{-3600, -900, -300, -120, -60, -30, -10, -5, -2.5, -1, -0.5, -0.25, -0.1, -0.05, -0.025, -0.01}'::real[])::bigint
$$;

-- sum_totals: notes as rows of totals, one per queue and job_type; ends and attempts, without other changes of status.
-- Index: statistics_note_pkey.
create or replace function jobqueue.sum_totals(_ids bigint[])
returns setof jobqueue.total
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set jit = off
as $$
    with note as materialized (
        select n.*, coalesce(n.job_type, n.queue) as type
        from statistics_note n
        where n.id = any (_ids) and (n.to_status is null or n.to_status in ('failed', 'cancelled', 'skipped'))),
    counted as (
        select c.queue, c.type, sum(c.completed) as completed, count(*) filter (where c.to_status = 'failed') as failed,
            count(*) filter (where c.to_status = 'cancelled') as cancelled, count(*) filter (where c.to_status = 'skipped') as skipped,
            sum(c.failed_attempts) as failed_attempts, sum(c.retried) as retried
        from (
            select n.queue, n.type, n.completed, n.to_status, n.failed_attempts, n.retried
            from note n
            where n.job_types is null
            union all
            select n.queue, t.type, 1, null, 0, 0 from note n cross join lateral unnest(n.job_types) t (type)) c
        group by 1, 2),
    -- one pass over all attempts, into at most 17 * 17 groups a pair
    attempt as materialized (
        select n.queue, coalesce(a.type, n.type) as type, bucket_of(a.wait) as wait, bucket_of(a.run) as run, count(*) as n,
            sum(greatest(a.wait, 0)::double precision) as waited, sum(greatest(a.run, 0)::double precision) as ran
        from note n
        cross join lateral unnest(n.waits, n.runs, n.job_types) a (wait, run, type)
        group by 1, 2, 3, 4),
    waited as (
        select b.queue, b.type, sum(b.seconds) as seconds, array_agg(b.wait + 256 * b.n order by b.wait) as buckets
        from (select a.queue, a.type, a.wait, sum(a.n)::bigint as n, sum(a.waited) as seconds
            from attempt a where a.wait is not null group by 1, 2, 3) b
        group by 1, 2),
    ran as (
        select b.queue, b.type, sum(b.seconds) as seconds, array_agg(b.run + 256 * b.n order by b.run) as buckets
        from (select a.queue, a.type, a.run, sum(a.n)::bigint as n, sum(a.ran) as seconds
            from attempt a where a.run is not null group by 1, 2, 3) b
        group by 1, 2)
    select c.queue, c.type, c.completed, c.failed, c.cancelled, c.skipped, c.failed_attempts, c.retried, coalesce(w.seconds, 0),
        coalesce(r.seconds, 0), coalesce(w.buckets, '{}'), coalesce(r.buckets, '{}')
    from counted c
    left join waited w using (queue, type)
    left join ran r using (queue, type)
$$;

-- sum_transitions: the changes of status that notes say. Index: statistics_note_pkey.
create or replace function jobqueue.sum_transitions(_ids bigint[])
returns setof jobqueue.transition_total
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set jit = off
as $$
    select x.from_status, x.to_status, sum(x.n)::bigint
    from (
        select n.from_status, n.to_status, coalesce(n.changes, 1) as n from statistics_note n where n.id = any (_ids) and n.from_status is not null
        union all
        select 'processing', 'completed', n.completed from statistics_note n where n.id = any (_ids) and n.completed > 0) x
    group by 1, 2
$$;

-- series_of: under which names a queue and job_type are counted. First come, first named: at most 200 queues, 200 job_types and 1,000 pairs
-- of them have rows of their own, the rest is _other; and who has a row keeps it, so that no counter ever goes down.
create or replace function jobqueue.series_of(_queue text, _job_type text, out queue text, out job_type text)
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    queues bigint;
    types bigint;
    pairs bigint;
begin
    queue := _queue;
    job_type := _job_type;
    if exists (select from total t where t.queue = _queue and t.job_type = _job_type) then
        return;
    end if;
    select count(distinct t.queue), count(distinct t.job_type), count(*) into queues, types, pairs from total t;
    if queues >= 200 and not exists (select from total t where t.queue = _queue) then
        queue := '_other';
    end if;
    if pairs >= 1000 or types >= 200 and not exists (select from total t where t.job_type = _job_type) then
        job_type := '_other';
    end if;
end
$$;

-- add_totals: add notes to the totals; by whoever deletes them, in the same transaction. Only one does at a time (maintain).
create or replace function jobqueue.add_totals(_ids bigint[])
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    t jobqueue.total;
    label record;
begin
    for t in select * from sum_totals(_ids) loop
        label := series_of(t.queue, t.job_type);
        insert into total as x
        values (label.queue, label.job_type, t.completed, t.failed, t.cancelled, t.skipped, t.failed_attempts, t.retried, t.wait_seconds,
            t.run_seconds, t.waits, t.runs)
        on conflict (queue, job_type) do update
        set completed = x.completed + excluded.completed,
            failed = x.failed + excluded.failed,
            cancelled = x.cancelled + excluded.cancelled,
            skipped = x.skipped + excluded.skipped,
            failed_attempts = x.failed_attempts + excluded.failed_attempts,
            retried = x.retried + excluded.retried,
            wait_seconds = x.wait_seconds + excluded.wait_seconds,
            run_seconds = x.run_seconds + excluded.run_seconds,
            waits = add_bins(x.waits || excluded.waits),
            runs = add_bins(x.runs || excluded.runs);
    end loop;
    insert into transition_total as x
    select s.from_status, s.to_status, s.n from sum_transitions(_ids) s
    on conflict (from_status, to_status) do update set n = x.n + excluded.n;
end
$$;
