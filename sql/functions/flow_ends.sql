-- What the ends of parents do to their children.
--
-- A child counts the parents that it still waits for (unfinished_parents); its row is the place where they meet. Two parents that end at
-- the same time in two transactions both subtract from it: the second waits for the row, then PostgreSQL evaluates its update again on the
-- row as the first one left it (READ COMMITTED), so that exactly one of them brings the count to 0 and releases. With REPEATABLE READ the
-- second is refused (40001) and its caller tries again. Nobody counts parents whose end is not committed, and none is counted twice:
-- completed and skipped are final, and an edge that was passed after a bad end is marked.
-- Children are locked in the order of their ids, after the jobs that ended, so that settling never waits in a circle.

-- end_parents: release the children of jobs that have ended, or end them as their edges ask.
--   _locked  whether all that can end by it is locked already: it is after the first generation
-- Returns the children that ended by it, null if none did; their own children are the caller's to go on with.
-- Index: edge_of_parent, job_pkey.
create or replace function jobqueue.end_parents(_parents uuid[], _locked boolean)
returns uuid[]
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    badly boolean := exists (select from job p where p.id = any (_parents) and p.status in ('failed', 'cancelled'));
begin
    if badly and not _locked then
        perform lock_below(_parents);
    end if;
    perform release_children(_parents);
    if badly then
        return strike_children(_parents, null);
    end if;
    return null;
end
$$;

-- lock_below: lock parents and all that could end together with them, in the order of ids, before any of it is changed.
create or replace function jobqueue.lock_below(_parents uuid[])
returns void
language sql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    select from job j where j.id in (select b.id from jobs_below(_parents) b (id)) order by j.id for no key update
$$;

-- jobs_below: jobs that are to end badly, as far as others wait for them, and all that could end together with them. Jobs without children,
-- and children that stay as they are whatever happens (on_failure wait), are passed over. Index: job_pkey, edge_of_parent.
create or replace function jobqueue.jobs_below(_parents uuid[])
returns setof uuid
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    with recursive below (id) as (
        select j.id from job j where j.id = any (_parents) and j.settle_flags & 2 <> 0
        union
        select e.child_id
        from below b
        join job j on j.id = b.id and j.settle_flags & 2 <> 0 and (j.status = 'blocked' or j.id = any (_parents))
        join edge e on e.parent_id = j.id and e.on_failure <> 'wait')
    select b.id from below b
$$;

-- release_children: one parent less for each child of a parent that ended as the edge asks; the last one makes it pending.
-- A child that has been cancelled or has failed meanwhile counts on, so that it can be taken up again. How long a job may wait (expires_in)
-- counts from its release; one that was taken up again waits however long.
create or replace function jobqueue.release_children(_parents uuid[])
returns void
language plpgsql
-- jobqueue twice: it notes itself what it releases (guard.sql)
set search_path = pg_catalog, jobqueue, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    released uuid[];
    limited uuid[];
    queues text[];
begin
    with passed as (
        update edge e
        set passed = true
        from job p
        where p.id = any (_parents) and p.status in ('failed', 'cancelled')
            and e.parent_id = p.id and e.on_failure = 'run' and not e.passed
        returning e.child_id),
    met as materialized (
        select x.child_id, count(*)::int as n
        from (
            select p.child_id from passed p
            union all
            select e.child_id
            from job p
            join edge e on e.parent_id = p.id and not e.passed
            where p.id = any (_parents) and p.status in ('completed', 'skipped')) x
        group by x.child_id
        order by x.child_id),
    counted as (
        update job j
        set unfinished_parents = greatest(j.unfinished_parents - m.n, 0),
            status = case when j.status = 'blocked' and j.unfinished_parents <= m.n then 'pending' else j.status end,
            version = case when j.status = 'blocked' and j.unfinished_parents <= m.n then j.version + 1 else j.version end,
            ready_seq = case when j.status = 'blocked' and j.unfinished_parents <= m.n and j.run_at <= now() then next_ready() end,
            wait_until = case when j.status = 'blocked' and j.unfinished_parents <= m.n and j.run_at > now() then j.run_at end,
            expires_at = case when j.status = 'blocked' and j.unfinished_parents <= m.n and greatest(j.attempt, j.retry_count, j.resume_count) = 0
                then greatest(j.run_at, now())
                    + option_interval(j.options, 'expires_in', (select q.expires_in from queue q where q.name = j.queue)) end,
            run_at = case when j.status = 'blocked' and j.unfinished_parents <= m.n then greatest(j.run_at, now()) else j.run_at end,
            status_reason = case when j.status = 'blocked' and j.unfinished_parents <= m.n then null else j.status_reason end,
            updated_at = case when j.status = 'blocked' and j.unfinished_parents <= m.n then now() else j.updated_at end
        from met m
        where j.id = m.child_id and j.status not in ('completed', 'pending', 'processing', 'paused')
        returning j.id, j.queue, j.status, j.wait_until, j.settle_flags)
    select array_agg(c.id), array_agg(c.id) filter (where c.settle_flags & 256 <> 0 and c.wait_until is null),
        array_agg(distinct c.queue) filter (where c.wait_until is null or c.wait_until < now() + interval '5 s')
    into released, limited, queues
    from counted c
    where c.status = 'pending';
    if released is null then
        return;
    end if;
    insert into statistics_note (queue, from_status, to_status, changes) values ('', 'blocked', 'pending', cardinality(released));
    if limited is not null then
        perform join_line(limited);
    end if;
    if queues is not null then
        perform wake_many(queues);
    end if;
    perform publish_changes(released);
