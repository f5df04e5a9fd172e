-- Maintenance has no leader: every step is idempotent, passes over rows that somebody else has locked, and is due by its own row.

-- promote: move jobs whose time has come into the line; returns how many, and when the next one is due.
--   _since  look at jobs due after this time only; the dead entries of a long past lie before it. Null: at all
-- Index: job_waiting.
create or replace function jobqueue.promote(_max int, _since timestamptz default null, out promoted int, out next_due timestamptz)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set enable_sort = off
set jit = off
as $$
declare
    queues text[];
    ids uuid[];
    limited uuid[];
    limited_queues text[];
    refilled timestamptz;
begin
    with due as materialized (
        select j.ctid as t
        from job j
        where j.wait_until is not null and j.wait_until <= now() and j.wait_until >= coalesce(_since, '-infinity')
        order by j.wait_until
        limit _max
        for update skip locked),
    moved as (
        update job j
        set wait_until = null, ready_seq = next_ready(), version = j.version + 1, updated_at = now(), status_reason = null
        from due where j.ctid = due.t
        returning j.id, j.queue, j.settle_flags)
    select count(*), array_agg(distinct m.queue), array_agg(m.id), array_agg(m.id) filter (where m.settle_flags & 256 <> 0)
    into promoted, queues, ids, limited
    from moved m;
    if limited is not null then
        perform join_line(limited);
    end if;
    select min(x.wait_until) into next_due
    from (select j.wait_until from job j
        where j.wait_until is not null and j.wait_until >= greatest(coalesce(_since, '-infinity'), now() - interval '1 min')
        order by j.wait_until limit 1) x;
    -- a token that comes back may let a job start
    select array_agg(q.name) into limited_queues
    from queue q
    where q.rate_limit is not null and exists (select from admission_note n
        where n.queue_number = q.number and n.due <= now() and n.due > now() - interval '10 s');
    -- who takes tokens just now has not committed them: while jobs wait and no token is known to come back, it looks again soon
    select min(coalesce(x.due, now() + least(make_interval(secs => (q.rate_limit ->> 'period')::double precision), interval '1 s')))
    into refilled
    from queue q
    left join lateral (select n.due from admission_note n where n.queue_number = q.number and n.due > now() order by n.due limit 1) x on true
    where q.rate_limit is not null
        and (x.due is not null or q.paused_at is null and exists (select from admission_line l where l.queue_number = q.number));
    next_due := least(next_due, refilled);
    if limited_queues is not null then
        perform wake_many(limited_queues);
    end if;
    if promoted > 0 then
        perform wake_many(queues);
        perform publish_changes(ids);
    end if;
end
$$;

-- rescue: end claims whose lease has run out. If the handler may have started the retry counts, with class lost; otherwise nothing is
-- spent. Reads the notes of claims, not the jobs; a job's own lease decides. A job of which the end has to wait for somebody (who holds one
-- of its children, say) is left to the next call, so that the others go on. Returns how many were rescued.
create or replace function jobqueue.rescue(_max int)
returns int
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
set lock_timeout = '50ms'
as $$
declare
    note jobqueue.claim_batch;
    j jobqueue.job;
    later timestamptz;
    n int := 0;
begin
    -- notes of claims that have ended otherwise: clients without the worker's bookkeeping leave one behind for every claim
    delete from claim_batch b
    using (select c.id from claim_batch c where c.check_at <= now() order by c.check_at limit _max * 50 for update skip locked) due
    where b.id = due.id
        and not exists (select from unnest(b.job_ids) x (id) join job k on k.id = x.id and k.status = 'processing');
    for note in
        select * from claim_batch b where b.check_at <= now() order by b.check_at limit _max for update skip locked
    loop
        for j in
            select k.* from unnest(note.job_ids) x (id)
            join job k on k.id = x.id and k.status = 'processing' and k.lease_until <= now()
            order by k.id
            for update of k skip locked
        loop
            begin
                perform rescue_one(j);
                n := n + 1;
            exception when lock_not_available then
                null;
            when others then
                -- one job whose end fails must not keep the others from being rescued; doctor shows it
                raise warning 'jobqueue: job % was not rescued: %', j.id, sqlerrm;
            end;
        end loop;
        select min(k.lease_until) into later
        from unnest(note.job_ids) x (id)
        join job k on k.id = x.id and k.status = 'processing';
        if later is null then
            delete from claim_batch b where b.id = note.id;
        else
            update claim_batch b set check_at = greatest(later, now() + interval '1 s') where b.id = note.id;
        end if;
        exit when n >= 1000;
    end loop;
    return n;
