-- What can be done with a job now, and why not the rest: the table behind every button, refusal and `allowed_actions`.

-- possible_actions: the one table of what can be done with a job in a status, unless something about the job itself stands against it.
create or replace function jobqueue.possible_actions(_status text)
returns text[]
language sql immutable
as $$
    select case _status
        when 'blocked' then array['cancel', 'prioritize']
        when 'pending' then array['cancel', 'pause', 'prioritize', 'run_now']
        when 'processing' then array['cancel', 'pause']
        when 'paused' then array['resume', 'cancel']
        when 'failed' then array['retry', 'restart', 'skip', 'delete']
        when 'cancelled' then array['resume', 'delete']
        else array['delete'] end
$$;

-- impossible_actions: the rest, each with the reason, as members of a JSON object.
create or replace function jobqueue.impossible_actions(_status text)
returns text
language sql immutable
as $$
    select string_agg(format('"%s":"a job that is %s cannot be %s"', x.action, _status, x.done), ',' order by x.n)
    from (values (1, 'cancel', 'cancelled'), (2, 'pause', 'paused'), (3, 'resume', 'resumed'), (4, 'retry', 'retried'),
        (5, 'restart', 'restarted'), (6, 'skip', 'skipped'), (7, 'run_now', 'run now'), (8, 'prioritize', 'prioritized'),
        (9, 'delete', 'deleted')) x (n, action, done)
    where x.action <> all (jobqueue.possible_actions(_status))
$$;

-- action_sets: what can be done with a job now, and what cannot, with the reasons as members of a JSON object. Every answer about a job
-- has both: the literals make the planner compute the texts once per session (4 us instead of 26 us for the rows of action_list).
create or replace function jobqueue.action_sets(_job jobqueue.job, out allowed text[], out refused text)
language plpgsql stable
as $$
begin
    allowed := jobqueue.possible_actions(_job.status);
    refused := case _job.status
        when 'blocked' then jobqueue.impossible_actions('blocked')
        when 'pending' then jobqueue.impossible_actions('pending')
        when 'processing' then jobqueue.impossible_actions('processing')
        when 'paused' then jobqueue.impossible_actions('paused')
        when 'completed' then jobqueue.impossible_actions('completed')
        when 'failed' then jobqueue.impossible_actions('failed')
        when 'cancelled' then jobqueue.impossible_actions('cancelled')
        else jobqueue.impossible_actions('skipped') end;
    if _job.status = 'pending' and _job.wait_until is null then
        allowed := array_remove(allowed, 'run_now');
        refused := refused || ',"run_now":"it may run already"';
    elsif _job.status = 'processing' and _job.requested_action = 'cancel' then
        allowed := array_remove(allowed, 'pause');
        refused := refused || ',"pause":"it is being cancelled"';
    elsif _job.status = 'processing' and not (_job.pausable or jobqueue.is_pausable(_job)) then
        allowed := array_remove(allowed, 'pause');
        refused := refused || ',"pause":"it is running, and neither its job_type nor its last checkpoint says that it can be paused"';
    elsif _job.settle_flags & 2 <> 0 and 'delete' = any (allowed) and jobqueue.has_waiting_children(_job.id) then
        allowed := array_remove(allowed, 'delete');
        refused := refused || ',"delete":"other jobs wait for it or may still read its result"';
    end if;
end
$$;

-- action_list: the same as rows, one per action.
create or replace function jobqueue.action_list(_job jobqueue.job)
returns table (action text, allowed boolean, reason text)
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    sets record := action_sets(_job);
    refused jsonb := ('{' || sets.refused || '}')::jsonb;
begin
    foreach action in array array['cancel', 'pause', 'resume', 'retry', 'restart', 'skip', 'run_now', 'prioritize', 'delete'] loop
        allowed := action = any (sets.allowed);
        reason := refused ->> action;
        return next;
    end loop;
end
$$;

-- is_pausable: a running job can be paused if its job_type says so or its last checkpoint is pause-safe.
create or replace function jobqueue.is_pausable(_job jobqueue.job)
returns boolean
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    return _job.pausable
        or coalesce((select t.pausable from job_type t where t.name = _job.job_type), false)
        or coalesce((select c.pause_safe from checkpoint c where c.id = _job.checkpoint_id), false);
end
$$;

-- allowed_actions: the names of what can be done with a job now. Errors: JQ404.
create or replace function jobqueue.allowed_actions(id uuid)
returns text[]
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    return array(select a.action from jobqueue.actions(allowed_actions.id) a where a.allowed);
end
$$;

-- actions: everything that could be done with a job, whether it is allowed now, and if not, why. Errors: JQ404.
create or replace function jobqueue.actions(id uuid)
returns table (action text, allowed boolean, reason text)
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    j jobqueue.job;
begin
    select * into j from job x where x.id = actions.id;
    if not found or not sees_tenant(j.tenant) then
        perform refuse_job(actions.id);
    end if;
    return query select * from action_list(j);
end
$$;
