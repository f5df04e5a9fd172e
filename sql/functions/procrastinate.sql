-- What a procrastinate application asks of the queue (jobqueue.procrastinate, the connector). Its words and ours:
--   todo = pending, paused, blocked   doing = processing   succeeded = completed   failed = failed   cancelled = cancelled before it ran,
--   skipped   aborted = cancelled while it ran   lock = singleton_key in a queue with key_concurrency 1   args = payload
--   attempts = attempts that have ended: retry_count, and one more once the job has ended by running
-- Its queueing_lock is held (held_key) by a job that waits, until its task really starts: a job that was claimed ahead still counts as waiting.

-- procrastinate_queue: the queue of a name. A new one has no time-out (tasks may be silent for as long as they like); one in which locks
-- are used admits one job per lock. Remembers which queues are procrastinate's, for workers that serve all of them.
-- Errors: JQ400 bad name, JQ404 unknown and not to be created.
create or replace function jobqueue.procrastinate_queue(_name text, _locks boolean)
returns jobqueue.queue
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    q jobqueue.queue;
begin
    select * into q from queue where name = _name;
    if not found then
        q := queue_for_send(_name);
        update queue set timeout = null where name = _name returning * into q;
    end if;
    if not setting_of('procrastinate_queues', '[]') ? _name then
        insert into setting as s (name, value) values ('procrastinate_queues', jsonb_build_array(_name))
        on conflict (name) do update set value = s.value || to_jsonb(_name) where not s.value ? _name;
    end if;
    if _locks and q.key_concurrency is null then
        update queue set key_concurrency = 1 where name = _name returning * into q;
    end if;
    return q;
end
$$;

-- procrastinate_adopt_queue: the same, for programs.
create or replace function jobqueue.procrastinate_adopt_queue(_name text, _locks boolean)
returns void
language sql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select from procrastinate_queue(_name, _locks)
$$;

-- procrastinate_queues: the queues of procrastinate's jobs. Jobs of other queues are none of its workers' business.
create or replace function jobqueue.procrastinate_queues()
returns setof text
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select q.name from queue q where setting_of('procrastinate_queues', '[]') ? q.name order by q.name
$$;

-- procrastinate_holder: the job that holds a key, in whichever of procrastinate's queues. Waits for whoever takes the same key at this
-- moment, to the end of its transaction, so that one of two always sees the other. Index: job_held_key.
create or replace function jobqueue.procrastinate_holder(_key text)
returns uuid
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
begin
    perform pg_advisory_xact_lock(27260, hashtext(_key));
    return (
        select j.id from queue q join job j on j.queue = q.name and j.held_key = _key
        where setting_of('procrastinate_queues', '[]') ? q.name limit 1);
end
$$;

-- procrastinate_defer: add jobs, all or none.
--   _jobs  [{"queue", "task", "priority", "lock", "queueing_lock", "args", "at"}]; at: RFC 3339 or null; imported ones also have "id" and
--          "attempts": an id that exists is passed over; "options": {"trace_context"}, see with_trace_context; others are not looked at
-- Returns the ids, in order. Errors: JQ400, JQ403, JQ404, JQ413, JQ409 ALREADY_ENQUEUED with the queueing_lock that another waiting job holds.
create or replace function jobqueue.procrastinate_defer(_jobs jsonb)
returns setof uuid
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    wanted record;
    ids uuid[];
    limited uuid[];
    queues text[];
