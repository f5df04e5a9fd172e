-- Waiting jobs changed by their senders; jobs found page by page; one action on many jobs.

-- changeable_options: what update_jobs can change on a job that waits.
create or replace function jobqueue.changeable_options()
returns text[]
language sql immutable parallel safe
as $$
    select array['payload', 'priority', 'run_at', 'delay', 'subject', 'display_name', 'metadata', 'group', 'tier', 'max_retries',
        'retry_delay', 'retry_backoff', 'retry_delay_max', 'timeout', 'max_runtime', 'lease', 'expires_in', 'keep_completed',
        'keep_ended', 'dead_letter']
$$;

-- waiting_jobs: the ids of the waiting jobs that a target names.
--   _target  {"id", "tenant": any} or {"singleton_key", "match": newest (default), oldest, all, "tenant": default}. Errors: JQ400.
create or replace function jobqueue.waiting_jobs(_queue text, _target jsonb)
returns uuid[]
language plpgsql volatile
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    which text;
    key text;
    whose text;
begin
    perform refuse_unknown_option(_target, array['id', 'singleton_key', 'match', 'tenant'], 'a target');
    which := to_text(_target -> 'match', 'match', 10);
    key := to_text(_target -> 'singleton_key', 'singleton_key', 500);
    whose := coalesce(to_text(_target -> 'tenant', 'tenant', 200), 'default');
    if (key is null) = (coalesce(_target -> 'id', 'null') = 'null') then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'A target has either an id or a singleton_key.', 'Give exactly one of the two.');
    elsif which is not null and (key is null or which not in ('newest', 'oldest', 'all')) then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'match is newest, oldest or all, and goes with a singleton_key.', '', '{"option": "match"}');
    elsif key is null then
        return array(select j.id from job j where j.id = to_id(_target -> 'id') and j.queue = _queue and sees_tenant(j.tenant)
            and (coalesce(_target -> 'tenant', 'null') = 'null' or j.tenant = whose) and j.status in ('pending', 'paused', 'blocked'));
    end if;
    perform check_tenant(whose);
    return array(
        select x.id
        from (select j.id, row_number() over (order by j.created_at desc, j.id desc) as newest,
                row_number() over (order by j.created_at, j.id) as oldest
            from job j
            where j.queue = _queue and j.tenant = whose and j.singleton_key = key and j.status in ('pending', 'paused', 'blocked')) x
        where case coalesce(which, 'newest') when 'all' then true when 'oldest' then x.oldest = 1 else x.newest = 1 end
        order by x.id);
end
$$;

-- update_jobs: change jobs that wait.
--   queue    theirs
--   target   {"id"}, or {"singleton_key"} with "match" newest (default), oldest or all, and "tenant"
--   changes  payload and the options in jobqueue.changeable_options(); what is not named stays. A job that is moved in time keeps the
--            length of its expires_in
-- Returns the ids of the jobs that were changed; one that a worker has claimed meanwhile is passed over.
-- Errors: JQ400, JQ403, JQ404 no such queue, JQ413.
create or replace function jobqueue.update_jobs(queue text, target jsonb, changes jsonb)
returns table (id uuid)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    q jobqueue.queue;
    j jobqueue.job;
    ids uuid[];
begin
    perform refuse_unknown_option(update_jobs.changes, changeable_options(), 'update_jobs');
    select * into q from queue x where x.name = update_jobs.queue;
    if not found then
        perform refuse_queue(update_jobs.queue);
    end if;
    -- what send would refuse is refused also if nothing is found
    perform new_job(q, update_jobs.changes -> 'payload', (update_jobs.changes - 'payload')
        -- jobs of a queue in strict order have a key, and keep theirs
        || case when q.policy = 'key_strict_fifo' then '{"singleton_key": "any"}' else '{}' end::jsonb
        || case when coalesce(current_setting('jobqueue.tenants', true), '') in ('', '*') then '{}'
            else jsonb_build_object('tenant', split_part(current_setting('jobqueue.tenants', true), ',', 1)) end);
    ids := waiting_jobs(q.name, update_jobs.target);
    for j in select * from job x where x.id = any (ids) and x.status in ('pending', 'paused', 'blocked') order by x.id for update loop
        perform change_waiting(j, q, update_jobs.changes);
        id := j.id;
        return next;
    end loop;
    if id is not null then
        perform wake(q.name, q.number);
        perform publish_changes(ids);
    end if;
