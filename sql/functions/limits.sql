-- What goes with limits besides admitting: their options, a change of them, pauses, priorities, maintenance, and what people ask about them.

-- queue_with_limits: the options of a queue that limit its jobs, over what it has. Null takes a limit away. Nothing is stored. Errors: JQ400.
create or replace function jobqueue.queue_with_limits(_queue jobqueue.queue, _options jsonb)
returns jobqueue.queue
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    q jobqueue.queue := _queue;
    o jsonb := _options;
begin
    if o ? 'concurrency' then
        q.concurrency := to_int(o -> 'concurrency', 'concurrency', 1, 1000000);
    end if;
    if o ? 'key_concurrency' then
        q.key_concurrency := to_int(o -> 'key_concurrency', 'key_concurrency', 1, 1000000);
    end if;
    if o ? 'group_concurrency' then
        q.group_concurrency := to_group_limits(o -> 'group_concurrency');
    end if;
    if o ? 'rate_limit' then
        q.rate_limit := to_rate(o -> 'rate_limit');
    end if;
    if o ? 'ageing' then
        q.ageing := to_interval(o -> 'ageing', 'ageing');
        if q.ageing < interval '1 s' then
            perform refuse('JQ400', 'INVALID_ARGUMENT', 'ageing must be at least 1 second.', 'It is the time of waiting that counts like one '
                'step of priority; null: none.', '{"option": "ageing"}');
        end if;
    end if;
    if o ? 'fair_by' then
        q.fair_by := to_text(o -> 'fair_by', 'fair_by', 20);
        if q.fair_by not in ('group', 'tenant') then
            perform refuse('JQ400', 'INVALID_ARGUMENT', format('fair_by must be "group" or "tenant", not "%s".', left(q.fair_by, 100)), '',
                '{"option": "fair_by"}');
        end if;
    end if;
    if q.fair_by is not null and q.ageing is not null then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'fair_by and ageing exclude each other.',
            'Fairness takes turns inside one priority; ageing makes every job''s priority its own.', '{"option": "ageing"}');
    elsif q.policy in ('singleton', 'stately', 'key_strict_fifo') and q.key_concurrency is not null then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('The policy "%s" runs one job per key; key_concurrency cannot say otherwise.', q.policy),
            'Use the policy standard with key_concurrency.', '{"option": "key_concurrency"}');
    end if;
    return q;
end
$$;

-- to_group_limits: {"default": n, "tiers": {"gold": n}}; without default only the tiers named are limited. Errors: JQ400.
create or replace function jobqueue.to_group_limits(_value jsonb)
returns jsonb
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if coalesce(jsonb_typeof(_value), 'null') = 'null' then
        return null;
    elsif jsonb_typeof(_value) <> 'object' or coalesce(jsonb_typeof(_value -> 'tiers'), 'object') <> 'object'
        or not (_value ? 'default' or coalesce(_value -> 'tiers', '{}') <> '{}')
    then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'group_concurrency says how many jobs of one group may run.',
            'Give {"default": 2, "tiers": {"gold": 10}}; either may be left out.', '{"option": "group_concurrency"}');
    end if;
    perform refuse_unknown_option(_value, array['default', 'tiers'], 'group_concurrency');
    return jsonb_strip_nulls(jsonb_build_object(
        'default', to_int(_value -> 'default', 'group_concurrency.default', 1, 1000000),
        'tiers', (select jsonb_object_agg(t.key, to_int(t.value, 'group_concurrency.tiers', 1, 1000000))
            from jsonb_each(_value -> 'tiers') t)));
end
$$;

-- to_rate: {"limit": n, "period": duration, "per": "queue" or "key"}: at most n starts in any period. Period: 1 s unless told. Errors: JQ400.
create or replace function jobqueue.to_rate(_value jsonb)
returns jsonb
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    n int;
    period interval;
    per text;
