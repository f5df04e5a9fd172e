-- Numbers for monitoring, read by GET /metrics and by people: select * from jobqueue.metrics(). No tenant, job or reason is among them.
--
-- Counters come from the totals and from the notes that are still to be added to them, so that they never go down, survive restarts
-- and are the same for every reader. A pending job that is claimed leaves no note of its own: every job that has ever been processing
-- either left it, which is noted, or is in it now. One statement reads both, so one snapshot.
--
-- Nothing here reads all jobs: the price follows what runs, what waits (counted no further than 100,000 per queue) and the notes of
-- the last seconds; ended jobs cost nothing.

-- in_flight: the jobs that are processing now, by queue: how many; how many of them made no progress for longer than the setting
-- warn_slow_job (30 min); of how many the lease ended over 2 minutes ago without a rescue. Index: claim_batch (all of it), job_pkey.
create or replace function jobqueue.in_flight()
returns table (queue text, running bigint, stuck bigint, unrescued bigint)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    select j.queue, count(*), count(*) filter (where greatest(j.started_at, j.updated_at, j.life_at) < now() - l.most),
        count(*) filter (where j.lease_until < now() - interval '2 min')
    from (select to_interval(setting_of('warn_slow_job', '"30 min"'), 'warn_slow_job') as most) l
    cross join (select distinct x.id from claim_batch b cross join lateral unnest(b.job_ids) x (id)) c
    join job j on j.id = c.id and j.status = 'processing'
    group by j.queue
$$;

-- metric_transitions: how often each allowed change of status happened.
--   _notes    ids of the notes that are not in the totals yet
--   _running  how many jobs are processing now
create or replace function jobqueue.metric_transitions(_notes bigint[], _running bigint)
returns table (name text, labels jsonb, value double precision, buckets jsonb)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    with seen as materialized (
        select s.from_status, s.to_status, sum(s.n) as n
        from (select * from transition_total union all select * from sum_transitions(_notes)) s
        group by 1, 2)
    select 'job_status_transitions_total', jsonb_build_object('from', f.status, 'to', t.status),
        case when f.status = 'pending' and t.status = 'processing'
            then coalesce((select sum(x.n) from seen x where x.from_status = 'processing'), 0) + coalesce(_running, 0)
            else coalesce(s.n, 0) end,
        null::jsonb
    from unnest(array['blocked', 'pending', 'processing', 'paused', 'failed', 'cancelled']) f (status)
    cross join lateral unnest(statuses_after(f.status)) t (status)
    left join seen s on s.from_status = f.status and s.to_status = t.status
$$;

-- to_buckets: a histogram of totals as pairs (upper bound, how many are at most that), the last bound +Inf.
create or replace function jobqueue.to_buckets(_histogram bigint[])
returns jsonb
language sql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select jsonb_agg(jsonb_build_array(b.bound, coalesce((select sum(v >> 8) from unnest(_histogram) v where v & 255 < b.i), 0)) order by b.i)
    from unnest(duration_bounds()::text[] || '+Inf'::text) with ordinality b (bound, i)
$$;

-- metric_totals: what ended, was tried again and how long it took, by queue and job_type; waits by queue.
--   _notes  ids of the notes that are not in the totals yet
create or replace function jobqueue.metric_totals(_notes bigint[])
returns table (name text, labels jsonb, value double precision, buckets jsonb)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    with part as (
        select t.* from total t
        union all
        select s.queue, s.job_type, n.completed, n.failed, n.cancelled, n.skipped, n.failed_attempts, n.retried, n.wait_seconds,
            n.run_seconds, n.waits, n.runs
        from sum_totals(_notes) n
        cross join lateral series_of(n.queue, n.job_type) s),
    sums as materialized (
        select p.queue, p.job_type, sum(p.completed) as completed, sum(p.failed) as failed, sum(p.cancelled) as cancelled,
            sum(p.skipped) as skipped, sum(p.failed_attempts) as failed_attempts, sum(p.retried) as retried,
            sum(p.wait_seconds) as wait_seconds, sum(p.run_seconds) as run_seconds
        from part p
        group by 1, 2),
    histogram as (
        select h.queue, h.job_type, add_bins(array_agg(h.run) filter (where h.run is not null)) as runs,
            add_bins(array_agg(h.wait) filter (where h.wait is not null)) as waits
        from (select p.queue, p.job_type, x.run, x.wait from part p cross join lateral unnest(p.runs, p.waits) x (run, wait)) h
        group by 1, 2)
    select m.name, jsonb_build_object('queue', s.queue, 'job_type', s.job_type) || m.labels, m.value, m.buckets
    from sums s
    left join histogram h using (queue, job_type)
    cross join lateral (values
        ('jobs_finished_total', '{"outcome": "completed"}'::jsonb, s.completed::double precision, null::jsonb),
        ('jobs_finished_total', '{"outcome": "failed"}', s.failed, null),
        ('jobs_finished_total', '{"outcome": "cancelled"}', s.cancelled, null),
        ('jobs_finished_total', '{"outcome": "skipped"}', s.skipped, null),
        ('job_attempts_failed_total', '{}', s.failed_attempts, null),
        ('job_retries_total', '{}', s.retried, null),
        ('job_duration_seconds', '{}', s.run_seconds, to_buckets(h.runs))) m (name, labels, value, buckets)
    union all
    select 'job_wait_seconds', jsonb_build_object('queue', w.queue), w.seconds, to_buckets(w.buckets)
    from (
        select s.queue, sum(s.wait_seconds) as seconds, (
            select add_bins(array_agg(v)) from histogram h cross join lateral unnest(h.waits) v where h.queue = s.queue) as buckets
        from sums s
        group by s.queue) w
