-- What a handler says while it runs. Each of these is a sign of life (see timeout), names the claim token, and answers with what is
-- asked of the job: cancel, pause or null.

-- store_progress: progress of a claim; false if the claim is lost. The sign of life is always written; version and listeners hear of it only
-- if something changed that a poller can see. Errors: JQ400, JQ413.
create or replace function jobqueue.store_progress(_id uuid, _token uuid, _pct int, _message text, _data jsonb)
returns boolean
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    done bigint := to_bigint(_data -> 'done', 'done');
    total bigint := to_bigint(_data -> 'total', 'total');
    ends timestamptz := to_time(_data -> 'estimated_completion', 'estimated_completion');
    rest jsonb := nullif(_data - array['done', 'total', 'substage', 'estimated_completion'], '{}');
    -- least and greatest pass over null
    pct int := case when _pct is not null then least(greatest(_pct, 0), 100) end;
    message text := clean_text(_message, 2000);
    changed boolean;
begin
    update job j
    set life_at = now(),
        version = j.version + n.differs::int,
        updated_at = case when n.differs then now() else j.updated_at end,
        progress_pct = n.pct_now,
        progress_message = n.message_now,
        progress_done = n.done_now,
        progress_total = n.total_now,
        substage = n.substage_now,
        estimated_completion = n.ends_now,
        metadata = n.metadata_now
    from (
        select k.id, x.*,
            (x.pct_now, x.message_now, x.done_now, x.total_now, x.substage_now, x.ends_now, x.metadata_now) is distinct from
            (k.progress_pct::int, k.progress_message, k.progress_done, k.progress_total, k.substage, k.estimated_completion, k.metadata)
                as differs
        from job k
        cross join lateral (
            select coalesce(pct, k.progress_pct) as pct_now,
                coalesce(message, k.progress_message) as message_now,
                coalesce(done, k.progress_done) as done_now,
                coalesce(total, k.progress_total) as total_now,
                case when _data ? 'substage' then clean_text(_data ->> 'substage', 500) else k.substage end as substage_now,
                case when _data ? 'estimated_completion' then ends else k.estimated_completion end as ends_now,
                case when rest is null then k.metadata else coalesce(k.metadata, '{}') || rest end as metadata_now) x
        where k.id = _id and k.claim_token = _token and k.status = 'processing'
        for update of k) n
    where j.id = _id and n.id = j.id
    returning n.differs into changed;
    if not found then
        return false;
    end if;
    if rest is not null and changed then
        perform refuse_large((select j.metadata from job j where j.id = _id), 'metadata', 1048576);
    end if;
    if changed then
        perform publish_changes(array[_id]);
    end if;
    return true;
end
$$;

-- progress: how far the job is.
--   pct      0 to 100 (clamped), null: unchanged
--   message  for people, at most 2,000 characters
--   data     an object; done, total and substage fill columns, the rest is merged into metadata (at most 1 MB)
-- Returns cancel, pause or null. Errors: JQ400, JQ404, JQ409 LEASE_LOST, JQ413.
create or replace function jobqueue.progress(id uuid, token uuid, pct int default null, message text default null, data jsonb default null)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if coalesce(jsonb_typeof(progress.data), 'object') not in ('object', 'null') then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'data must be a JSON object.', 'Give something like {"done": 5, "total": 17}.');
    end if;
    if not store_progress(progress.id, progress.token, progress.pct, progress.message, nullif(progress.data, 'null')) then
        perform refuse_lost(progress.id);
    end if;
    return (select j.requested_action from job j where j.id = progress.id);
end
$$;

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
    update job x
    set life_at = now(),
        updated_at = now(),
        version = x.version + 1,
        current_stage = case when stage.status = 'in_progress' then stage.stage else x.current_stage end,
        substage = case when stage.status = 'in_progress' then null else x.substage end,
        -- known only if it was said or declared; without it no percentage follows from stages
        total_stages = case when t.known is not null then greatest(t.total, t.known) end,
        completed_stages = t.done,
        progress_pct = case when t.known is null then x.progress_pct else
            greatest(x.progress_pct, least(99, floor(100 * t.done_weight / (t.weight + greatest(0, t.known - t.total)))::int)) end
    from (select count(*)::int as total, count(*) filter (where s.status in ('completed', 'skipped'))::int as done,
            coalesce(to_int(d -> 'of', 'of', 1, 1000), j.total_stages) as known,
            sum(s.weight) as weight, coalesce(sum(s.weight) filter (where s.status in ('completed', 'skipped')), 0) as done_weight
        from stage s where s.job_id = j.id) t
    where x.id = j.id;
    perform publish_changes(array[j.id]);
    return j.requested_action;
