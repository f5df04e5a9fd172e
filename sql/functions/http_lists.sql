-- Lists of jobs for the HTTP API, newest first. No index has the order of all tenants together, so a list is merged from its tenants:
-- the newest n of all can only be among the tenants whose own newest are the n newest. Each tenant is read along job_list (or job_creator,
-- job_subject) and left after n entries: the length of the history does not matter.

-- http_names: a text or a list of texts, as an array. Errors: JQ400.
create or replace function jobqueue.http_names(_value jsonb, _name text)
returns text[]
language plpgsql immutable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if jsonb_typeof(_value) = 'string' then
        return array[_value #>> '{}'];
    elsif jsonb_typeof(_value) = 'array' and jsonb_array_length(_value) between 1 and 1000
        and not exists (select from jsonb_array_elements(_value) e where jsonb_typeof(e) <> 'string')
    then
        return array(select e from jsonb_array_elements_text(_value) e);
    end if;
    perform refuse('JQ400', 'INVALID_ARGUMENT', format('%s must be a text, or a list of 1 to 1,000 texts.', _name), '',
        jsonb_build_object('option', _name));
end
$$;

-- http_conditions: a filter as SQL, to be put behind a condition on a job j. Values stand in it as literals, so that the planner sees them.
--   _filter  status, queue, job_type, tenant, subject, created_by, error_class, error_code, ids (each a text or a list), created_after,
--            created_before, ended_after; null means not given
-- Returns "" or " and …". Errors: JQ400.
create or replace function jobqueue.http_conditions(_filter jsonb)
returns text
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    k text;
    v jsonb;
    names text[];
    said text := '';
begin
    perform refuse_unknown_option(_filter, array['ids', 'status', 'queue', 'job_type', 'tenant', 'subject', 'created_by', 'error_class',
        'error_code', 'created_after', 'created_before', 'ended_after'], 'a filter');
    for k, v in select e.key, e.value from jsonb_each(_filter) e where e.value <> 'null' order by e.key loop
        if k = 'ids' then
            said := said || format(' and j.id = any (%L::uuid[])', to_ids(v, k));
        elsif k in ('created_after', 'created_before', 'ended_after') then
            said := said || format(' and j.%I %s %L::timestamptz', case k when 'ended_after' then 'completed_at' else 'created_at' end,
                case k when 'created_before' then '<' else '>' end, to_time(v, k));
        else
            names := http_names(v, k);
            -- one value as an equation: then the order of an index behind it can be used
            said := said || case when cardinality(names) = 1 then format(' and j.%I = %L', k, names[1])
                else format(' and j.%I = any (%L::text[])', k, names) end;
        end if;
    end loop;
    return said;
end
$$;

-- http_candidates: the ids among which all jobs in these statuses are, if they are few: then no way leads through all the others. Every
-- tenant's; the policies decide later. Null if they are more than 20,000 or cannot be found without reading everything (ended otherwise
-- than by failure; paused; waiting in queues with limits). Index: job_failed, job_claim, job_waiting, claim_batch.
create or replace function jobqueue.http_candidates(_statuses jsonb)
returns uuid[]
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off
as $$
declare
    names text[];
    ids uuid[];
begin
    if coalesce(_statuses, 'null') = 'null' then
        return null;
    end if;
    names := http_names(_statuses, 'status');
    if not names <@ array['failed', 'processing', 'pending', 'blocked']
        or 'pending' = any (names) and exists (select from queue q where q.limited)
    then
        return null;
    end if;
    select array_agg(x.id) into ids
    from (
        (select j.id from job j where 'failed' = any (names) and j.failed_at is not null limit 20001)
        union all
        (select i from claim_batch b, unnest(b.job_ids) i where 'processing' = any (names) limit 20001)
        union all
        (select j.id from job j where 'pending' = any (names) and j.ready_seq is not null limit 20001)
        union all
        (select j.id from job j where 'pending' = any (names) and j.wait_until is not null limit 20001)
        union all
        (select e.child_id from edge e where 'blocked' = any (names) limit 20001)
        limit 20001) x;
    return case when coalesce(cardinality(ids), 0) <= 20000 then coalesce(ids, '{}') end;
end
$$;

-- http_tenants: the tenants whose jobs a list has: those named, else those of the transaction, else all that have jobs (one probe of
-- job_list each).
create or replace function jobqueue.http_tenants(_named jsonb)
returns setof text
language plpgsql stable
set enable_seqscan = off
as $$
begin
    if coalesce(_named, 'null') <> 'null' then
        return query select distinct unnest(jobqueue.http_names(_named, 'tenant'));
    elsif not jobqueue.sees_all_tenants() then
        return query select distinct unnest(jobqueue.visible_tenants());
    else
        return query
            with recursive t (tenant) as (
                (select j.tenant from jobqueue.job j order by j.tenant limit 1)
                union all
                select (select j.tenant from jobqueue.job j where j.tenant > t.tenant order by j.tenant limit 1)
                from t where t.tenant is not null)
            select t.tenant::text from t where t.tenant is not null;
    end if;