$$;

-- metric_queues: how each queue stands now. The 200 oldest queues have series of their own, the others are _other.
--   _flying  rows of in_flight: {queue: row}
create or replace function jobqueue.metric_queues(_flying jsonb)
returns table (name text, labels jsonb, value double precision, buckets jsonb)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    with named as materialized (
        select q.name, case when row_number() over (order by q.number) <= 200 then q.name else '_other' end as label, q.paused_at
        from queue q),
    live as materialized (
        select x as queue, count(*) as n
        from worker w
        cross join lateral unnest(coalesce(w.queues, array(select q.name from queue q))) x
        where w.stopped_at is null and w.drain_requested_at is null and w.heartbeat_at > now() - interval '30 s'
        group by 1),
    standing as materialized (
        select n.label, sum(g.ready) as ready, sum(g.scheduled) as scheduled, sum(g.blocked) as blocked, sum(g.paused) as paused,
            sum(g.failed_jobs) as failed, max(g.oldest_ready_seconds) filter (where g.ready > 0) as oldest,
            sum((_flying -> n.name ->> 'running')::bigint) as running, sum((_flying -> n.name ->> 'stuck')::bigint) as stuck,
            sum((_flying -> n.name ->> 'unrescued')::bigint) as unrescued, sum(l.n) as workers,
            count(n.paused_at) as paused_queues
        from named n
        left join queue_gauges(null) g on g.queue = n.name
        left join live l on l.queue = n.name
        group by n.label)
    select m.name, jsonb_build_object('queue', s.label) || m.labels, coalesce(m.value, 0)::double precision, null::jsonb
    from standing s
    cross join lateral (values
        ('jobs', '{"status": "pending"}'::jsonb, (s.ready + s.scheduled)::double precision),
        ('jobs', '{"status": "processing"}', s.running),
        ('jobs', '{"status": "blocked"}', s.blocked),
        ('jobs', '{"status": "paused"}', s.paused),
        ('jobs', '{"status": "failed"}', s.failed),
        ('jobs_ready', '{}', s.ready),
        ('jobs_stuck', '{}', s.stuck),
        ('jobs_unrescued', '{}', s.unrescued),
        ('queue_oldest_ready_age_seconds', '{}', s.oldest),
        ('queue_paused', '{}', s.paused_queues),
        ('queue_workers', '{}', s.workers)) m (name, labels, value)
$$;

-- metric_workers: workers and their slots; what maintenance is late.
create or replace function jobqueue.metric_workers()
returns table (name text, labels jsonb, value double precision, buckets jsonb)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    with w as materialized (
        select case when x.heartbeat_at < now() - interval '30 s' then 'lost' when x.drain_requested_at is not null then 'draining'
                else 'working' end as state,
            coalesce(x.concurrency, 0) as slots, x.running, coalesce((x.stuck ->> 'slots')::int, 0) as stuck
        from worker x where x.stopped_at is null)
    select 'workers', jsonb_build_object('state', s.state), (select count(*) from w where w.state = s.state)::double precision, null::jsonb
    from unnest(array['working', 'draining', 'lost']) s (state)
    union all
    select m.name, '{}', m.value, null
    from (select coalesce(sum(w.slots), 0) as slots, coalesce(sum(w.running), 0) as busy, coalesce(sum(w.stuck), 0) as stuck
        from w where w.state <> 'lost') t
    cross join lateral (values ('worker_slots', t.slots::double precision), ('worker_slots_busy', t.busy),
        ('worker_slots_stuck', t.stuck)) m (name, value)
    union all
    select 'maintenance_late_seconds', '{}', greatest(extract(epoch from now() - min(m.next_at)), 0)::double precision, null
    from maintenance m
