-- How send_flow reads, orders and stores its jobs: as sets, so that ten thousand jobs take a few statements and not as many.

-- refuse_element: an error with the element that it is about: its index, and its ref if it has one.
create or replace function jobqueue.refuse_element(_index bigint, _ref text, _state text, _message text, _hint text, _detail jsonb)
returns void
language sql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select refuse(_state, _detail ->> 'code', format('Element %s%s: %s', _index, coalesce(format(' ("%s")', _ref), ''), _message), _hint,
        (_detail - 'code') || jsonb_build_object('index', _index, 'ref', _ref))
$$;

-- check_flow_element: what is wrong with an element, apart from its options. Errors: JQ400.
create or replace function jobqueue.check_flow_element(_element jsonb)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    perform refuse_unknown_option(_element, array['ref', 'queue', 'payload', 'options', 'depends_on', 'on_failure'], 'an element of send_flow');
    perform to_text(_element -> 'ref', 'ref', 200);
    perform to_text(coalesce(nullif(_element -> 'queue', 'null'), '""'), 'queue', 200);
    if coalesce(jsonb_typeof(_element -> 'options'), 'null') not in ('object', 'null') then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'options must be a JSON object.');
    end if;
    perform edge_list(_element -> 'depends_on', coalesce(nullif(_element -> 'on_failure', 'null'), _element -> 'options' -> 'on_failure'));
    perform edge_list(_element -> 'options' -> 'depends_on', null);
end
$$;

-- read_flow: the jobs and edges of a flow, checked. Errors: JQ400 with the element.
create or replace function jobqueue.read_flow(_jobs jsonb)
returns jobqueue.flow_plan
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    p jobqueue.flow_plan;
    odd record;
    state text;
    message text;
    hint text;
    detail text;
begin
    odd := null;
    -- only elements with something out of the ordinary are looked at one by one
    for odd in
        select n - 1 as i, e
        from jsonb_array_elements(_jobs) with ordinality x (e, n)
        where case when jsonb_typeof(e) <> 'object' then true
            else e - array['ref', 'queue', 'payload'] <> '{}' and not is_plain_element(e)
                or jsonb_typeof(e -> 'queue') is distinct from 'string' or e ->> 'queue' = '' or length(e ->> 'queue') > 200
                or coalesce(jsonb_typeof(e -> 'ref'), 'null') not in ('string', 'null') or e ->> 'ref' = '' or length(e ->> 'ref') > 200 end
        order by n
    loop
        perform check_flow_element(odd.e);
    end loop;
    odd := null;
    select array_agg(e order by n), array_agg(e ->> 'ref' order by n), array_agg(e ->> 'queue' order by n)
    into p.elements, p.refs, p.queues
    from jsonb_array_elements(_jobs) with ordinality x (e, n);
    p := resolve_flow(p);
    return p;
exception when others then
    get stacked diagnostics state = returned_sqlstate, message = message_text, hint = pg_exception_hint, detail = pg_exception_detail;
    if state not like 'JQ%' or odd is null then
        raise;
    end if;
    perform refuse_element(odd.i, case when jsonb_typeof(odd.e) = 'object' then odd.e ->> 'ref' end, state, message, hint, detail::jsonb);
end
$$;

-- is_plain_element: an element that has nothing but a ref, a queue, a payload and the names of its parents.
create or replace function jobqueue.is_plain_element(_element jsonb)
returns boolean
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select _element - array['ref', 'queue', 'payload', 'depends_on'] = '{}' and jsonb_typeof(_element -> 'depends_on') = 'array'
        and jsonb_array_length(_element -> 'depends_on') <= 10000
        and not jsonb_path_exists(_element, '$.depends_on[*] ? (@.type() != "string" || @ == "")')
$$;

-- resolve_flow: the edges of a flow; a name is a ref of the flow, else the id of a job that is there. Errors: JQ400.
create or replace function jobqueue.resolve_flow(_plan jobqueue.flow_plan)
returns jobqueue.flow_plan
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_nestloop = off set jit = off
as $$
declare
    p jobqueue.flow_plan := _plan;
    odd record;
    child bigint;
    parent bigint;
    target text;