end
$$;

-- http_found: a page of the jobs that a filter means, newest first.
--   _after_at, _after_id  the last job of the page before; null: from the newest on
--   _most, _skip          how many, and how many before them are left out
-- Index: job_list, job_creator, job_subject; job_pkey for ids.
create or replace function jobqueue.http_found(_filter jsonb, _after_at timestamptz, _after_id uuid, _most int, _skip int)
returns table (id uuid, created_at timestamptz)
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set enable_sort = off set jit = off
as $$
declare
    conditions text := jobqueue.http_conditions(_filter)
        || case when _after_at is null then '' else format(' and (j.created_at, j.id) < (%L::timestamptz, %L::uuid)', _after_at, _after_id) end;
    candidates uuid[] := jobqueue.http_candidates(_filter -> 'status');
begin
    if candidates is not null or coalesce(_filter -> 'ids', 'null') <> 'null' then
        return query execute format('select j.id, j.created_at from jobqueue.job j where ($1 is null or j.id = any ($1)) %s
            order by j.created_at desc, j.id desc limit %s offset %s', conditions, _most, _skip) using candidates;
    else
        return query execute format($q$
            with heads as materialized (
                select t.tenant
                from jobqueue.http_tenants(%4$L) t (tenant)
                cross join lateral (
                    select j.created_at, j.id from jobqueue.job j where j.tenant = t.tenant %1$s
                    order by j.created_at desc, j.id desc limit 1) h
                order by h.created_at desc, h.id desc
                limit %2$s)
            select p.id, p.created_at
            from heads
            cross join lateral (
                select j.id, j.created_at from jobqueue.job j where j.tenant = heads.tenant %1$s
                order by j.created_at desc, j.id desc limit %2$s) p
            order by p.created_at desc, p.id desc
            limit %2$s - %3$s offset %3$s $q$, conditions, _most + _skip, _skip, _filter -> 'tenant');
    end if;
end
$$;

-- http_total: how many jobs a filter means; one more than _most stands for more.
create or replace function jobqueue.http_total(_filter jsonb, _most int)
returns bigint
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set enable_sort = off set jit = off
as $$
declare
    conditions text := jobqueue.http_conditions(_filter);
    candidates uuid[] := jobqueue.http_candidates(_filter -> 'status');
    n bigint;
begin
    if candidates is not null or coalesce(_filter -> 'ids', 'null') <> 'null' then
        execute format('select count(*) from jobqueue.job j where ($1 is null or j.id = any ($1)) %s', conditions) into n using candidates;
    else
        execute format($q$
            select count(*)
            from (
                select
                from jobqueue.http_tenants(%3$L) t (tenant)
                cross join lateral (select from jobqueue.job j where j.tenant = t.tenant %1$s limit %2$s) x
                limit %2$s) counted $q$, conditions, _most + 1, _filter -> 'tenant') into n;
    end if;
    return n;
end
$$;

-- http_jobs: GET /jobs as one call.
--   _filter            as of http_conditions
--   _after_at, _after_id, _most, _skip   as of http_found
--   _fields            the keys wanted; null: all
-- Returns the jobs and, to know whether there is a next page, one more without a body. At least one row: total is in each (at most
-- 10,001, which means more), and id is null if the page is empty.
create or replace function jobqueue.http_jobs(
    _role text, _tenants text, _filter jsonb, _after_at timestamptz, _after_id uuid, _most int, _skip int, _fields text[])
returns table (total bigint, id uuid, created_at timestamptz, body text)
language plpgsql
as $$
#variable_conflict use_column
declare
    counted bigint;
begin
    perform jobqueue.http_context(_role, _tenants, true);
    counted := jobqueue.http_total(_filter, 10000);
    return query
        select counted, f.id, f.created_at, case when f.n <= _most then jobqueue.http_job_body(f.id, _fields, array['brief'], false) end
        from (select) one
        left join (
            select x.id, x.created_at, row_number() over (order by x.created_at desc, x.id desc) as n
            from jobqueue.http_found(_filter, _after_at, _after_id, _most + 1, _skip) x) f on true
        order by f.n;
end
$$;

-- http_recent: SQL for the newest jobs of all tenants, by their ids: ids that are made here begin with their time, so those of the last hour
-- lie together. Ids of the sender's own lie before and behind them; of each side 2,000 are looked at. Index: job_pkey.
create or replace function jobqueue.http_recent(_most int)
returns text
language sql stable
as $$
    select format('(select * from (select * from jobqueue.job j where j.id between %1$L and %2$L order by j.id desc limit %3$s) ours
        union all select * from (select * from jobqueue.job j where j.id > %2$L order by j.id desc limit 2000) high
        union all select * from (select * from jobqueue.job j where j.id < %4$L order by j.id desc limit 2000) low)',
        jobqueue.first_id(now() - interval '1 hour'), jobqueue.first_id(now() + interval '1 min'), _most,
        jobqueue.first_id('2020-01-01 00:00:00+00'))
