-- Where a job comes from, for tracing: the option trace_context of send, a W3C trace context such as
-- {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}. It stays with the job in job.options, so a claim brings it
-- along, retries and redrives keep it, and no filter on metadata sees it. docs/decisions/0011-telemetry.md.

-- is_trace_context: whether a value can be stored as one; null is none. Without a SET clause, so that it is inlined: 1 us instead of 11.
create or replace function jobqueue.is_trace_context(_value jsonb)
returns boolean
language sql immutable
as $$
    select case when jsonb_typeof(_value) = 'object'
        then length(_value::text) <= 8192 and not jsonb_path_exists(_value, '$.* ? (@.type() != "string")')
        else coalesce(jsonb_typeof(_value), 'null') = 'null' end
$$;

-- trace_option: the option trace_context of some options, as job.options keeps it; null without one. Errors: JQ400.
create or replace function jobqueue.trace_option(_options jsonb)
returns jsonb
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    context jsonb := nullif(_options -> 'trace_context', 'null');
begin
    if context is null or context = '{}' then
        return null;
    elsif not is_trace_context(context) then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'trace_context must be an object of texts, of at most 8,192 characters.',
            'Give {"traceparent": "00-…-…-01"}.', '{"option": "trace_context"}');
    end if;
    return jsonb_build_object('trace_context', context);
end
$$;

-- is_only_traced: options that say nothing but where the job comes from: its sending takes a short way too.
create or replace function jobqueue.is_only_traced(_options jsonb)
returns boolean
language sql immutable parallel safe
as $$
    select _options ? 'trace_context' and _options - 'trace_context' = '{}'
$$;

-- are_only_traced: the same for every element of send_many; one without options is that too. What would be refused is not: the general
-- way names the element.
create or replace function jobqueue.are_only_traced(_jobs jsonb)
returns boolean
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select not exists (
        select from jsonb_array_elements(_jobs) e
        where case when jsonb_typeof(e) = 'object'
            then e - array['payload', 'options'] <> '{}' or pg_column_size(e) > 100000
                or e ? 'options' and case when jsonb_typeof(e -> 'options') = 'object'
                    then (e -> 'options') - 'trace_context' <> '{}' or not jobqueue.is_trace_context(e #> '{options,trace_context}')
                    else true end
            else true end)
$$;

-- with_trace_context: jobs for send_many or send_flow, each with this trace context unless it has one of its own:
-- jobqueue.send_many('mail', jobqueue.with_trace_context('[{"payload": {}}]', '{"traceparent": "00-…-…-01"}')).
--   jobs     [{"payload": …, "options": {…}}, …]; what is none is left to the function that takes it
--   context  what the option trace_context takes
-- Returns the jobs.
create or replace function jobqueue.with_trace_context(jobs jsonb, context jsonb)
returns jsonb
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(
        jsonb_agg(
            case when jsonb_typeof(e) = 'object' and coalesce(jsonb_typeof(e -> 'options'), 'null') in ('object', 'null')
                then e || jsonb_build_object('options', jsonb_build_object('trace_context', context) || coalesce(nullif(e -> 'options', 'null'), '{}'))
                else e end),
        jobs)
    from jsonb_array_elements(case when jsonb_typeof(jobs) = 'array' then jobs else '[]' end) e
$$;

-- trace_context: where a job comes from, or null if nobody said so: the trace to look for in the tracing system. Errors: JQ404.
create or replace function jobqueue.trace_context(id uuid)
returns jsonb
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    context jsonb;
begin
    select j.options -> 'trace_context' into context from job j where j.id = trace_context.id and sees_tenant(j.tenant);
    if not found then
        perform refuse_job(trace_context.id);
    end if;
    return context;
end
$$;