end
$$;

-- checkpoint: remember how far the job is, so that the next attempt goes on from here.
--   stage       what is behind us
--   data        inline state, at most 8 MB; reference: where the state lies instead (a path)
--   hash        SHA-256 in hex: required with a reference, computed for data
--   pause_safe  the job may be paused here
-- Returns pause or cancel if that was asked (pause only at a pause-safe checkpoint), else null. Errors: JQ400, JQ404, JQ409, JQ413.
create or replace function jobqueue.checkpoint(
    id uuid, token uuid, stage text, data jsonb default null, reference text default null, hash text default null,
    pause_safe boolean default true)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    j jobqueue.job := lock_claim(checkpoint.id, checkpoint.token);
    digest text := lower(checkpoint.hash);
    stored bigint;
begin
    if nullif(checkpoint.stage, '') is null or length(checkpoint.stage) > 200 then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'stage must be a name of 1 to 200 characters.');
    elsif checkpoint.reference is not null and checkpoint.data is not null then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'data and reference exclude each other.', 'Keep the state inline, or say where it lies.');
    elsif checkpoint.reference is not null and digest is null then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'A reference needs the SHA-256 of what it refers to.', 'Give hash as 64 hex digits.');
    elsif digest is not null and digest !~ '^[0-9a-f]{64}$' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'hash must be a SHA-256 of 64 hex digits.');
    end if;
    perform refuse_large(checkpoint.data, 'checkpoint', 8388608);
    if checkpoint.data is not null then
        digest := encode(sha256(convert_to(checkpoint.data::text, 'UTF8')), 'hex');
    end if;
    insert into checkpoint (job_id, tenant, attempt, stage, data, reference, hash, pause_safe)
    values (j.id, j.tenant, j.attempt, checkpoint.stage, checkpoint.data, checkpoint.reference, digest, coalesce(checkpoint.pause_safe, true))
    returning checkpoint.id into stored;
    -- the history of checkpoints stays, the state of older ones goes: one row never grows without bound
    update checkpoint c set data = null where c.job_id = j.id and c.id < stored and c.data is not null;
    update job x
    set life_at = now(), updated_at = now(), version = x.version + 1, checkpoint_id = stored
    where x.id = j.id;
    perform publish_changes(array[j.id]);
    return case when j.requested_action = 'pause' and not coalesce(checkpoint.pause_safe, true) then null else j.requested_action end;
end
$$;

-- mark_done: remember that parts of the job are done; a part is named by a key. Returns how many keys are new.
create or replace function jobqueue.mark_done(id uuid, token uuid, keys text[])
returns int
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    j jobqueue.job := lock_claim(mark_done.id, mark_done.token);
    n int;
begin
    if mark_done.keys is null or exists (select from unnest(mark_done.keys) k where k is null or k = '' or length(k) > 1000) then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'keys must be strings of 1 to 1,000 characters.');
    end if;
    insert into done_key (job_id, tenant, key) select j.id, j.tenant, k from unnest(mark_done.keys) k
    on conflict do nothing;
    get diagnostics n = row_count;
    update job x set life_at = now() where x.id = j.id;
    return n;
end
$$;

-- done_keys: the parts of a job that are done. Errors: JQ404.
create or replace function jobqueue.done_keys(id uuid)
returns setof text
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
begin
    if not exists (select from job j where j.id = done_keys.id and sees_tenant(j.tenant)) then
        perform refuse_job(done_keys.id);
    end if;
    return query select d.key from done_key d where d.job_id = done_keys.id order by d.key;
end
$$;

-- last_checkpoint: where a claimed job goes on, and whether inline data still have the hash that was computed for them.
create or replace function jobqueue.last_checkpoint(id uuid, token uuid)
returns table (stage text, data jsonb, reference text, hash text, pause_safe boolean, created_at timestamptz, intact boolean)
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
begin
    return query
        select c.stage, c.data, c.reference, c.hash, c.pause_safe, c.created_at,
            case when c.reference is null and c.data is not null
                then c.hash = encode(sha256(convert_to(c.data::text, 'UTF8')), 'hex') else true end
        from job j
        join checkpoint c on c.id = j.checkpoint_id
        where j.id = last_checkpoint.id and j.claim_token = last_checkpoint.token and j.status = 'processing';
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
