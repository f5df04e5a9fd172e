-- Batches: jobs that are counted together, and a job that is sent when all of them have ended, or when the first has failed.
--
-- Nothing is counted when a job ends: the members are counted when somebody asks (index job_batch). That the last one has ended is noticed
-- by its witness: one member that has not ended carries a flag (settle_flags 4), and only its end looks at the batch, ends it or appoints
-- another witness. Whoever appoints a witness holds its row and writes it, so that the transaction that ends it later sees the flag.
-- Nobody waits for anybody here: rows that others hold are passed over, and a note (batch_note) lets maintenance look again within
-- seconds. The choice and its alternatives: docs/decisions/0005-flows.md.

-- batch_options: what create_batch knows.
create or replace function jobqueue.batch_options()
returns text[]
language sql immutable parallel safe
as $$
    select array['name', 'metadata', 'tenant', 'callback', 'callback_on']
$$;

-- create_batch: a batch that jobs are then sent into, with the option batch of send. It ends when it was closed and all its jobs have ended.
--   options  name, metadata (an object), tenant (default); callback {"queue", "payload", "options"}: a job that is sent once, its metadata
--            has batch_id and batch_name; callback_on: ended (default), first_failure (a member ends as failed) or either (what comes first)
-- Returns its id. Errors: JQ400, JQ403, JQ404 no such queue, JQ413.
create or replace function jobqueue.create_batch(options jsonb default '{}')
returns uuid
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    o jsonb := coalesce(create_batch.options, '{}');
    b jobqueue.batch;
begin
    perform refuse_unknown_option(o, batch_options(), 'a batch');
    b.id := new_id();
    b.tenant := coalesce(to_text(o -> 'tenant', 'tenant', 200), 'default');
    perform check_tenant(b.tenant);
    b.name := to_text(o -> 'name', 'name', 200);
    b.metadata := nullif(o -> 'metadata', 'null');
    if jsonb_typeof(b.metadata) <> 'object' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'metadata must be a JSON object.', '', '{"option": "metadata"}');
    end if;
    perform refuse_large(b.metadata, 'metadata', 1048576);
    b.callback_on := coalesce(to_text(o -> 'callback_on', 'callback_on', 100), 'ended');
    if b.callback_on not in ('ended', 'first_failure', 'either') then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('callback_on cannot be "%s".', b.callback_on),
            'It is ended, first_failure or either.', '{"option": "callback_on"}');
    end if;
    b.callback := nullif(o -> 'callback', 'null');
    if b.callback is not null then
        perform check_callback(b.callback, b.tenant);
    end if;
    insert into batch (id, tenant, name, metadata, callback, callback_on)
    values (b.id, b.tenant, b.name, b.metadata, b.callback, b.callback_on);
    return b.id;
end
$$;

-- check_callback: what send would refuse is refused when the batch is made, not when it ends. Errors: those of send.
create or replace function jobqueue.check_callback(_callback jsonb, _tenant text)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    chosen jsonb := coalesce(nullif(_callback -> 'options', 'null'), '{}');
begin
    perform refuse_unknown_option(_callback, array['queue', 'payload', 'options'], 'a callback');
    perform refuse_unknown_option(chosen, array(select x from unnest(job_options()) x where x not in ('id', 'tenant', 'batch')), 'a callback');
    perform new_job(queue_for_send(to_text(coalesce(nullif(_callback -> 'queue', 'null'), '""'), 'callback.queue', 200)),
        _callback -> 'payload', chosen || jsonb_build_object('tenant', _tenant));
    perform edge_list(chosen -> 'depends_on', chosen -> 'on_failure');
end
$$;