$$;

-- metric_database: sizes and dead rows of the tables, and what keeps vacuum or notifications back.
create or replace function jobqueue.metric_database()
returns table (name text, labels jsonb, value double precision, buckets jsonb)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select m.name, jsonb_build_object('table', c.relname), m.value, null::jsonb
    from pg_class c
    cross join lateral (values
        ('table_bytes', pg_total_relation_size(c.oid)::double precision),
        ('table_live_rows', pg_stat_get_live_tuples(c.oid)::double precision),
        ('table_dead_rows', pg_stat_get_dead_tuples(c.oid)::double precision)) m (name, value)
    where c.relnamespace = 'jobqueue'::regnamespace and c.relkind = 'r'
    union all
    select m.name, '{}', m.value, null
    from (values
        ('job_table_bound_bytes', table_bound()::double precision),
        ('notify_queue_usage_ratio', pg_notification_queue_usage()),
        ('watched_topics', (select count(*) from watch w where w.until > now())::double precision),
        ('oldest_transaction_age_seconds', (
            select coalesce(max(extract(epoch from now() - a.xact_start)), 0)::double precision
            from pg_stat_activity a
            where a.backend_xmin is not null and a.datname = current_database() and a.pid <> pg_backend_pid()
                and a.backend_type <> 'autovacuum worker'))) m (name, value)
$$;

-- table_bound: how large the table of jobs may become, with its indexes, before health() and the alerts say so, in bytes: the setting
-- warn_table_size, such as "1 GB"; 100 MB unless told.
create or replace function jobqueue.table_bound()
returns bigint
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select pg_size_bytes(setting_of('warn_table_size', '"100 MB"') #>> '{}')
$$;

-- metrics: every number that monitoring reads.
-- Returns (name, labels, value, buckets). Counters end in _total and never go down; they count from when the schema was made. For a
-- histogram of durations value is the sum in seconds, and buckets are pairs [upper bound, how many are at most that].
-- One snapshot: call it by itself, or the parts may not fit together. GET /metrics shows it with the prefix jobqueue_.
create or replace function jobqueue.metrics()
returns table (name text, labels jsonb, value double precision, buckets jsonb)
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
set jit = off
as $$
declare
    notes bigint[] := open_notes(2147483647);
    running bigint;
    flying jsonb;
begin
    select sum(f.running), jsonb_object_agg(f.queue, to_jsonb(f)) into running, flying from in_flight() f;
    return query select * from metric_transitions(notes, running);
    return query select * from metric_totals(notes);
    return query select * from metric_queues(flying);
    return query select * from metric_workers();
    return query select * from metric_database();
    -- made by the program, not by the migrations
    if to_regclass('jobqueue.schema_migration') is not null then
        return query execute 'select ''schema_version'', ''{}''::jsonb, max(m.version)::double precision, null::jsonb from jobqueue.schema_migration m';
    end if;
end
$$;

-- check_table_size: the table of jobs against its bound.
create or replace function jobqueue.check_table_size()
returns table (name text, status text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select 'table size', case when t.bytes > t.bound then 'warn' else 'ok' end,
        format('the table of jobs has %s of %s', pg_size_pretty(t.bytes), pg_size_pretty(t.bound)),
        case when t.bytes > t.bound then 'Keep ended jobs for a shorter time (keep_completed, keep_ended of the queues), or raise the bound: '
            'insert into jobqueue.setting values (''warn_table_size'', ''"1 GB"'').' end
    from (select pg_total_relation_size('jobqueue.job') as bytes, table_bound() as bound) t
$$;

-- check_failures: queues in which more than a tenth of the jobs that ended in the last hour failed; of each at least 20 must have ended.
-- Index: statistic_age.
create or replace function jobqueue.check_failures()
returns table (name text, status text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select 'failures: ' || s.queue, 'warn',
        format('%s of the %s jobs that ended in the last hour failed', sum(s.failed), sum(s.failed + s.completed)),
        format('See why: select error_code, error_message from jobqueue.jobs where queue = %L and status = ''failed''.', s.queue)
    from statistic s
    where s.begins_at >= now() - interval '1 hour' and s.minutes = 1
    group by s.queue
    having sum(s.failed + s.completed) >= 20 and sum(s.failed) > 0.1 * sum(s.failed + s.completed)
    order by s.queue
$$;
