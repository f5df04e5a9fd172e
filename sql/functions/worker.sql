-- see_worker: note that a worker is alive; an unknown one is registered.
create or replace function jobqueue.see_worker(_worker uuid)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if not exists (select from worker w where w.id = _worker and w.heartbeat_at > now() - interval '1 s' and w.stopped_at is null) then
        insert into worker (id, name) values (_worker, current_setting('application_name'))
        on conflict (id) do update set heartbeat_at = now(), stopped_at = null;
    end if;
end
$$;

-- register_worker: who works here. info: name, hostname, pid, version, queues (list or null for all), job_types (list), concurrency.
create or replace function jobqueue.register_worker(_worker uuid, _info jsonb)
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    insert into worker as w (id, name, hostname, pid, version, queues, job_types, concurrency)
    values (_worker, _info ->> 'name', _info ->> 'hostname', (_info ->> 'pid')::int, _info ->> 'version',
        case when jsonb_typeof(_info -> 'queues') = 'array' then array(select jsonb_array_elements_text(_info -> 'queues')) end,
        case when jsonb_typeof(_info -> 'job_types') = 'array' then array(select jsonb_array_elements_text(_info -> 'job_types')) end,
        (_info ->> 'concurrency')::int)
    on conflict (id) do update set name = excluded.name, hostname = excluded.hostname, pid = excluded.pid, version = excluded.version,
        queues = excluded.queues, job_types = excluded.job_types, concurrency = excluded.concurrency,
        heartbeat_at = now(), stopped_at = null, stuck = null;
end
$$;

-- note_stuck: handlers of a worker that go on after their attempts have ended, for health, explain and the list of workers. Told when they
-- change, not with every heartbeat.
--   _slots  how many of its slots they keep
--   _jobs   [{"id", "job_type", "why", "seconds"}]: why the attempt ended (timeout, cancel, pause, lost, fenced), and how long ago
create or replace function jobqueue.note_stuck(_worker uuid, _slots int, _jobs jsonb)
returns void
language sql security definer
set search_path = pg_catalog, jobqueue, pg_temp
-- the leases wait for the next heartbeat, and that for this
set lock_timeout = '200ms'
as $$
    update worker
    set stuck = case when _slots > 0 then jsonb_build_object('slots', _slots, 'jobs', (
        select jsonb_agg(e - 'seconds' || jsonb_build_object('since', now() - make_interval(secs => (e ->> 'seconds')::double precision)) order by i)
        from jsonb_array_elements(_jobs) with ordinality x (e, i))) end
    where id = _worker and stopped_at is null
$$;

-- stop_worker: the worker has ended in order.
create or replace function jobqueue.stop_worker(_worker uuid)
returns void
language sql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    update worker set stopped_at = now(), running = 0, stuck = null where id = _worker
$$;

-- register_job_types: what workers can run, and how it is called, tried again and shown; every way of sending applies it.
--   types: [{"name", "queue", "label", "options", "stages", "pausable"}]
create or replace function jobqueue.register_job_types(_types jsonb)
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    t jsonb;
begin
    for t in select e from jsonb_array_elements(_types) e order by e ->> 'name' loop
        perform refuse_unknown_option(coalesce(t -> 'options', '{}'), job_options(), 'a job_type');
        perform kept_options(coalesce(t -> 'options', '{}'));
        if nullif(t -> 'stages', 'null') is not null then
            perform 1 from stage_list(t -> 'stages');
        end if;
        insert into job_type as k (name, queue, label, options, stages, pausable)
        values (t ->> 'name', t ->> 'queue', t ->> 'label', coalesce(t -> 'options', '{}'), nullif(t -> 'stages', 'null'),
            coalesce((t ->> 'pausable')::boolean, false))
        on conflict (name) do update set queue = excluded.queue, label = excluded.label, options = excluded.options,
            stages = excluded.stages, pausable = excluded.pausable, registered_at = now()
        where (k.queue, k.label, k.options, k.stages, k.pausable)
            is distinct from (excluded.queue, excluded.label, excluded.options, excluded.stages, excluded.pausable);
        -- made here, so that no producer makes it in a long transaction while the others wait for its name
        insert into queue (name) values (coalesce(t ->> 'queue', t ->> 'name')) on conflict (name) do nothing;
    end loop;
end
$$;

-- drain_worker: ask a worker to finish what it has and stop. It hears of it with its next heartbeat.
create or replace function jobqueue.drain_worker(worker uuid, reason text)
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
begin
    perform check_reason(drain_worker.reason);
    update worker w set drain_requested_at = now(), drain_reason = drain_worker.reason
    where w.id = drain_worker.worker and w.stopped_at is null;
    if not found then
        perform refuse('JQ404', 'WORKER_NOT_FOUND', format('There is no running worker %s.', drain_worker.worker),
            'select * from jobqueue.workers lists them.');
    end if;
    perform note_action('drain_worker', null, null, drain_worker.worker::text, null, null, drain_worker.reason);
end
$$;

-- queue_names: the queues there are; for workers that serve all of them.
create or replace function jobqueue.queue_names()
returns table (name text, number int)
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select q.name, q.number from queue q order by q.name
$$;
