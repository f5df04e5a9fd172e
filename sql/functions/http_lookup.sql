-- What is not a job: queues, workers, schedules, flows, batches; for the HTTP API, as JSON text.

-- http_seconds: a duration as seconds.
create or replace function jobqueue.http_seconds(_duration interval)
returns double precision
language sql immutable
as $$
    select extract(epoch from _duration)::double precision
$$;

-- http_queue_rows: queues with their options, durations in seconds, and how many jobs wait there (of all tenants, as a number; 1,000
-- means 1,000 or more). Null: all queues.
create or replace function jobqueue.http_queue_rows(_name text)
returns setof text
language sql stable
as $$
    select row_to_json(r)::text
    from (
        select q.name, q.policy, case when q.paused_at is null then 'active' else 'paused' end as state,
            q.max_retries, jobqueue.http_seconds(q.retry_delay) as retry_delay, q.retry_backoff,
            jobqueue.http_seconds(q.retry_delay_max) as retry_delay_max, jobqueue.http_seconds(q.timeout) as timeout,
            jobqueue.http_seconds(q.max_runtime) as max_runtime, jobqueue.http_seconds(q.lease) as lease,
            jobqueue.http_seconds(q.expires_in) as expires_in, jobqueue.http_seconds(q.keep_completed) as keep_completed,
            jobqueue.http_seconds(q.keep_ended) as keep_ended, q.dead_letter, q.concurrency, q.group_concurrency, q.key_concurrency,
            q.rate_limit, jobqueue.http_seconds(q.ageing) as ageing, q.fair_by, q.warn_backlog, q.paused_at, q.pause_reason, q.paused_by,
            coalesce(w.ready, 0) as ready, q.created_at, q.updated_at
        from jobqueue.queues q
        left join jobqueue.http_ready(_name) w on w.queue = q.name
        where _name is null or q.name = _name
        order by q.name) r
$$;

-- http_ready: how many jobs of each queue that has any may run now; at most 1,000 of each are counted. _queue: of this one only; null: all.
-- It hops from queue to queue, so that those without such jobs cost nothing. Index: job_claim.
create or replace function jobqueue.http_ready(_queue text)
returns table (queue text, ready bigint)
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
    with recursive waiting (queue) as (
        (select j.queue from job j where j.ready_seq is not null and (_queue is null or j.queue = _queue) order by j.queue limit 1)
        union all
        select (select j.queue from job j where j.ready_seq is not null and j.queue > w.queue order by j.queue limit 1)
        from waiting w
        where w.queue is not null and _queue is null)
    select w.queue, (select count(*) from (
        select from job j where j.queue = w.queue and j.ready_seq is not null order by -j.priority, j.ready_seq limit 1000) x)
    from waiting w
    where w.queue is not null
$$;

-- http_worker_rows: the workers as JSON objects with commas between, the latest first; null if there are none.
--   _named  whether with name, host name and process id: of machines that belong to all tenants, so for who sees all
create or replace function jobqueue.http_worker_rows(_named boolean)
returns text
language sql stable
as $$
    select string_agg(row_to_json(r)::text, ',' order by r.started_at desc, r.id)
    from (
        select w.id, case when _named then w.name end as name, case when _named then w.hostname end as hostname,
            case when _named then w.pid end as pid, w.version, w.queues, w.job_types, w.concurrency, w.running, w.started_at, w.heartbeat_at,
            w.stopped_at, w.state, w.drain_reason, w.stuck
        from jobqueue.workers w) r
$$;

-- http_list: GET /queues, /workers, /schedules as one call.
--   _what  queues, workers, schedules
-- Returns a JSON list.
create or replace function jobqueue.http_list(_role text, _tenants text, _what text)
returns text
language plpgsql
as $$
begin
    perform jobqueue.http_context(_role, _tenants, true);
    return '[' || coalesce(case _what
        when 'queues' then (select string_agg(x, ',') from jobqueue.http_queue_rows(null) x)
        when 'workers' then jobqueue.http_worker_rows(_tenants = '*')
        when 'schedules' then (select string_agg(row_to_json(s)::text, ',' order by s.name) from jobqueue.schedules s)
        end, '') || ']';
end
$$;

-- http_flow: GET /flows/{id} as one call: how far a flow is, and its jobs with what they wait for, at most 1,000. Errors: JQ404.
--   _id  of the flow, or of any job in it
create or replace function jobqueue.http_flow(_role text, _tenants text, _id uuid)
returns text
language plpgsql
as $$
begin
    perform jobqueue.http_context(_role, _tenants, true);
    return (
        select (to_jsonb(f) || jsonb_build_object('jobs', coalesce((
            select jsonb_agg(to_jsonb(m))
            from (
                select m.job_id as id, m.ref, j.queue, j.job_type, j.display_name, j.status, j.progress_pct, (
                        select coalesce(jsonb_agg(jsonb_build_object('id', e.parent_id, 'on_failure', e.on_failure) order by e.parent_id), '[]')
                        from jobqueue.edge e where e.child_id = m.job_id) as depends_on
                from jobqueue.flow_member m
                join jobqueue.job j on j.id = m.job_id
                where m.flow_id = f.flow_id
                order by j.created_at, j.id
                limit 1000) m), '[]')))::text
        from jobqueue.flow_status(_id) f);
end
$$;

-- http_batch: GET /batches/{id} as one call: how far a batch is. Errors: JQ404.
create or replace function jobqueue.http_batch(_role text, _tenants text, _id uuid)
returns text
language plpgsql
as $$
begin
    perform jobqueue.http_context(_role, _tenants, true);
    return (select to_jsonb(b)::text from jobqueue.batch_status(_id) b);
end
$$;
