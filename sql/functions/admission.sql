-- Admission: how limits hold. A job of a queue with limits does not become ready by itself: it gets a row in admission_line, and one
-- admitter per queue at a time (an advisory lock, held to the end of a short transaction of a worker) gives it what it needs, in this order:
--   1 a slot of its key    2 a slot of its group    3 a token of its key's rate    4 the gate: a slot of the queue, a token of the queue's
--   rate, and, with fairness or ageing, its turn
-- What it has it keeps while it waits for the next, so that nobody waits in a circle. Then it is ready like any other job, and claims know
-- nothing of limits. Only the admitter writes admission_slot; whoever ends a job leaves a note there and waits for nobody. So no number of
-- claimers can exceed a limit, and a transaction of any length that sends, cancels or completes blocks no queue.
-- Model, alternatives and figures: docs/decisions/0010-admission.md.

-- stage_limit: how many slots a line of a stage has; null: no limit. Stage 5 is the rate of the whole queue.
create or replace function jobqueue.stage_limit(_queue jobqueue.queue, _stage int, _tier text)
returns int
language sql immutable
as $$
    select case _stage
        when 1 then case when _queue.policy in ('singleton', 'stately', 'key_strict_fifo') then 1 else _queue.key_concurrency end
        when 2 then coalesce((_queue.group_concurrency -> 'tiers' ->> _tier)::int, (_queue.group_concurrency ->> 'default')::int)
        when 3 then case when _queue.rate_limit ->> 'per' = 'key' then (_queue.rate_limit ->> 'limit')::int end
        when 4 then _queue.concurrency
        else case when _queue.rate_limit ->> 'per' = 'queue' then (_queue.rate_limit ->> 'limit')::int end end
$$;

-- stage_line: the line of a job at a stage; null: that stage does not concern it.
create or replace function jobqueue.stage_line(_row jobqueue.admission_line, _stage int)
returns text
language sql immutable
as $$
    select case _stage when 1 then _row.key_line when 2 then _row.group_line when 3 then _row.rate_line else '' end
$$;

-- line_of: the row of a job in the line of its queue, as it enters.
create or replace function jobqueue.line_of(_job jobqueue.job, _queue jobqueue.queue)
returns jobqueue.admission_line
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    l jobqueue.admission_line;
    key text := policy_key(_job.tenant, _job.singleton_key);
begin
    l.job_id := _job.id;
    l.queue_number := _queue.number;
    l.stage := 0;
    l.line := '';
    l.rank := 0;
    l.seq := coalesce(_job.inbox_seq, _job.ready_seq);
    -- a key of strict order stays with its head through retries; everything else was given back
    l.held := _job.settle_flags & 8;
    l.own_rank := -_job.priority::bigint;
    if _queue.policy in ('singleton', 'stately', 'key_strict_fifo') or (_queue.key_concurrency is not null and _job.singleton_key is not null) then
        l.key_line := key;
    end if;
    if _job.group_key is not null and stage_limit(_queue, 2, _job.tier) is not null then
        l.group_line := _job.group_key;
    end if;
    if _queue.rate_limit ->> 'per' = 'key' and _job.singleton_key is not null then
        l.rate_line := key;
    end if;
    l.tier := _job.tier;
    l.lane := case _queue.fair_by when 'tenant' then _job.tenant when 'group' then coalesce(_job.group_key, '') else '' end;
    l.entered_at := _job.updated_at;
    return l;
end
$$;

-- join_line: jobs that have just become ready wait to be admitted instead, if their queue has limits. Call it wherever a job becomes ready,
-- in the same transaction. Index: job_pkey.
create or replace function jobqueue.join_line(_ids uuid[])
returns void
-- not in plain SQL: its plan is kept
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
begin
    with entered as (
        update job j
        set inbox_seq = next_ready(), ready_seq = null
        where j.id = any (_ids) and j.settle_flags & 256 <> 0 and j.settle_flags & 224 = 0 and j.ready_seq is not null
        returning j as job)
    insert into admission_line
    select l.* from entered e join queue q on q.name = (e.job).queue cross join lateral line_of(e.job, q) l
    on conflict (job_id) do nothing;
end
$$;

-- leave_line: a job with limits is no longer ready, waiting to be admitted or processing: what it holds is given back. In a queue of strict
-- order it keeps its key until it is completed, skipped, cancelled or deleted.
--   _job  the job as it was before its status changed; _to  its new status
create or replace function jobqueue.leave_line(_job jobqueue.job, _to text)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    q jobqueue.queue;
    l jobqueue.admission_line;
    held int := _job.settle_flags & 232;
    kept int := 0;
begin
    select * into q from queue where name = _job.queue;
    if _job.inbox_seq is not null then
        delete from admission_line x where x.job_id = _job.id returning x.held into held;
        held := coalesce(held, 0);
    end if;
    if q.policy = 'key_strict_fifo' and _to in ('pending', 'paused', 'failed') then
        kept := held & 8;
    end if;
    -- a token is given back a period after the start, not at the end
    held := held & ~kept & case when _job.status = 'processing' then 104 else 232 end;
    update job j set settle_flags = j.settle_flags & ~232 | kept where j.id = _job.id and (j.settle_flags & 232) <> kept;
    l := line_of(_job, q);
    perform give_back_slots(q.number, held, l.key_line, l.group_line, l.rate_line, q.rate_limit is not null and l.rate_line is null);
    if held <> 0 then
        perform wake(q.name, q.number);
    end if;
end
$$;

-- give_back_slots: one note per slot.
create or replace function jobqueue.give_back_slots(_queue_number int, _held int, _key text, _group text, _rate text, _queue_rate boolean)
returns void
language sql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    insert into admission_note (queue_number, seq, stage, line, slots)
    select _queue_number, next_ready(), x.stage, x.line, 1
    from (values (8, 1, _key), (32, 2, _group), (64, 4, ''), (128, case when _queue_rate then 5 else 3 end, coalesce(_rate, ''))) x (bit, stage, line)
    where _held & x.bit <> 0 and x.line is not null
$$;

-- give_slots_of: completed jobs give back what they held; the rest of them is passed over. Index: job_pkey.
create or replace function jobqueue.give_slots_of(_ids uuid[])
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    queues text[];
begin
    with given as (
        insert into admission_note (queue_number, seq, stage, line, slots)
        select q.number, next_ready(), x.stage, x.line, count(*)
        from job j
        join queue q on q.name = j.queue
        cross join lateral line_of(j, q) l
        cross join lateral (values (8, 1, l.key_line), (32, 2, l.group_line), (64, 4, '')) x (bit, stage, line)
        where j.id = any (_ids) and j.status = 'completed' and j.settle_flags & x.bit <> 0 and x.line is not null
        group by q.number, x.stage, x.line
        returning queue_number)
    select array_agg(distinct q.name) into queues from given g join queue q on q.number = g.queue_number;
    if queues is not null then
        perform wake_many(queues);
    end if;
end
$$;

-- note_starts: tokens of jobs that were just claimed come back one period from now: at most so many starts in any period.
create or replace function jobqueue.note_starts(_queue jobqueue.queue, _ids uuid[])
returns void
language sql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    insert into admission_note (queue_number, seq, stage, line, slots, due)
    select _queue.number, next_ready(), case when l.rate_line is null then 5 else 3 end, coalesce(l.rate_line, ''), count(*),
        now() + make_interval(secs => (_queue.rate_limit ->> 'period')::double precision)
    from job j cross join lateral line_of(j, _queue) l
    where j.id = any (_ids) and j.settle_flags & 128 <> 0
    group by l.rate_line
$$;
