-- The admitter: who holds the advisory lock (27252, number of the queue) gives slots away. See admission.sql for the model.

-- admission_waits: whether there is something to do for an admitter: arrivals, slots given back, a turn to give.
create or replace function jobqueue.admission_waits(_queue jobqueue.queue)
returns boolean
language sql volatile
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
    select exists (select from admission_line l where l.queue_number = _queue.number and l.stage = 0 and l.line = '' and l.rank = 0 and l.seq >= a.floor)
        or exists (select from admission_line l where l.queue_number = _queue.number and l.stage = 5)
        or exists (select from admission_note n where n.queue_number = _queue.number and n.due is null and n.seq >= a.floor)
        or exists (select from admission_note n where n.queue_number = _queue.number and n.due <= now() and n.due > now() - interval '1 min')
        or ((_queue.fair_by is not null or _queue.ageing is not null)
            and exists (select from admission_line l where l.queue_number = _queue.number and l.stage = 4))
    from (select coalesce((select x.floor from admission x where x.queue_number = _queue.number), 0) as floor) a
$$;

-- admit: make jobs of a queue with limits ready, as many as there are slots for.
--   _demand  with fairness or ageing: so many are to be ready afterwards, chosen at this moment
--   _wait    wait for another admitter, at most 0.2 s; otherwise leave it to that one
-- Returns whether it was the admitter.
create or replace function jobqueue.admit(_queue jobqueue.queue, _demand int, _wait boolean)
returns boolean
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    a jobqueue.admission;
    moving jobqueue.admission_line[];
    late jobqueue.admission_line[];
    stages int[];
    lines text[];
    arrived int;
begin
    if not pg_try_advisory_xact_lock(27252, _queue.number) and not (_wait and wait_for_admitter(_queue.number)) then
        return false;
    end if;
    insert into admission (queue_number) select _queue.number
    where not exists (select from admission x where x.queue_number = _queue.number)
    -- there already for others than those who see the past: they are refused with 40001
    on conflict do nothing;
    for round in 1 .. 30 loop
        select * into a from admission x where x.queue_number = _queue.number;
        select n.stages, n.lines into stages, lines from take_notes(_queue.number, a.floor) n;
        moving := array(
            select l from admission_line l
            where l.queue_number = _queue.number and l.stage = 0 and l.line = '' and l.rank = 0 and l.seq >= a.floor
            order by l.seq limit 1000 for update skip locked);
        late := array(
            select l from admission_line l where l.queue_number = _queue.number and l.stage = 5
            order by l.seq limit 1000 for update skip locked);
        arrived := cardinality(moving);
        if _queue.policy = 'key_strict_fifo' then
            moving := in_strict_order(moving, a.floor);
        end if;
        for stage in 1 .. 3 loop
            moving := pass_stage(_queue, stage, moving, array(select x.line from unnest(stages, lines) x (s, line) where x.s = stage));
        end loop;
        if has_gate(_queue) then
            moving := pass_gate(_queue, moving, _demand, a.last_lane);
        end if;
        perform make_ready(_queue, late || moving);
        perform raise_floor(a);
        -- thousands that only take their place in a full line must not keep the others from being seen
        exit when arrived < 1000 and (cardinality(moving) + cardinality(late) = 0 or not admission_waits(_queue));
    end loop;
    return true;
end
$$;

-- wait_for_admitter: become the admitter after another one. A client that claims in a transaction that it leaves open is not waited for.
create or replace function jobqueue.wait_for_admitter(_queue_number int)
returns boolean
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set lock_timeout = '200ms'
as $$
begin
    perform pg_advisory_xact_lock(27252, _queue_number);
    return true;
exception when lock_not_available then
    return false;
end
$$;

-- has_gate: whether the jobs of a queue wait at its gate: its own limit, its own rate, or their turn.
create or replace function jobqueue.has_gate(_queue jobqueue.queue)
returns boolean
language sql immutable
as $$
    select _queue.concurrency is not null or _queue.rate_limit ->> 'per' = 'queue' or _queue.fair_by is not null or _queue.ageing is not null
$$;