end
$$;

-- rescue_one: one locked job whose lease has run out. It had not started if it was only prefetched, or if its worker went on beating
-- without ever listing it: then the answer of the claim never arrived.
create or replace function jobqueue.rescue_one(_job jobqueue.job)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    never_started boolean := not coalesce(_job.handler_started, true)
        or (_job.heartbeat_at is null and exists (
            select from worker w where w.id = _job.worker_id and w.heartbeat_at > _job.started_at + interval '10 s'
                and w.name is distinct from null and w.hostname is not null));
begin
    if never_started then
        perform end_attempt(_job, 'lost',
            case _job.requested_action when 'cancel' then 'cancelled' when 'pause' then 'paused' else 'pending' end,
            now(), null, _job.retry_count, _job.lost_count, true, null, 'its worker was lost before it started');
    else
        perform fail_claim(_job, 'lost', jsonb_build_object('class', 'lost', 'code', 'LOST',
            'message', 'The worker stopped responding while it ran this job.'), null);
    end if;
end
$$;

-- expire: end jobs that waited longer than their expires_in without ever running; as rescue, it leaves to the next call what has to wait
-- for somebody. Returns how many. Index: job_expiring.
create or replace function jobqueue.expire(_max int)
returns int
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
set lock_timeout = '50ms'
as $$
declare
    j jobqueue.job;
    n int := 0;
    error jsonb := '{"class": "permanent", "code": "EXPIRED", "message": "The job expired before it ran."}';
begin
    for j in
        select * from job k where k.expires_at is not null and k.expires_at <= now() and k.status = 'pending'
        order by k.expires_at limit _max for update skip locked
    loop
        begin
            update job k
            set status = 'failed', version = k.version + 1, ready_seq = null, wait_until = null, inbox_seq = null, park_seq = null,
                expires_at = null, completed_at = now(), failed_at = now(), updated_at = now(),
                held_key = case when k.hold_mask & 32 <> 0 then k.held_key end,
                error_class = 'permanent', error_code = 'EXPIRED', error_message = error ->> 'message'
            where k.id = j.id;
            insert into attempt (job_id, attempt, tenant, outcome, error_class, error_code, error_message)
            values (j.id, j.attempt, j.tenant, 'expired', 'permanent', 'EXPIRED', error ->> 'message')
            on conflict do nothing;
            insert into statistics_note (queue, failed) values (j.queue, 1);
            if j.settle_flags & 256 <> 0 then
                perform leave_line(j, 'failed');
            end if;
            perform after_failure(j.id, error);
            perform after_end(array[j.id]);
            perform publish_changes(array[j.id]);
            n := n + 1;
        exception when lock_not_available then
            null;
        when others then
            raise warning 'jobqueue: job % did not expire: %', j.id, sqlerrm;
        end;
    end loop;
    return n;
end
$$;

-- remove_old: delete ended jobs that were kept long enough, walking the primary key (v7 ids sort by age) in portions. _from is where the
-- last portion stopped. It also is the net below rescue, which finds running jobs by the notes of their claims: what lost its lease over a
-- minute ago gets a note. Returns how many went and where to go on; null when the walk is through.
create or replace function jobqueue.remove_old(_from uuid, _max int, out removed int, out next_from uuid)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set enable_sort = off
set jit = off
as $$
declare
    ids uuid[];
