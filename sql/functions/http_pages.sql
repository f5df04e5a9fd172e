-- Pages of jobs for the HTTP API, newest first. No index has the order of all tenants together, so a page is merged from its tenants: the
-- newest n of all can only be among the tenants whose own newest are the n newest. Each is read along an index and left after n entries.
--
-- What no index answers (a queue, a job_type, a mixture) is looked for among the newest jobs, and no further than look_back() of them: a page
-- may then have fewer jobs than there are, or none, and says where to look on. Ways and measurements: docs/decisions/0015-lists.md.

-- look_back: how many jobs a page looks at for what no index leads to, of all tenants together.
create or replace function jobqueue.look_back()
returns int
language sql immutable parallel safe
as $$
    select 100000
$$;

-- has_own_index: whether the owner of this database has made an index of this name on jobs (docs/guide/finding-jobs.md), and it is complete.
create or replace function jobqueue.has_own_index(_name text)
returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select exists (select from pg_index i where i.indexrelid = to_regclass('jobqueue.' || quote_ident(_name)) and i.indisvalid)
$$;

-- http_way: which index leads to the jobs of a filter.
--   along, names  a column and its values: each tenant is read once per value, along the index that has both; null: along job_list
--   within     what the index answers, as SQL on a job j
--   beyond     what is left to look at in each job, as SQL on a job j; "": nothing
-- Subjects come first, for nothing is rarer. What has failed has an error_class (a CHECK), what is cancelled, skipped or paused has a
-- status_reason (guard.sql). Index: job_subject, job_error, job_aside, job_creator, job_list; the owner's job_by_queue, job_by_type.
create or replace function jobqueue.http_way(_filter jsonb, out along text, out names text[], out within text, out beyond text)
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    f jsonb := (select coalesce(jsonb_object_agg(e.key, e.value), '{}') from jsonb_each(_filter) e where e.value <> 'null' and e.key <> 'tenant');
    statuses text[] := case when f ? 'status' then http_names(f -> 'status', 'status') end;
begin
    within := http_conditions((select coalesce(jsonb_object_agg(e.key, e.value), '{}') from jsonb_each(f) e
        where e.key in ('created_after', 'created_before')));
    along := case
        when f ? 'subject' then 'subject'
        when f ? 'error_class' then 'error_class'
        when f ? 'error_code' or statuses <@ '{failed}' then 'error_class'
        when statuses <@ '{cancelled, skipped, paused}' then null
        when f ? 'created_by' then 'created_by'
        when f ? 'queue' and has_own_index('job_by_queue') then 'queue'
        when f ? 'job_type' and has_own_index('job_by_type') then 'job_type' end;
    if f ? along then
        names := array(select distinct n from unnest(http_names(f -> along, along)) n);
        -- so many ways would take longer than looking
        if cardinality(names) > 100 then
            along := null;
        end if;
    elsif along = 'error_class' then
        names := '{transient, permanent, quota, invalid, lost}';
    elsif statuses <@ '{cancelled, skipped, paused}' then
        within := within || ' and j.status_reason is not null';
    end if;
    if along is null then
        names := '{""}';
    end if;
    beyond := http_conditions(f - array['created_after', 'created_before', coalesce(along, '')]);
end
$$;

-- http_source: the newest jobs of a tenant along the way, as SQL; s has the tenant and, if the way has a column, its value.
create or replace function jobqueue.http_source(_along text, _within text)
returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select format('select * from jobqueue.job j where j.tenant = s.tenant%s%s order by j.created_at desc, j.id desc',
        case when _along is not null then format(' and j.%I = s.name', _along) end, _within)
$$;

-- http_found: a page of the jobs that a filter means, newest first.
--   _after_at, _after_id  the last job of the page before; null: from the newest on
--   _most, _skip          how many, and how many before them are left out
-- With more true: no job of the page but the one at which looking ended; the next page goes on behind it. It is the last row.
-- Index: as of http_way; job_pkey for ids.
create or replace function jobqueue.http_found(_filter jsonb, _after_at timestamptz, _after_id uuid, _most int, _skip int)
returns table (id uuid, created_at timestamptz, more boolean)
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set enable_sort = off set jit = off
as $$
declare
    way record;
    after text := case when _after_at is null then '' else format(' and (j.created_at, j.id) < (%L::timestamptz, %L::uuid)', _after_at, _after_id) end;
    candidates uuid[];
    tenants text[];
    source text;
    bound text := 'null';
    few boolean;