-- take_notes: book the slots that were given back. Returns the lines that have some now. Index: admission_note_now, admission_note_due.
create or replace function jobqueue.take_notes(_queue_number int, _floor bigint, out stages int[], out lines text[])
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    counts int[];
begin
    with freed as (
        delete from admission_note n where n.queue_number = _queue_number and n.due is null and n.seq >= _floor
        returning n.stage, n.line, n.slots),
    refilled as (
        -- the dead entries of a long past lie before; what is older than that is found by the recount
        delete from admission_note n where n.queue_number = _queue_number and n.due <= now() and n.due > now() - interval '1 min'
        returning n.stage, n.line, n.slots)
    select array_agg(x.stage), array_agg(x.line), array_agg(x.n) into stages, lines, counts
    from (select f.stage, f.line, sum(f.slots)::int as n from (table freed union all table refilled) f group by f.stage, f.line) x;
    if stages is null then
        return;
    end if;
    update admission_slot s
    set used = greatest(0, s.used - x.n)
    from unnest(stages, lines, counts) x (stage, line, n)
    cross join lateral (select y.ctid from admission_slot y
        where y.queue_number = _queue_number and y.stage = x.stage and y.line = x.line limit 1) t
    where x.n <> 0 and s.ctid = t.ctid;
end
$$;

-- in_strict_order: arrivals without those that would overtake one of their key which somebody has locked at this moment.
-- Index: admission_line_order.
create or replace function jobqueue.in_strict_order(_arrivals jobqueue.admission_line[], _floor bigint)
returns jobqueue.admission_line[]
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    there jobqueue.admission_line[];
    last jobqueue.admission_line := _arrivals[cardinality(_arrivals)];
begin
    there := array(
        select l from admission_line l
        where l.queue_number = last.queue_number and l.stage = 0 and l.line = '' and l.rank = 0 and l.seq >= _floor and l.seq < last.seq
        order by l.seq limit 2000);
    if cardinality(there) < cardinality(_arrivals) then
        return _arrivals;
    end if;
    return array(
        select a
        from unnest(_arrivals) a
        left join (
            select t.key_line, min(t.seq) as seq
            from unnest(there) t
            where t.job_id <> all (array(select a.job_id from unnest(_arrivals) a))
            group by t.key_line) locked on locked.key_line = a.key_line
        where locked.seq is null or a.seq < locked.seq
        order by a.seq);
end
$$;

-- pass_stage: give slots of stage 1, 2 or 3 to arrivals and to those who wait in lines where some became free; the others wait.
-- Returns who goes on. Index: admission_line_order, admission_slot_pkey.
create or replace function jobqueue.pass_stage(_queue jobqueue.queue, _stage int, _arrivals jobqueue.admission_line[], _freed text[])
returns jobqueue.admission_line[]
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    flag int := case _stage when 1 then 8 when 2 then 32 else 128 end;
    most int := case when _stage = 2 then (
            select max(v::int) from (select _queue.group_concurrency ->> 'default' union all
                select t.value from jsonb_each_text(_queue.group_concurrency -> 'tiers') t) x (v))
        else stage_limit(_queue, _stage, null) end;
    going jobqueue.admission_line[];
    lines text[];
    used int[];
    on_their_way jobqueue.admission_line[];
    staying jobqueue.admission_line[];
    passed int[];
    looked_at int[];
