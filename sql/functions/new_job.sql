-- The options of send and how they become a job. Order of precedence: option of the call, option of the job_type, then, at the time of
-- use, option of the queue (so that a changed queue reaches waiting jobs).

-- job_options: the names that send knows.
create or replace function jobqueue.job_options()
returns text[]
language sql immutable parallel safe
as $$
    select array['job_type', 'priority', 'run_at', 'delay', 'singleton_key', 'throttle_seconds', 'debounce_seconds', 'slot_until',
        'merge_payload', 'group', 'tier', 'tenant', 'subject', 'display_name', 'metadata', 'created_by', 'max_retries', 'retry_delay',
        'retry_backoff', 'retry_delay_max', 'timeout', 'max_runtime', 'lease', 'expires_in', 'keep_completed', 'keep_ended',
        'dead_letter', 'stages', 'id', 'depends_on', 'on_failure', 'batch', 'trace_context']
$$;

-- kept_options: those that stay with the job until they are used, durations in seconds.
create or replace function jobqueue.kept_options(_options jsonb)
returns jsonb
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    name text;
    value jsonb;
    duration interval;
    result jsonb := '{}';
begin
    foreach name in array array['retry_delay', 'retry_delay_max', 'timeout', 'max_runtime', 'lease', 'expires_in', 'keep_completed',
        'keep_ended'] loop
        if _options ? name then
            value := _options -> name;
            duration := to_interval(value, name);
            if duration is null and name in ('retry_delay', 'lease') then
                perform refuse('JQ400', 'INVALID_ARGUMENT', format('%s cannot be null.', name), '', jsonb_build_object('option', name));
            elsif name = 'lease' and duration < interval '10 s' then
                perform refuse('JQ400', 'INVALID_ARGUMENT', 'lease must be at least 10 seconds.',
                    'Workers prove that they live every 5 seconds.', jsonb_build_object('option', name));
            elsif name in ('timeout', 'max_runtime') and duration = interval '0' then
                perform refuse('JQ400', 'INVALID_ARGUMENT', format('%s must be more than 0 seconds.', name),
                    'Give null for no limit.', jsonb_build_object('option', name));
            end if;
            result := result || jsonb_build_object(name, extract(epoch from duration));
        end if;
    end loop;
    if _options ? 'retry_backoff' then
        result := result || jsonb_build_object('retry_backoff', to_boolean(_options -> 'retry_backoff', 'retry_backoff'));
    end if;
    if _options ? 'dead_letter' then
        name := to_text(_options -> 'dead_letter', 'dead_letter', 200);
        if name !~ '^[A-Za-z0-9_./:-]{1,200}$' then
            perform refuse('JQ400', 'INVALID_ARGUMENT', format('"%s" cannot be the name of a queue.', left(name, 100)),
                'Use 1 to 200 letters, digits, and _ . / : -', '{"option": "dead_letter"}');
        end if;
        result := result || jsonb_build_object('dead_letter', name);
    end if;
    if _options ? 'trace_context' then
        result := result || coalesce(trace_option(_options), '{}');
    end if;
    return nullif(result, '{}');
end
$$;

-- check_tenant: the tenants of this transaction (jobqueue.tenants) bound what may be sent.
create or replace function jobqueue.check_tenant(_tenant text)
returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
    -- jobqueue.tenants is a list with commas, in which * means all
    if _tenant = '*' or strpos(_tenant, ',') > 0 then
        perform jobqueue.refuse('JQ400', 'INVALID_ARGUMENT', format('"%s" cannot be the name of a tenant.', left(_tenant, 100)),
            'A tenant is not "*" and has no comma in its name.', '{"option": "tenant"}');
    end if;
    if not jobqueue.sees_tenant(_tenant) then
        perform jobqueue.refuse('JQ403', 'FORBIDDEN', format('This session may not act for the tenant "%s".', left(_tenant, 200)),
            'It is bound to the tenants in the setting jobqueue.tenants.', jsonb_build_object('tenant', left(_tenant, 200)));
    end if;
end
$$;

-- to_id: any uuid as the id of a job.
create or replace function jobqueue.to_id(_value jsonb)
returns uuid
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if jsonb_typeof(_value) = 'string' then
        return (_value #>> '{}')::uuid;
    end if;
    raise invalid_text_representation;
exception when invalid_text_representation then
    perform jobqueue.refuse('JQ400', 'INVALID_ARGUMENT', format('id is not a uuid: %s.', left(_value::text, 100)), '',
        jsonb_build_object('option', 'id'));
end
$$;

-- stage_list: stages as given (names, or objects with name and weight) as rows.
create or replace function jobqueue.stage_list(_stages jsonb)
returns table (name text, "position" int, weight double precision)
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    stage jsonb;
    names text[] := '{}';
begin
    if jsonb_typeof(_stages) is distinct from 'array' or jsonb_array_length(_stages) > 1000 then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'stages must be a list of at most 1000 stages.',
            'Give names, or objects such as {"name": "ocr", "weight": 5}.', '{"option": "stages"}');
    end if;
    for stage, "position" in select s, n from jsonb_array_elements(_stages) with ordinality e (s, n) loop
        if jsonb_typeof(stage) = 'object' then
            perform refuse_unknown_option(stage, array['name', 'weight'], 'a stage');
        else
            stage := jsonb_build_object('name', stage);
        end if;
        name := to_text(stage -> 'name', 'stages.name', 200);
        weight := coalesce(to_weight(stage -> 'weight', 'stages.weight'), 1);
        if name is null or name = any (names) then
            perform refuse('JQ400', 'INVALID_ARGUMENT', format('Stage %s needs a name of its own.', "position"), '', '{"option": "stages"}');
        end if;
        names := names || name;
        return next;
    end loop;