begin
    select array_agg(x.id), max(x.id::text)::uuid into ids, next_from
    from (select j.id from job j where j.id > _from order by j.id limit _max) x;
    -- only what goes is locked: a claimer passes over every locked row
    with old as materialized (
        select j.ctid as t
        from job j join queue q on q.name = j.queue
        where j.id = any (ids)
            and (j.status in ('completed', 'failed', 'cancelled', 'skipped'))
            and j.completed_at <= now() - case when j.status = 'completed'
                then option_interval(j.options, 'keep_completed', q.keep_completed)
                else option_interval(j.options, 'keep_ended', q.keep_ended) end
            and not (j.settle_flags & 2 <> 0 and has_waiting_children(j.id))
            and not (j.settle_flags & 8 <> 0 and has_followers(j))
            and (j.held_key is null or slot_is_over(j.held_key))
        for update of j skip locked)
    delete from job j using old where j.ctid = old.t;
    get diagnostics removed = row_count;
    -- claimed later than now: the clock was ahead. Its worker goes on beating, if it lives
    with ahead as materialized (
        select j.ctid as t, now() + option_interval(j.options, 'lease', q.lease) as ends
        from job j join queue q on q.name = j.queue
        where j.id = any (ids) and j.status = 'processing' and j.started_at > now() + interval '1 min'
            and j.lease_until > now() + option_interval(j.options, 'lease', q.lease)
        for update of j skip locked),
    shortened as (
        update job j set lease_until = a.ends from ahead a where j.ctid = a.t returning j.id, j.worker_id, j.lease_until)
    insert into claim_batch (worker_id, check_at, job_ids)
    select s.worker_id, min(s.lease_until), array_agg(s.id) from shortened s group by s.worker_id;
    -- under way, but in no note of a claim: after a crash of the server, or somebody's hand in claim_batch. A note too many does no harm
    insert into claim_batch (worker_id, check_at, job_ids)
    select j.worker_id, now(), array_agg(j.id) from job j
    where j.id = any (ids) and j.status = 'processing' and j.lease_until < now() - interval '1 min'
    group by j.worker_id;
    perform count_standing(ids, _from = '00000000-0000-0000-0000-000000000000', coalesce(cardinality(ids), 0) < _max);
    if coalesce(cardinality(ids), 0) < _max then
        next_from := null;
    end if;
end
$$;

-- housekeeping: what listeners, stopped workers, old keys and old stages left behind.
create or replace function jobqueue.housekeeping()
returns int
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    n int;
    total int := 0;
begin
    delete from watch where until < now() - interval '10 s';
    get diagnostics n = row_count; total := total + n;
    delete from worker where coalesce(stopped_at, heartbeat_at) < now() - interval '1 day';
    get diagnostics n = row_count; total := total + n;
    delete from idempotency_key where created_at < now() - interval '24 hours';
    get diagnostics n = row_count; total := total + n;
    delete from stream_ticket where expires_at < now();
    get diagnostics n = row_count; total := total + n;
    delete from quota_use where window_ends < now() - interval '1 day';
    get diagnostics n = row_count; total := total + n;
    -- of keys that have their first name; most are used once
    delete from key_generation where generation = 0 and used_at < now() - interval '1 hour';
    get diagnostics n = row_count; total := total + n;
    total := total + accept_clock();
    total := total + remove_old_batches();
    return total;
end
$$;

-- maintain: run the steps that are due, each once in the whole installation.
--   _worker  who asks; _only  names of steps to run now, due or not (null: those that are due)
-- Returns (step, done, next_due); without a row nothing was due. Never waits for another worker. All steps of a call are one transaction, and
-- what one of them locked stays locked until the last is through: after 100 ms the rest is left to the next call, the longest due first.
-- A step that would wait for a row or a table that somebody keeps locked gives up and is tried again, as after any other error. One that
-- was done later than now is due: the clock was ahead.
create or replace function jobqueue.maintain(_worker uuid default null, _only text[] default null)
returns table (step text, done bigint, next_due timestamptz)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set lock_timeout = '200ms'
as $$
#variable_conflict use_column
declare
    m jobqueue.maintenance;
    new_state jsonb;
    removed int;
    place uuid;
    began timestamptz := clock_timestamp();
