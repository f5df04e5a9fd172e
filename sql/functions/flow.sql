-- Flows: jobs that wait for other jobs. A sender locks the parents (in the order of ids) and writes their rows before it stores children:
-- a parent that ends at the same time either has ended before, and counts, or sees its new children and releases them.

-- edge_list: what a job waits for, as given: a list of ids or refs, or of objects {"id" or "ref", "on_failure"}.
--   _on_failure  what holds for those that do not say it; null: wait
-- Errors: JQ400, also if one is named twice.
create or replace function jobqueue.edge_list(_value jsonb, _on_failure jsonb)
returns table (target text, on_failure text)
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    element jsonb;
    usual text := coalesce(to_text(_on_failure, 'on_failure', 100), 'wait');
    known text[] := array['wait', 'fail', 'cancel', 'run'];
    seen text[] := '{}';
begin
    if usual <> all (known) then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('on_failure cannot be "%s".', usual), 'It is wait, fail, cancel or run.',
            '{"option": "on_failure"}');
    elsif coalesce(jsonb_typeof(_value), 'null') = 'null' then
        return;
    elsif jsonb_typeof(_value) <> 'array' or jsonb_array_length(_value) > 10000 then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'depends_on must be a list of at most 10,000 jobs.',
            'Give ids, or objects such as {"id": …, "on_failure": "run"}.', '{"option": "depends_on"}');
    end if;
    for element in select e from jsonb_array_elements(_value) e loop
        if jsonb_typeof(element) = 'object' then
            perform refuse_unknown_option(element, array['id', 'ref', 'on_failure'], 'depends_on');
            on_failure := coalesce(to_text(element -> 'on_failure', 'on_failure', 100), usual);
            target := coalesce(to_text(element -> 'ref', 'depends_on', 200), to_text(element -> 'id', 'depends_on', 200));
        else
            on_failure := usual;
            target := to_text(element, 'depends_on', 200);
        end if;
        if target is null or on_failure <> all (known) then
            perform refuse('JQ400', 'INVALID_ARGUMENT', format('depends_on has an element that cannot be read: %s.', left(element::text, 200)),
                'Give ids, or objects such as {"id": …, "on_failure": "run"}; on_failure is wait, fail, cancel or run.', '{"option": "depends_on"}');
        end if;
        -- a list of 10,000 is compared by the caller, as a set
        if cardinality(seen) < 100 and target = any (seen) then
            perform refuse('JQ400', 'INVALID_ARGUMENT', format('depends_on names "%s" twice.', target), '', '{"option": "depends_on"}');
        end if;
        seen := case when cardinality(seen) < 100 then seen || target else seen end;
        return next;
    end loop;
end
$$;

