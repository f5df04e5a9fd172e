-- heartbeat: a worker says that it lives, what it works on, and hears what it is asked. One call per worker per beat (5 s).
--   worker  its id; an unknown one is registered
--   jobs    [{"id", "token", "started", "pct", "message", "data"}]: the leases of exactly these are extended; started = the handler
--           runs; pct, message and data are stored as progress() does, unless somebody keeps the job locked: then the next report says more
-- Returns (id, command): cancel, pause or lost for a job; drain, with a null id, for the worker. Errors: JQ400.
create or replace function jobqueue.heartbeat(worker uuid, jobs jsonb default '[]')
returns table (id uuid, command text)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    told uuid[];
    only_reports boolean;
    has_reports boolean;
    kept_ids uuid[];
    asked_ids uuid[];
    asked text[];
begin
    if heartbeat.worker is null or jsonb_typeof(jobs) is distinct from 'array' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'heartbeat needs the uuid of the worker and a JSON array of jobs.');
    elsif exists (select from jsonb_array_elements(jobs) e
        where case when jsonb_typeof(e) = 'object' then not coalesce(is_uuid(e ->> 'id') and is_uuid(e ->> 'token'), false) else true end)
    then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'Each job of a heartbeat needs an id and a token (uuids).');
    elsif exists (select from jsonb_array_elements(jobs) e
        where coalesce(jsonb_typeof(e -> 'started'), 'null') not in ('boolean', 'null')
            or coalesce(jsonb_typeof(e -> 'pct'), 'null') not in ('number', 'null')
            or coalesce(jsonb_typeof(e -> 'message'), 'null') not in ('string', 'null')
            or coalesce(jsonb_typeof(e -> 'data'), 'null') not in ('object', 'null'))
    then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'A job of a heartbeat has values of a wrong type.',
            'started is true or false, pct a number, message a string, data an object.');
    end if;
    -- a beat of nothing but reports is sent in between, and does not list what has nothing to report; it leaves the worker's row to the beats,
    -- which would wait for it
    select coalesce(bool_and(e ?| array['pct', 'message', 'data']), false), bool_or(e ?| array['pct', 'message', 'data'])
    into only_reports, has_reports
    from jsonb_array_elements(jobs) e;
    if not only_reports or not exists (select from worker w
        where w.id = heartbeat.worker and w.stopped_at is null and w.heartbeat_at > now() - interval '4 s')
    then
        insert into worker as w (id, name, running) values (heartbeat.worker, current_setting('application_name'), jsonb_array_length(jobs))
        on conflict (id) do update set heartbeat_at = now(), stopped_at = null,
            running = case when only_reports then greatest(w.running, excluded.running) else excluded.running end;
    end if;
    -- hash joins are off, so nothing but the jobs themselves is joined: 1,000 jobs joined with their list took 300 ms
    with listed as materialized (
        select (e ->> 'id')::uuid as id, (e ->> 'token')::uuid as token, coalesce((e ->> 'started')::boolean, true) as started,
            e ?| array['pct', 'message', 'data'] as reports
        from jsonb_array_elements(jobs) e),
    locked as materialized (
        select j.id, l.started, option_interval(j.options, 'lease', q.lease) as lease,
            -- what was expected has passed, or nothing is expected yet; a report brings its own estimate
            case when l.started and not l.reports and coalesce(j.estimated_completion < now(), true)
                then late_estimate(j.job_type, j.started_at, j.estimated_completion) end as ends
        from (select * from listed l order by l.id) l
        join job j on j.id = l.id and j.claim_token = l.token and j.status = 'processing'
        join queue q on q.name = j.queue
        -- a row that somebody has locked must not keep the other leases back: it is extended by the next beat
        for update of j skip locked),
    kept as (
        update job j
        set lease_until = greatest(j.lease_until, now() + k.lease),
            heartbeat_at = now(),
            handler_started = j.handler_started or k.started,
            life_at = case when k.started and not j.handler_started then now() else j.life_at end,
            estimated_completion = coalesce(k.ends, j.estimated_completion),
            version = case when k.ends is null then j.version else j.version + 1 end
        from locked k
        where j.id = k.id
        returning j.id, j.requested_action)
    select coalesce(array_agg(k.id), '{}'), array_agg(k.id) filter (where k.requested_action is not null),
        array_agg(k.requested_action) filter (where k.requested_action is not null)
    into kept_ids, asked_ids, asked
    from kept k;
    return query select * from unnest(asked_ids, asked);
    return query
        select l.id, case when j.id is null then 'lost' else j.requested_action end
        from (select (e ->> 'id')::uuid as id, (e ->> 'token')::uuid as token from jsonb_array_elements(jobs) e) l
        left join job j on j.id = l.id and j.claim_token = l.token and j.status = 'processing'
        where l.id <> all (kept_ids) and (j.id is null or j.requested_action is not null);
    if has_reports then
        begin
            told := store_reports(jobs);
        exception when lock_not_available then
            -- one by one, without those that somebody keeps locked
            told := store_free_reports(jobs);
        end;
    end if;
    -- one look at the listeners and one notification for up to 120 jobs
    if told <> '{}' then
        perform publish_changes(told);
    end if;
    return query
        select null::uuid, 'drain'::text from worker w where w.id = heartbeat.worker and w.drain_requested_at is not null;
end
$$;

-- store_reports: the reports of a heartbeat, in the order of ids. Returns the jobs of which something changed that a poller can see.
create or replace function jobqueue.store_reports(_jobs jsonb)
returns uuid[]
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
-- what waits here holds the leases and the other jobs of its worker
set lock_timeout = '200ms'
as $$
declare
    beat jsonb;
    told uuid[] := '{}';
begin
    for beat in
        select e from jsonb_array_elements(_jobs) e
        where e ?| array['pct', 'message', 'data'] order by e ->> 'id'
    loop
        if store_progress((beat ->> 'id')::uuid, (beat ->> 'token')::uuid,
            case when beat ->> 'pct' is not null then least(greatest((beat ->> 'pct')::numeric, 0), 100)::int end, beat ->> 'message',
            nullif(beat -> 'data', 'null')) = 'changed'
        then
            told := told || (beat ->> 'id')::uuid;
        end if;
    end loop;
    return told;
end
$$;

-- store_free_reports: the same without the jobs that somebody has locked at this moment.
create or replace function jobqueue.store_free_reports(_jobs jsonb)
returns uuid[]
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    free uuid[] := array(
        select j.id from job j
        where j.id = any (array(select (e ->> 'id')::uuid from jsonb_array_elements(_jobs) e))
        order by j.id
        for update skip locked);
begin
    return store_reports((
        select coalesce(jsonb_agg(e), '[]') from jsonb_array_elements(_jobs) e where (e ->> 'id')::uuid = any (free)));
end
$$;
