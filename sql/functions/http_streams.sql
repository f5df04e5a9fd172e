-- What streams show (server-sent events). One statement reads for all streams of a process; who may see what is decided when a stream
-- begins, and by the tenant in the rows here.

-- http_snapshots: many jobs as they are now, whoever they belong to, as events show them. Deleted ones are missing.
create or replace function jobqueue.http_snapshots(_role text, _ids uuid[])
returns table (id uuid, version bigint, status text, alive boolean, body text)
language plpgsql
as $$
#variable_conflict use_column
begin
    perform jobqueue.http_context(_role, '*', true);
    return query
        select v.id, v.version, v.status, v.alive, jobqueue.http_job_body(v.id, null, array['brief'], false)
        from jobqueue.jobs v
        where v.id = any (_ids);
end
$$;

-- http_signals: the few words about a changed job that a tenant's stream has, as JSON text, and whose job it is.
create or replace function jobqueue.http_signals(_role text, _ids uuid[])
returns table (id uuid, tenant text, signal text)
language plpgsql
as $$
#variable_conflict use_column
begin
    perform jobqueue.http_context(_role, '*', true);
    return query
        select j.id, j.tenant::text, json_build_object('id', j.id, 'version', j.version, 'status', j.status, 'job_type', j.job_type,
            'subject', j.subject, 'current_stage', j.current_stage, 'progress_pct', j.progress_pct,
            'estimated_completion', j.estimated_completion)::text
        from jobqueue.job j
        where j.id = any (_ids);
end
$$;

-- http_summary: how all is going, as JSON text: the counts of GET /jobs/stats, the mean progress of what is unfinished, and per stage how
-- many jobs have done it and are in it: of the newest 5,000 jobs of each tenant those that are unfinished or ended in the last hour.
create or replace function jobqueue.http_summary(_role text, _tenants text)
returns text
language plpgsql
as $$
declare
    counts jsonb;
    by_stage jsonb;
begin
    perform jobqueue.http_context(_role, _tenants, true);
    select c.counts || jsonb_build_object('capped', c.capped) into counts from jobqueue.http_counts('{}') c;
    select coalesce(jsonb_object_agg(x.name, jsonb_build_object('done', x.done, 'active', x.active)), '{}') into by_stage
    from (
        select s.name, count(*) filter (where s.status in ('completed', 'skipped')) as done,
            count(*) filter (where s.status = 'in_progress') as active
        from jobqueue.http_tenants(null) t (tenant)
        cross join lateral (
            select j.id, j.completed_at, j.total_stages, j.current_stage from jobqueue.job j where j.tenant = t.tenant
            order by j.created_at desc limit 5000) j
        join jobqueue.stage s on s.job_id = j.id
        where (j.completed_at is null or j.completed_at > now() - interval '1 hour')
            and (j.total_stages is not null or j.current_stage is not null)
        group by s.name) x;
    return (counts || jsonb_build_object('stages', by_stage))::text;
end
$$;