begin
    select x.n - 1 as i, x.ref into odd
    from (select ref, n, row_number() over (partition by ref order by n) as nth from unnest(p.refs) with ordinality u (ref, n)) x
    where x.ref is not null and x.nth > 1
    order by x.n
    limit 1;
    if found then
        perform refuse_element(odd.i, odd.ref, 'JQ400', 'its ref is there twice.', 'Each job of a flow has a ref of its own.',
            '{"code": "INVALID_ARGUMENT", "option": "ref"}');
    end if;
    with named as materialized (
        select u.n, coalesce(d.v ->> 'ref', d.v ->> 'id', d.v #>> '{}') as target,
            coalesce(d.v ->> 'on_failure', u.e ->> 'on_failure', u.e -> 'options' ->> 'on_failure', 'wait') as on_failure
        from unnest(p.elements) with ordinality u (e, n)
        cross join lateral jsonb_array_elements(coalesce(nullif(u.e -> 'depends_on', 'null'), '[]')
            || coalesce(nullif(u.e -> 'options' -> 'depends_on', 'null'), '[]')) d (v)),
    found as (
        select f.n, r.n as parent, f.target, f.on_failure
        from named f
        left join (select ref, n from unnest(p.refs) with ordinality u (ref, n) where ref is not null) r on r.ref = f.target)
    select array_agg(f.n::int order by f.n, f.target), array_agg(f.parent::int order by f.n, f.target),
        array_agg(case when f.parent is null and is_uuid(f.target) then f.target::uuid end order by f.n, f.target),
        array_agg(f.on_failure order by f.n, f.target), min(f.n) filter (where f.parent is null and not is_uuid(f.target)),
        min(f.target) filter (where f.parent is null and not is_uuid(f.target))
    into p.children, p.parents, p.parent_ids, p.on_failure, child, target
    from found f;
    if child is not null then
        perform refuse_element(child - 1, p.refs[child], 'JQ400', format('depends_on names "%s", which no job of this flow has as its ref.', left(target, 200)),
            'Name refs of this flow, or ids of jobs that are there.', '{"code": "INVALID_ARGUMENT", "option": "depends_on"}');
    end if;
    select e.child, e.parent, e.parent_id::text into child, parent, target
    from unnest(p.children, p.parents, p.parent_ids) e (child, parent, parent_id)
    group by e.child, e.parent, e.parent_id
    having count(*) > 1
    order by e.child
    limit 1;
    if found then
        perform refuse_element(child - 1, p.refs[child], 'JQ400', format('depends_on names "%s" twice.', coalesce(p.refs[parent], target)), '',
            '{"code": "INVALID_ARGUMENT", "option": "depends_on"}');
    end if;
    return p;
end
$$;

-- ordered_flow: put parents before their children, and give every job its id in that order. Errors: JQ400 with the cycle, if there is one.
create or replace function jobqueue.ordered_flow(_plan jobqueue.flow_plan)
returns jobqueue.flow_plan
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_nestloop = off set jit = off
as $$
declare
    p jobqueue.flow_plan := _plan;
    n int := cardinality(p.elements);
    -- edge k of those that are sorted by parent leads to child[k]; those of job i begin at first_edge[i]
    child int[];
    first_edge int[];
    waits int[];
    ready int[] := array_fill(0, array[n]);
    head int := 1;
    tail int := 0;
    job int;
    next_job int;
begin
    select array_agg(e.c order by e.p, e.c) into child from unnest(p.children, p.parents) e (c, p) where e.p is not null;
    select array_agg(coalesce(a.before, 0) + 1 order by g), array_agg(coalesce(b.parents, 0) order by g)
    into first_edge, waits
    from generate_series(1, n + 1) g
    left join (select i, sum(count(e.p)) over (order by i rows between unbounded preceding and 1 preceding)::int as before
        from generate_series(1, n + 1) i left join unnest(p.parents) e (p) on e.p = i group by i) a on a.i = g
    left join (select e.c, count(*)::int as parents from unnest(p.children, p.parents) e (c, p) where e.p is not null group by e.c) b on b.c = g;
    for i in 1 .. n loop
        if waits[i] = 0 then
            tail := tail + 1;
            ready[tail] := i;
        end if;
    end loop;
    while head <= tail loop
        job := ready[head];
        head := head + 1;
        for k in first_edge[job] .. first_edge[job + 1] - 1 loop
            next_job := child[k];
            waits[next_job] := waits[next_job] - 1;
            if waits[next_job] = 0 then
                tail := tail + 1;
                ready[tail] := next_job;
            end if;
        end loop;
    end loop;
    if tail < n then
        perform refuse_cycle(p, ready[1:tail]);
    end if;
    p.run_order := ready;
    -- ids are given in this order, so that locking in the order of ids is locking parents first; those of one millisecond are sorted before,
    -- because only servers from 18 on make them in order
    with made as materialized (
        select new_id() as id from generate_series(1, n)),
    sorted as (
        select m.id, row_number() over (order by m.id) as k from made m),
    given as (
        select o.i, s.id from unnest(ready) with ordinality o (i, k) join sorted s on s.k = o.k)
    select array_agg(coalesce(case when u.e -> 'options' ? 'id' then to_id(u.e -> 'options' -> 'id') end, g.id) order by u.n) into p.ids
    from given g
    join unnest(p.elements) with ordinality u (e, n) on u.n = g.i;
    return p;
end
$$;

-- refuse_cycle: JQ400 with the first cycle among the jobs that could not be put in order, each followed by what it depends on.
create or replace function jobqueue.refuse_cycle(_plan jobqueue.flow_plan, _ordered int[])
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    way int[] := '{}';
    job int := (select min(e.c) from unnest(_plan.children, _plan.parents) e (c, p) where e.p is not null and e.c <> all (_ordered));
    cycle text[];
begin
    -- each of them depends on another of them, so this way comes back to itself; a cycle of more than 1,000 jobs is told by its first
    while job <> all (way) and cardinality(way) < 1000 loop
        way := way || job;
        job := (select min(e.p) from unnest(_plan.children, _plan.parents) e (c, p)
            where e.c = job and e.p is not null and e.p <> all (_ordered));
    end loop;
    cycle := array(select _plan.refs[w.i] from unnest(way) with ordinality w (i, n)
        where w.n >= coalesce(array_position(way, job), 1) order by w.n) || _plan.refs[job];
    perform refuse('JQ400', 'INVALID_ARGUMENT', format('The jobs of this flow depend on each other in a cycle: %s.',
            array_to_string(case when cardinality(cycle) > 20 then cycle[1:10] || '…'::text || cycle[cardinality(cycle) - 8:] else cycle end, ' -> ')),
        'A job cannot wait for itself, not by way of others either.', jsonb_build_object('cycle', to_jsonb(cycle)));
end
$$;

-- lock_flow: the tenant of a flow, how many parents each job waits for, and the parents that are there already, locked. Errors: JQ404.
create or replace function jobqueue.lock_flow(_plan jobqueue.flow_plan)
returns jobqueue.flow_plan
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    p jobqueue.flow_plan := _plan;
    outer_ids uuid[] := array(select distinct x.id from unnest(p.parent_ids) x (id) where x.id is not null order by x.id);
    chosen jsonb := coalesce(nullif(p.elements[1] -> 'options', 'null'), '{}');
    statuses text[];
begin
    p.tenant := coalesce(chosen ->> 'tenant',
        (select t.options ->> 'tenant' from job_type t where t.name = coalesce(chosen ->> 'job_type', p.queues[1])), 'default');
    select array_agg(l.id), array_agg(l.status) into outer_ids, statuses from lock_parents(outer_ids, p.tenant) l;
    select c.passed, c.waits into p.passed, p.waits from count_waits(p, outer_ids, statuses) c;
    return p;
end
$$;

-- count_waits: per edge whether it is passed already, per job how many parents it waits for; _ids and _statuses are parents outside.
create or replace function jobqueue.count_waits(
    _plan jobqueue.flow_plan, _ids uuid[], _statuses text[], out passed boolean[], out waits int[])
language sql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_nestloop = off set jit = off
as $$
    with edges as materialized (
        select e.c, e.k, e.p is not null or is_waited_for(o.status, e.how) as waits,
            coalesce(o.status in ('failed', 'cancelled'), false) and e.how = 'run' as passed
        from unnest(_plan.children, _plan.parents, _plan.parent_ids, _plan.on_failure) with ordinality e (c, p, id, how, k)
        left join unnest(_ids, _statuses) o (id, status) on o.id = e.id),
    sums as (
        select e.c, count(*) filter (where e.waits)::int as waits from edges e group by e.c)
    select (select array_agg(e.passed order by e.k) from edges e),
        (select array_agg(coalesce(s.waits, 0) order by g)
        from generate_series(1, cardinality(_plan.elements)) g left join sums s on s.c = g)
$$;

-- store_plain_jobs: store the jobs of a flow that need nothing but a place in the line of one of these queues.
create or replace function jobqueue.store_plain_jobs(_plan jobqueue.flow_plan, _queues text[])
returns void
language sql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_nestloop = off set jit = off
as $$
    with plain as materialized (
        select u.id, u.q, u.e, u.w, x.n is not null as has_children
        from unnest(_plan.run_order) with ordinality o (i, k)
        join unnest(_plan.ids, _plan.queues, _plan.elements, _plan.waits) with ordinality u (id, q, e, w, n) on u.n = o.i
        left join (select distinct e.p as n from unnest(_plan.parents) e (p)) x on x.n = u.n
        where u.q = any (_queues) and is_plain_job(u.e)
        order by o.k)
    insert into job (id, queue, job_type, payload, options, status, unfinished_parents, settle_flags, ready_seq)
    select x.id, x.q, x.q, coalesce(x.e -> 'payload', '{}'), case when x.e ? 'options' then trace_option(x.e -> 'options') end,
        case when x.w > 0 then 'blocked' else 'pending' end, x.w,
        512 | case when x.has_children then 2 else 0 end, case when x.w = 0 then next_ready() end
    from plain x
$$;

-- other_jobs: the jobs of a flow that take the general way of sending.
create or replace function jobqueue.other_jobs(_plan jobqueue.flow_plan, _queues text[])
returns table (place bigint, i bigint, ref text, id uuid, q text, payload jsonb, w int, has_children boolean, options jsonb)
language sql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_nestloop = off set jit = off
as $$
    select o.k, u.n - 1, u.ref, u.id, u.q, u.e -> 'payload', u.w, x.n is not null,
        coalesce(nullif(u.e -> 'options', 'null'), '{}') - array['depends_on', 'on_failure'] || jsonb_build_object('id', u.id)
    from unnest(_plan.run_order) with ordinality o (i, k)
    join unnest(_plan.refs, _plan.ids, _plan.queues, _plan.elements, _plan.waits) with ordinality u (ref, id, q, e, w, n) on u.n = o.i
    left join (select distinct e.p as n from unnest(_plan.parents) e (p)) x on x.n = u.n
    where not (u.q = any (_queues) and is_plain_job(u.e))
$$;

-- store_flow: store the jobs of a flow: those that need nothing but a place in a line in one statement, the others as send does.
-- Errors: those of send, JQ409 if another job stands in the place of one, with the element.
create or replace function jobqueue.store_flow(_plan jobqueue.flow_plan)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    p jobqueue.flow_plan := _plan;
    plain_queues text[];
    el record;
    stored record;
    state text;
    message text;
    hint text;
    detail text;
begin
    el := null;
    for el in select u.q, min(u.n) - 1 as i, (array_agg(u.ref order by u.n))[1] as ref
        from unnest(p.queues, p.refs) with ordinality u (q, ref, n) group by u.q order by 2
    loop
        perform queue_for_send(el.q);
    end loop;
    el := null;
    plain_queues := array(select q.name from queue q
        where q.name = any (p.queues) and is_plain(q) and p.tenant = 'default' and not is_bound_to_tenants()
            and not exists (select from job_type t where t.name = q.name and t.applies));
    perform store_plain_jobs(p, plain_queues);
    for el in select o.* from other_jobs(p, plain_queues) o order by o.place loop
        select s.id, s.created, s.reason, r.tenant into stored
        from queue q
        cross join lateral new_job(q, el.payload, el.options) r
        cross join lateral store_job(waiting_job(r, el.w, el.has_children),
            coalesce((select t.options from job_type t where t.name = r.job_type), '{}') - 'depends_on' || el.options, q.policy) s
        where q.name = el.q;
        if stored.tenant <> p.tenant then
            perform refuse('JQ404', 'JOB_NOT_FOUND', format('it belongs to the tenant "%s", the flow to "%s".', stored.tenant, p.tenant),
                'All jobs of a flow belong to one tenant.', jsonb_build_object('tenant', stored.tenant));
        elsif not stored.created then
            perform refuse('JQ409', 'CONFLICT', format('another job stands in its place (%s).', stored.reason),
                'Nothing of the flow was sent. Wait until that job has ended, or leave this one out.',
                jsonb_build_object('reason', stored.reason, 'id', stored.id));
        end if;
    end loop;
-- around the loop and not inside it: a block with an exception clause is a subtransaction
exception when others then
    get stacked diagnostics state = returned_sqlstate, message = message_text, hint = pg_exception_hint, detail = pg_exception_detail;
    if state not like 'JQ%' or el is null then
        raise;
    end if;
    perform refuse_element(el.i, el.ref, state, message, hint, detail::jsonb);
end
$$;

-- is_plain_job: an element that asks for nothing that only the general way of sending can do.
create or replace function jobqueue.is_plain_job(_element jsonb)
returns boolean
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(nullif(_element -> 'options', 'null'), '{}') - array['depends_on', 'on_failure', 'trace_context'] = '{}'
        and pg_column_size(_element) < 100000
        and (_element #> '{options,trace_context}' is null or jobqueue.is_trace_context(_element #> '{options,trace_context}'))
$$;

-- waiting_job: a new job of a flow, with what it waits for and whether others wait for it.
create or replace function jobqueue.waiting_job(_job jobqueue.job, _parents int, _has_children boolean)
returns jobqueue.job
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    r jobqueue.job := _job;
begin
    r.unfinished_parents := _parents;
    r.settle_flags := r.settle_flags | 512 | case when _has_children then 2 else 0 end;
    return blocked_job(r);
end
$$;

-- tie_flow: the edges and members of a flow whose jobs are stored.
create or replace function jobqueue.tie_flow(_plan jobqueue.flow_plan)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_nestloop = off set jit = off
as $$
declare
    p jobqueue.flow_plan := _plan;
    which uuid := new_id();
    outer_ids uuid[] := array(select distinct x.id from unnest(p.parent_ids) x (id) where x.id is not null);
begin
    insert into flow (id, tenant) values (which, p.tenant);
    insert into flow_member (job_id, flow_id, tenant, ref)
    select m.id, which, p.tenant, m.ref from unnest(p.ids, p.refs) m (id, ref);
    insert into flow_member (job_id, flow_id, tenant)
    select x.id, which, p.tenant from unnest(outer_ids) x (id)
    on conflict (job_id) do nothing;
    insert into edge (child_id, parent_id, tenant, on_failure, passed)
    select c.id, coalesce(e.id, m.id), p.tenant, e.how, e.passed
    from unnest(p.children, p.parents, p.parent_ids, p.on_failure, p.passed) e (c, p, id, how, passed)
    join unnest(p.ids) with ordinality c (id, n) on c.n = e.c
    left join unnest(p.ids) with ordinality m (id, n) on m.n = e.p;
end
$$;
