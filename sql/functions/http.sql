-- What only the HTTP API calls. A request is one statement, so one transaction and one round trip: it takes the role and the tenants of
-- its caller upon itself, reads or sends, and answers with the job as JSON text. Both settings end with the transaction.

-- http_context: make this transaction the caller's.
--   role       jobqueue_api, or null if the login user cannot take it (its own rights and policies hold then)
--   tenants    'a,b', or '*' for all
--   read_only  true: nothing can be written until the transaction ends; false: a lock is waited for 5 s at most
-- No SET clause here and in the other functions that are not SECURITY DEFINER: it would cost them 3 us, and they can do nothing that
-- their caller could not.
create or replace function jobqueue.http_context(_role text, _tenants text, _read_only boolean)
returns void
language plpgsql
as $$
begin
    -- Plans of these functions are the same for every job; planning anew each time would double the time of GET /jobs/{id}.
    -- One statement: each costs 5 us.
    perform pg_catalog.set_config('plan_cache_mode', 'force_generic_plan', true), pg_catalog.set_config('jit', 'off', true),
        case when _read_only then pg_catalog.set_config('transaction_read_only', 'on', true)
            else pg_catalog.set_config('lock_timeout', '5s', true) end,
        case when _role is not null then pg_catalog.set_config('role', _role, true) end,
        pg_catalog.set_config('jobqueue.tenants', _tenants, true);
end
$$;

-- http_queue_position: how many waiting jobs are claimed before this one, plus 1; 1000 means 1000 or more. Null unless it may run now, or
-- waits for a limit. Counts other tenants' jobs too: they stand in the same line. Index: see ahead_of.
create or replace function jobqueue.http_queue_position(_id uuid)
returns int
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    j jobqueue.job;
    l jobqueue.admission_line;
begin
    select * into j from job where id = _id;
    if j.status is distinct from 'pending' or not sees_tenant(j.tenant) then
        return null;
    elsif j.ready_seq is null then
        select * into l from admission_line x where x.job_id = _id and x.stage <> 6;
        if not found then
            return null;
        end if;
    end if;
    return least(1000, 1 + (select count(*) from ahead_of(j, l, 999)));
end
$$;

-- http_more: what the API adds to a row of the view jobqueue.jobs; parts of jobqueue.actions, without its second look at the job.
--   _estimate  whether to estimate when a pending job ends; that counts those ahead in the line (up to 10,000), so lists go without
-- Returns members as JSON text, without braces, and ends_at: when a pending job is expected to end; null where nobody knows. Both are
-- null for a job of another tenant.
create or replace function jobqueue.http_more(_id uuid, _estimate boolean, out members text, out ends_at timestamptz)
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    j jobqueue.job;
    visible text[] := string_to_array(current_setting('jobqueue.tenants', true), ',');
    place int;
    sets record;
begin
    select * into j from job where id = _id;
    if (j.tenant = any (visible) or visible = '{*}') is not true then
        return;
    end if;
    -- Where nobody knows what a run takes, the line has no times either; its length alone costs a quarter.
    if j.status = 'pending' and _estimate and run_expectation(j.job_type) is not null then
        select case when e.queue_position > 1000 then 1000 else e.queue_position end, e.ends_at into place, ends_at from estimate(_id) e;
    elsif j.status = 'pending' then
        place := http_queue_position(_id);
    end if;
    sets := action_sets(j);
    members := case when j.status in ('completed', 'failed', 'cancelled', 'skipped') then '"done":true' else '"done":false' end
        || ',"allowed_actions":' || array_to_json(sets.allowed)::text
        || ',"refused_actions":{' || sets.refused || '}'
        || ',"queue_position":' || coalesce(place::text, 'null');
end
$$;

-- http_job_body: the job as JSON text, as the caller may see it. Null if there is none.
--   fields   the keys wanted; null: all
--   include  'stages', 'attempts': their rows as well; 'brief': without values over 16 kB, whose names stand in "omitted" (for lists
--            and streams, where 200 jobs of 16 MB would be gigabytes); 'sent': just sent, perhaps one of many. Neither of these two
--            counts the line for an estimate
--   traces   whether attempts come with their stack traces
create or replace function jobqueue.http_job_body(_id uuid, _fields text[], _include text[], _traces boolean)
returns text
language plpgsql
as $$
declare
    seen record;
    more record;
    body text;
    omitted text[];
