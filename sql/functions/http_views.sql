-- What the pages of the dashboard show besides what the HTTP API has: one call per page, as JSON text. What is not a tenant's (workers, health,
-- the database) is for callers who see all tenants; queues are shown to everybody, as numbers.

-- http_sparks: what ended in each queue in each of the last 60 minutes, the oldest first; queues of which nothing ended are missing. What
-- has ended in the last 10 s may be missing (fold_statistics). Index: statistic_age.
create or replace function jobqueue.http_sparks()
returns table (queue text, completed bigint[], failed bigint[])
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set jit = off
as $$
    with minute as (
        select s.queue, (extract(epoch from s.begins_at - date_trunc('minute', now() - interval '59 min', 'UTC')) / 60)::int as n, s.completed, s.failed
        from statistic s
        where s.begins_at >= date_trunc('minute', now() - interval '59 min', 'UTC') and s.minutes = 1 and s.completed + s.failed > 0)
    select q.queue, array_agg(coalesce(m.completed, 0) order by x.n), array_agg(coalesce(m.failed, 0) order by x.n)
    from (select distinct minute.queue from minute) q
    cross join generate_series(0, 59) x (n)
    left join minute m on m.queue = q.queue and m.n = x.n
    group by q.queue
$$;

-- http_queue_workers: how many live workers serve each queue that has a pause, a job or a worker; a worker without a list serves all.
create or replace function jobqueue.http_queue_workers()
returns table (queue text, workers bigint)
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
set jit = off
as $$
    select q.name, count(w.id)
    from queue q
    left join worker w on w.stopped_at is null and w.heartbeat_at > now() - interval '30 s' and (w.queues is null or q.name = any (w.queues))
    group by q.name
$$;

-- http_overview: all queues with what stands where, and what needs attention.
-- Returns {"queues": […], "health": […] or null}: health has the rows of health() that are not ok, for callers who see all tenants.
create or replace function jobqueue.http_overview(_role text, _tenants text)
returns text
language plpgsql
as $$
begin
    perform jobqueue.http_context(_role, _tenants, true);
    -- json, not jsonb: what is only written out need not be sorted first, a third of the time with thousands of queues
    return json_build_object(
        'queues', (
            select coalesce(json_agg(json_build_object('name', q.name, 'policy', q.policy, 'dead_letter', q.dead_letter, 'paused_at', q.paused_at,
                'pause_reason', q.pause_reason, 'paused_by', q.paused_by, 'warn_backlog', q.warn_backlog, 'workers', w.workers,
                'ready', coalesce(g.ready, 0), 'scheduled', coalesce(g.scheduled, 0), 'blocked', coalesce(g.blocked, 0),
                'processing', coalesce(g.processing, 0), 'paused', coalesce(g.paused, 0), 'failed', coalesce(g.failed_jobs, 0),
                'oldest_ready_seconds', g.oldest_ready_seconds, 'completed_minutes', s.completed, 'failed_minutes', s.failed) order by q.name), '[]')
            from jobqueue.queues q
            left join jobqueue.queue_gauges(null) g on g.queue = q.name
            left join jobqueue.http_queue_workers() w on w.queue = q.name
            left join jobqueue.http_sparks() s on s.queue = q.name),
        'health', case when jobqueue.sees_all_tenants() then (
            select coalesce(json_agg(row_to_json(h) order by h.status, h.name), '[]') from jobqueue.health() h where h.status <> 'ok') end)::text;
end
$$;

-- http_running: what each worker runs now, of the tenants that the caller sees, as rows for people; at most 20 jobs of a worker.
-- Index: claim_batch (all of it: one row per claim), job_pkey.
create or replace function jobqueue.http_running()
returns table (worker_id uuid, jobs jsonb)
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    select r.worker_id, jsonb_agg(jsonb_build_object('id', r.id, 'name', coalesce(r.display_name, r.job_type), 'progress_pct', r.progress_pct,
            'started_at', r.started_at) order by r.started_at, r.id)
    from (
        select j.id, j.worker_id, j.display_name, j.job_type, j.progress_pct, j.started_at,
            row_number() over (partition by j.worker_id order by j.started_at, j.id) as n
        from (select distinct i as id from claim_batch b cross join lateral unnest(b.job_ids) i limit 20000) c
        join job j on j.id = c.id and j.status = 'processing'
        where j.tenant = any ((select visible_tenants())::text[]) or (select sees_all_tenants())) r
    where r.n <= 20
    group by r.worker_id