begin
    if coalesce(jsonb_typeof(_value), 'null') = 'null' then
        return null;
    elsif jsonb_typeof(_value) = 'object' then
        perform refuse_unknown_option(_value, array['limit', 'period', 'per'], 'rate_limit');
        n := to_int(_value -> 'limit', 'rate_limit.limit', 1, 1000000);
        period := coalesce(to_interval(_value -> 'period', 'rate_limit.period'), interval '1 s');
        per := coalesce(to_text(_value -> 'per', 'rate_limit.per', 20), 'queue');
    end if;
    if n is null or per not in ('queue', 'key') or period < interval '10 ms' or period > interval '1 year' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'rate_limit says how many jobs may start in a period.',
            'Give {"limit": 10, "period": "1 minute", "per": "queue"}; per: queue or key; period: 0.01 seconds to a year.',
            '{"option": "rate_limit"}');
    end if;
    return jsonb_build_object('limit', n, 'period', extract(epoch from period)::double precision, 'per', per);
end
$$;

-- carry_starts: the starts that a rate still counts, when its queue is changed from _old to _new: each of them for the period of now. A
-- rate per queue counts the starts of all keys; which keys those of a rate per queue had is not known.
create or replace function jobqueue.carry_starts(_old jobqueue.queue, _new jobqueue.queue)
returns void
language sql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    update admission_note n
    set due = n.due + make_interval(secs => (_new.rate_limit ->> 'period')::double precision - (_old.rate_limit ->> 'period')::double precision),
        stage = case when _new.rate_limit ->> 'per' = 'queue' then 5 else n.stage end,
        line = case when _new.rate_limit ->> 'per' = 'queue' then '' else n.line end
    where n.queue_number = _new.number and n.due is not null and _old.rate_limit is not null and _new.rate_limit is not null
$$;

-- readmit_queue: after a change of limits: every job that waits or may be taken up again enters anew, and what runs is counted, as are the
-- starts that its rate still has to count. Call it while senders and claimers are kept out (keep_senders_out). Walks the primary key in
-- portions. Index: job_pkey.
create or replace function jobqueue.readmit_queue(_queue jobqueue.queue)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    place uuid := '00000000-0000-0000-0000-000000000000';
    ids uuid[];
    fifo boolean := _queue.policy = 'key_strict_fifo';
    rate smallint := case _queue.rate_limit ->> 'per' when 'queue' then 5 when 'key' then 3 end;
begin
    perform pg_advisory_xact_lock(27252, _queue.number);
    delete from admission_line l where l.queue_number = _queue.number;
    delete from admission_slot s where s.queue_number = _queue.number;
    delete from admission_note n where n.queue_number = _queue.number and (n.due is null or n.stage is distinct from rate);
    delete from admission a where a.queue_number = _queue.number;
    insert into admission_slot (queue_number, stage, line, used)
    select n.queue_number, n.stage, n.line, sum(n.slots) from admission_note n where n.queue_number = _queue.number group by 1, 2, 3;
    loop
        ids := array(select j.id from job j where j.id > place order by j.id limit 10000);
        exit when ids = '{}';
        place := ids[cardinality(ids)];
        ids := array(select j.id from job j
            where j.id = any (ids) and j.queue = _queue.name and j.status in ('blocked', 'pending', 'processing', 'paused', 'failed', 'cancelled')
            order by j.id for update);
        update job j
        set settle_flags = j.settle_flags & ~(case when fifo then 480 else 488 end) | case when _queue.limited then 256 else 0 end
                | case when j.status = 'processing' then held_now(j, _queue) else 0 end,
            ready_seq = case when j.inbox_seq is null then j.ready_seq else next_ready() end,
            inbox_seq = null
        where j.id = any (ids);
        insert into admission_slot as s (queue_number, stage, line, used)
        select _queue.number, x.stage, x.line, count(*)
        from job j
        cross join lateral line_of(j, _queue) l
        cross join lateral (values (8, 1, l.key_line), (32, 2, l.group_line), (64, 4, '')) x (bit, stage, line)
        where j.id = any (ids) and j.settle_flags & x.bit <> 0 and x.line is not null
        group by x.stage, x.line
        on conflict on constraint admission_slot_pkey do update set used = s.used + excluded.used;
        perform join_line(ids);
    end loop;
    perform wake(_queue.name, _queue.number);
end
$$;