begin
    if 'brief' = any (_include) then
        select array_agg(x.name) into omitted
        from jobqueue.job j
        cross join lateral (values ('payload', pg_column_size(j.payload)), ('result', pg_column_size(j.result)),
            ('stats', pg_column_size(j.stats)), ('metadata', pg_column_size(j.metadata))) x (name, bytes)
        where j.id = _id and x.bytes > 16384 and (_fields is null or x.name = any (_fields));
    end if;
    if _fields is null and omitted is null then
        select * into seen from jobqueue.jobs v where v.id = _id;
        if seen.id is not null then
            more := jobqueue.http_more(_id, not coalesce(_include && array['brief', 'sent'], false));
            seen.estimated_completion := coalesce(seen.estimated_completion, more.ends_at);
            body := left(row_to_json(seen)::text, -1) || ',' || more.members || '}';
        end if;
    else
        body := jobqueue.http_some(_id, case when _include && array['brief', 'sent'] then _fields
            else array_replace(_fields, 'estimated_completion', 'estimate') end, omitted);
    end if;
    if 'stages' = any (_include) then
        body := jobqueue.http_with(body, 'stages', (
            select json_agg(row_to_json(s) order by s."position")
            from (select t.* from jobqueue.stages t where t.job_id = _id) s));
    end if;
    if 'attempts' = any (_include) then
        body := jobqueue.http_with(body, 'attempts', jobqueue.http_attempts(_id, _traces));
    end if;
    return body;
end
$$;

-- http_some: some keys of a job as JSON text; only what is wanted is read. Null if there is no such job.
--   fields   the keys wanted, in this order; null: all; "estimate" is estimated_completion, also for a pending job. omitted: keys left
--            out, and named in "omitted"
create or replace function jobqueue.http_some(_id uuid, _fields text[], _omitted text[])
returns text
language plpgsql
as $$
declare
    keys text[] := coalesce(_fields, jobqueue.http_fields());
    said text;
    body text;
begin
    select string_agg(case k
            when 'done' then 'v.status in (''completed'', ''failed'', ''cancelled'', ''skipped'') as done'
            when 'allowed_actions' then '(select coalesce(jsonb_agg(x.action) filter (where x.allowed), ''[]'')
                from jobqueue.actions(v.id) x) as allowed_actions'
            when 'refused_actions' then '(select coalesce(jsonb_object_agg(x.action, x.reason) filter (where not x.allowed), ''{}'')
                from jobqueue.actions(v.id) x) as refused_actions'
            when 'estimate' then 'coalesce(v.estimated_completion, case when v.status = ''pending'' then (
                select e.ends_at from jobqueue.estimate(v.id) e) end) as estimated_completion'
            when 'queue_position' then 'case when v.status = ''pending'' then jobqueue.http_queue_position(v.id) end as queue_position'
            else format('v.%I', k) end, ', ' order by n)
    into said
    from (select k, min(n) as n from unnest(keys) with ordinality x (k, n) group by k) wanted
    where k <> 'links' and (_omitted is null or k <> all (_omitted));
    said := concat_ws(', ', said, case when _omitted is not null then format('%L::text[] as omitted', _omitted) end);
    execute format('select row_to_json(r)::text from (select %s from jobqueue.jobs v where v.id = $1) r', said) into body using _id;
    return body;
end
$$;

-- http_fields: the keys of a job: the columns of the view jobqueue.jobs, and what the API adds.
create or replace function jobqueue.http_fields()
returns text[]
language sql stable
as $$
    select array_agg(a.attname::text order by a.attnum) || array['done', 'allowed_actions', 'refused_actions', 'queue_position']
    from pg_catalog.pg_attribute a
    where a.attrelid = 'jobqueue.jobs'::pg_catalog.regclass and a.attnum > 0
$$;

-- http_attempts: the attempts of a job as a JSON list, the first one first; null if there is none.
create or replace function jobqueue.http_attempts(_id uuid, _traces boolean)
returns json
language sql stable
as $$
    select json_agg(row_to_json(s) order by s.attempt)
    from (
        select t.job_id, t.attempt, t.tenant, t.outcome, t.worker_id, t.started_at, t.ended_at, t.error_class, t.error_code,
            t.error_message, case when _traces then t.error_detail end as error_detail, t.next_run_at
        from jobqueue.attempts t where t.job_id = _id) s
$$;

-- http_with: a JSON object, as text, with one list more.
create or replace function jobqueue.http_with(_object text, _key text, _list json)
returns text
language sql immutable
as $$
    select case _object when '{}' then '{' else left(_object, -1) || ',' end
        || to_json(_key)::text || ':' || coalesce(_list::text, '[]') || '}'
$$;

-- http_job_state: what an answer about a job is decided by, and the job itself unless the caller has it already.
--   etags  what the caller has ("*": anything); null: nothing
-- Returns no job (version null), or etag, version, status, alive, the seconds until it is due and until it is expected to end,
-- and the body; body is null if etag is among those given. etag changes with the version, with alive while the job is processing,
-- and every 10 s while it is pending (its place in the line changes without a new version).
create or replace function jobqueue.http_job_state(
    _id uuid, _etags text[], _fields text[], _include text[], _traces boolean,
    out etag text, out version bigint, out status text, out alive boolean, out due_in double precision, out ends_in double precision,
    out body text)