$$;

-- http_active: GET /jobs/active as one call: the jobs of a person that were sent in the last hour and are under way or ended in the last
-- five minutes. Looked at are the person's newest 20,000 of each tenant; for everybody's the newest 5,000 of each tenant, or the newest
-- 10,000 of all for those who see all (30 ms, however long the history and however many the tenants).
--   _created_by  whose; null: everybody's
-- Returns as http_jobs. Index: job_creator; for everybody's job_list, job_pkey.
create or replace function jobqueue.http_active(_role text, _tenants text, _created_by text, _most int, _fields text[])
returns table (total bigint, id uuid, created_at timestamptz, body text)
language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set enable_sort = off set jit = off
as $$
#variable_conflict use_column
declare
    source text;
begin
    perform jobqueue.http_context(_role, _tenants, true);
    source := case when _created_by is null and _tenants = '*' then format('%s x where', jobqueue.http_recent(10000))
        else format($q$jobqueue.http_tenants(null) t (tenant)
            cross join lateral (
                select j.id, j.created_at, j.status, j.completed_at
                from jobqueue.job j
                where j.tenant = t.tenant and j.created_at > now() - interval '1 hour' %s
                order by j.created_at desc
                limit %s) x
            where$q$,
            case when _created_by is not null then format('and j.created_by = %L', _created_by) end,
            case when _created_by is null then 5000 else 20000 end) end;
    return query execute format($q$
        with active as materialized (
            select x.id, x.created_at, count(*) over () as total, row_number() over (order by x.created_at desc, x.id desc) as n
            from %1$s x.created_at > now() - interval '1 hour'
                and (x.status in ('blocked', 'pending', 'processing', 'paused') or x.completed_at > now() - interval '5 min'))
        select coalesce(a.total, 0), a.id, a.created_at, jobqueue.http_job_body(a.id, $1, array['brief'], false)
        from (select) one
        left join active a on a.n <= %2$s
        order by a.n $q$, source, _most) using _fields;
end
$$;

-- http_counts: how many jobs there are by status, and how long the completed ones took, as JSON. Looked at are the newest 50,000 of each
-- tenant, or the newest 200,000 by their ids for those who see all (which lie together: 0.2 s); capped says whether there are more.
create or replace function jobqueue.http_counts(_filter jsonb, out counts jsonb, out capped boolean)
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set enable_sort = off set jit = off
as $$
declare
    everything boolean := jobqueue.sees_all_tenants() and coalesce(_filter -> 'tenant', 'null') = 'null';
    conditions text := jobqueue.http_conditions(_filter);
    source text := case when everything
        then format('(select j.*, row_number() over () as n from (select * from jobqueue.job j where true %s order by j.id desc limit 200001) j) x',
            conditions)
        else format('jobqueue.http_tenants(%L) t (tenant) cross join lateral (select j.*, row_number() over () as n from (
            select * from jobqueue.job j where j.tenant = t.tenant %s order by j.created_at desc limit 50001) j) x',
            _filter -> 'tenant', conditions) end;
begin
    execute format($q$
        select jsonb_build_object(
                'blocked', count(*) filter (where x.status = 'blocked'),
                'pending', count(*) filter (where x.status = 'pending'),
                'processing', count(*) filter (where x.status = 'processing'),
                'paused', count(*) filter (where x.status = 'paused'),
                'completed', count(*) filter (where x.status = 'completed'),
                'failed', count(*) filter (where x.status = 'failed'),
                'cancelled', count(*) filter (where x.status = 'cancelled'),
                'skipped', count(*) filter (where x.status = 'skipped'),
                'total', count(*),
                'avg_processing_time_ms', round(avg(extract(epoch from x.completed_at - x.started_at) * 1000)
                    filter (where x.status = 'completed'))::bigint,
                'avg_progress_pct', round(avg(x.progress_pct) filter (where x.completed_at is null), 1)),
            coalesce(max(x.n) > %s, false)
        from %s $q$, case when everything then 200000 else 50000 end, source) into counts, capped;
end
$$;

-- http_stats: GET /jobs/stats as one call; parameters of http_context and http_counts.
create or replace function jobqueue.http_stats(_role text, _tenants text, _filter jsonb, out counts text, out capped boolean)
language plpgsql
as $$
begin
    perform jobqueue.http_context(_role, _tenants, true);
    select c.counts::text, c.capped into counts, capped from jobqueue.http_counts(_filter) c;
end
$$;