end
$$;

-- strike_children: blocked children whose parent ended badly and whose edge says fail or cancel; fail wins.
--   _children  only these; null: all of them
-- Returns those that ended, null if none did.
create or replace function jobqueue.strike_children(_parents uuid[], _children uuid[])
returns uuid[]
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    ended uuid[];
    failed uuid[];
    limited uuid[];
begin
    with struck as materialized (
        select distinct on (e.child_id) e.child_id, e.on_failure = 'fail' as fails,
            format('Its parent %s%s ended as %s%s.', p.id, coalesce(format(' ("%s")', m.ref), ''), p.status,
                case when p.status = 'failed' then format(': %s, %s', p.error_code, rtrim(left(p.error_message, 500), '.')) else '' end) as why
        from job p
        join edge e on e.parent_id = p.id and e.on_failure in ('fail', 'cancel')
        left join flow_member m on m.job_id = p.id
        where p.id = any (_parents) and p.status in ('failed', 'cancelled') and (_children is null or e.child_id = any (_children))
        order by e.child_id, e.on_failure = 'fail' desc, p.id),
    ended_now as (
        update job j
        set status = case when s.fails then 'failed' else 'cancelled' end,
            version = j.version + 1,
            held_key = case when j.hold_mask & case when s.fails then 32 else 64 end <> 0 then j.held_key end,
            expires_at = null,
            completed_at = now(),
            failed_at = case when s.fails then now() end,
            updated_at = now(),
            status_reason = case when s.fails then j.status_reason else s.why end,
            error_class = case when s.fails then 'permanent' else j.error_class end,
            error_code = case when s.fails then 'PARENT_FAILED' else j.error_code end,
            error_message = case when s.fails then s.why else j.error_message end
        from struck s
        where j.id = s.child_id and j.status = 'blocked'
        returning j.id, j.status, j.settle_flags)
    select array_agg(x.id), array_agg(x.id) filter (where x.status = 'failed'), array_agg(x.id) filter (where x.settle_flags & 256 <> 0)
    into ended, failed, limited
    from ended_now x;
    perform leave_line(j, j.status) from job j where j.id = any (limited);
    perform after_failure(f, jsonb_build_object('class', 'permanent', 'code', 'PARENT_FAILED')) from unnest(failed) f;
    if ended is not null then
        perform publish_changes(ended);
    end if;
    return ended;
end
$$;

-- has_waiting_children: whether jobs that have not ended wait for this one or may still read its result; it is not deleted before.
-- Volatile, so that a check that is made again after a row was waited for sees the children that came meanwhile.
create or replace function jobqueue.has_waiting_children(_id uuid)
returns boolean
language sql volatile
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    select exists (
        select from edge e join job c on c.id = e.child_id
        where e.parent_id = _id and c.status in ('blocked', 'pending', 'processing', 'paused'))
$$;

-- leave_flows: jobs of flows are being deleted. Nobody can delete a job that others wait for, whatever the way (JQ409). A child that failed
-- or was cancelled no longer waits for a parent that is gone.
create or replace function jobqueue.leave_flows(_ids uuid[], _statuses text[])
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    needed uuid;
    flows uuid[];
begin
    -- a child that somebody takes up again at this moment is waited for, and then seen: it may be blocked by the job that goes
    perform from job c
    where c.id in (
            select e.child_id from unnest(_ids, _statuses) x (id, status) join edge e on e.parent_id = x.id
            where x.status in ('failed', 'cancelled') and not e.passed)
        and c.status in ('failed', 'cancelled')
    order by c.id
    for no key update;
    select x.id into needed from unnest(_ids) x (id) where has_waiting_children(x.id) limit 1;
    if found then
        perform refuse('JQ409', 'CONFLICT', format('Job %s cannot be deleted: other jobs wait for it.', needed),
            'select * from jobqueue.children(id) lists them; cancel them first.', jsonb_build_object('id', needed));
    end if;
    with gone as materialized (
        delete from edge e using unnest(_ids, _statuses) x (id, status) where e.parent_id = x.id returning e.child_id, e.passed, x.status),
    fewer as materialized (
        select g.child_id, count(*)::int as n
        from gone g
        where not g.passed and g.status in ('failed', 'cancelled')
        group by g.child_id
        order by g.child_id)
    update job j set unfinished_parents = greatest(j.unfinished_parents - f.n, 0) from fewer f where j.id = f.child_id;
    delete from edge e using unnest(_ids) x (id) where e.child_id = x.id;
    with gone as materialized (
        delete from flow_member m using unnest(_ids, _statuses) x (id, status) where m.job_id = x.id returning m.flow_id, x.status),
    counts as materialized (
        select g.flow_id, count(*) filter (where g.status = 'completed') as completed, count(*) filter (where g.status = 'failed') as failed,
            count(*) filter (where g.status = 'cancelled') as cancelled, count(*) filter (where g.status = 'skipped') as skipped
        from gone g
        group by g.flow_id
        order by g.flow_id),
    noted as (
        update flow f
        set gone_completed = f.gone_completed + c.completed, gone_failed = f.gone_failed + c.failed,
            gone_cancelled = f.gone_cancelled + c.cancelled, gone_skipped = f.gone_skipped + c.skipped
        from counts c
        where f.id = c.flow_id
        returning f.id)
    select array_agg(n.id) into flows from noted n;
    delete from flow f where f.id = any (flows) and not exists (select from flow_member m where m.flow_id = f.id);
end
$$;
