-- What a handler says while it runs. Each of these is a sign of life (see timeout), names the claim token, and answers with what is
-- asked of the job: cancel, pause or null. Stages: stages.sql; estimates: estimates.sql.

-- store_progress: progress of a claim. The sign of life is always written; version hears of it only if something changed that a poller can
-- see, and so does the estimate of the end, if the counts did. Listeners are told by the caller, once for all of its jobs.
-- Returns changed, same, or null if the claim is lost. Errors: JQ400, JQ413.
create or replace function jobqueue.store_progress(_id uuid, _token uuid, _pct int, _message text, _data jsonb)
returns text
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job;
    n jobqueue.job;
    done bigint := to_bigint(_data -> 'done', 'done');
    total bigint := to_bigint(_data -> 'total', 'total');
    ends timestamptz := to_time(_data -> 'estimated_completion', 'estimated_completion');
    rest jsonb := nullif(_data - array['done', 'total', 'substage', 'estimated_completion'], '{}');
begin
    select * into j from job x where x.id = _id and x.claim_token = _token and x.status = 'processing' for update;
    if not found then
        return null;
    end if;
    n := j;
    n.progress_message := coalesce(clean_text(_message, 2000), j.progress_message);
    n.progress_done := coalesce(done, j.progress_done);
    n.progress_total := coalesce(total, j.progress_total);
    -- least and greatest pass over null
    n.progress_pct := case
        when _pct is not null then least(greatest(_pct, 0), 100)
        when done is not null or total is not null then counted_pct(n)
        else j.progress_pct end;
    if _data ? 'substage' then
        n.substage := clean_text(_data ->> 'substage', 500);
    end if;
    if rest is not null then
        n.metadata := coalesce(j.metadata, '{}') || rest;
        if n.metadata is distinct from j.metadata then
            perform refuse_large(n.metadata, 'metadata', 1048576);
        end if;
    end if;
    if _data ? 'estimated_completion' then
        n.estimated_completion := ends;
    elsif (n.progress_done, n.progress_total, n.progress_pct) is distinct from (j.progress_done, j.progress_total, j.progress_pct)
        -- the first report of a job that waits for its history
        or j.estimated_completion is null
    then
        n.estimated_completion := counted_estimate(j, n);
    end if;
    if n is not distinct from j then
        update job x set life_at = now() where x.id = _id;
        return 'same';
    end if;
    update job x
    set life_at = now(),
        version = x.version + 1,
        updated_at = now(),
        progress_pct = n.progress_pct,
        progress_message = n.progress_message,
        progress_done = n.progress_done,
        progress_total = n.progress_total,
        substage = n.substage,
        estimated_completion = n.estimated_completion,
        metadata = n.metadata
    where x.id = _id;
    return 'changed';
end
$$;

-- counted_pct: the percentage that follows from done and total. While a stage runs of a job whose number of stages is known, it is that
-- stage's share in the whole, by weight. It falls neither within stages nor below what an earlier attempt has shown.
create or replace function jobqueue.counted_pct(_job jobqueue.job)
returns int
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    fraction double precision;
    here double precision;
    behind double precision;
    weights double precision;
    pct int;
begin
    if _job.progress_done is null or coalesce(_job.progress_total, 0) = 0 then
        return _job.progress_pct;
    end if;
    if _job.total_stages is not null and _job.current_stage is not null then
        select max(s.weight) filter (where s.name = _job.current_stage and s.status = 'in_progress'),
            coalesce(sum(s.weight) filter (where s.status in ('completed', 'skipped')), 0),
            sum(s.weight) + greatest(0, _job.total_stages - count(*))
        into here, behind, weights
        from stage s
        where s.job_id = _job.id;
    end if;
    if here is null then
        pct := least(100, floor(100 * _job.progress_done::numeric / _job.progress_total));
        return case when _job.attempt > 1 then greatest(_job.progress_pct, pct) else pct end;
    end if;
    fraction := least(1, _job.progress_done::double precision / _job.progress_total);
    return greatest(_job.progress_pct, least(99, floor(100 * (behind + here * fraction) / weights)::int));