-- parent_list: the same for send, where only ids can be named.
create or replace function jobqueue.parent_list(_options jsonb)
returns table (id uuid, on_failure text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select distinct on (to_id(to_jsonb(e.target))) to_id(to_jsonb(e.target)), e.on_failure
    from edge_list(_options -> 'depends_on', _options -> 'on_failure') e
    order by 1
$$;

-- lock_parents: lock jobs that are to have children, mark them as such and say how they are. Written and not only locked: a transaction with
-- REPEATABLE READ that ends one of them is then refused instead of overlooking the new child; once per transaction.
-- Errors: JQ404 for one that is not there or belongs to another tenant. Index: job_pkey.
create or replace function jobqueue.lock_parents(_ids uuid[], _tenant text)
returns table (id uuid, status text)
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    missing uuid;
begin
    update job j
    set settle_flags = j.settle_flags | 514
    from (select distinct x.id from unnest(_ids) x (id) order by x.id) x
    where j.id = x.id and j.tenant = _tenant
        and (j.settle_flags & 514 <> 514 or j.xmin <> pg_current_xact_id()::xid);
    select x.id into missing
    from unnest(_ids) with ordinality x (id, n)
    where not exists (select from job j where j.id = x.id and j.tenant = _tenant)
    order by x.n
    limit 1;
    if found then
        perform refuse_job(missing);
    end if;
    return query select j.id, j.status from job j where j.id = any (_ids);
end
$$;

-- is_waited_for: whether a parent in this status still keeps its child from running.
create or replace function jobqueue.is_waited_for(_status text, _on_failure text)
returns boolean
language sql immutable
as $$
    select case when _status in ('completed', 'skipped') then false when _status in ('failed', 'cancelled') then _on_failure <> 'run' else true end
$$;

-- wait_for_parents: a new job that depends on others, before it is stored: its parents are locked, it is blocked if one has not ended as
-- its edge asks. Errors: JQ400, JQ404.
create or replace function jobqueue.wait_for_parents(_job jobqueue.job, _options jsonb)
returns jobqueue.job
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    r jobqueue.job := _job;
    ids uuid[] := array(select p.id from parent_list(_options) p);
begin
    if ids <> '{}' then
        r.unfinished_parents := (
            select count(*) from lock_parents(ids, r.tenant) l join parent_list(_options) p on p.id = l.id
            where is_waited_for(l.status, p.on_failure));
        r.settle_flags := r.settle_flags | 512;
    end if;
    return blocked_job(r);
end
$$;

-- blocked_job: a new job is blocked while it waits for others. How long it may wait for a worker counts from its release.
create or replace function jobqueue.blocked_job(_job jobqueue.job)
returns jobqueue.job
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    r jobqueue.job := _job;
begin
    if r.unfinished_parents > 0 then
        r.status := 'blocked';
        r.expires_at := null;
    end if;
    return r;
end
$$;

-- tie_to_parents: the edges of a job that was stored, and its flow: that of its first parent that is in one, else a new one. A parent that
-- ended badly before is honoured at once.
create or replace function jobqueue.tie_to_parents(_job jobqueue.job, _options jsonb)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    ids uuid[];
    which uuid;
    ended uuid[];
begin
    with tied as (
        insert into edge (child_id, parent_id, tenant, on_failure, passed)
        select _job.id, p.id, _job.tenant, p.on_failure, j.status in ('failed', 'cancelled') and p.on_failure = 'run'
        from parent_list(_options) p join job j on j.id = p.id
        returning edge.parent_id)
    select array_agg(t.parent_id order by t.parent_id) into ids from tied t;
    if ids is null then
        return;
    end if;
    select m.flow_id into which from flow_member m where m.job_id = any (ids) order by m.job_id limit 1;
    if not found then
        which := new_id();
        insert into flow (id, tenant) values (which, _job.tenant);
    end if;
    insert into flow_member (job_id, flow_id, tenant)
    select x.id, which, _job.tenant from unnest(ids || _job.id) x (id)
    on conflict (job_id) do nothing;
    ended := strike_children(ids, array[_job.id]);
    if ended is not null then
        perform after_end(ended);
    end if;
end
$$;

-- send_flow: send jobs that depend on each other, all or none, across queues, in the caller's transaction.
--   jobs  [{"ref", "queue", "payload", "options", "depends_on", "on_failure"}], at most 100,000. ref: a name of its own in this flow, needed
--         if others depend on it. depends_on: refs, ids of jobs that are there, or {"ref" or "id", "on_failure"}. on_failure: what becomes of
--         the job when one of them ends failed or cancelled: wait (default), fail, cancel or run
-- Returns (ref, id) per job, in order. All of them belong to one tenant.
-- Errors: those of send; JQ400 also for a ref that is unknown or there twice and for a cycle, which is named; JQ404 for a parent of another
-- tenant; JQ409 if another job stands in the place of one. DETAIL has index and ref.
create or replace function jobqueue.send_flow(jobs jsonb)
returns table (ref text, id uuid)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set jit = off
as $$
#variable_conflict use_column
declare
    plan jobqueue.flow_plan;
    ended uuid[];
begin
    if jsonb_typeof(send_flow.jobs) is distinct from 'array' or jsonb_array_length(send_flow.jobs) not between 1 and 100000 then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'jobs must be a JSON array of 1 to 100,000 jobs.',
            'Give [{"ref": "a", "queue": …}, {"ref": "b", "queue": …, "depends_on": ["a"]}].');
    end if;
    plan := ordered_flow(read_flow(send_flow.jobs));
    plan := lock_flow(plan);
    perform store_flow(plan);
    perform tie_flow(plan);
    -- parents that ended badly before are honoured at once
    ended := strike_children(array(select distinct x.id from unnest(plan.parent_ids) x (id) where x.id is not null), plan.ids);
    if ended is not null then
        perform after_end(ended);
    end if;
    perform wake_many(array(select distinct q from unnest(plan.queues) q));
    return query select x.ref, x.id from unnest(plan.refs, plan.ids) with ordinality x (ref, id, n) order by x.n;
