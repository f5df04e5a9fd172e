-- What lists of jobs for the HTTP API are made of (pages of them: http_pages.sql), the active jobs, and the counts.

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

-- http_counts: how many jobs there are by status, and how long the completed ones took, as JSON. Looked at are the newest 100,000, for those
-- who see all by their ids (which lie together); of several tenants each has its share of them, at least 1,000. capped: there may be more.
create or replace function jobqueue.http_counts(_filter jsonb, out counts jsonb, out capped boolean)
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set enable_sort = off set jit = off
as $$
declare
    way record;
    tenants text[];
    most int := 100000;
    newest text;
begin
    select w.* into way from jobqueue.http_way(_filter) w;
    if way.along is null and jobqueue.sees_all_tenants() and coalesce(_filter -> 'tenant', 'null') = 'null' then
        newest := format('(select j.*, row_number() over () as n from (
            select * from jobqueue.job j where true %s order by j.id desc limit %s) j)', way.within, most + 1);
    else
        tenants := array(select t.tenant from jobqueue.http_tenants(_filter -> 'tenant') t (tenant));
        most := greatest(most / greatest(cardinality(tenants) * cardinality(way.names), 1), 1000);
        newest := format('unnest($1) t (tenant) cross join unnest($2) b (name) cross join lateral (select t.tenant, b.name) s cross join lateral (
            select j.*, row_number() over () as n from (%s limit %s) j)', jobqueue.http_source(way.along, way.within), most + 1);
    end if;
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
                'total', count(x.status),
                'avg_processing_time_ms', round(avg(extract(epoch from x.completed_at - x.started_at) * 1000)
                    filter (where x.status = 'completed'))::bigint,
                'avg_progress_pct', round(avg(x.progress_pct) filter (where x.status is not null and x.completed_at is null), 1)),
            coalesce(max(x.n) > %1$s, false)
        from (
            select case when j.n <= %1$s %3$s then j.status end as status, j.started_at, j.completed_at, j.progress_pct, j.n
            from %2$s) x $q$, most, newest || ' j', way.beyond)
    into counts, capped using tenants, way.names;
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