begin
    -- whom the limit does not concern, and who has its slot already
    going := array(select a from unnest(_arrivals) a where a.held & flag <> 0 or stage_line(a, _stage) is null);
    lines := array(
        select x.line from (
            select stage_line(a, _stage) from unnest(_arrivals) a where a.held & flag = 0 and stage_line(a, _stage) is not null
            union select unnest(_freed)) x (line)
        order by x.line);
    if lines = '{}' or most is null then
        return going;
    end if;
    insert into admission_slot (queue_number, stage, line)
    select _queue.number, _stage, x.line from unnest(lines) x (line)
    on conflict do nothing;
    used := array(
        select s.used from unnest(lines) with ordinality x (line, n)
        cross join lateral (select y.used from admission_slot y
            where y.queue_number = _queue.number and y.stage = _stage and y.line = x.line limit 1) s
        order by x.n);
    with heads as materialized (
        select w.r from unnest(lines, used) x (line, used)
        cross join lateral (
            select l as r from admission_line l
            where l.queue_number = _queue.number and l.stage = _stage and l.line = x.line
            order by l.rank, l.seq limit greatest(0, most - x.used) for update skip locked) w),
    -- in strict order nobody overtakes a head that somebody has locked at this moment
    locked as materialized (
        select x.line, f.rank, f.seq
        from unnest(lines, used) x (line, used)
        cross join lateral (
            select l.job_id, l.rank, l.seq from admission_line l
            where l.queue_number = _queue.number and l.stage = _stage and l.line = x.line
            order by l.rank, l.seq limit 1) f
        where _stage = 1 and _queue.policy = 'key_strict_fifo' and x.used < most
            and f.job_id <> all (array(select (h.r).job_id from heads h))),
    -- a row for each line goes first and tells the others how many slots are taken: no join, which would be one of all with all
    pool as (
        select null::jobqueue.admission_line as r, x.line, x.used, null::text as tier, null::bigint as rank, null::bigint as seq, false as arrives
        from unnest(lines, used) x (line, used)
        union all
        select h.r, (h.r).line, null, (h.r).tier, (h.r).rank, (h.r).seq, false from heads h
        union all
        select null, k.line, null, null, k.rank, k.seq, false from locked k
        union all
        select a, stage_line(a, _stage), null, a.tier,
            case when _stage = 1 and _queue.policy = 'key_strict_fifo' then 0 else a.own_rank end, a.seq, true
        from unnest(_arrivals) a where a.held & flag = 0 and stage_line(a, _stage) is not null),
    placed as materialized (
        select p.*, (p.r).job_id is not null and row_number() over w - 1
            <= stage_limit(_queue, _stage, p.tier) - max(p.used) over (partition by p.line) as passes
        from pool p
        window w as (partition by p.line order by p.rank nulls first, p.seq nulls first)),
    counted as (
        select p.line, count(*) filter (where p.passes) as passed, max(p.used) as used,
            -- -1: its head is locked
            case when exists (select from locked k where k.line = p.line) then -1
                else count(*) filter (where p.seq is not null and not p.arrives) end as looked_at
        from placed p group by p.line)
    select (select array_agg(p.r order by p.rank, p.seq) from placed p where p.passes),
        (select array_agg(p.r) from placed p where p.arrives and not p.passes),
        array_agg(c.line), array_agg(c.used), array_agg(c.passed), array_agg(c.looked_at)
    into on_their_way, staying, lines, used, passed, looked_at
    from counted c;
    if staying is not null then
        update admission_line l
        set stage = _stage, line = stage_line(p, _stage), held = p.held,
            rank = case when _stage = 1 and _queue.policy = 'key_strict_fifo' then 0 else p.own_rank end
        from unnest(staying) p where l.job_id = p.job_id;
    end if;
    if on_their_way is not null then
        update admission_slot s
        set used = s.used + x.n
        -- row by row: a join with this small table is planned as a scan of the queue's whole part of it
        from unnest(lines, passed) x (line, n)
        cross join lateral (select y.ctid from admission_slot y
            where y.queue_number = _queue.number and y.stage = _stage and y.line = x.line limit 1) t
        where x.n > 0 and s.ctid = t.ctid;
    end if;
    -- who was locked by somebody at this moment is looked for again
    insert into admission_note (queue_number, seq, stage, line, slots)
    select _queue.number, next_ready(), _stage, x.line, 0
    from unnest(lines, used, looked_at) x (line, used, seen)
    where x.seen = -1 or x.seen < most - x.used and x.line = any (_freed)
        and (select count(*) from (select from admission_line l
            where l.queue_number = _queue.number and l.stage = _stage and l.line = x.line limit x.seen + 1) y) > x.seen
        and not exists (select from unnest(staying) p where stage_line(p, _stage) = x.line);
    return going || array(
        select (p.job_id, p.queue_number, p.stage, p.line, p.rank, p.seq, p.held | flag, p.own_rank, p.key_line, p.group_line, p.rate_line,
            p.tier, p.lane, p.entered_at)::jobqueue.admission_line
        from unnest(on_their_way) p);
end
$$;

-- pass_gate: everybody waits at the gate; as many go on as the queue has slots and tokens for and, with fairness or ageing, as are asked for.
-- Fairness: of the highest priority, one of each lane in turn, beginning after the lane that was last. Ageing: an interval of waiting
-- counts like one step of priority. Index: admission_gate.
create or replace function jobqueue.pass_gate(
    _queue jobqueue.queue, _arrivals jobqueue.admission_line[], _demand int, _last_lane text)
returns jobqueue.admission_line[]
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    room int := 1000;
    chosen jobqueue.admission_line[];
    flags int := case when _queue.concurrency is not null then 64 else 0 end
        | case when _queue.rate_limit ->> 'per' = 'queue' then 128 else 0 end;