end
$$;

-- counted_estimate: when a job is expected to end, after a report that changed it from _before to _now.
create or replace function jobqueue.counted_estimate(_before jobqueue.job, _now jobqueue.job)
returns timestamptz
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if _now.progress_done is not null and _now.progress_total is not null then
        perform begin_count(_now, coalesce(_now.current_stage, ''), _now.progress_done, _before.progress_done);
    elsif _now.current_stage is null and _now.progress_pct > 0 then
        perform begin_count(_now, '', _now.progress_pct, _before.progress_pct);
    end if;
    return next_estimate(_now);
end
$$;

-- progress: how far the job is.
--   pct      0 to 100 (clamped); null: follows from done and total if they are given, within a stage by the stage's weight
--   message  for people, at most 2,000 characters
--   data     an object; done, total and substage fill columns, the rest is merged into metadata (at most 1 MB)
-- Returns cancel, pause or null. Errors: JQ400, JQ404, JQ409 LEASE_LOST, JQ413.
create or replace function jobqueue.progress(id uuid, token uuid, pct int default null, message text default null, data jsonb default null)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    stored text;
begin
    if coalesce(jsonb_typeof(progress.data), 'object') not in ('object', 'null') then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'data must be a JSON object.', 'Give something like {"done": 5, "total": 17}.');
    end if;
    stored := store_progress(progress.id, progress.token, progress.pct, progress.message, nullif(progress.data, 'null'));
    if stored is null then
        perform refuse_lost(progress.id);
    elsif stored = 'changed' then
        perform publish_changes(array[progress.id]);
    end if;
    return (select j.requested_action from job j where j.id = progress.id);
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

-- reject_checkpoint: the last checkpoint of a claimed job is damaged or missing (see last_checkpoint): begin afresh. Drops what the job
-- kept (checkpoint, done keys, outputs of stages), as a restart does, and says so in the audit, in metadata and in the message.
--   why  what is wrong with it, for people
-- Returns the name of the checkpoint's stage, or null. Errors: JQ400, JQ404, JQ409 LEASE_LOST.
create or replace function jobqueue.reject_checkpoint(id uuid, token uuid, why text)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    j jobqueue.job := lock_claim(reject_checkpoint.id, reject_checkpoint.token);
    c jobqueue.checkpoint;
    reason text := rtrim(clean_text(btrim(reject_checkpoint.why), 500), '.');
begin
    perform check_reason(reason);
    select * into c from checkpoint x where x.id = j.checkpoint_id;
    perform forget_progress(j.id);
    update job x
    set checkpoint_id = null,
        progress_pct = 0,
        progress_done = null,
        current_stage = null,
        substage = null,
        completed_stages = case when x.total_stages is not null then 0 end,
        estimated_completion = null,
        progress_message = format('The checkpoint%s cannot be used: %s. Starting afresh.', ' "' || c.stage || '"', reason),
        metadata = coalesce(x.metadata, '{}') || jsonb_build_object('checkpoint_rejected', jsonb_build_object('stage', c.stage,
            'reference', c.reference, 'reason', reason, 'attempt', x.attempt, 'at', now())),
        life_at = now(),
        updated_at = now(),
        version = x.version + 1
    where x.id = j.id;
    perform note_action('reject_checkpoint', j.id, j.tenant, c.stage, j.status, j.status, reason || '; the job starts afresh',
        jsonb_build_object('attempt', j.attempt, 'reference', c.reference, 'hash', c.hash));
    perform publish_changes(array[j.id]);
    return c.stage;
end
$$;

-- forget_progress: what a job kept for its next attempt goes: done keys, outputs of stages, inline data of checkpoints.
create or replace function jobqueue.forget_progress(_id uuid)
returns void
language sql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    delete from done_key d where d.job_id = _id;
    update stage s set status = 'pending', started_at = null, completed_at = null, error = null, output = null where s.job_id = _id;
    update checkpoint c set data = null where c.job_id = _id and c.data is not null;
    delete from pace p where p.job_id = _id;
$$;
