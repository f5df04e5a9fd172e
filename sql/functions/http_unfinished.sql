-- The unfinished jobs, newest first: what the dashboard opens with. Found from their end, so that ten million finished ones do not matter.

-- unfinished_ids: the ids among which all unfinished jobs are; every tenant's, the policies decide later. Null if they may be more than
-- _most. What is ready, waits for its time or for a limit, runs or waits for others stands in an index or a table of its own; what is
-- paused does not, but nobody pauses a job without a line in the audit.
-- Index: job_claim, job_waiting, claim_batch, admission_line_pkey, edge_of_parent, audit_pauses.
create or replace function jobqueue.unfinished_ids(_most int default 20000)
returns uuid[]
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set jit = off
as $$
declare
    ids uuid[];
begin
    select array_agg(x.id) into ids
    from (
        (select j.id from job j where j.ready_seq is not null limit _most + 1)
        union all
        (select j.id from job j where j.wait_until is not null limit _most + 1)
        union all
        (select l.job_id from admission_line l limit _most + 1)
        union all
        (select i from claim_batch b, unnest(b.job_ids) i limit _most + 1)
        union all
        (select e.child_id from edge e limit _most + 1)
        union all
        (select a.job_id from audit a where a.action = 'pause' and a.job_id is not null order by a.id desc limit _most + 1)
        limit _most + 1) x;
    return case when coalesce(cardinality(ids), 0) <= _most then coalesce(ids, '{}') end;
end
$$;

-- http_unfinished: the unfinished jobs that a filter means, as http_jobs answers; parameters as there. A status in the filter must be one of
-- the unfinished.
-- Index: job_pkey; as http_jobs if they are too many.
create or replace function jobqueue.http_unfinished(
    _role text, _tenants text, _filter jsonb, _after_at timestamptz, _after_id uuid, _most int, _fields text[])
returns table (total bigint, id uuid, created_at timestamptz, body text, open boolean)
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    ids uuid[] := jobqueue.unfinished_ids();
begin
    perform jobqueue.http_context(_role, _tenants, true);
    if ids is null then
        return query
            select j.total, j.id, j.created_at, j.body, j.open
            from jobqueue.http_jobs(_role, _tenants, '{"status": ["blocked", "pending", "processing", "paused"]}' || _filter, _after_at,
                _after_id, _most, 0, _fields) j;
        return;
    end if;
    return query execute format($q$
        with found as materialized (
            select j.id, j.created_at
            from jobqueue.job j
            where j.id = any ($1) and j.status in ('blocked', 'pending', 'processing', 'paused') %s)
        select (select count(*) from found), p.id, p.created_at,
            case when p.n <= $4 then jobqueue.http_job_body(p.id, $5, array['brief'], false) end, false
        from (select) one
        left join (
            select f.id, f.created_at, row_number() over (order by f.created_at desc, f.id desc) as n
            from found f
            where $2 is null or (f.created_at, f.id) < ($2, $3)
            order by f.created_at desc, f.id desc
            limit $4 + 1) p on true
        order by p.n $q$, jobqueue.http_conditions(_filter)) using ids, _after_at, _after_id, _most, _fields;
end
$$;