-- batch_for_send: the batch that a new job goes into, held open until the sender's transaction ends.
-- Errors: JQ404 unknown or another tenant's, JQ409 it is closed.
create or replace function jobqueue.batch_for_send(_batch jsonb, _tenant text)
returns uuid
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    b jobqueue.batch;
begin
    if _batch is null or _batch = 'null' then
        return null;
    elsif not coalesce(jsonb_typeof(_batch) = 'string' and is_uuid(_batch #>> '{}'), false) then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('batch is not a uuid: %s.', left(_batch::text, 100)),
            'Give what create_batch returned.', '{"option": "batch"}');
    end if;
    select * into b from batch x where x.id = (_batch #>> '{}')::uuid and x.tenant = _tenant for key share;
    if not found then
        perform refuse_batch((_batch #>> '{}')::uuid);
    elsif b.closed_at is not null then
        perform refuse('JQ409', 'CONFLICT', format('The batch %s is closed.', b.id), 'Send into it before close_batch, or make another.',
            jsonb_build_object('batch', b.id));
    end if;
    return b.id;
end
$$;

-- refuse_batch: JQ404 for a batch that does not exist or that the caller may not see.
create or replace function jobqueue.refuse_batch(_id uuid)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    perform refuse('JQ404', 'BATCH_NOT_FOUND', format('There is no batch %s.', coalesce(_id::text, 'without an id')),
        'It may have been deleted after its time of keeping, or it belongs to another tenant.', jsonb_build_object('batch', _id));
end
$$;

-- close_batch: no more jobs come; the batch ends when those that it has have ended, at once if it has none left.
-- Waits for open transactions that have sent into it. Returns whether it was open. Errors: JQ404.
create or replace function jobqueue.close_batch(id uuid)
returns boolean
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    b jobqueue.batch;
begin
    select * into b from batch x where x.id = close_batch.id for update;
    if not found or not sees_tenant(b.tenant) then
        perform refuse_batch(close_batch.id);
    elsif b.closed_at is not null then
        return false;
    end if;
    update batch x set closed_at = now() where x.id = b.id;
    perform look_at_batch(b.id);
    return true;
end
$$;

-- look_at_batch: end a closed batch of which nothing is left to end, or appoint a witness.
create or replace function jobqueue.look_at_batch(_id uuid)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    b jobqueue.batch;
    witness uuid;
begin
    select * into b from batch x where x.id = _id for no key update skip locked;
    if not found then
        insert into batch_note (batch_id) values (_id);
        return;
    elsif b.closed_at is null then
        return;
    elsif b.ended_at is null then
        -- the youngest: as a rule it ends last, so that this happens once or twice in the life of a batch
        update job j
        set settle_flags = j.settle_flags | 4
        where j.id = (
            select k.id from job k
            where k.batch_id = _id and k.status in ('blocked', 'pending', 'processing', 'paused')
            order by k.id desc
            limit 1
            for no key update skip locked)
        returning j.id into witness;
        if witness is not null then
            update batch x set witness_id = witness where x.id = _id;
            return;
        elsif exists (select from job k where k.batch_id = _id and k.status in ('blocked', 'pending', 'processing', 'paused')) then
            -- all that are left are in the hands of others, who may be ending them just now
            insert into batch_note (batch_id) values (_id);
            return;
        end if;
        update batch x set ended_at = now(), witness_id = null where x.id = _id;
    end if;
    if b.callback_on in ('ended', 'either') then
        perform send_callback(_id);
    end if;
end
$$;

-- note_failure: a member has ended as failed; the first one counts.
create or replace function jobqueue.note_failure(_id uuid)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    b jobqueue.batch;
begin
    select * into b from batch x where x.id = _id;
    if not found or b.first_failed_at is not null and (b.callback_at is not null or b.callback is null or b.callback_on = 'ended') then
        return;
    end if;
    select * into b from batch x where x.id = _id for no key update skip locked;
    if not found then
        insert into batch_note (batch_id, failed) values (_id, true);
        return;
    end if;
    update batch x set first_failed_at = now() where x.id = _id and x.first_failed_at is null;
    if b.callback_on in ('first_failure', 'either') then
        perform send_callback(_id);
    end if;
end
$$;

-- send_callback: send the callback of a locked batch, unless it was sent. An end must always be stored: what send refuses is noted on the
-- batch and tried again by maintenance.
create or replace function jobqueue.send_callback(_id uuid)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    b jobqueue.batch;
    q jobqueue.queue;
    chosen jsonb;
    sent record;
begin
    select * into b from batch x where x.id = _id;
    if b.callback is null or b.callback_at is not null then
        return;
    end if;
    chosen := coalesce(nullif(b.callback -> 'options', 'null'), '{}');
    begin
        q := queue_for_send(b.callback ->> 'queue');
        select s.id, s.created, s.reason, s.due into sent
        from send_one(q, b.callback -> 'payload', chosen || jsonb_build_object('tenant', b.tenant,
            'metadata', coalesce(nullif(chosen -> 'metadata', 'null'), '{}') || jsonb_build_object('batch_id', b.id, 'batch_name', b.name))) s;
        -- another job in its place (a singleton key, a policy) is what was asked for
        update batch x
        set callback_at = now(), callback_job_id = sent.id, callback_error = case when not sent.created then 'not sent: ' || sent.reason end
        where x.id = _id;
        if sent.created and sent.due < now() + interval '5 s' then
            perform wake(q.name, q.number);
        end if;
    exception when others then
        update batch x set callback_error = left(sqlerrm, 2000) where x.id = _id;
        insert into batch_note (batch_id, failed) values (_id, b.callback_on = 'first_failure' or b.ended_at is null);
    end;
end
$$;

-- tend_batches: maintenance: what was left to it by a note, and closed batches whose witness is gone. Returns how many were looked at.
create or replace function jobqueue.tend_batches(_max int)
returns int
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    note record;
    n int := 0;
begin
    for note in
        with taken as (
            delete from batch_note t
            where t.id in (select x.id from batch_note x order by x.id limit _max for update skip locked)
            returning t.batch_id, t.failed)
        select distinct t.batch_id, t.failed from taken t
        where exists (select from batch b where b.id = t.batch_id)
        union
        select l.id, false
        from (select b.id from batch b
            where b.closed_at is not null and b.ended_at is null
                and not exists (select from job j
                    where j.id = b.witness_id and j.settle_flags & 4 <> 0 and j.status in ('blocked', 'pending', 'processing', 'paused'))
            limit _max) l
        order by 1
    loop
        if note.failed then
            perform note_failure(note.batch_id);
        else
            perform look_at_batch(note.batch_id);
        end if;
        n := n + 1;
    end loop;
    return n;
end
$$;

-- leave_batches: members are being deleted; their batches go on counting them.
create or replace function jobqueue.leave_batches(_batches uuid[], _statuses text[])
returns void
language sql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    with counts as materialized (
        select x.id, count(*) filter (where x.status = 'completed') as completed, count(*) filter (where x.status = 'failed') as failed,
            count(*) filter (where x.status = 'cancelled') as cancelled, count(*) filter (where x.status = 'skipped') as skipped
        from unnest(_batches, _statuses) x (id, status)
        group by x.id
        order by x.id)
    update batch b
    set gone_completed = b.gone_completed + c.completed, gone_failed = b.gone_failed + c.failed,
        gone_cancelled = b.gone_cancelled + c.cancelled, gone_skipped = b.gone_skipped + c.skipped
    from counts c
    where b.id = c.id
$$;

-- remove_old_batches: batches that nobody needs any more: without members for 30 days since they ended, or were made and forgotten.
-- Returns how many went.
create or replace function jobqueue.remove_old_batches()
returns int
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    n int;
begin
    delete from batch b
    where coalesce(b.ended_at, b.created_at) < now() - interval '30 days' and not exists (select from job j where j.batch_id = b.id);
    get diagnostics n = row_count;
    return n;
end
$$;

-- batch_status: how far a batch is: its jobs per status, those deleted since among them.
--   pct    ended of total, rounded down; null without jobs
--   state  open (jobs may still come), closed (it ends with its last job) or ended
-- Errors: JQ404. Index: job_batch.
create or replace function jobqueue.batch_status(id uuid)
returns table (
    batch_id uuid, name text, tenant text, state text, total bigint, ended bigint, pct int, blocked bigint, pending bigint, processing bigint,
    paused bigint, completed bigint, failed bigint, cancelled bigint, skipped bigint, metadata jsonb, callback_on text, callback_job_id uuid,
    callback_error text, created_at timestamptz, closed_at timestamptz, first_failed_at timestamptz, ended_at timestamptz)
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    b jobqueue.batch;
begin
    select * into b from batch x where x.id = batch_status.id;
    if not found or not sees_tenant(b.tenant) then
        perform refuse_batch(batch_status.id);
    end if;
    return query
        with c as (
            select count(*) filter (where j.status = 'blocked') as blocked, count(*) filter (where j.status = 'pending') as pending,
                count(*) filter (where j.status = 'processing') as processing, count(*) filter (where j.status = 'paused') as paused,
                count(*) filter (where j.status = 'completed') + b.gone_completed as completed,
                count(*) filter (where j.status = 'failed') + b.gone_failed as failed,
                count(*) filter (where j.status = 'cancelled') + b.gone_cancelled as cancelled,
                count(*) filter (where j.status = 'skipped') + b.gone_skipped as skipped
            from job j
            where j.batch_id = b.id),
        s as (
            select c.*, c.completed + c.failed + c.cancelled + c.skipped as ended,
                c.blocked + c.pending + c.processing + c.paused + c.completed + c.failed + c.cancelled + c.skipped as total
            from c)
        select b.id, b.name, b.tenant::text, case when b.ended_at is not null then 'ended' when b.closed_at is not null then 'closed' else 'open' end,
            s.total, s.ended, (100 * s.ended / nullif(s.total, 0))::int, s.blocked, s.pending, s.processing, s.paused, s.completed, s.failed,
            s.cancelled, s.skipped, b.metadata, b.callback_on, b.callback_job_id, b.callback_error, b.created_at, b.closed_at, b.first_failed_at,
            b.ended_at
        from s;
end
$$;