-- held_now: the slots that a running job of a queue has to hold.
create or replace function jobqueue.held_now(_job jobqueue.job, _queue jobqueue.queue)
returns int
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select case when l.key_line is not null then 8 else 0 end | case when l.group_line is not null then 32 else 0 end
        | case when _queue.concurrency is not null then 64 else 0 end
    from line_of(_job, _queue) l
$$;

-- take_back_ready: ready jobs of a tenant or a job_type that is being paused make room for others. Index: job_claim.
create or replace function jobqueue.take_back_ready(_tenant text, _job_type text)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    j jobqueue.job;
begin
    for j in
        select x.* from queue q
        join job x on x.queue = q.name and x.ready_seq is not null
        where q.limited and x.settle_flags & 256 <> 0 and (x.tenant = _tenant or x.job_type = _job_type)
        order by x.id
        for update of x skip locked
    loop
        perform leave_line(j, 'pending');
        perform join_line(array[j.id]);
    end loop;
end
$$;

-- is_set_aside: whether jobs of a tenant and a job_type are given no slots: one of the two is paused.
create or replace function jobqueue.is_set_aside(_tenant text, _job_type text)
returns boolean
language sql stable
as $$
    select exists (select from jobqueue.tenant_pause p where p.tenant = _tenant)
        or exists (select from jobqueue.job_type t where t.name = _job_type and t.paused_at is not null)
$$;

-- look_again: those that were set aside during a pause which is over come back among the arrivals. Whoever is locked by somebody, and who is
-- being set aside at this very moment, is found by maintenance. Returns how many. Index: admission_line_order.
create or replace function jobqueue.look_again()
returns int
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    n int;
begin
    with back as materialized (
        select l.job_id
        from queue q
        join admission_line l on l.queue_number = q.number and l.stage = 6
        join job j on j.id = l.job_id
        where q.limited and not is_set_aside(j.tenant, j.job_type)
        order by l.job_id
        for update of l skip locked)
    update admission_line l
    set stage = 0, line = '', rank = 0, seq = next_ready()
    from back b
    where l.job_id = b.job_id;
    get diagnostics n = row_count;
    return n;
end
$$;

-- change_rank: a job that waits to be admitted got another priority. The order inside a key of strict order is not touched.
create or replace function jobqueue.change_rank(_job jobqueue.job, _priority int)
returns void
language sql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    update admission_line l
    set own_rank = -_priority::bigint,
        rank = case
            when l.stage not in (1, 2, 3, 4) or (l.stage = 1 and q.policy = 'key_strict_fifo') then l.rank
            when l.stage = 4 and q.ageing is not null
                then l.rank + (-_priority::bigint - l.own_rank) * (extract(epoch from q.ageing) * 1000)::bigint
            else -_priority::bigint end
    from queue q
    where _job.inbox_seq is not null and l.job_id = _job.id and q.name = _job.queue
$$;

-- tend_admission: what keeps limits alive whatever happens: counts that are off are put right, what a pause or its end overlooked is found,
-- and ready jobs that no live worker has a handler for make room for others. Passes over queues that are being admitted just now. Returns how many things it changed.
create or replace function jobqueue.tend_admission()
returns int
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    q jobqueue.queue;
    j jobqueue.job;
    total int := look_again();
begin
    for q in select * from queue x where x.limited order by x.number loop
        for j in
            select x.* from job x
            where x.queue = q.name and x.ready_seq is not null and x.settle_flags & 256 <> 0
                -- made ready at the moment of the pause
                and (is_set_aside(x.tenant, x.job_type)
                    or x.updated_at < now() - interval '30 s'
                    and not exists (select from worker w
                        where w.stopped_at is null and w.heartbeat_at > now() - interval '30 s' and (w.queues is null or q.name = any (w.queues))
                            and (w.job_types is null or x.job_type = any (w.job_types)))
                    -- without any worker there is nobody to make room for
                    and exists (select from worker w
                        where w.stopped_at is null and w.heartbeat_at > now() - interval '30 s'
                            and (w.queues is null or q.name = any (w.queues))))
            order by x.id limit 1000
            for update skip locked
        loop
            perform leave_line(j, 'pending');
            perform join_line(array[j.id]);
            total := total + 1;
        end loop;
        if pg_try_advisory_xact_lock(27252, q.number) then
            total := total + recount_slots(q);
        end if;
    end loop;
    return total;
