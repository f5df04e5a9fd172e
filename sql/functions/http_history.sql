-- What has happened: to one job, and by whose hand. Lists are JSON text.

-- http_history: GET /jobs/{id}/stages, attempts, audit, explain as one call.
--   _what   one of these words
--   _traces whether attempts come with their stack traces, and the audit with logins and addresses
-- Returns a JSON list; null if there is no such job that the caller sees. The audit outlives its job.
create or replace function jobqueue.http_history(_role text, _tenants text, _id uuid, _what text, _traces boolean)
returns text
language plpgsql
as $$
declare
    list json;
begin
    perform jobqueue.http_context(_role, _tenants, true);
    if not exists (select from jobqueue.job j where j.id = _id) then
        if _what <> 'audit' or not exists (select from jobqueue.audit a where a.job_id = _id) then
            return null;
        end if;
    end if;
    case _what
        when 'stages' then
            list := (select json_agg(row_to_json(s) order by s.position)
                from (select t.* from jobqueue.stages t where t.job_id = _id) s);
        when 'attempts' then
            list := jobqueue.http_attempts(_id, _traces);
        when 'audit' then
            list := (select json_agg(jobqueue.http_audit_row(a, _traces) order by a.id)
                from jobqueue.audit a where a.job_id = _id);
        else
            list := (select json_agg(json_build_object('reason', e.reason, 'detail', e.detail, 'what_to_do', e.what_to_do) order by e.n)
                from jobqueue.explain(_id) with ordinality e (reason, detail, what_to_do, n));
    end case;
    return coalesce(list, '[]')::text;
end
$$;

-- http_audit_row: a line of the audit as JSON; logins and addresses only if _traces.
create or replace function jobqueue.http_audit_row(_line jobqueue.audit, _traces boolean)
returns json
language sql stable
as $$
    select json_build_object('id', _line.id, 'at', _line.at, 'action', _line.action, 'job_id', _line.job_id, 'tenant', _line.tenant,
        'target', _line.target, 'from_status', _line.from_status, 'to_status', _line.to_status, 'reason', _line.reason,
        'actor', _line.actor, 'details', _line.details,
        'session_user_name', case when _traces then _line.session_user_name end,
        'application_name', case when _traces then _line.application_name end,
        'client_addr', case when _traces then _line.client_addr end)
$$;

-- http_audit: GET /audit as one call, newest first. Lines about queues and workers belong to no tenant: those who see all see them.
--   _filter  job_id, action, target, actor; null means not given. _before: the id after which the list goes on; null: the newest
-- Returns (id, line as JSON text). Index: the primary key; audit_of_job, audit_of_tenant.
create or replace function jobqueue.http_audit(
    _role text, _tenants text, _filter jsonb, _before bigint, _most int, _traces boolean)
returns table (id bigint, line text)
language plpgsql
as $$
#variable_conflict use_column
begin
    perform jobqueue.http_context(_role, _tenants, true);
    -- planned for what is given: conditions that are not given must not stand in the way of an index
    perform pg_catalog.set_config('plan_cache_mode', 'force_custom_plan', true);
    return query
        select a.id, jobqueue.http_audit_row(a, _traces)::text
        from jobqueue.audit a
        where (_before is null or a.id < _before)
            and (_filter ->> 'job_id' is null or a.job_id = (_filter ->> 'job_id')::uuid)
            and (_filter ->> 'action' is null or a.action = _filter ->> 'action')
            and (_filter ->> 'target' is null or a.target = _filter ->> 'target')
            and (_filter ->> 'actor' is null or a.actor = _filter ->> 'actor')
        order by a.id desc
        limit _most;
end
$$;