end
$$;

-- change_waiting: write changes on a locked job that waits; they are read as send reads them.
create or replace function jobqueue.change_waiting(_job jobqueue.job, _queue jobqueue.queue, _changes jsonb)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    c jsonb := _changes;
    r jobqueue.job := new_job(_queue, c -> 'payload', (c - 'payload') || jsonb_build_object('tenant', _job.tenant, 'job_type', _job.job_type,
        'singleton_key', _job.singleton_key));
    j jobqueue.job := _job;
    moved boolean := c ? 'run_at' or c ? 'delay';
    due boolean;
    -- it keeps its place among those that wait to be admitted
    in_line boolean := false;
begin
    j.payload := case when c ? 'payload' then r.payload else j.payload end;
    j.subject := case when c ? 'subject' then r.subject else j.subject end;
    j.display_name := case when c ? 'display_name' then r.display_name else j.display_name end;
    j.metadata := case when c ? 'metadata' then r.metadata else j.metadata end;
    j.group_key := case when c ? 'group' then r.group_key else j.group_key end;
    j.tier := case when c ? 'tier' then r.tier else j.tier end;
    j.max_retries := case when c ? 'max_retries' then r.max_retries else j.max_retries end;
    j.retry_budget := case when c ? 'max_retries' then r.max_retries else j.retry_budget end;
    j.options := nullif(coalesce(j.options, '{}') || coalesce(kept_options(c), '{}'), '{}');
    j.settle_flags := stamped_flags(j, _queue);
    j.run_at := case when moved then r.run_at else j.run_at end;
    j.expires_at := case when c ? 'expires_in' then greatest(j.run_at, now()) + to_interval(c -> 'expires_in', 'expires_in')
        when moved then j.expires_at + (greatest(j.run_at, now()) - greatest(_job.run_at, _job.created_at)) else j.expires_at end;
    if j.status = 'pending' then
        due := case when moved then j.run_at <= now() else j.wait_until is null end;
        j.wait_until := case when not due then j.run_at end;
        -- with its old number a job of another priority could lie below the floors of busy workers
        in_line := due and _job.inbox_seq is not null and (j.group_key, j.tier) is not distinct from (_job.group_key, _job.tier);
        j.inbox_seq := case when in_line then _job.inbox_seq end;
        j.ready_seq := case when not due or in_line then null when _job.ready_seq is null or c ? 'priority' then next_ready()
            else _job.ready_seq end;
    end if;
    update job x
    set payload = j.payload, subject = j.subject, display_name = j.display_name, metadata = j.metadata, group_key = j.group_key, tier = j.tier,
        max_retries = j.max_retries, retry_budget = j.retry_budget, options = j.options, settle_flags = j.settle_flags, run_at = j.run_at,
        expires_at = j.expires_at, wait_until = j.wait_until, ready_seq = j.ready_seq, inbox_seq = j.inbox_seq,
        priority = case when c ? 'priority' then r.priority else x.priority end, version = x.version + 1, updated_at = now()
    where x.id = j.id;
    if j.settle_flags & 256 <> 0 and not in_line then
        perform leave_line(_job, j.status);
        perform join_line(array[j.id]);
    elsif c ? 'priority' then
        perform change_rank(_job, r.priority);
    end if;
end
$$;

-- upsert: change the waiting job with this id or singleton_key, or send a new one.
--   options  those of send, with exactly one of id and singleton_key. A waiting job takes payload and those of
--            jobqueue.changeable_options() that are named; the others matter only if it is sent
-- Returns (id, created, updated, reason): neither created nor updated if a job that does not wait stands in its place; reason as of send.
-- Errors: those of send.
create or replace function jobqueue.upsert(
    queue text, payload jsonb default '{}', options jsonb default '{}',
    out id uuid, out created boolean, out updated boolean, out reason text)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    o jsonb := coalesce(upsert.options, '{}');
    target jsonb;
    changes jsonb;
