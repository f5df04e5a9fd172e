-- What callers of the HTTP API do with jobs: the actions of actions.sql under the caller's tenants and name.

-- http_actor: who acts, for the audit, until the transaction ends.
create or replace function jobqueue.http_actor(_actor text)
returns void
language sql
as $$
    select pg_catalog.set_config('jobqueue.actor', coalesce(_actor, ''), true)
$$;

-- http_reason: the reason that was given; without one the audit says so.
create or replace function jobqueue.http_reason(_reason text)
returns text
language sql immutable
as $$
    select coalesce(nullif(btrim(_reason, E' \t\n\r'), ''), 'no reason given')
$$;

-- http_act: POST /jobs/{id}/{action} and PATCH /jobs/{id} as one call.
--   _actor    who acts, as the audit says it
--   _options  {"reason", "force" (cancel), "from_start" (retry), "priority", "run_at" (change)}
-- Returns the columns of http_job_state, and asked: the worker has to act before it takes effect. Errors: those of the actions.
create or replace function jobqueue.http_act(
    _role text, _tenants text, _actor text, _id uuid, _action text, _options jsonb,
    out etag text, out version bigint, out status text, out alive boolean, out due_in double precision, out ends_in double precision,
    out body text, out asked boolean)
language plpgsql
as $$
#variable_conflict use_column
declare
    why text := jobqueue.http_reason(_options ->> 'reason');
begin
    perform jobqueue.http_context(_role, _tenants, false);
    perform jobqueue.http_actor(_actor);
    case _action
        when 'cancel' then perform jobqueue.cancel(_id, why, coalesce((_options ->> 'force')::boolean, false));
        when 'pause' then perform jobqueue.pause(_id, why);
        when 'resume' then perform jobqueue.resume(_id, why);
        when 'retry' then perform jobqueue.retry(_id, why, coalesce((_options ->> 'from_start')::boolean, false));
        when 'skip' then perform jobqueue.skip(_id, why);
        when 'run_now' then perform jobqueue.run_now(_id, why);
        when 'change' then
            if nullif(_options -> 'priority', 'null') is not null then
                perform jobqueue.prioritize(_id, (_options ->> 'priority')::int, why);
            end if;
            if nullif(_options -> 'run_at', 'null') is not null then
                perform jobqueue.http_move(_id, _options -> 'run_at', why);
            end if;
    end case;
    select s.* into etag, version, status, alive, due_in, ends_in, body
    from jobqueue.http_job_state(_id, null, null, null, false) s;
    select j.requested_action is not null into asked from jobqueue.job j where j.id = _id;
end
$$;

-- http_move: run a waiting job at another time; audited. Errors: JQ400, JQ404, JQ409 if it does not wait.
create or replace function jobqueue.http_move(_id uuid, _run_at jsonb, _reason text)
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job;
    moved_to timestamptz := to_time(_run_at, 'run_at');
begin
    perform check_reason(_reason);
    j := lock_job(_id);
    if j.status not in ('pending', 'blocked', 'paused') then
        perform refuse('JQ409', 'INVALID_TRANSITION', format('Job %s: run_at is refused, a job that is %s does not wait.', _id, j.status),
            'A job that waits can be moved in time: pending, blocked or paused.',
            jsonb_build_object('id', _id, 'status', j.status, 'action', 'run_at',
                'allowed', to_jsonb(array(select a.action from action_list(j) a where a.allowed))));
    elsif j.run_at is distinct from moved_to then
        perform 1 from update_jobs(j.queue, jsonb_build_object('id', _id), jsonb_build_object('run_at', _run_at));
        perform note_action('run_at', j.id, j.tenant, null, j.status, j.status, _reason,
            jsonb_build_object('from', j.run_at, 'to', moved_to));
    end if;
end
$$;

-- http_delete: DELETE /jobs/{id} as one call. Returns the status that the job had. Errors: JQ404, JQ409.
create or replace function jobqueue.http_delete(_role text, _tenants text, _actor text, _id uuid, _reason text)
returns text
language plpgsql
as $$
begin
    perform jobqueue.http_context(_role, _tenants, false);
    perform jobqueue.http_actor(_actor);
    return jobqueue.delete_job(_id, jobqueue.http_reason(_reason));
end
$$;

-- http_administer: pause and resume queues and schedules, drain workers, as one call; what is named answers with its row as JSON text.
--   _what  pause_queue, resume_queue, pause_schedule, resume_schedule, drain_worker
-- Errors: those of these functions.
create or replace function jobqueue.http_administer(
    _role text, _tenants text, _actor text, _what text, _name text, _reason text)
returns text
language plpgsql
as $$
declare
    why text := jobqueue.http_reason(_reason);
begin
    perform jobqueue.http_context(_role, _tenants, false);
    perform jobqueue.http_actor(_actor);
    case _what
        when 'pause_queue' then perform jobqueue.pause_queue(_name, why);
        when 'resume_queue' then perform jobqueue.resume_queue(_name, why);
        when 'pause_schedule' then perform jobqueue.pause_schedule(_name, why);
        when 'resume_schedule' then perform jobqueue.resume_schedule(_name, why);
        when 'drain_worker' then perform jobqueue.drain_worker(_name::uuid, why);
    end case;
    return case
        when _what like '%_queue' then (select x from jobqueue.http_queue_rows(_name) x)
        when _what like '%_schedule' then (select row_to_json(s)::text from jobqueue.schedules s where s.name = _name)
        else (select row_to_json(w)::text from jobqueue.workers w where w.id = _name::uuid) end;
end
$$;