language plpgsql
as $$
#variable_conflict use_column
declare
    -- Asked for all of it, the row is read once (60 us); a 304 needs no more than the table itself has (20 us).
    whole boolean := _etags is null and _fields is null and coalesce(_include, '{sent}') = '{sent}';
    seen record;
    more record;
begin
    if whole then
        select * into seen from jobqueue.jobs v where v.id = _id;
    else
        select v.version, v.status, v.alive, v.run_at, v.estimated_completion into seen from jobqueue.jobs v where v.id = _id;
    end if;
    if seen.version is null then
        return;
    end if;
    status := seen.status;
    alive := seen.alive;
    due_in := extract(epoch from seen.run_at - now());
    ends_in := extract(epoch from seen.estimated_completion - now());
    etag := 'W/"' || seen.version || '-' || case status
        when 'processing' then case when alive then 'a' else 'n' end
        when 'pending' then (extract(epoch from now())::bigint / 10)::text
        else '0' end || '"';
    version := seen.version;
    if etag = any (_etags) or '*' = any (_etags) then
        return;
    end if;
    if whole then
        more := jobqueue.http_more(_id, _include is null);
        if more.ends_at is not null and seen.estimated_completion is null then
            seen.estimated_completion := more.ends_at;
        end if;
        body := left(row_to_json(seen)::text, -1) || ',' || more.members || '}';
    else
        body := jobqueue.http_job_body(_id, _fields, _include, _traces);
    end if;
    if body is null then
        -- deleted meanwhile
        version := null;
    end if;
end
$$;

-- http_job: GET /jobs/{id} as one call; parameters of http_context and http_job_state.
create or replace function jobqueue.http_job(
    _role text, _tenants text, _id uuid, _etags text[], _fields text[], _include text[], _traces boolean,
    out etag text, out version bigint, out status text, out alive boolean, out due_in double precision, out ends_in double precision,
    out body text)
language plpgsql
as $$
declare
    state record;
begin
    perform jobqueue.http_context(_role, _tenants, true);
    -- Assigned, not selected: as a row source the function would cost 40 us more.
    state := jobqueue.http_job_state(_id, _etags, _fields, _include, _traces);
    etag := state.etag;
    version := state.version;
    status := state.status;
    alive := state.alive;
    due_in := state.due_in;
    ends_in := state.ends_in;
    body := state.body;
end
$$;

-- http_send_one: one element of POST /jobs: {"queue": …, "payload": …, any option of send}. Errors: those of send, JQ404 unknown queue.
create or replace function jobqueue.http_send_one(
    _job jsonb, _fixed jsonb, _create_queues boolean, out id uuid, out created boolean, out reason text)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    name_given text;
begin
    if jsonb_typeof(_job) is distinct from 'object' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'A job must be a JSON object.', 'Give {"queue": "…", "payload": {…}}.');
    end if;
    name_given := to_text(_job -> 'queue', 'queue', 200);
    if name_given is null then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'queue is missing.', 'Name the queue that the job goes to.', '{"option": "queue"}');
    elsif not _create_queues and not exists (select from queue q where q.name = name_given) then
        perform refuse_queue(name_given, 'Create it with jobqueue.create_queue, or allow this API to (JOBQUEUE_API_CREATE_QUEUES).');
    end if;
    select s.id, s.created, s.reason into id, created, reason
    from send(name_given, coalesce(_job -> 'payload', '{}'), coalesce(_fixed -> 'defaults', '{}') || (_job - 'queue' - 'payload') || (_fixed - 'defaults')) s;
end
$$;

-- http_send_all: the elements of POST /jobs, all or none. An error names its element if several were given.
create or replace function jobqueue.http_send_all(_jobs jsonb, _fixed jsonb, _create_queues boolean)
returns table (id uuid, created boolean, reason text)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    element jsonb;
    n bigint;
    state text;
    message text;
    hint text;
    detail text;
begin
    for element, n in select e, i - 1 from jsonb_array_elements(_jobs) with ordinality x (e, i) order by i loop
        select s.id, s.created, s.reason into id, created, reason from http_send_one(element, _fixed, _create_queues) s;
        return next;
    end loop;
exception when others then
    get stacked diagnostics state = returned_sqlstate, message = message_text, hint = pg_exception_hint, detail = pg_exception_detail;
    if state not like 'JQ%' then
        raise;
    end if;
    perform refuse(state, detail::jsonb ->> 'code', format('Element %s: %s', n, message), hint,
        (detail::jsonb - 'code') || jsonb_build_object('index', n));