end
$$;

-- recount_slots: put the counts of a queue right: what ready and running jobs hold, those that wait for more, and slots whose return is noted.
-- One statement, so that every job is seen before or after its end and never in between. Keys of strict order are not counted: their heads
-- may be paused or failed. Returns how many lines were off. Index: job_claim, claim_batch.
create or replace function jobqueue.recount_slots(_queue jobqueue.queue)
returns int
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    n int;
begin
    -- noted while the clock was ahead: no token comes back later than a period from now
    update admission_note t
    set due = now() + make_interval(secs => (_queue.rate_limit ->> 'period')::double precision)
    where t.queue_number = _queue.number and t.due > now() + make_interval(secs => (_queue.rate_limit ->> 'period')::double precision);
    -- tokens that came back while nobody admitted: take_notes looks back one minute only
    delete from admission_note t where t.queue_number = _queue.number and t.due <= now() - interval '1 min';
    with running as materialized (
        -- once each: a job that was claimed again is in several notes of claims
        select j as job from (select distinct unnest(b.job_ids) as id from claim_batch b) x
            join job j on j.id = x.id and j.queue = _queue.name and j.status = 'processing'
        union all
        select j from job j where j.queue = _queue.name and j.ready_seq is not null),
    holding as (
        select x.stage, x.line
        from running r cross join lateral line_of(r.job, _queue) l
        cross join lateral (values (8, 1, l.key_line), (32, 2, l.group_line), (64, 4, ''),
            (case when (r.job).status = 'processing' then 0 else 128 end, case when l.rate_line is null then 5 else 3 end, coalesce(l.rate_line, '')))
            x (bit, stage, line)
        where (r.job).settle_flags & x.bit <> 0 and x.line is not null
        union all
        select x.stage, x.line
        from admission_line l
        cross join lateral (values (8, 1, l.key_line), (32, 2, l.group_line), (64, 4, ''),
            (128, case when l.rate_line is null then 5 else 3 end, coalesce(l.rate_line, ''))) x (bit, stage, line)
        where l.queue_number = _queue.number and l.held & x.bit <> 0),
    counted as (
        select u.stage, u.line, sum(u.n)::int as n
        from (select h.stage::smallint, h.line, 1 as n from holding h
            union all select t.stage, t.line, t.slots from admission_note t where t.queue_number = _queue.number) u
        group by u.stage, u.line),
    changed as (
        update admission_slot s
        set used = coalesce(c.n, 0)
        from admission_slot old left join counted c on c.stage = old.stage and c.line = old.line
        where old.queue_number = _queue.number and s.queue_number = _queue.number and s.stage = old.stage and s.line = old.line
            and s.used <> coalesce(c.n, 0) and not (s.stage = 1 and _queue.policy = 'key_strict_fifo')
        returning s.stage, s.line),
    noted as (
        -- whoever waits there is looked at
        insert into admission_note (queue_number, seq, stage, line, slots)
        select _queue.number, next_ready(), c.stage, c.line, 0 from changed c
        returning 1)
    select count(*) into n from noted;
    delete from admission_slot s
    where s.queue_number = _queue.number and s.used = 0
        and not exists (select from admission_line l where l.queue_number = s.queue_number and l.stage = s.stage and l.line = s.line);
    return n;
end
$$;

-- explain_limits: what a job that is pending and due waits for, if its queue has limits.
create or replace function jobqueue.explain_limits(_job jobqueue.job)
returns table (reason text, detail text, what_to_do text)
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    q jobqueue.queue;
    l jobqueue.admission_line;
    ahead bigint;
    slots int;
    head jobqueue.job;