begin
    perform check_tenant('default');
    for wanted in
        select e ->> 'queue' as queue, bool_or(e ->> 'lock' is not null) as locks
        from jsonb_array_elements(_jobs) e group by 1 order by 1
    loop
        perform procrastinate_queue(wanted.queue, wanted.locks);
    end loop;
    for wanted in
        select e ->> 'queueing_lock' as name, count(*) as n
        from jsonb_array_elements(_jobs) e where e ->> 'queueing_lock' is not null group by 1 order by 1
    loop
        if wanted.n > 1 or procrastinate_holder('queueing:' || wanted.name) is not null then
            perform refuse('JQ409', 'ALREADY_ENQUEUED', format('A job with the queueing_lock "%s" is waiting already.', wanted.name),
                'Leave it at that, or defer the job without this queueing_lock.', jsonb_build_object('queueing_lock', wanted.name));
        end if;
    end loop;
    with given as materialized (
        select coalesce((e ->> 'id')::uuid, new_id()) as id, i, e ->> 'queue' as queue, e ->> 'task' as task, e ->> 'lock' as lock,
            coalesce((e ->> 'priority')::int, 0) as priority, e ->> 'queueing_lock' as queueing_lock, e -> 'args' as args,
            (e ->> 'at')::timestamptz as at, coalesce((e ->> 'attempts')::int, 0) as attempts,
            case when e ? 'options' then trace_option(e -> 'options') end as trace,
            case when (e ->> 'at')::timestamptz > now() then null else next_ready() end as seq
        from jsonb_array_elements(_jobs) with ordinality x (e, i)),
    stored as (
        insert into job (id, queue, job_type, priority, payload, display_name, pausable, singleton_key, run_at, wait_until, ready_seq,
            held_key, hold_mask, options, settle_flags, expires_at, retry_count, max_retries)
        select g.id, g.queue, g.task, g.priority, g.args, clean_text(render_label(t.label, g.args, null), 300), coalesce(t.pausable, false),
            g.lock, coalesce(g.at, now()), case when g.seq is null then g.at end, g.seq,
            'queueing:' || g.queueing_lock, case when g.queueing_lock is not null then 15 end,
            case when g.trace is null then procrastinate_options(t.options, g.queueing_lock)
                else coalesce(procrastinate_options(t.options, g.queueing_lock), '{}') || g.trace end,
            procrastinate_flags(q, g.lock), greatest(g.at, now()) + q.expires_in,
            g.attempts, g.attempts + coalesce((t.options ->> 'max_retries')::int, nullif(q.max_retries, 0))
        from given g
        join queue q on q.name = g.queue
        left join job_type t on t.name = g.task and t.applies
        where not exists (select from job o where o.id = g.id) and not is_too_large(g.args, 'payload', 8388608)
        returning id, settle_flags, queue, ready_seq)
    select array_agg(g.id order by g.i), array_agg(s.id) filter (where s.settle_flags & 256 <> 0),
        array_agg(distinct s.queue) filter (where s.ready_seq is not null)
    into ids, limited, queues
    from given g left join stored s on s.id = g.id;
    perform refuse_large(e -> 'args', 'payload', 8388608) from jsonb_array_elements(_jobs) e;
    if limited is not null then
        perform join_line(limited);
    end if;
    perform wake_many(queues);
    return query select unnest(ids);
end
$$;

-- procrastinate_options: the options that stay with a job: those of its job_type, and the queueing_lock.
create or replace function jobqueue.procrastinate_options(_options jsonb, _queueing_lock text)
returns jsonb
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select nullif(coalesce(case when _options <> '{}' then kept_options(_options) end, '{}')
        || case when _queueing_lock is null then '{}'
            else jsonb_build_object('queueing_lock', _queueing_lock, 'hold', 'queueing:' || _queueing_lock) end, '{}')
$$;

-- procrastinate_flags: settle_flags of a new job: what its queue keeps for no time, and whether it waits to be admitted.
create or replace function jobqueue.procrastinate_flags(_queue jobqueue.queue, _lock text)
returns int
language sql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select case when _queue.keep_completed = interval '0' then 1 else 0 end | case when _queue.keep_ended = interval '0' then 16 else 0 end
        | case when _lock is not null or _queue.limited and (_queue.concurrency is not null or _queue.rate_limit is not null
            or _queue.ageing is not null or _queue.fair_by is not null or _queue.policy <> 'standard') then 256 else 0 end
$$;

-- procrastinate_tick: whether a tick of a periodic task is new; it is noted. The row in schedule holds the last tick; it has no next one,
-- unless a native worker has taken the schedule over: then that sends the jobs, and no tick is new.
--   _name  of the schedule; _tick  epoch seconds
create or replace function jobqueue.procrastinate_tick(_name text, _queue text, _task text, _tick bigint)
returns boolean
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    never text := E'DTSTART:20000101T000000Z\nRRULE:FREQ=DAILY;COUNT=1';
begin
    insert into schedule as s (name, queue, expression, spec, options, last_at)
    values (_name, _queue, never, schedule_spec(never, 'UTC', now()), jsonb_build_object('job_type', _task), to_timestamp(_tick))
    on conflict (name) do update set last_at = excluded.last_at, updated_at = now()
    where s.next_at is null and s.paused_at is null and (s.last_at is null or s.last_at < excluded.last_at);
    return found;
end
$$;