begin
    update admission_line l
    set stage = 4, line = p.lane, held = p.held,
        rank = case when _queue.ageing is null then p.own_rank
            else (extract(epoch from p.entered_at) * 1000)::bigint + p.own_rank * (extract(epoch from _queue.ageing) * 1000)::bigint end
    from unnest(_arrivals) p where l.job_id = p.job_id;
    insert into admission_slot (queue_number, stage, line)
    select _queue.number, s, '' from unnest(array[4, 5]) s where flags <> 0
    on conflict do nothing;
    select least(room, min(stage_limit(_queue, s.stage, null) - s.used)) into room
    from admission_slot s
    where s.queue_number = _queue.number and s.stage in (4, 5) and s.line = '' and stage_limit(_queue, s.stage, null) is not null;
    if _queue.fair_by is not null or _queue.ageing is not null then
        room := least(room, _demand - (select count(*)
            from (select from job j where j.queue = _queue.name and j.ready_seq is not null
                and (j.expires_at is null or j.expires_at > now()) limit _demand) x));
    end if;
    if room <= 0 then
        return '{}';
    elsif _queue.fair_by is not null then
        chosen := fair_turns(_queue.number, _last_lane, room);
    else
        chosen := array(
            select l from admission_line l where l.queue_number = _queue.number and l.stage = 4
            order by l.rank, l.line, l.seq limit room for update skip locked);
    end if;
    -- who was locked by somebody at this moment is looked for again; with fairness or ageing every claim looks
    if cardinality(chosen) < room and _queue.fair_by is null and _queue.ageing is null
        and (select count(*) from (select from admission_line l
            where l.queue_number = _queue.number and l.stage = 4 limit cardinality(chosen) + 1) y) > cardinality(chosen)
    then
        insert into admission_note (queue_number, seq, stage, line, slots) values (_queue.number, next_ready(), 4, '', 0);
    end if;
    if flags <> 0 and chosen <> '{}' then
        update admission_slot s set used = s.used + cardinality(chosen)
        where s.queue_number = _queue.number and s.line = '' and (s.stage = 4 and flags & 64 <> 0 or s.stage = 5 and flags & 128 <> 0);
    end if;
    if _queue.fair_by is not null and chosen <> '{}' then
        update admission x set last_lane = chosen[cardinality(chosen)].line where x.queue_number = _queue.number;
    end if;
    return array(
        select (p.job_id, p.queue_number, p.stage, p.line, p.rank, p.seq, p.held | flags, p.own_rank, p.key_line, p.group_line, p.rate_line,
            p.tier, p.lane, p.entered_at)::jobqueue.admission_line
        from unnest(chosen) p);
end
$$;

-- fair_turns: the next at the gate, priority by priority: one of each lane in turn, beginning after the lane that was served last.
-- Jumps from lane to lane in the index, so that a lane of 100,000 jobs costs no more than one of 3. Index: admission_gate.
create or replace function jobqueue.fair_turns(_queue_number int, _last_lane text, _room int)
returns jobqueue.admission_line[]
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set enable_sort = off set jit = off
as $$
declare
    chosen jobqueue.admission_line[] := '{}';
    part jobqueue.admission_line[];
    this_rank bigint;
    lanes text[];
begin
    loop
        select l.rank into this_rank from admission_line l
        where l.queue_number = _queue_number and l.stage = 4 and (this_rank is null or l.rank > this_rank)
        order by l.rank, l.line, l.seq limit 1;
        exit when not found or cardinality(chosen) >= _room;
        lanes := array(
            with recursive lane (name) as (
                (select l.line from admission_line l where l.queue_number = _queue_number and l.stage = 4 and l.rank = this_rank
                order by l.line limit 1)
                union all
                select (select l.line from admission_line l
                    where l.queue_number = _queue_number and l.stage = 4 and l.rank = this_rank and l.line > lane.name
                    order by l.line limit 1)
                from lane where lane.name is not null)
            select name from lane where name is not null);
        part := array(
            select w.r
            from (
                select h.r, row_number() over (partition by x.name order by (h.r).seq) as turn, x.name as line
                from unnest(lanes) x (name)
                cross join lateral (
                    select l as r from admission_line l
                    where l.queue_number = _queue_number and l.stage = 4 and l.rank = this_rank and l.line = x.name
                    order by l.seq
                    limit (_room - cardinality(chosen) + cardinality(lanes) - 1) / cardinality(lanes) + 1
                    for update skip locked) h) w
            order by w.turn, w.line <= _last_lane, w.line
            limit _room - cardinality(chosen));
        chosen := chosen || part;
    end loop;
    return chosen;
end
$$;