begin
    select w.* into way from jobqueue.http_way(_filter) w;
    if way.along is null then
        candidates := jobqueue.http_candidates(_filter -> 'status');
    end if;
    if candidates is not null or coalesce(_filter -> 'ids', 'null') <> 'null' then
        return query execute format('select j.id, j.created_at, false from jobqueue.job j where ($1 is null or j.id = any ($1)) %s
            order by j.created_at desc, j.id desc limit %s offset %s', jobqueue.http_conditions(_filter) || after, _most, _skip) using candidates;
        return;
    end if;
    tenants := array(select t.tenant from jobqueue.http_tenants(_filter -> 'tenant') t (tenant));
    source := jobqueue.http_source(way.along, way.within || after);
    few := cardinality(tenants) * cardinality(way.names) <= 10;
    if way.beyond <> '' then
        bound := greatest(jobqueue.look_back() / greatest(cardinality(tenants) * cardinality(way.names), 1), 200)::text;
    end if;
    return query execute format($q$
        with source as materialized (
            select row_number() over () as n, t.tenant, b.name from unnest($1) t (tenant) cross join unnest($2) b (name)),
        head as materialized (%6$s),
        page as materialized (
            select s.n, p.created_at, p.id
            from (select * from head order by head.created_at desc, head.id desc limit %7$s) s
            cross join lateral (
                select j.created_at, j.id from (%1$s limit %2$s) j where true %3$s order by j.created_at desc, j.id desc limit %4$s) p),
        -- of the sources that were left with jobs not looked at and no full page: where that was, the newest of them
        rim as materialized (
            select r.created_at, r.id
            from source s
            cross join lateral (%1$s limit 1 offset %2$s - 1) r
            where %2$s > 0 and case when exists (select from page p where p.n = s.n) then (select count(*) < %4$s from page p where p.n = s.n)
                else %8$s or not exists (select from head h where h.n = s.n) end
            order by r.created_at desc, r.id desc
            limit 1),
        found as materialized (
            select p.id, p.created_at
            from page p
            where not exists (select from rim r where (r.created_at, r.id) > (p.created_at, p.id))
            order by p.created_at desc, p.id desc
            limit %4$s - %5$s offset %5$s)
        select f.id, f.created_at, false from found f
        union all
        select r.id, r.created_at, true from rim r where (select count(*) from found) < %4$s - %5$s $q$,
        source, bound, way.beyond, _most + _skip, _skip,
        -- few are all read; of many, those whose newest are the newest
        case when few then 'select s.*, null::timestamptz as created_at, null::uuid as id from source s' else format('select s.*, h.created_at, h.id
            from source s
            cross join lateral (select j.created_at, j.id from (%s limit %s) j where true %s order by j.created_at desc, j.id desc limit 1) h',
            source, bound, way.beyond) end,
        case when few then 'null' else (_most + _skip)::text end, few::text)
    using tenants, way.names;
end
$$;

-- http_total: how many jobs a filter means, counted no further than one more than _most.
--   open  whether there may be more than that, for not all that could be were looked at
-- Index: as of http_way; job_pkey for ids.
create or replace function jobqueue.http_total(_filter jsonb, _most int, out total bigint, out open boolean)
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set enable_sort = off set jit = off
as $$
declare
    way record;
    candidates uuid[];
begin
    select w.* into way from jobqueue.http_way(_filter) w;
    if way.along is null then
        candidates := jobqueue.http_candidates(_filter -> 'status');
    end if;
    if candidates is not null or coalesce(_filter -> 'ids', 'null') <> 'null' then
        execute format('select count(*) from jobqueue.job j where ($1 is null or j.id = any ($1)) %s', jobqueue.http_conditions(_filter))
        into total using candidates;
        open := total > _most;
    else
        -- the one that is beyond the bound counts as found: it says that there are more
        execute format($q$
            select count(*) filter (where x.n <= %2$s), coalesce(max(x.n) > %2$s, false)
            from (
                select j.n
                from (
                    select j.*, row_number() over () as n
                    from unnest($1) t (tenant)
                    cross join unnest($2) b (name)
                    cross join lateral (select t.tenant, b.name) s
                    cross join lateral (%1$s) j
                    limit %2$s + 1) j
                where j.n > %2$s or (true %3$s)
                limit %4$s) x $q$,
            jobqueue.http_source(way.along, way.within), case when way.beyond = '' then _most + 1 else jobqueue.look_back() end, way.beyond, _most + 1)
        into total, open
        using array(select t.tenant from jobqueue.http_tenants(_filter -> 'tenant') t (tenant)), way.names;
        open := open or total > _most;
    end if;
end
$$;

-- http_jobs: GET /jobs as one call.
--   _filter            as of http_conditions
--   _after_at, _after_id, _most, _skip   as of http_found
--   _fields            the keys wanted; null: all
-- Returns the jobs and, if the list goes on, one more row without a body: the job that begins the next page or, if looking ended before the
-- page was full, the one at which it did. At least one row: total is in each (at most 10,001, which means more; open: at least so many), and
-- id is null if the page is empty.
create or replace function jobqueue.http_jobs(
    _role text, _tenants text, _filter jsonb, _after_at timestamptz, _after_id uuid, _most int, _skip int, _fields text[])
returns table (total bigint, id uuid, created_at timestamptz, body text, open boolean)
language plpgsql
as $$
#variable_conflict use_column
declare
    counted record;
begin
    perform jobqueue.http_context(_role, _tenants, true);
    select t.* into counted from jobqueue.http_total(_filter, 10000) t;
    return query
        select counted.total, f.id, f.created_at,
            case when f.n <= _most and not f.more then jobqueue.http_job_body(f.id, _fields, array['brief'], false) end, counted.open
        from (select) one
        left join (
            select x.id, x.created_at, x.more, row_number() over (order by x.more, x.created_at desc, x.id desc) as n
            from jobqueue.http_found(_filter, _after_at, _after_id, _most + 1, _skip) x) f on true
        order by f.n;
end
$$;