-- procrastinate_defer_periodic: defer the job of a tick, once. Returns its id; null if the tick is not new. Errors: of procrastinate_defer.
create or replace function jobqueue.procrastinate_defer_periodic(_name text, _tick bigint, _job jsonb)
returns uuid
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    sent uuid;
begin
    if not procrastinate_tick(_name, _job ->> 'queue', _job ->> 'task', _tick) then
        return null;
    end if;
    sent := (select d from procrastinate_defer(jsonb_build_array(_job)) d);
    update schedule set last_job_id = sent where name = _name;
    return sent;
end
$$;

-- procrastinate_start: the task of a claimed job is about to start. Needed for jobs with a lock or a queueing_lock only: from now on another
-- job with that queueing_lock may wait, and no job of any queue with that lock may run.
-- Returns false if it must not start: the claim is lost, or a job of another queue has the lock (then it is given back, to run in a second).
create or replace function jobqueue.procrastinate_start(_id uuid, _token uuid)
returns boolean
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job;
    holder uuid;
begin
    -- the key first, then the row, as those do who defer
    select * into j from job where id = _id;
    if j.settle_flags & 256 <> 0 and j.singleton_key is not null then
        holder := procrastinate_holder('lock:' || j.singleton_key);
    end if;
    select * into j from job where id = _id and claim_token = _token and status = 'processing' for update;
    if not found then
        return false;
    elsif holder <> j.id then
        perform end_attempt(j, 'snoozed', 'pending', now() + interval '1 s', null, j.retry_count, j.lost_count, false, null,
            'waits for its lock, held by a job of another queue');
        return false;
    end if;
    update job set handler_started = true, hold_mask = 4, held_key = case when settle_flags & 256 <> 0 then 'lock:' || singleton_key end
    where id = j.id;
    return true;
end
$$;

-- procrastinate_end: end the attempt of a locked, processing job.
--   _end  {"to": succeeded | failed | aborted | retry, "delete", "error", "result", "at", "priority", "queue", "lock"}
create or replace function jobqueue.procrastinate_end(_job jobqueue.job, _end jsonb)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    error jsonb := clean_error(coalesce(nullif(_end -> 'error', 'null'), jsonb_build_object('class', 'permanent', 'code', 'FAILED',
        'message', 'The task failed; its worker''s log has the traceback.')));
begin
    if _end ->> 'to' = 'succeeded' then
        perform settle(null, array[_job.id], array[_job.claim_token], array[nullif(_end -> 'result', 'null')], null, null);
    elsif _end ->> 'to' = 'aborted' then
        perform end_attempt(_job, 'cancelled', 'cancelled', now(), null, _job.retry_count, 0, false, null, 'aborted by its task');
    elsif _end ->> 'to' = 'retry' and _job.requested_action is distinct from 'cancel' then
        perform procrastinate_retry_claim(_job, _end, error);
    else
        perform end_attempt(_job, 'failed', 'failed', now(), error, _job.retry_count, 0, false, null, null);
    end if;
    if (_end ->> 'delete')::boolean then
        delete from job where id = _job.id and status in ('completed', 'failed', 'cancelled');
    end if;
end
$$;

-- procrastinate_retry_claim: back into the line, with what the retry strategy decided. Its queueing_lock is taken again if it is free; if
-- a twin was deferred meanwhile the retry waits without it: it is never lost.
create or replace function jobqueue.procrastinate_retry_claim(_job jobqueue.job, _end jsonb, _error jsonb)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job;
begin
    if _job.settle_flags & 256 <> 0 then
        perform leave_line(_job, 'pending');
    end if;
    j := procrastinate_change(_job, _end);
    perform end_attempt(j, 'failed', 'pending', coalesce((_end ->> 'at')::timestamptz, j.created_at), _error, j.retry_count, 0, false, null,
        'waits for a retry');
end
$$;

-- procrastinate_change: another queue, priority or lock for a job that is tried again, and a fresh budget for lost workers.
create or replace function jobqueue.procrastinate_change(_job jobqueue.job, _end jsonb)
returns jobqueue.job
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job;
    lock text := coalesce(_end ->> 'lock', _job.singleton_key);
    q jobqueue.queue := procrastinate_queue(coalesce(_end ->> 'queue', _job.queue), lock is not null);
    hold text := _job.options ->> 'hold';
begin
    if hold is not null and coalesce(procrastinate_holder(hold), _job.id) <> _job.id then
        hold := null;
    end if;
    update job x
    set queue = q.name, priority = coalesce((_end ->> 'priority')::int, x.priority), singleton_key = lock,
        settle_flags = x.settle_flags | procrastinate_flags(q, lock), held_key = hold, hold_mask = case when hold is not null then 15 end,
        retry_count = x.retry_count + 1, max_retries = x.retry_count + 1 + greatest(q.max_retries, 1)
    where x.id = _job.id
    returning * into j;
    return j;
