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
-- Kept free of table access and SET clauses, so that the planner inlines it into the trigger's WHEN: 3 us per job instead of 10.
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

-- refuse_transition: the trigger's voice.
create or replace function jobqueue.refuse_transition()
returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    from_status text := case when tg_op = 'INSERT' then 'none' else old.status end;
    to_status text := case when tg_op = 'DELETE' then 'deleted' else new.status end;
    allowed text[] := case tg_op
        when 'INSERT' then array['blocked', 'pending']
        when 'DELETE' then array['deleted once ended']
        else jobqueue.statuses_after(old.status) end;
begin
    perform jobqueue.refuse('JQ409', 'INVALID_TRANSITION',
        format('A job cannot go from %s to %s; allowed: %s.', from_status, to_status,
            coalesce(nullif(array_to_string(allowed, ', '), ''), 'nothing, ' || from_status || ' is final')),
        'Use the functions of the schema jobqueue: select * from jobqueue.actions(id) lists what is possible.',
        jsonb_build_object('status', from_status, 'to', to_status, 'allowed', to_jsonb(allowed),
            'id', case when tg_op = 'DELETE' then old.id else new.id end));
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
        perform jobqueue.refuse('JQ409', 'INVALID_TRANSITION',
            format('A job cannot go from %s to %s; allowed: %s.', was, _status,
                coalesce(nullif(array_to_string(allowed, ', '), ''), 'nothing, ' || was || ' is final')),
            'Use the functions of the schema jobqueue: select * from jobqueue.actions(id) lists what is possible.',
            jsonb_build_object('status', was, 'to', _status, 'allowed', to_jsonb(allowed), 'id', _id));
    end if;
    return false;
end
$$;

create or replace trigger job_guard
    after update of status on jobqueue.job
    for each row
    when (old.status is distinct from new.status and not jobqueue.can_become(old.status, new.status))
    execute function jobqueue.refuse_transition();

create or replace trigger job_guard_delete
    before delete on jobqueue.job
    for each row
    when (old.status not in ('completed', 'failed', 'cancelled', 'skipped'))
    execute function jobqueue.refuse_transition();

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