$$;

-- http_workers: the workers, live ones first, each with what it runs. Who runs where (name, hostname, pid) is null for callers who do not
-- see all tenants. Returns a JSON list.
create or replace function jobqueue.http_workers(_role text, _tenants text)
returns text
language plpgsql
as $$
begin
    perform jobqueue.http_context(_role, _tenants, true);
    return (
        select coalesce(jsonb_agg(to_jsonb(w) || jsonb_build_object('jobs', coalesce(r.jobs, '[]'))
                || case when jobqueue.sees_all_tenants() then '{}' else '{"name": null, "hostname": null, "pid": null}'::jsonb end
            order by w.stopped_at is not null, w.state, w.started_at desc, w.id), '[]')::text
        from (select * from jobqueue.workers x order by x.stopped_at is not null, x.started_at desc limit 500) w
        left join jobqueue.http_running() r on r.worker_id = w.id);
end
$$;

-- http_ticks: when a schedule sends next, as a JSON list of at most _count times; of a schedule of another tenant nothing.
create or replace function jobqueue.http_ticks(_name text, _count int)
returns jsonb
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select coalesce(jsonb_agg(t order by t), '[]')
    from schedule s
    cross join lateral unnest(first_ticks(s.spec, now(), 'infinity', _count)) t
    where s.name = _name and s.paused_at is null and sees_tenant(s.tenant)
$$;

-- http_schedules: the schedules of the caller's tenants, by name, each with its next three times. Returns a JSON list.
create or replace function jobqueue.http_schedules(_role text, _tenants text)
returns text
language plpgsql
as $$
begin
    perform jobqueue.http_context(_role, _tenants, true);
    return (
        select coalesce(jsonb_agg(to_jsonb(s) || jsonb_build_object('ticks', jobqueue.http_ticks(s.name, 3)) order by s.name), '[]')::text
        from (select * from jobqueue.schedules x order by x.name limit 500) s);
end
$$;

-- http_batch_jobs: jobs of a batch: those that failed first, then those under way, then the others; of the first 5,000 that the index has.
--   _most  how many are returned. Returns a JSON list; empty if there is no such batch that the caller sees. Index: job_batch.
create or replace function jobqueue.http_batch_jobs(_role text, _tenants text, _batch uuid, _most int)
returns text
language plpgsql
as $$
begin
    perform jobqueue.http_context(_role, _tenants, true);
    return (
        select coalesce(jsonb_agg(to_jsonb(x) - 'rank' order by x.rank, x.created_at, x.id), '[]')::text
        from (
            select m.*, array_position(array['failed', 'processing', 'paused', 'pending', 'blocked'], m.status) as rank
            from (
                select j.id, j.queue, j.job_type, j.display_name, j.status, j.progress_pct, j.created_at, j.completed_at, j.error_message
                from jobqueue.job j
                where j.batch_id = _batch
                limit 5000) m
            order by rank, m.created_at, m.id
            limit _most) x);
end
$$;

