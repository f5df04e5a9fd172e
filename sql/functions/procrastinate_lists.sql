-- What a procrastinate application reads of its jobs; the words are explained in procrastinate.sql. Ids and workers are uuids here, and the
-- same 128 bits as whole numbers there.

-- procrastinate_status: the status of a job in procrastinate's words. Aborted is what ended together with an attempt of its own.
create or replace function jobqueue.procrastinate_status(_job jobqueue.job)
returns text
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select case
        when _job.status in ('pending', 'paused', 'blocked') then 'todo'
        when _job.status = 'processing' then 'doing'
        when _job.status = 'completed' then 'succeeded'
        when _job.status = 'failed' then 'failed'
        when _job.status = 'cancelled' and exists (
            select from attempt a where a.job_id = _job.id and a.outcome = 'cancelled' and a.ended_at = _job.completed_at) then 'aborted'
        else 'cancelled' end
$$;

-- procrastinate_job_status: the same of one job by its id; no row if there is none. Index: job_pkey.
create or replace function jobqueue.procrastinate_job_status(_id uuid)
returns setof text
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select procrastinate_status(j) from job j where j.id = _id
$$;

-- procrastinate_jobs: jobs in the order of their ids; a filter that is null is not applied. Index: job_pkey for an id.
create or replace function jobqueue.procrastinate_jobs(
    _id uuid, _queue text, _task text, _status text, _lock text, _queueing_lock text, _worker uuid)
returns table (
    id uuid, queue_name text, task_name text, priority int, lock text, queueing_lock text, args jsonb, status text,
    scheduled_at timestamptz, attempts int, abort_requested boolean, worker_id uuid)
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
set plan_cache_mode = force_custom_plan
as $$
#variable_conflict use_column
begin
    return query
        select j.id, j.queue, j.job_type, j.priority, j.singleton_key, j.options ->> 'queueing_lock', j.payload, s.status,
            nullif(j.run_at, j.created_at),
            j.retry_count + case when j.attempt > 0 and s.status in ('succeeded', 'failed', 'aborted') then 1 else 0 end,
            coalesce(j.requested_action = 'cancel', false),
            -- of a worker that is gone the number is forgotten, as there
            (select w.id from worker w where w.id = j.worker_id and w.stopped_at is null)
        from job j
        cross join lateral (select procrastinate_status(j) as status offset 0) s
        where (_id is null or j.id = _id)
            and (_queue is null or j.queue = _queue)
            and (_task is null or j.job_type = _task)
            and (_lock is null or j.singleton_key = _lock)
            and (_queueing_lock is null or j.options ->> 'queueing_lock' = _queueing_lock)
            and (_worker is null or j.worker_id = _worker)
            and (_status is null or s.status = _status)
            and (j.queue in (select procrastinate_queues()))
        order by j.id;
end
$$;

-- procrastinate_counts: how many jobs there are per queue, task or lock, and per status among them ({"todo": 2}).
--   _by  queue_name, task_name, lock or status
create or replace function jobqueue.procrastinate_counts(_by text, _queue text, _task text, _status text, _lock text)
returns table (name text, jobs_count bigint, stats jsonb)
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select c.name, sum(c.n)::bigint, jsonb_object_agg(c.status, c.n)
    from (
        select case _by when 'queue_name' then p.queue_name when 'task_name' then p.task_name when 'lock' then p.lock else p.status end as name,
            p.status, count(*) as n
        from procrastinate_jobs(null, _queue, _task, _status, _lock, null, null) p
        group by 1, 2) c
    where c.name is not null
    group by c.name
    order by c.name
$$;

-- procrastinate_stalled: running jobs that nobody may be working on: their worker has said nothing for so many seconds or is gone; or, with
-- _started, those that began that long ago. Reads the notes of claims, not all jobs. Jobs whose lease is over are rescued without this.
create or replace function jobqueue.procrastinate_stalled(_silent double precision, _started double precision, _queue text, _task text)
returns table (
    id uuid, queue_name text, task_name text, priority int, lock text, queueing_lock text, args jsonb, status text,
    scheduled_at timestamptz, attempts int, abort_requested boolean, worker_id uuid)
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    select distinct p.*
    from claim_batch b
    cross join lateral unnest(b.job_ids) x (id)
    join job j on j.id = x.id and j.status = 'processing'
    left join worker w on w.id = j.worker_id
    cross join lateral procrastinate_jobs(j.id, _queue, _task, null, null, null, null) p
    where case when _started is not null then j.started_at < now() - make_interval(secs => _started)
        else w.id is null or w.stopped_at is not null or w.heartbeat_at < now() - make_interval(secs => _silent) end
    order by p.id
$$;

-- procrastinate_to_abort: running jobs that somebody asked to stop. Reads the notes of claims.
create or replace function jobqueue.procrastinate_to_abort(_queue text)
returns setof uuid
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    select distinct j.id
    from claim_batch b
    cross join lateral unnest(b.job_ids) x (id)
    join job j on j.id = x.id and j.status = 'processing' and j.requested_action = 'cancel'
    where (_queue is null or j.queue = _queue)
$$;

-- procrastinate_prune: workers of procrastinate that have said nothing for so many seconds are noted as stopped; returns them. Their jobs are
-- none of its business: a lease that runs out decides about those, and a worker that was only slow is back with its next beat.
create or replace function jobqueue.procrastinate_prune(_seconds double precision)
returns setof uuid
language sql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    update worker set stopped_at = now(), running = 0
    where stopped_at is null and version like 'procrastinate %' and heartbeat_at < now() - make_interval(secs => _seconds)
    returning id
$$;

-- procrastinate_delete_old: delete procrastinate's jobs that ended so many hours ago with one of these statuses. Returns how many.
-- Index: job_list, from the oldest on; nothing newer than the bound is looked at.
create or replace function jobqueue.procrastinate_delete_old(_hours double precision, _queue text, _statuses text[])
returns bigint
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set plan_cache_mode = force_custom_plan
as $$
declare
    bound timestamptz := now() - make_interval(secs => _hours * 3600);
    n bigint;
begin
    delete from job j
    where j.tenant = 'default' and j.created_at < bound and j.completed_at < bound
        and j.status in ('completed', 'failed', 'cancelled', 'skipped')
        and (_queue is null or j.queue = _queue) and j.queue in (select procrastinate_queues())
        and procrastinate_status(j) = any (_statuses)
        and not (j.settle_flags & 2 <> 0 and has_waiting_children(j.id));
    get diagnostics n = row_count;
    return n;
end
$$;