begin
    perform refuse_unknown_option(o, job_options(), 'upsert');
    perform queue_for_send(upsert.queue);
    -- the tenant that send would take
    target := jsonb_build_object('tenant', coalesce(o ->> 'tenant', (select t.options ->> 'tenant' from job_type t
            where t.name = coalesce(o ->> 'job_type', upsert.queue)), 'default')) || (
        select coalesce(jsonb_object_agg(e.key, e.value), '{}') from jsonb_each(o) e
        where e.key in ('id', 'singleton_key') and e.value <> 'null');
    changes := jsonb_build_object('payload', coalesce(upsert.payload, '{}')) || (
        select coalesce(jsonb_object_agg(e.key, e.value), '{}') from jsonb_each(o) e where e.key = any (changeable_options()));
    -- again if the one in its place went away, or came, between the look and the insert
    for round in 1 .. 3 loop
        select u.id into id from update_jobs(upsert.queue, target, changes) u limit 1;
        updated := found;
        created := false;
        exit when updated;
        select s.id, s.created, s.reason into id, created, reason from send(upsert.queue, upsert.payload, o) s;
        exit when created or id is null
            or not exists (select from job j where j.id = upsert.id and j.status in ('pending', 'paused', 'blocked'));
    end loop;
    if updated then
        reason := null;
    end if;
end
$$;

-- find_jobs: the jobs of a queue, page by page, in the order of their ids (by age, unless senders chose them).
--   filter    id, singleton_key, status (one or a list), job_type, tenant, subject, payload and metadata (what contains this JSON)
--   max_jobs  1 to 10,000, default 1,000; after: the last id of the page before, which need not exist any more
-- Index: job_pkey. Errors: JQ400.
create or replace function jobqueue.find_jobs(queue text, filter jsonb default '{}', max_jobs int default 1000, after uuid default null)
returns table (
    id uuid, job_type text, status text, priority int, tenant text, singleton_key text, subject text, display_name text,
    payload jsonb, run_at timestamptz, created_at timestamptz, retry_count int, version bigint)
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    f jsonb := coalesce(find_jobs.filter, '{}');
    one uuid;
begin
    perform refuse_unknown_option(f, array['id', 'singleton_key', 'status', 'job_type', 'tenant', 'subject', 'payload', 'metadata'],
        'find_jobs');
    one := case when coalesce(f -> 'id', 'null') <> 'null' then to_id(f -> 'id') end;
    if find_jobs.max_jobs is null or find_jobs.max_jobs not between 1 and 10000 then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('max_jobs must be from 1 to 10000, not %s.', find_jobs.max_jobs), '',
            '{"option": "max_jobs"}');
    end if;
    return query
        select j.id, j.job_type::text, j.status, j.priority, j.tenant::text, j.singleton_key, j.subject, j.display_name,
            j.payload, j.run_at, j.created_at, j.retry_count, j.version
        from job j
        where j.queue = find_jobs.queue and (find_jobs.after is null or j.id > find_jobs.after) and (one is null or j.id = one)
            and matches(j, f) and sees_tenant(j.tenant)
        order by j.id
        limit find_jobs.max_jobs;
end
$$;

-- matches: whether a job has the values of a filter; a value may be a list of which one is meant.
create or replace function jobqueue.matches(_job jobqueue.job, _filter jsonb)
returns boolean
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select coalesce(bool_and(case e.key
        when 'payload' then _job.payload @> e.value
        -- null is not false for bool_and: a job without metadata would match
        when 'metadata' then coalesce(_job.metadata @> e.value, false)
        when 'created_before' then _job.created_at < to_time(e.value, e.key)
        when 'created_after' then _job.created_at > to_time(e.value, e.key)
        when 'ended_after' then coalesce(_job.completed_at > to_time(e.value, e.key), false)
        when 'id' then true
        when 'ids' then true
        else coalesce(e.value @> to_jsonb(case e.key
            when 'status' then _job.status when 'queue' then _job.queue when 'job_type' then _job.job_type when 'tenant' then _job.tenant
            when 'subject' then _job.subject when 'singleton_key' then _job.singleton_key when 'error_class' then _job.error_class
            when 'error_code' then _job.error_code end), false) end), true)
    from jsonb_each(_filter) e
    where e.value <> 'null'
$$;

-- bulk_jobs: the ids that a filter names, among those that the caller may see. Errors: JQ400.
create or replace function jobqueue.bulk_jobs(_filter jsonb)
returns uuid[]
language plpgsql volatile
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    ids uuid[];
begin
    perform refuse_unknown_option(_filter, array['ids', 'status', 'queue', 'job_type', 'tenant', 'subject', 'error_class', 'error_code',
        'created_before', 'created_after', 'ended_after'], 'bulk');
    if not exists (select from jsonb_each(_filter) e where e.value <> 'null') then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'A filter names what is meant; an empty one would mean all jobs.',
            'Give at least one of ids, status, queue, job_type, tenant, subject, error_class, created_before.', '{"option": "filter"}');
    end if;
    -- read once here, so that a wrong one is refused also if no job is there to compare
    perform to_time(_filter -> k, k) from unnest(array['created_before', 'created_after', 'ended_after']) k;
    ids := to_ids(_filter -> 'ids', 'ids');
    return array(select j.id from job j
        where (ids is null or j.id = any (ids)) and matches(j, _filter) and sees_tenant(j.tenant) order by j.id);
