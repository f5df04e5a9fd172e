-- The inbox of failures: failed jobs of the last 7 days, grouped by what went wrong, for the dashboard.

-- http_message_shape: an error message without what differs from job to job: numbers, ids and quoted words become #. The first line only,
-- and of it the first 300 characters.
create or replace function jobqueue.http_message_shape(_message text)
returns text
language sql immutable parallel safe
-- without a fixed search_path, so that it becomes a part of the query that calls it for 10,000 jobs
as $$
    select pg_catalog.regexp_replace(pg_catalog.left(pg_catalog.split_part(_message, E'\n', 1), 300),
        '"[^"]*"|''[^'']*''|\m[0-9a-fA-F]{8}-[0-9a-fA-F-]{27}\M|\m0x[0-9a-fA-F]+|\m[0-9a-fA-F]{16,}\M|[0-9]+', '#', 'g')
$$;

-- http_fingerprint: failures with the same one are the same failure: the code, and the shape of the message. 12 hex digits.
create or replace function jobqueue.http_fingerprint(_code text, _message text)
returns text
language sql immutable parallel safe
as $$
    select pg_catalog.left(pg_catalog.md5(coalesce(_code, '') || E'\n' || coalesce(jobqueue.http_message_shape(_message), '')), 12)
$$;

-- http_failed: the newest failed jobs of the last 7 days that the caller may see.
--   _queue   of one queue only; null: of all
--   _tenant  of one tenant only; null: of all that the caller sees
--   _most    how many are looked at: shared among the queues that have any, but at least 200 of each, so that one broken queue does not
--            hide the others. Another tenant's count, too: what is read is bounded, whoever asks
-- capped: its queue had more than were looked at. Index: job_failed, read from its newest end.
create or replace function jobqueue.http_failed(_queue text, _tenant text, _most int)
returns table (
    id uuid, queue text, tenant text, job_type text, error_class text, fingerprint text, error_code text, error_message text,
    failed_at timestamptz, capped boolean)
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    with broken as materialized (
        select q.name, greatest(_most / (count(*) over ())::int, 200) as share
        from queue q
        where (_queue is null or q.name = _queue)
            and exists (select from job j where j.queue = q.name and j.failed_at > now() - interval '7 days')),
    found as (
        select f.*, count(*) over (partition by b.name) >= b.share as capped
        from broken b
        cross join lateral (
            select j.id, j.queue, j.tenant, j.job_type, j.error_class, j.error_code, j.error_message, j.failed_at
            from job j
            where j.queue = b.name and j.failed_at > now() - interval '7 days'
            order by j.failed_at desc
            limit b.share) f)
    select f.id, f.queue, f.tenant, f.job_type, f.error_class, http_fingerprint(f.error_code, f.error_message), f.error_code,
        f.error_message, f.failed_at, f.capped
    from found f
    where (f.tenant = any ((select visible_tenants())::text[]) or (select sees_all_tenants()))
        and (_tenant is null or f.tenant = _tenant)
$$;

-- http_failures: the inbox as one call.
--   _filter  queue, tenant, job_type, error_class; null means not given
--   _most    failed jobs that are looked at (http_failed); _groups: groups at most, those seen last first
-- Returns {"groups": [{"job_type", "error_class", "fingerprint", "error_code", "sample", "sample_id", "queues", "hour", "day", "week",
-- "first_at", "last_at", "tenants"}], "capped"} as JSON text; hour, day and week count its jobs of that time.
create or replace function jobqueue.http_failures(_role text, _tenants text, _filter jsonb, _most int, _groups int)
returns text
language plpgsql
as $$
begin
    perform jobqueue.http_context(_role, _tenants, true);
    return (
        with failed as materialized (
            select f.*
            from jobqueue.http_failed(_filter ->> 'queue', _filter ->> 'tenant', _most) f
            where (_filter ->> 'job_type' is null or f.job_type = _filter ->> 'job_type')
                and (_filter ->> 'error_class' is null or f.error_class = _filter ->> 'error_class')),
        grouped as (
            select f.job_type, f.error_class, f.fingerprint, count(*) filter (where f.failed_at > now() - interval '1 hour') as hour,
                count(*) filter (where f.failed_at > now() - interval '1 day') as day, count(*) as week,
                min(f.failed_at) as first_at, max(f.failed_at) as last_at, count(distinct f.tenant) as tenants,
                (array_agg(f.id order by f.failed_at desc))[1] as sample_id, array_agg(distinct f.queue) as queues
            from failed f
            group by 1, 2, 3
            order by last_at desc, f.job_type, f.fingerprint
            limit _groups)
        select jsonb_build_object(
            'groups', coalesce(jsonb_agg(to_jsonb(g) || jsonb_build_object('error_code', s.error_code, 'sample', left(s.error_message, 500))
                order by g.last_at desc, g.job_type, g.fingerprint), '[]'),
            'capped', (select coalesce(bool_or(f.capped), false) from failed f))::text
        from grouped g
        join failed s on s.id = g.sample_id);
end
$$;

-- http_failure_bulk: retry or skip every job of a group, as one call.
--   _body  {"job_type", "error_class", "fingerprint", "queue"?, "tenant"?, "action", "reason", "dry_run", "expected_count"}
--   _most  as of http_failures
-- Returns the operation as JSON text (http_bulk_row). Errors: those of http_bulk.
create or replace function jobqueue.http_failure_bulk(_role text, _tenants text, _actor text, _body jsonb, _most int)
returns text
language plpgsql
as $$
declare
    group_ids uuid[];
begin
    perform jobqueue.http_context(_role, _tenants, false);
    perform jobqueue.http_actor(_actor);
    group_ids := array(
        select f.id
        from jobqueue.http_failed(_body ->> 'queue', _body ->> 'tenant', _most) f
        where f.job_type = _body ->> 'job_type' and f.error_class = _body ->> 'error_class' and f.fingerprint = _body ->> 'fingerprint'
        order by f.id);
    return jobqueue.http_bulk_start(_body || jsonb_build_object('filter', jsonb_strip_nulls(jsonb_build_object(
            'status', 'failed', 'queue', _body -> 'queue', 'tenant', _body -> 'tenant', 'job_type', _body -> 'job_type',
            'error_class', _body -> 'error_class', 'fingerprint', _body -> 'fingerprint'))),
        group_ids, jobqueue.http_bulk_tenant(_body ->> 'tenant'));
end
$$;