end
$$;

-- http_take_key: make an idempotency key this transaction's. A twin waits here until the first has ended, and then finds its jobs.
-- Returns null if the key was free, or the ids of the jobs that it was used for. Kept for 24 hours.
-- Errors: JQ400 IDEMPOTENCY_KEY_REUSED for another fingerprint, JQ409 CONFLICT if the first twin went away just now.
create or replace function jobqueue.http_take_key(_owner text, _key text, _fingerprint text)
returns uuid[]
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    k jobqueue.idempotency_key;
begin
    insert into idempotency_key as x (owner, key, fingerprint, job_ids)
    values (_owner, _key, _fingerprint, '{}')
    on conflict (owner, key) do update
        set fingerprint = excluded.fingerprint, job_ids = '{}', created_at = now()
        where x.created_at < now() - interval '24 hours';
    if found then
        return null;
    end if;
    select * into k from idempotency_key x where x.owner = _owner and x.key = _key;
    if not found then
        perform refuse('JQ409', 'CONFLICT', 'This Idempotency-Key has expired while it was looked at.', 'Send the request again.');
    elsif k.fingerprint <> _fingerprint then
        perform refuse('JQ400', 'IDEMPOTENCY_KEY_REUSED', 'This Idempotency-Key was used with another request.',
            'Use a new key for every new request, and the same key only to repeat a request unchanged.');
    end if;
    return k.job_ids;
end
$$;

-- http_keep_key: remember the jobs of an idempotency key that this transaction has taken.
create or replace function jobqueue.http_keep_key(_owner text, _key text, _ids uuid[])
returns void
language sql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    update idempotency_key set job_ids = _ids where owner = _owner and key = _key
$$;

-- http_send: POST /jobs as one call.
--   body           what http_send_one takes, or {"jobs": [such elements]}: all or none, and errors name the element
--   fixed          options that hold for all of them and win over the elements' own; its "defaults" hold for elements without
--   create_queues  whether unknown queues are made
--   owner, key, fingerprint   the idempotency key, if any
-- Returns per element, in order: replayed, created, reason and the columns of http_job_state. id is null if another tenant's job
-- stands in the place; version is null if a replayed job has been deleted since.
create or replace function jobqueue.http_send(
    _role text, _tenants text, _body jsonb, _fixed jsonb, _create_queues boolean,
    _owner text, _key text, _fingerprint text)
returns table (replayed boolean, id uuid, created boolean, reason text, etag text, version bigint, status text, alive boolean,
    due_in double precision, ends_in double precision, body text)
language plpgsql
as $$
#variable_conflict use_column
declare
    ids uuid[];
begin
    perform jobqueue.http_context(_role, _tenants, false);
    if _key is not null then
        ids := jobqueue.http_take_key(_owner, _key, _fingerprint);
    end if;
    replayed := ids is not null;
    if replayed then
        for id in select x from unnest(ids) x loop
            created := false;
            reason := 'idempotency_key';
            select s.* into etag, version, status, alive, due_in, ends_in, body
            from jobqueue.http_job_state(id, null, null, array['sent'], false) s;
            return next;
        end loop;
        return;
    end if;
    ids := '{}';
    for id, created, reason in
        select s.id, s.created, s.reason from jobqueue.http_send_all(_body -> 'jobs', _fixed, _create_queues) s where _body ? 'jobs'
        union all
        select s.id, s.created, s.reason from jobqueue.http_send_one(_body, _fixed, _create_queues) s where not _body ? 'jobs'
    loop
        ids := ids || id;
        select s.* into etag, version, status, alive, due_in, ends_in, body
        from jobqueue.http_job_state(id, null, null, array['sent'], false) s;
        return next;
    end loop;
    if _key is not null then
        perform jobqueue.http_keep_key(_owner, _key, ids);
    end if;
end
$$;

-- http_watch: count the API as a listener of topics (see jobqueue.watch) for a minute or more, in one call.
create or replace function jobqueue.http_watch(_role text, _topics text[], _duration interval)
returns void
language plpgsql
as $$
begin
    perform jobqueue.http_context(_role, '*', false);
    perform jobqueue.watch(t, _duration) from (select distinct x as t from unnest(_topics) x order by 1) sorted;
end
$$;

-- http_versions: version and alive of many jobs, whoever they belong to: for waking those who wait. Deleted jobs are missing.
create or replace function jobqueue.http_versions(_role text, _ids uuid[])
returns table (id uuid, version bigint, alive boolean)
language plpgsql
as $$
#variable_conflict use_column
begin
    perform jobqueue.http_context(_role, '*', true);
    return query select v.id, v.version, v.alive from jobqueue.jobs v where v.id = any (_ids);
end
$$;