end
$$;

-- bulk_outcome: what an action would do to a job: done, asked (its worker is asked), unchanged (it is there already), refused.
create or replace function jobqueue.bulk_outcome(_job jobqueue.job, _action text)
returns text
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select case
        when (_action, _job.status) in (('cancel', 'cancelled'), ('pause', 'paused'), ('skip', 'skipped'), ('resume', 'pending'),
            ('resume', 'blocked')) then 'unchanged'
        when _action = _job.requested_action then 'unchanged'
        when _action = 'run_now' and _job.status = 'pending' and _job.wait_until is null then 'unchanged'
        when _action in ('retry', 'restart') and _job.status in ('pending', 'blocked') and _job.retry_count > 0 then 'unchanged'
        when not exists (select from action_list(_job) a where a.action = _action and a.allowed) then 'refused'
        when _job.status = 'processing' then 'asked'
        else 'done' end
$$;

-- bulk_one: do an action with one job; what is refused to one leaves the others alone. Returns the outcome; gone if it is not there.
create or replace function jobqueue.bulk_one(_action text, _id uuid, _reason text, _dry_run boolean)
returns text
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job;
    outcome text;
begin
    if _dry_run then
        select * into j from job x where x.id = _id;
    else
        select * into j from job x where x.id = _id for update;
    end if;
    if not found then
        return 'gone';
    end if;
    outcome := bulk_outcome(j, _action);
    if _dry_run or outcome not in ('done', 'asked') then
        return outcome;
    end if;
    case _action
        when 'cancel' then perform cancel(_id, _reason);
        when 'pause' then perform pause(_id, _reason);
        when 'resume' then perform resume(_id, _reason);
        when 'retry' then perform retry(_id, _reason);
        when 'restart' then perform retry(_id, _reason, true);
        when 'skip' then perform skip(_id, _reason);
        when 'run_now' then perform run_now(_id, _reason);
        else perform delete_job(_id, _reason);
    end case;
    return outcome;
exception when others then
    -- for example a key that another job holds by now
    if sqlstate not like 'JQ%' then
        raise;
    end if;
    return 'refused';
end
$$;

-- bulk: one action on many jobs, in one transaction; each is audited as if it were done alone.
--   action          cancel, pause, resume, retry, restart, skip, run_now, delete
--   filter          ids, status, queue, job_type, tenant, subject, error_class, error_code (a value or a list), created_before,
--                   created_after, ended_after; all must hold; an empty one is refused
--   dry_run         count only
--   expected_count  what a preview said: JQ409 if the set has grown by more than 10 % since
-- Returns rows (outcome, jobs): done, asked, unchanged, refused, gone. Errors: JQ400, JQ409 CONFLICT with the count.
create or replace function jobqueue.bulk(
    action text, filter jsonb, reason text, dry_run boolean default false, expected_count int default null)
returns table (outcome text, jobs bigint)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    known text[] := array['cancel', 'pause', 'resume', 'retry', 'restart', 'skip', 'run_now', 'delete'];
    ids uuid[];
begin
    if bulk.action is null or bulk.action <> all (known) then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('There is no bulk action "%s".', left(bulk.action, 100)),
            format('Actions are %s.', array_to_string(known, ', ')), '{"option": "action"}');
    end if;
    perform check_reason(bulk.reason);
    ids := bulk_jobs(bulk.filter);
    if cardinality(ids) > bulk.expected_count * 1.1 then
        perform refuse('JQ409', 'CONFLICT', format('The filter means %s jobs by now, not %s.', cardinality(ids), bulk.expected_count),
            'Look again with dry_run, and give the new number.', jsonb_build_object('count', cardinality(ids)));
    end if;
    return query
        select e.key, e.value::bigint
        from jsonb_each_text(bulk_portion(bulk.action, ids, bulk.reason, coalesce(bulk.dry_run, false))) e
        order by e.key;
end
$$;