end
$$;

-- parents: what a job waits for or waited for, as far as it is there.
--   result  of a completed parent; null otherwise
-- Errors: JQ404. Index: job_pkey.
create or replace function jobqueue.parents(job_id uuid)
returns table (id uuid, ref text, queue text, job_type text, status text, on_failure text, result jsonb, display_name text)
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
begin
    if not exists (select from job j where j.id = parents.job_id and sees_tenant(j.tenant)) then
        perform refuse_job(parents.job_id);
    end if;
    return query
        select j.id, m.ref, j.queue::text, j.job_type::text, j.status, e.on_failure, j.result, j.display_name
        from edge e
        join job j on j.id = e.parent_id
        left join flow_member m on m.job_id = j.id
        where e.child_id = parents.job_id
        order by j.id;
end
$$;

-- children: which jobs wait or waited for this one. Errors: JQ404. Index: edge_of_parent.
create or replace function jobqueue.children(job_id uuid)
returns table (id uuid, ref text, queue text, job_type text, status text, on_failure text, unfinished_parents int, display_name text)
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
begin
    if not exists (select from job j where j.id = children.job_id and sees_tenant(j.tenant)) then
        perform refuse_job(children.job_id);
    end if;
    return query
        select j.id, m.ref, j.queue::text, j.job_type::text, j.status, e.on_failure, j.unfinished_parents, j.display_name
        from edge e
        join job j on j.id = e.child_id
        left join flow_member m on m.job_id = j.id
        where e.parent_id = children.job_id
        order by j.id;
end
$$;

-- flow_status: how far a flow is: its jobs per status, those deleted since among them.
--   id   of the flow, or of any job in it
--   pct  ended of total, rounded down; ended_at: when the last job ended, null before
-- Errors: JQ404. Index: flow_member_list.
create or replace function jobqueue.flow_status(id uuid)
returns table (
    flow_id uuid, tenant text, total bigint, ended bigint, pct int, blocked bigint, pending bigint, processing bigint, paused bigint,
    completed bigint, failed bigint, cancelled bigint, skipped bigint, created_at timestamptz, ended_at timestamptz)
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_hashjoin = off set jit = off
as $$
#variable_conflict use_column
declare
    f jobqueue.flow;
begin
    select * into f from flow x
    where x.id in (flow_status.id, (select m.flow_id from flow_member m where m.job_id = flow_status.id));
    if not found or not sees_tenant(f.tenant) then
        perform refuse('JQ404', 'FLOW_NOT_FOUND', format('There is no flow %s, and no job of that id is in one.', flow_status.id),
            'Give the id of a flow, or of a job that depends on others or that others depend on.', jsonb_build_object('id', flow_status.id));
    end if;
    return query
        with c as (
            select count(*) filter (where j.status = 'blocked') as blocked, count(*) filter (where j.status = 'pending') as pending,
                count(*) filter (where j.status = 'processing') as processing, count(*) filter (where j.status = 'paused') as paused,
                count(*) filter (where j.status = 'completed') + f.gone_completed as completed,
                count(*) filter (where j.status = 'failed') + f.gone_failed as failed,
                count(*) filter (where j.status = 'cancelled') + f.gone_cancelled as cancelled,
                count(*) filter (where j.status = 'skipped') + f.gone_skipped as skipped,
                max(j.completed_at) as last_end
            from flow_member m join job j on j.id = m.job_id
            where m.flow_id = f.id),
        s as (
            select c.*, c.completed + c.failed + c.cancelled + c.skipped as ended,
                c.blocked + c.pending + c.processing + c.paused as left_over
            from c)
        select f.id, f.tenant::text, s.ended + s.left_over, s.ended, (100 * s.ended / nullif(s.ended + s.left_over, 0))::int, s.blocked, s.pending,
            s.processing, s.paused, s.completed, s.failed, s.cancelled, s.skipped, f.created_at, case when s.left_over = 0 then s.last_end end
        from s;
end
$$;
