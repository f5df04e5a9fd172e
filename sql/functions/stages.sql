-- Stages: the parts that a job goes through, with a history row each.

-- stage: a stage of the job begins or ends.
--   status  pending, in_progress, completed, failed, skipped
--   detail  of (how many stages there are), weight (share in the overall percentage, 1 unless told), error, metadata, output
-- The overall percentage follows from the weights of the stages. Errors: JQ400, JQ404, JQ409 LEASE_LOST.
create or replace function jobqueue.stage(id uuid, token uuid, stage text, status text, detail jsonb default null)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    j jobqueue.job := lock_claim(stage.id, stage.token);
    d jsonb := coalesce(nullif(stage.detail, 'null'), '{}');
    was jobqueue.stage;
    share double precision;
begin
    if nullif(stage.stage, '') is null or length(stage.stage) > 200 then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'stage must be a name of 1 to 200 characters.');
    elsif stage.status is null or stage.status not in ('pending', 'in_progress', 'completed', 'failed', 'skipped') then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('There is no stage status "%s".', left(stage.status, 100)),
            'Stages are pending, in_progress, completed, failed or skipped.');
    end if;
    perform refuse_unknown_option(d, array['of', 'weight', 'error', 'metadata', 'output'], 'stage');
    if coalesce(jsonb_typeof(d -> 'metadata'), 'null') not in ('object', 'null') then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'metadata must be a JSON object.', '', '{"option": "metadata"}');
    end if;
    perform refuse_large(d -> 'metadata', 'metadata', 1048576);
    perform refuse_large(d -> 'output', 'checkpoint', 8388608);
    share := to_weight(d -> 'weight', 'weight');
    select * into was from stage x where x.job_id = j.id and x.name = stage.stage;
    insert into stage as s (job_id, name, tenant, position, status, weight, attempt, started_at, completed_at, error, metadata, output)
    values (j.id, stage.stage, j.tenant, (select count(*) + 1 from stage x where x.job_id = j.id), stage.status, coalesce(share, 1),
        j.attempt, case when stage.status <> 'pending' then now() end,
        case when stage.status in ('completed', 'failed', 'skipped') then now() end,
        clean_text(d ->> 'error', 2000), nullif(d -> 'metadata', 'null'), d -> 'output')
    on conflict (job_id, name) do update set
        status = excluded.status,
        weight = coalesce(share, s.weight),
        attempt = j.attempt,
        started_at = case excluded.status when 'pending' then null when 'in_progress' then now() else coalesce(s.started_at, now()) end,
        completed_at = excluded.completed_at,
        error = case when excluded.status = 'failed' then coalesce(excluded.error, s.error) else excluded.error end,
        metadata = case when excluded.metadata is null then s.metadata else coalesce(s.metadata, '{}') || excluded.metadata end,
        output = coalesce(excluded.output, s.output);
    if stage.status = 'in_progress' then
        perform note_stage(j, stage.stage, null);
    elsif stage.status = 'completed' and was.status = 'in_progress' then
        perform note_stage(j, stage.stage, extract(epoch from now() - was.started_at)::double precision);
    end if;
    perform store_stage(j, stage.stage, stage.status, coalesce(to_int(d -> 'of', 'of', 1, 1000), j.total_stages));
    perform publish_changes(array[j.id]);
    return j.requested_action;
end
$$;

-- store_stage: what a change of a stage means for its job: the counts, the percentage, the estimate of the end.
--   _known  how many stages the job has, as far as that was said or declared; without it no percentage follows from them
create or replace function jobqueue.store_stage(_job jobqueue.job, _stage text, _status text, _known int)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job := _job;
    total int;
    weights double precision;
    behind double precision;
begin
    select count(*), count(*) filter (where s.status in ('completed', 'skipped')),
        sum(s.weight), coalesce(sum(s.weight) filter (where s.status in ('completed', 'skipped')), 0)
    into total, j.completed_stages, weights, behind
    from stage s where s.job_id = j.id;
    if _status = 'in_progress' then
        j.current_stage := _stage;
        j.substage := null;
    end if;
    if _known is not null then
        j.total_stages := greatest(total, _known);
        j.progress_pct := greatest(j.progress_pct, least(99, floor(100 * behind / (weights + greatest(0, _known - total)))::int));
    end if;
    j.estimated_completion := next_estimate(j);
    update job x
    set life_at = now(),
        updated_at = now(),
        version = x.version + 1,
        current_stage = j.current_stage,
        substage = j.substage,
        total_stages = j.total_stages,
        completed_stages = j.completed_stages,
        progress_pct = j.progress_pct,
        estimated_completion = j.estimated_completion
    where x.id = j.id;
end
$$;

-- stage_output: what a stage of a claimed job kept in an earlier attempt; null if nothing.
create or replace function jobqueue.stage_output(id uuid, token uuid, stage text)
returns jsonb
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select s.output
    from job j
    join stage s on s.job_id = j.id and s.name = stage_output.stage
    where j.id = stage_output.id and j.claim_token = stage_output.token and j.status = 'processing'
$$;

-- remove_stage_history: delete the stages of jobs that ended longer ago than the setting stage_history says (30 days; null: as long as the
-- job is kept), in portions of _max from _from on. The jobs themselves stay as long as their queue keeps them.
-- Returns how many rows went, and where to go on; null when all were looked at. Index: stage_pkey, job_pkey.
create or replace function jobqueue.remove_stage_history(_from uuid, _max int, out removed int, out next_from uuid)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    kept interval := to_interval(setting_of('stage_history', '"30 days"'), 'stage_history');
    ids uuid[];
    seen int;
begin
    removed := 0;
    if kept is null then
        return;
    end if;
    select array_agg(distinct x.job_id), count(*), max(x.job_id::text)::uuid into ids, seen, next_from
    from (select s.job_id from stage s where s.job_id > coalesce(_from, '00000000-0000-0000-0000-000000000000')
        order by s.job_id limit _max) x;
    ids := array(
        select j.id from job j
        where j.id = any (ids) and j.status in ('completed', 'failed', 'cancelled', 'skipped') and j.completed_at < now() - kept);
    delete from stage s where s.job_id = any (ids);
    get diagnostics removed = row_count;
    if seen < _max then
        next_from := null;
    end if;
end
$$;