begin
    if _job.inbox_seq is null then
        return;
    end if;
    select * into q from queue where name = _job.queue;
    select * into l from admission_line x where x.job_id = _job.id;
    ahead := (select count(*) from (select from admission_line x
        where x.queue_number = l.queue_number and x.stage = l.stage and x.line = l.line and (x.rank, x.seq) < (l.rank, l.seq) limit 10000) y);
    slots := stage_limit(q, l.stage, l.tier);
    reason := case l.stage when 1 then 'waits_for_key' when 2 then 'waits_for_group' when 3 then 'waits_for_rate' when 4 then 'waits_for_queue'
        when 6 then 'set_aside' else 'waits_for_admission' end;
    detail := case l.stage
        when 1 then format('%s of its key may run at a time in "%s"; %s of the same key %s before it.', slots, q.name, ahead,
            case when ahead = 1 then 'stands' else 'stand' end)
        when 2 then format('%s of its group "%s" may run at a time in "%s"; %s of the group %s before it.', slots, l.group_line, q.name, ahead,
            case when ahead = 1 then 'stands' else 'stand' end)
        when 3 then format('%s of its key may start in %s; %s before it.', slots, for_people(make_interval(secs => (q.rate_limit ->> 'period')::float)), ahead)
        when 4 then concat_ws(' ', format('Its turn has not come in "%s".', q.name),
            'At most ' || q.concurrency || ' may run at a time.',
            'At most ' || (q.rate_limit ->> 'limit') || ' may start in ' || for_people(make_interval(secs => (q.rate_limit ->> 'period')::float)) || '.',
            'Turns are taken by ' || q.fair_by || '.', case when q.ageing is not null then 'Waiting raises its priority.' end)
        when 6 then 'It was set aside while its tenant or its job_type is paused.'
        else 'It is admitted with the next claim of a worker.' end;
    what_to_do := case when l.stage in (1, 2, 3, 4) then 'Wait, or change the limit with jobqueue.update_queue.' else 'Nothing.' end;
    select x.* into head from job x
    where l.stage = 1 and q.policy = 'key_strict_fifo' and x.queue = q.name and x.status in ('failed', 'paused', 'pending', 'processing')
        and x.settle_flags & 8 <> 0 and x.tenant = _job.tenant and x.singleton_key = _job.singleton_key
    order by x.created_at limit 1;
    if head.id is not null then
        detail := detail || format(' Its head is job %s, which is %s.', head.id, head.status);
        what_to_do := case when head.status = 'failed' then format('select jobqueue.retry(%L, ''reason''), or skip it, so that the key goes on.', head.id)
            else what_to_do end;
    end if;
    return next;
end
$$;

-- blocked_keys: keys of a queue of strict order whose head does not run: failed, paused or waiting for a retry; the others of the key wait.
-- Returns (singleton_key, tenant, job_id, status, since, waiting), longest first. Errors: JQ404, JQ400 for another policy.
create or replace function jobqueue.blocked_keys(queue text)
returns table (singleton_key text, tenant text, job_id uuid, status text, since timestamptz, waiting bigint)
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    q jobqueue.queue;
begin
    select * into q from queue x where x.name = blocked_keys.queue;
    if not found then
        perform refuse_queue(blocked_keys.queue);
    elsif q.policy <> 'key_strict_fifo' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('Keys block only in queues with the policy key_strict_fifo; "%s" has %s.', q.name, q.policy));
    end if;
    return query
        select j.singleton_key, j.tenant, j.id, j.status, j.updated_at,
            (select count(*) from admission_line l
                where l.queue_number = q.number and l.stage = 1 and l.line = policy_key(j.tenant, j.singleton_key))
        from job j
        where j.queue = q.name and j.settle_flags & 8 <> 0 and sees_tenant(j.tenant)
            and (j.status in ('failed', 'paused') or j.status = 'pending' and j.wait_until is not null)
        order by j.updated_at;
end
$$;

-- has_followers: whether others wait for the key of a failed job, in a queue of strict order: in its line, among those that have just come
-- or set aside. Maintenance does not delete it then: the key would go on as if nothing had happened. Index: admission_line_order.
create or replace function jobqueue.has_followers(_job jobqueue.job)
returns boolean
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select _job.status = 'failed' and exists (
        select from queue q
        where q.name = _job.queue
            and (exists (select from admission_line l
                    where l.queue_number = q.number and l.stage = 1 and l.line = policy_key(_job.tenant, _job.singleton_key))
                or exists (select from admission_line l
                    where l.queue_number = q.number and l.stage in (0, 6) and l.line = ''
                        and l.key_line = policy_key(_job.tenant, _job.singleton_key))))
$$;