-- make_ready: jobs that have all they need take their place in the line of their queue. Who is locked by somebody keeps what it has and is
-- taken the next time; who is paused gives it back and is set aside. Index: job_pkey.
create or replace function jobqueue.make_ready(_queue jobqueue.queue, _rows jobqueue.admission_line[])
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set enable_sort = off set jit = off
as $$
declare
    aside uuid[];
    done uuid[];
begin
    if coalesce(cardinality(_rows), 0) = 0 then
        return;
    end if;
    aside := array(
        select r.job_id from unnest(_rows) r join job j on j.id = r.job_id
        where j.tenant = any (array(select p.tenant from tenant_pause p))
            or j.job_type = any (array(select t.name from job_type t where t.paused_at is not null)));
    with there as materialized (
        select j.t, r.held
        from unnest(_rows) r
        cross join lateral (
            select x.ctid as t from job x where x.id = r.job_id and x.inbox_seq is not null for update skip locked) j
        where r.job_id <> all (aside)),
    moved as (
        update job j
        set ready_seq = next_ready(), inbox_seq = null, settle_flags = j.settle_flags & ~232 | there.held
        from there where j.ctid = there.t
        returning j.id)
    select array_agg(m.id) into done from moved m;
    delete from admission_line l where l.job_id = any (done);
    if aside <> '{}' then
        perform give_back_slots(_queue.number, case when _queue.policy = 'key_strict_fifo' then r.held & ~8 else r.held end,
                r.key_line, r.group_line, r.rate_line, r.rate_line is null)
        from unnest(_rows) r where r.job_id = any (aside);
        update admission_line l
        set stage = 6, line = '', rank = 0, held = case when _queue.policy = 'key_strict_fifo' then r.held & 8 else 0 end
        from unnest(_rows) r where l.job_id = r.job_id and r.job_id = any (aside);
    end if;
    if coalesce(cardinality(done), 0) + cardinality(aside) < cardinality(_rows) then
        update admission_line l
        set stage = 5, line = '', rank = 0, held = r.held
        from unnest(_rows) r
        where l.job_id = r.job_id and r.job_id <> all (aside) and r.job_id <> all (coalesce(done, '{}'));
    end if;
end
$$;

-- raise_floor: numbers below the floor are not read again. A number belongs to a transaction that began before it was taken, so when all
-- transactions of the time of the last look have ended, nothing below the numbers of that time can still appear. Numbers are read as they
-- are now: who sees the past could overlook one that was taken since.
create or replace function jobqueue.raise_floor(_admission jobqueue.admission)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
declare
    newest bigint := (select s.last_value + 1 from ready_seq s);
    bounds pg_snapshot;
    lowest bigint;
    -- an id that is yet to come is of the server that this database was dumped on
    restored boolean;
begin
    -- a write for every few hundred numbers, not for every look
    if newest < _admission.next_floor + 250 or sees_the_past() then
        return;
    end if;
    bounds := pg_current_snapshot();
    restored := _admission.next_xid > pg_snapshot_xmax(bounds);
    if pg_snapshot_xmin(bounds) < _admission.next_xid and not restored then
        return;
    end if;
    lowest := least(
        (select l.seq from admission_line l where l.queue_number = _admission.queue_number and l.stage = 0 and l.line = '' and l.rank = 0
            and l.seq >= _admission.floor order by l.seq limit 1),
        (select n.seq from admission_note n where n.queue_number = _admission.queue_number and n.due is null and n.seq >= _admission.floor
            order by n.seq limit 1));
    update admission a
    set floor = case when restored then a.floor else least(_admission.next_floor, coalesce(lowest, _admission.next_floor)) end,
        next_floor = newest, next_xid = pg_snapshot_xmax(bounds)
    where a.queue_number = _admission.queue_number;
end
$$;

-- admit_for_claim: what a claim does first in a queue with limits. It leaves the work to another admitter if there is one, unless too little
-- is ready for this claim: then it waits for its turn, so that what its own worker has just given back is never left lying.
create or replace function jobqueue.admit_for_claim(_queue text, _wanted int)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
declare
    q jobqueue.queue;
begin
    select * into q from queue where name = _queue;
    if not admission_waits(q) then
        return;
    end if;
    if not admit(q, _wanted, false) and _wanted > (select count(*)
        from (select from job j where j.queue = _queue and j.ready_seq is not null
            and (j.expires_at is null or j.expires_at > now()) limit _wanted) x)
    then
        perform admit(q, _wanted, true);
    end if;
end
$$;