end
$$;

-- procrastinate_settle: end claims of a worker in one call; a stale claim does not keep the others back.
--   _ends  [{"id", "token", …}], see procrastinate_end
-- Returns (id, outcome): ok or lost.
create or replace function jobqueue.procrastinate_settle(_ends jsonb)
returns table (id uuid, outcome text)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    e jsonb;
    j jobqueue.job;
begin
    for e in select x from jsonb_array_elements(_ends) x order by x ->> 'id' loop
        id := (e ->> 'id')::uuid;
        -- a retry takes its key before its row, as all do
        perform pg_advisory_xact_lock(27260, hashtext(k.options ->> 'hold'))
        from job k where k.id = procrastinate_settle.id and e ->> 'to' = 'retry' and k.options ? 'hold';
        select * into j from job k
        where k.id = procrastinate_settle.id and k.claim_token = (e ->> 'token')::uuid and k.status = 'processing' for update;
        outcome := case when found then 'ok' else 'lost' end;
        if found then
            perform procrastinate_end(j, e);
        end if;
        return next;
    end loop;
end
$$;

-- procrastinate_retry: a worker's claim ends and is tried again as its retry strategy decided; see procrastinate_end. Errors: JQ409 LEASE_LOST.
create or replace function jobqueue.procrastinate_retry(_id uuid, _token uuid, ending jsonb)
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    perform pg_advisory_xact_lock(27260, hashtext(k.options ->> 'hold')) from job k where k.id = _id and k.options ? 'hold';
    perform procrastinate_end(lock_claim(_id, _token), ending || '{"to": "retry"}');
end
$$;

-- procrastinate_finish: end a job by its id alone, as procrastinate's job manager does: whoever has it, its claim becomes stale. One that
-- waits is taken first. Errors: JQ409 if the job neither waits nor runs.
create or replace function jobqueue.procrastinate_finish(_id uuid, _end jsonb)
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job;
begin
    if _end ->> 'to' = 'retry' then
        perform pg_advisory_xact_lock(27260, hashtext(k.options ->> 'hold')) from job k where k.id = _id and k.options ? 'hold';
    end if;
    select * into j from job where id = _id for update;
    if j.status = 'failed' and _end ->> 'to' = 'retry' then
        j := procrastinate_change(j, _end);
        update job set run_at = coalesce((_end ->> 'at')::timestamptz, created_at) where id = _id returning * into j;
        perform change_job(j, 'retry at', 'pending', 'retried through procrastinate');
        perform note_action('retry', j.id, j.tenant, null, 'failed', 'pending', 'retried through procrastinate');
        return;
    elsif j.status = 'pending' and _end ->> 'to' <> 'retry' then
        if j.settle_flags & 256 <> 0 then
            perform leave_line(j, 'completed');
        end if;
        update job
        set status = 'processing', ready_seq = null, wait_until = null, inbox_seq = null, park_seq = null, expires_at = null,
            claim_token = gen_random_uuid(), worker_id = '00000000-0000-0000-0000-000000000000', started_at = now(), lease_until = now()
        where id = _id returning * into j;
    elsif j.status is distinct from 'processing' then
        perform refuse('JQ409', 'INVALID_TRANSITION', format('Job %s was not found or has no status from which it can be %s.', _id,
                case _end ->> 'to' when 'retry' then 'retried' else 'finished' end),
            'Jobs are finished while todo or doing, and retried while doing or failed.', jsonb_build_object('id', _id, 'status', j.status));
    end if;
    perform procrastinate_end(j, _end);
end
$$;

-- procrastinate_cancel: cancel a waiting job; with _abort also ask the worker of a running one to stop; with _delete remove a waiting one.
-- Returns the id, or null if there was nothing to cancel.
create or replace function jobqueue.procrastinate_cancel(_id uuid, _abort boolean, _delete boolean)
returns uuid
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job;
begin
    select * into j from job where id = _id and status in ('pending', 'paused', 'blocked', 'processing') for update;
    if not found or (j.status = 'processing' and not _abort) then
        return null;
    end if;
    perform cancel(_id, 'cancelled through procrastinate');
    if _delete and j.status <> 'processing' then
        perform delete_job(_id, 'cancelled and deleted through procrastinate');
    end if;
    return _id;
end
$$;