begin
    for m in
        select * from maintenance x
        where case when _only is null then x.next_at <= now() or x.last_at > now() + interval '1 min' else x.step = any (_only) end
        order by x.next_at, x.step
        for update skip locked
    loop
        new_state := m.state - array['error', 'failed_at'];
        next_due := now() + m.every;
        begin
            case m.step
                when 'rescue' then
                    done := rescue(200);
                    if done > 0 then
                        next_due := now() + interval '100 ms';
                    end if;
                when 'expire' then
                    done := expire(500);
                    if done > 0 then
                        next_due := now() + interval '100 ms';
                    end if;
                when 'retention' then
                    select r.removed, r.next_from into removed, place
                    from remove_old(coalesce((m.state ->> 'from')::uuid, '00000000-0000-0000-0000-000000000000'), 5000) r;
                    done := removed;
                    new_state := jsonb_build_object('from', place);
                    if place is not null then
                        next_due := now() + interval '1 s';
                    end if;
                when 'batches' then
                    done := tend_batches(500);
                when 'admission' then
                    done := tend_admission();
                when 'fold_statistics' then
                    select f.folded, f.state into done, new_state from fold_statistics(m.state, 500) f;
                    if done = 500 then
                        next_due := now() + interval '100 ms';
                    end if;
                when 'sample_statistics' then
                    select f.sampled, f.state into done, new_state from sample_statistics(m.state) f;
                    next_due := greatest(date_trunc('minute', now()) + interval '1 min', now() + interval '10 s');
                when 'keep_statistics' then
                    done := keep_statistics();
                when 'housekeeping' then
                    done := housekeeping();
                when 'estimates' then
                    perform sample_runs(coalesce(m.last_at, now() - interval '1 min'));
                    select l.learned, l.next_from into done, place from learn_estimates((m.state ->> 'from')::uuid, 5000) l;
                    new_state := jsonb_build_object('from', place);
                    if place is not null then
                        next_due := now() + interval '100 ms';
                    end if;
                when 'stage_history' then
                    select r.removed, r.next_from into done, place from remove_stage_history((m.state ->> 'from')::uuid, 5000) r;
                    new_state := jsonb_build_object('from', place);
                    if place is not null then
                        next_due := now() + interval '1 s';
                    end if;
                when 'bulk' then
                    done := run_bulk(_worker);
                    if done > 0 then
                        next_due := now() + interval '100 ms';
                    end if;
                when 'schedules' then
                    select r.sent, least(r.next_due, now() + m.every) into done, next_due from run_schedules(500) r;
                else
                    done := 0;
            end case;
        exception when others then
            -- one step that fails must not stop the others; doctor and the log show it
            raise warning 'jobqueue: maintenance step % failed: %', m.step, sqlerrm;
            done := 0;
            next_due := now() + case when sqlstate = '55P03' then m.every else greatest(m.every, interval '10 s') end;
            new_state := coalesce(m.state, '{}') || jsonb_build_object('error', sqlerrm, 'failed_at', now());
        end;
        update maintenance x set next_at = coalesce(next_due, now() + m.every), last_at = now(), last_done = done, state = new_state where x.step = m.step;
        step := m.step;
        return next;
        exit when _only is null and clock_timestamp() > began + interval '100 ms';
    end loop;
end
$$;

-- maintenance_is_due: whether a call of maintain would find something to do. Volatile, to see what a call in the same statement has left.
create or replace function jobqueue.maintenance_is_due()
returns boolean
language sql volatile security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select exists (select from maintenance m where m.next_at <= now() or m.last_at > now() + interval '1 min')
$$;

-- next_due: when the next waiting job becomes due; null if none waits.
create or replace function jobqueue.next_due(_queues text[] default null)
returns timestamptz
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
    select j.wait_until from job j where j.wait_until is not null order by j.wait_until limit 1
$$;