-- http_tenant_page: what one tenant is waiting for, of its newest 5,000 jobs.
--   _most  unfinished and failed jobs at most, each
-- Returns {"unfinished", "progress_pct" (their mean), "failed", "completed" (in the last hour), "capped", "active": […], "failures": […],
-- "subjects": kinds of subjects of the unfinished ones, such as document} as JSON text. Index: job_list.
create or replace function jobqueue.http_tenant_page(_role text, _tenants text, _tenant text, _most int)
returns text
language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = on set jit = off
as $$
begin
    perform jobqueue.http_context(_role, _tenants, true);
    return (
        with newest as materialized (
            select j.id, j.status, j.progress_pct, j.subject, j.completed_at, j.created_at
            from jobqueue.job j
            where j.tenant = _tenant
            order by j.created_at desc, j.id desc
            limit 5000),
        active as (
            select n.* from newest n where n.status in ('processing', 'pending', 'blocked', 'paused'))
        select jsonb_build_object(
            'unfinished', (select count(*) from active),
            'progress_pct', (select floor(avg(a.progress_pct))::int from active a),
            'subjects', (select coalesce(jsonb_agg(distinct split_part(a.subject, ':', 1)), '[]') from active a where a.subject like '%:%'),
            'named', (select count(*) from active a where a.subject like '%:%'),
            'failed', (select count(*) from newest n where n.status = 'failed'),
            'completed', (select count(*) from newest n where n.status = 'completed' and n.completed_at > now() - interval '1 hour'),
            'capped', (select count(*) = 5000 from newest),
            'active', (
                select coalesce(jsonb_agg(jobqueue.http_job_body(x.id, null, array['brief'], false)::jsonb order by x.n), '[]')
                from (select a.id, row_number() over (order by a.status <> 'processing', a.created_at desc, a.id desc) as n from active a) x
                where x.n <= _most),
            'failures', (
                select coalesce(jsonb_agg(jobqueue.http_job_body(x.id, null, array['brief'], false)::jsonb order by x.n), '[]')
                from (select n.id, row_number() over (order by n.completed_at desc, n.id desc) as n from newest n where n.status = 'failed') x
                where x.n <= _most))::text);
end
$$;

-- http_tables: the tables of the schema, the largest first, with their sizes in bytes and what vacuum has left to do.
create or replace function jobqueue.http_tables()
returns table (name text, bytes bigint, index_bytes bigint, live_rows bigint, dead_rows bigint, vacuumed_at timestamptz, analyzed_at timestamptz)
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select t.relname::text, pg_total_relation_size(t.relid), pg_indexes_size(t.relid), t.n_live_tup, t.n_dead_tup,
        greatest(t.last_vacuum, t.last_autovacuum), greatest(t.last_analyze, t.last_autoanalyze)
    from pg_stat_user_tables t
    where t.schemaname = 'jobqueue'
    order by 2 desc, 1
$$;

-- http_settings: the settings that are stored in the database; what could be a secret by its name is hidden.
create or replace function jobqueue.http_settings()
returns table (name text, value text)
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select s.name, case when s.name ~* '(secret|password|passwd|token|key|dsn|url)' then '(hidden)' else s.value #>> '{}' end
    from setting s
    order by 1
$$;

-- http_system: the database as operators see it: doctor(), tables, settings. Names logins of the server, so the API asks for the scope admin,
-- and a caller who does not see all tenants is refused (JQ403).
create or replace function jobqueue.http_system(_role text, _tenants text)
returns text
language plpgsql
as $$
begin
    perform jobqueue.http_context(_role, _tenants, true);
    return jobqueue.http_database()::text;
end
$$;

-- http_database: see http_system. Errors: JQ403.
create or replace function jobqueue.http_database()
returns jsonb
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if not sees_all_tenants() then
        perform refuse('JQ403', 'FORBIDDEN', 'The state of the database is for callers who see all tenants.');
    end if;
    return jsonb_build_object(
        'checks', (select coalesce(jsonb_agg(to_jsonb(d) order by d.n), '[]') from (select *, row_number() over () as n from doctor()) d),
        'tables', (select coalesce(jsonb_agg(to_jsonb(t)), '[]') from http_tables() t),
        'settings', (select coalesce(jsonb_agg(to_jsonb(s)), '[]') from http_settings() s));
end
$$;

-- http_bulks: bulk operations, the newest first, as rows of http_bulk_row and tenant, actor, filter.
--   _before  the id of the last one of the page before; null: from the newest on;  _most  how many
-- Returns a JSON list. Index: bulk_operation_pkey.
create or replace function jobqueue.http_bulks(_role text, _tenants text, _before uuid, _most int)
returns text
language plpgsql
as $$
begin
    perform jobqueue.http_context(_role, _tenants, true);
    return (
        select coalesce(jsonb_agg(to_jsonb(x) order by x.id desc), '[]')::text
        from (
            select b.id, b.tenant, b.action, b.reason, b.actor, b.filter, b.total, b.done, b.counts, b.created_at, b.ended_at,
                coalesce((select j.status from jobqueue.job j where j.id = b.id), 'completed') as status
            from jobqueue.bulk_operation b
            where _before is null or b.id < _before
            order by b.id desc
            limit _most) x);
end
$$;
