-- How many jobs stand where now. Nothing here reads all jobs: what an index or a note leads to is counted, and no further than 100,000 per
-- queue (scheduled and processing: together). Blocked and paused jobs have neither; retention counts them as it passes.

-- queue_gauges: how many jobs of each queue are where, for queues that have any.
--   _queue  one queue only; null: all
-- ready: due and waiting, for a worker or for a limit; scheduled: waiting for their time; failed_jobs: ended as failed and kept;
-- oldest_ready_seconds: since when the longest waiting one of them could run. blocked, paused: as of the last pass of retention.
-- Index: job_claim, job_waiting, job_failed, admission_line_order, admission_gate.
create or replace function jobqueue.queue_gauges(_queue text default null)
returns table (
    queue text, ready int, scheduled int, blocked int, processing int, paused int, failed_jobs int, oldest_ready_seconds double precision)
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    -- hopping from queue to queue: those without such jobs cost nothing, and a call per queue costs ten times what the counting does
    with recursive waiting (queue) as (
        (select j.queue from job j where j.ready_seq is not null order by j.queue limit 1)
        union all
        select (select j.queue from job j where j.ready_seq is not null and j.queue > w.queue order by j.queue limit 1)
        from waiting w
        where w.queue is not null),
    failing (queue) as (
        (select j.queue from job j where j.failed_at is not null order by j.queue limit 1)
        union all
        select (select j.queue from job j where j.failed_at is not null and j.queue > f.queue order by j.queue limit 1)
        from failing f
        where f.queue is not null),
    lined (number) as (
        (select l.queue_number from admission_line l order by l.queue_number limit 1)
        union all
        select (select l.queue_number from admission_line l where l.queue_number > i.number order by l.queue_number limit 1)
        from lined i
        where i.number is not null),
    failed as materialized (
        select f.queue, (select count(*)::int from (select from job j where j.queue = f.queue and j.failed_at is not null limit 100000) x) as n
        from failing f
        where f.queue is not null and (_queue is null or f.queue = _queue)),
    scheduled as materialized (
        select w.queue, count(*)::int as n
        from (select j.queue from job j where j.wait_until is not null limit 100000) w
        group by 1),
    processing as materialized (
        select j.queue, count(*)::int as n
        from (select distinct x.id from claim_batch b cross join lateral unnest(b.job_ids) x (id) limit 100000) c
        join job j on j.id = c.id and j.status = 'processing'
        group by 1)
    select g.*
    from (
        select q.name, case when w.queue is not null then count_ready(q.name) else 0 end
                + case when i.number is not null then count_in_line(q.number) else 0 end as ready,
            coalesce(s.n, 0) as scheduled, coalesce(t.blocked, 0) as blocked,
            coalesce(p.n, 0) as processing, coalesce(t.paused, 0) as paused, coalesce(f.n, 0) as failed_jobs,
            case when coalesce(w.queue, i.number::text) is not null then oldest_ready(q.name, q.number) end as oldest
        from queue q
        left join waiting w on w.queue = q.name
        left join lined i on i.number = q.number
        left join failed f on f.queue = q.name
        left join scheduled s on s.queue = q.name
        left join processing p on p.queue = q.name
        left join standing t on t.queue = q.name
        where _queue is null or q.name = _queue) g
    where g.ready + g.scheduled + g.blocked + g.processing + g.paused + g.failed_jobs > 0
$$;

-- count_ready: jobs of a queue that a worker could claim, counted no further than 100,000. Index: job_claim.
create or replace function jobqueue.count_ready(_queue text)
returns int
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set jit = off
as $$
    select count(*)::int from (select from job j where j.queue = _queue and j.ready_seq is not null limit 100000) x
$$;

-- count_in_line: due jobs of a queue that wait for a limit, counted no further than 100,000.
-- Index: admission_line_order, admission_gate.
create or replace function jobqueue.count_in_line(_number int)
returns int
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set jit = off
as $$
    select (select count(*) from (select from admission_line l where l.queue_number = _number and l.stage <> 4 limit 100000) x)::int
        + (select count(*) from (select from admission_line l where l.queue_number = _number and l.stage = 4 limit 100000) x)::int
$$;

-- oldest_ready: for how many seconds the longest waiting ready job of a queue could have run. The first of each priority is the oldest of
-- it, so that one look per priority is enough; no more than 1,000 of them. Index: job_claim.
create or replace function jobqueue.oldest_ready(_queue text, _number int)
returns double precision
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
    with recursive first (rank, since, n) as (
        (select (-j.priority), greatest(j.run_at, j.created_at), 1
        from job j
        where j.queue = _queue and j.ready_seq is not null
        order by (-j.priority), j.ready_seq
        limit 1)
        union all
        select x.rank, x.since, f.n + 1
        from first f
        cross join lateral (
            select (-j.priority) as rank, greatest(j.run_at, j.created_at) as since
            from job j
            where j.queue = _queue and j.ready_seq is not null and (-j.priority) > f.rank
            order by (-j.priority), j.ready_seq
            limit 1) x
        where f.n < 1000)
    select greatest(date_part('epoch', now() - least(min(f.since), (
        select min(l.entered_at) from (select k.entered_at from admission_line k where k.queue_number = _number limit 100000) l))), 0)
    from first f
$$;

-- count_standing: count blocked and paused jobs among those that retention passes; the sums are shown when it has passed all.
--   _ids     the portion;  _begins, _ends  whether it is the first, the last one. Index: job_pkey.
create or replace function jobqueue.count_standing(_ids uuid[], _begins boolean, _ends boolean)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
begin
    if _begins then
        update standing s set blocked_so_far = 0, paused_so_far = 0 where s.blocked_so_far + s.paused_so_far > 0;
    end if;
    insert into standing as s (queue, blocked_so_far, paused_so_far)
    select j.queue, count(*) filter (where j.status = 'blocked'), count(*) filter (where j.status = 'paused')
    from job j
    where j.id = any (_ids) and j.status in ('blocked', 'paused')
    group by j.queue
    on conflict (queue) do update
    set blocked_so_far = s.blocked_so_far + excluded.blocked_so_far, paused_so_far = s.paused_so_far + excluded.paused_so_far;
    if _ends then
        update standing s
        set blocked = s.blocked_so_far, paused = s.paused_so_far
        where (s.blocked, s.paused) <> (s.blocked_so_far, s.paused_so_far);
    end if;
end
$$;
