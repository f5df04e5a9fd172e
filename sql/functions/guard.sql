-- The guard: no client, a superuser's hand included, can make a change of status that is not in this table.
--   blocked    -> pending, cancelled, failed
--   pending    -> processing, paused, cancelled, failed
--   processing -> completed, failed, cancelled, paused, pending
--   paused     -> pending, cancelled
--   failed     -> pending, blocked, skipped
--   cancelled  -> pending, blocked
--   completed and skipped are final.
-- Inserts are not guarded (a trigger's WHEN is parsed for every statement: a third of the price of a single send); they have to be
-- consistent, and only the owner of the table can make them by hand, for example when a dump is restored.
create or replace function jobqueue.can_become(_from text, _to text)
returns boolean
language sql immutable parallel safe
as $$
    select case _from
        when 'pending' then _to in ('processing', 'paused', 'cancelled', 'failed')
        when 'processing' then _to in ('completed', 'failed', 'cancelled', 'paused', 'pending')
        when 'blocked' then _to in ('pending', 'cancelled', 'failed')
        when 'paused' then _to in ('pending', 'cancelled')
        when 'failed' then _to in ('pending', 'blocked', 'skipped')
        when 'cancelled' then _to in ('pending', 'blocked')
        else false
    end
$$;

-- statuses_after: where a status may lead, in alphabetical order.
create or replace function jobqueue.statuses_after(_from text)
returns text[]
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(array_agg(s order by s), '{}')
    from unnest(array['blocked', 'pending', 'processing', 'paused', 'completed', 'failed', 'cancelled', 'skipped']) s
    where jobqueue.can_become(_from, s)
$$;

-- refuse_change: JQ409 for a change of status that is not allowed.
create or replace function jobqueue.refuse_change(_id uuid, _from text, _to text, _allowed text[])
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform jobqueue.refuse('JQ409', 'INVALID_TRANSITION',
        format('A job cannot go from %s to %s; allowed: %s.', _from, _to,
            coalesce(nullif(array_to_string(_allowed, ', '), ''), 'nothing, ' || _from || ' is final')),
        'Use the functions of the schema jobqueue: select * from jobqueue.actions(id) lists what is possible.',
        jsonb_build_object('status', _from, 'to', _to, 'allowed', to_jsonb(_allowed), 'id', _id));
end
$$;

-- refuse_deletion: the trigger's voice when a job is deleted that has not ended.
create or replace function jobqueue.refuse_deletion()
returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform jobqueue.refuse_change(old.id, old.status, 'deleted', array['deleted once ended']);
    return null;
end
$$;

-- count_transition: refuse a change of status, or note it for the counters of monitoring (totals.sql). What is taken or completed by hand
-- gets the note that claim_queue and settle would have written: with claim_batch the job is also rescued when its lease ends.
create or replace function jobqueue.count_transition()
returns trigger
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if not can_become(old.status, new.status) then
        perform refuse_change(new.id, old.status, new.status, statuses_after(old.status));
    elsif new.status = 'processing' then
        insert into claim_batch (worker_id, check_at, job_ids) values (new.worker_id, new.lease_until, array[new.id]);
    elsif new.status = 'completed' then
        insert into statistics_note (queue, job_type, completed, waits, runs)
        values (new.queue, nullif(new.job_type, new.queue), 1,
            array[date_part('epoch', old.started_at - greatest(old.run_at, old.created_at))::real],
            array[date_part('epoch', new.completed_at - old.started_at)::real]);
    else
        insert into statistics_note (queue, job_type, from_status, to_status)
        values (new.queue, nullif(new.job_type, new.queue), old.status, new.status);
        -- lists find by it what is paused, cancelled or skipped (the index job_aside)
        if new.status in ('paused', 'cancelled', 'skipped') and new.status_reason is null then
            update job j set status_reason = 'changed by hand' where j.id = new.id;
        end if;
    end if;
    return null;
end
$$;

-- refuse_inconsistent: the last word of the CHECK on a row that is not consistent: JQ409 if its change of status is not allowed
-- anyway (the CHECK comes before the trigger), otherwise false.
create or replace function jobqueue.refuse_inconsistent(_id uuid, _status text)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    was text := coalesce((select j.status from jobqueue.job j where j.id = _id), 'none');
    allowed text[] := case was when 'none' then array['blocked', 'pending'] else jobqueue.statuses_after(was) end;
begin
    if was <> _status and _status <> all (allowed) then
        perform jobqueue.refuse_change(_id, was, _status, allowed);
    end if;
    return false;
end
$$;

-- Claims, completions and releases of children are not noted one by one: claim_queue, settle and release_children, which can be told by
-- their search_path, note theirs once per call. So a job's life calls no trigger function. The WHEN calls nothing but current_setting: it
-- is parsed for every statement, and a function to be inlined costs more than all of it (docs/decisions/0012-transitions.md).
create or replace trigger job_guard
    after update of status on jobqueue.job
    for each row
    when (old.status <> new.status
        and (case new.status
                when 'completed' then old.status <> 'processing'
                when 'processing' then old.status <> 'pending'
                when 'pending' then old.status <> 'blocked'
                else true end
            or current_setting('search_path') <> 'pg_catalog, jobqueue, jobqueue, pg_temp'))
    execute function jobqueue.count_transition();

create or replace trigger job_guard_delete
    before delete on jobqueue.job
    for each row
    when (old.status not in ('completed', 'failed', 'cancelled', 'skipped'))
    execute function jobqueue.refuse_deletion();

-- remove_children: what hung on deleted jobs goes with them, whoever deleted them.
create or replace function jobqueue.remove_children()
returns trigger
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    ids uuid[];
    statuses text[];
begin
    -- the failed head of a key in strict order gives its key back
    insert into admission_note (queue_number, seq, stage, line, slots)
    select q.number, next_ready(), 1, policy_key(gone.tenant, gone.singleton_key), 1
    from gone join queue q on q.name = gone.queue
    where gone.status = 'failed' and gone.settle_flags & 8 <> 0;
    delete from attempt c using gone where c.job_id = gone.id and gone.attempt > 0;
    -- expired before it ever ran, and perhaps retried since
    delete from attempt c using gone where c.job_id = gone.id and gone.attempt = 0 and gone.error_class is not null;
    delete from stage c using gone where c.job_id = gone.id and (gone.total_stages is not null or gone.current_stage is not null);
    delete from checkpoint c using gone where c.job_id = gone.id and gone.attempt > 0;
    delete from done_key c using gone where c.job_id = gone.id and gone.attempt > 0;
    select array_agg(gone.id), array_agg(gone.status) into ids, statuses from gone where gone.settle_flags & 514 <> 0;
    if ids is not null then
        perform leave_flows(ids, statuses);
    end if;
    -- a batch goes on counting them
    select array_agg(gone.batch_id), array_agg(gone.status) into ids, statuses from gone where gone.batch_id is not null;
    if ids is not null then
        perform leave_batches(ids, statuses);
    end if;
    return null;
end
$$;

create or replace trigger job_children_go
    after delete on jobqueue.job
    referencing old table as gone
    for each statement
    execute function jobqueue.remove_children();

-- remove_all_children: after truncate of the jobs by their owner nothing is left of any: no claims, flows or batches, and no slot of a limit
-- is taken. Rates go on counting the starts of jobs that are gone.
create or replace function jobqueue.remove_all_children()
returns trigger
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    delete from attempt;
    delete from stage;
    delete from checkpoint;
    delete from done_key;
    delete from claim_batch;
    delete from edge;
    delete from flow_member;
    delete from flow;
    delete from batch_note;
    delete from batch;
    delete from pace;
    perform readmit_queue(q) from queue q where q.limited;
    return null;
end
$$;

create or replace trigger job_children_go_all
    after truncate on jobqueue.job
    for each statement
    execute function jobqueue.remove_all_children();