end
$$;

-- new_job: the row that a call of send asks for; not stored yet. Raises JQ400, JQ403 or JQ413.
create or replace function jobqueue.new_job(_queue jobqueue.queue, _payload jsonb, _options jsonb)
returns jobqueue.job
language plpgsql volatile
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    r jobqueue.job;
    t jobqueue.job_type;
    o jsonb := _options;
    expires interval;
begin
    perform refuse_unknown_option(o, job_options(), 'send');
    r.job_type := coalesce(to_text(o -> 'job_type', 'job_type', 200), _queue.name);
    select * into t from job_type where name = r.job_type;
    if found then
        o := t.options || o;
    end if;
    if o ? 'run_at' and o ? 'delay' then
        if not _options ? 'run_at' then o := o - 'run_at'; elsif not _options ? 'delay' then o := o - 'delay';
        else
            perform refuse('JQ400', 'INVALID_ARGUMENT', 'run_at and delay exclude each other.', 'Give one of the two.');
        end if;
    end if;
    r.id := coalesce(case when o ? 'id' then to_id(o -> 'id') end, new_id());
    r.queue := _queue.name;
    r.tenant := coalesce(to_text(o -> 'tenant', 'tenant', 200), 'default');
    perform check_tenant(r.tenant);
    r.payload := coalesce(_payload, '{}');
    r.priority := coalesce(to_int(o -> 'priority', 'priority', -2147483646, 2147483647), 0);
    r.subject := to_text(o -> 'subject', 'subject', 1000);
    r.created_by := to_text(o -> 'created_by', 'created_by', 500);
    r.singleton_key := to_text(o -> 'singleton_key', 'singleton_key', 500);
    r.group_key := to_text(o -> 'group', 'group', 500);
    r.tier := to_text(o -> 'tier', 'tier', 200);
    r.max_retries := to_int(o -> 'max_retries', 'max_retries', 0, 1000000);
    r.retry_budget := r.max_retries;
    r.options := kept_options(o);
    r.metadata := nullif(o -> 'metadata', 'null');
    r.pausable := coalesce(t.pausable, false);
    if jsonb_typeof(r.metadata) <> 'object' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'metadata must be a JSON object.', '', '{"option": "metadata"}');
    end if;
    perform refuse_large(r.payload, 'payload', 8388608);
    perform refuse_large(r.metadata, 'metadata', 1048576);
    r.display_name := clean_text(coalesce(to_text(o -> 'display_name', 'display_name', 1000),
        render_label(t.label, r.payload, r.metadata)), 300);
    r.created_at := now();
    r.updated_at := now();
    r.run_at := coalesce(to_time(o -> 'run_at', 'run_at'), now() + to_interval(o -> 'delay', 'delay'), now());
    expires := coalesce(to_interval(o -> 'expires_in', 'expires_in'), case when o ? 'expires_in' then null else _queue.expires_in end);
    r.expires_at := greatest(r.run_at, now()) + expires;
    r.status := 'pending';
    r.version := 1;
    r.suspect := false;
    r.attempt := 0;
    r.retry_count := 0;
    r.lost_count := 0;
    r.progress_pct := 0;
    r.resume_count := 0;
    r.unfinished_parents := 0;
    r.settle_flags := case when option_interval(r.options, 'keep_completed', _queue.keep_completed) = interval '0' then 1 else 0 end
        | case when option_interval(r.options, 'keep_ended', _queue.keep_ended) = interval '0' then 16 else 0 end
        | case when _queue.limited then 256 else 0 end;
    if _queue.policy = 'key_strict_fifo' and r.singleton_key is null then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('Every job of the queue "%s" needs a singleton_key.', _queue.name),
            'Its policy is key_strict_fifo: jobs of one key run strictly one after the other.', '{"option": "singleton_key"}');
    end if;
    r.batch_id := case when o ? 'batch' then batch_for_send(o -> 'batch', r.tenant) end;
    r := hold_of(r, _queue, o);
    if coalesce(o -> 'stages', t.stages) is not null then
        select count(*) into r.total_stages from stage_list(coalesce(o -> 'stages', t.stages));
        r.completed_stages := 0;
    end if;
    return r;
end
$$;

-- render_label: "Indexing: {payload.path}" with the values of one job; what is missing is left out.
create or replace function jobqueue.render_label(_label text, _payload jsonb, _metadata jsonb)
returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    field text;
    result text := _label;
begin
    for field in select m[1] from regexp_matches(_label, '\{((?:payload|metadata)(?:\.[A-Za-z0-9_-]+)*)\}', 'g') m loop
        result := replace(result, '{' || field || '}', coalesce(
            jsonb_build_object('payload', _payload, 'metadata', _metadata) #>> string_to_array(field, '.'), ''));
    end loop;
    return nullif(result, '');
end
$$;
