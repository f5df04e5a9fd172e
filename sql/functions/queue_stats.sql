-- queue_stats: how a queue does over time, one row per bucket, oldest first.
--   queue   its name; null: all queues together
--   since   from when on; an hour before until unless told
--   until   up to when; now unless told
--   bucket  width of a row: whole minutes; 1 minute unless told. Buckets begin at multiples of it since 1970, UTC; at most 10,000 of them
-- Counted per bucket: sent, completed, failed (jobs that ended so), failed_attempts (retried ones included), retried; throughput is completed
-- jobs per second. wait_… is the time from being due to the claim, run_… from the claim to the end, in seconds, over the attempts that ended in
-- the bucket, completed or failed; percentiles are within 4.9 %. ready … oldest_ready_seconds are sampled once a minute while a worker runs:
-- a bucket has the most of its minutes, the one that is now has them as they are now. Null: nobody looked.
-- What is older than 7 days is kept per hour, for 90 days. Errors: JQ400, JQ404.
create or replace function jobqueue.queue_stats(
    queue text default null, since timestamptz default null, until timestamptz default null, bucket interval default null)
returns table (
    begins_at timestamptz, ends_at timestamptz, sent bigint, completed bigint, failed bigint, failed_attempts bigint, retried bigint,
    throughput double precision, wait_mean double precision, wait_p50 double precision, wait_p95 double precision, wait_p99 double precision,
    run_mean double precision, run_p50 double precision, run_p95 double precision, run_p99 double precision,
    ready int, scheduled int, blocked int, processing int, paused int, failed_jobs int, oldest_ready_seconds double precision)
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
set jit = off
as $$
#variable_conflict use_column
declare
    upto timestamptz := coalesce(queue_stats.until, now());
    width interval := coalesce(queue_stats.bucket, interval '1 min');
    low timestamptz;
    n int;
begin
    select c.low, c.n into low, n
    from check_stats_range(queue_stats.queue, coalesce(queue_stats.since, upto - interval '1 hour'), upto, width) c;
    width := make_interval(secs => extract(epoch from width)::double precision);
    return query
        with part as materialized (
            select s.*, floor(extract(epoch from s.begins_at - low) / extract(epoch from width))::int as i
            from statistics_between(queue_stats.queue, low, low + n * width) s),
        counted as (
            select p.i, sum(p.sent)::bigint as sent, sum(p.completed)::bigint as completed, sum(p.failed)::bigint as failed,
                sum(p.failed_attempts)::bigint as failed_attempts, sum(p.retried)::bigint as retried, sum(p.wait_seconds) as waited,
                sum(p.run_seconds) as ran
            from part p
            group by 1),
        waits as (select p.i, add_bins(array_agg(v)) as bins, sum(v >> 8)::double precision as n from part p, unnest(p.waits) v group by 1),
        runs as (select p.i, add_bins(array_agg(v)) as bins, sum(v >> 8)::double precision as n from part p, unnest(p.runs) v group by 1),
        gauges as (
            select m.i, max(m.ready)::int as ready, max(m.scheduled)::int as scheduled, max(m.blocked)::int as blocked,
                max(m.processing)::int as processing, max(m.paused)::int as paused, max(m.failed_jobs)::int as failed_jobs, max(m.oldest) as oldest
            from (
                select p.i, sum(p.ready) as ready, sum(p.scheduled) as scheduled, sum(p.blocked) as blocked, sum(p.processing) as processing,
                    sum(p.paused) as paused, sum(p.failed_jobs) as failed_jobs, max(p.oldest_ready_seconds) as oldest
                from part p
                group by p.i, p.begins_at, p.minutes) m
            group by 1)
        select b.at, b.at + width, coalesce(c.sent, 0), coalesce(c.completed, 0), coalesce(c.failed, 0), coalesce(c.failed_attempts, 0),
            coalesce(c.retried, 0),
            coalesce(c.completed, 0) / greatest(extract(epoch from least(b.at + width, greatest(now(), b.at)) - b.at)::double precision, 1),
            c.waited / w.n, percentile(w.bins, 0.5), percentile(w.bins, 0.95), percentile(w.bins, 0.99),
            c.ran / r.n, percentile(r.bins, 0.5), percentile(r.bins, 0.95), percentile(r.bins, 0.99),
            g.ready, g.scheduled, g.blocked, g.processing, g.paused, g.failed_jobs, g.oldest
        from (select x as i, low + x * width as at from generate_series(0, n - 1) x) b
        left join counted c on c.i = b.i
        left join waits w on w.i = b.i
        left join runs r on r.i = b.i
        left join gauges g on g.i = b.i
        order by b.i;
end
$$;

-- check_stats_range: when the first bucket begins, and how many there are. Errors: JQ400, JQ404.
create or replace function jobqueue.check_stats_range(
    _queue text, _since timestamptz, _until timestamptz, _bucket interval, out low timestamptz, out n int)
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    seconds numeric := extract(epoch from _bucket);
    first numeric;
begin
    if _queue is not null and not exists (select from queue q where q.name = _queue)
        and not exists (select from statistic s where s.queue = _queue) then
        perform refuse_queue(_queue);
    elsif seconds < 60 or seconds % 60 <> 0 then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('bucket must be a number of whole minutes, not %s.', _bucket),
            'Give something like interval ''5 min''.', '{"option": "bucket"}');
    elsif not (isfinite(_since) and isfinite(_until)) or _since >= _until then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'since must be before until.', '', '{"option": "since"}');
    end if;
    first := floor(extract(epoch from _since) / seconds);
    if ceil(extract(epoch from _until) / seconds) - first > 10000 then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('From %s to %s there are more than 10,000 buckets of %s.', _since, _until, _bucket),
            'Make the buckets wider, or the time shorter.', '{"option": "bucket"}');
    end if;
    n := ceil(extract(epoch from _until) / seconds) - first;
    low := to_timestamp((first * seconds)::double precision);
end
$$;

-- statistics_between: the rows of a time with what is not in them yet: notes that wait to be folded, what was sent in the last minutes, and,
-- if the time reaches until now, how many jobs stand where now. Index: statistic_pkey, statistic_age.
create or replace function jobqueue.statistics_between(_queue text, _from timestamptz, _until timestamptz)
returns setof jobqueue.statistic
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set jit = off
as $$
declare
    minute timestamptz := date_trunc('minute', now(), 'UTC');
    reaches_now boolean := minute >= _from and minute < _until;
    s jobqueue.statistic;
begin
    for s in
        select x.* from statistic x
        where x.begins_at >= _from and x.begins_at < _until and (_queue is null or x.queue in (_queue, ''))
        union all
        select y.* from sum_notes(open_notes(100000)) y
        where y.begins_at >= _from and y.begins_at < _until and (_queue is null or y.queue = _queue)
    loop
        if reaches_now and s.begins_at = minute then
            s := row(s.queue, s.begins_at, s.minutes, s.sent, s.completed, s.failed, s.failed_attempts, s.retried, s.wait_seconds, s.run_seconds,
                s.waits, s.runs, null, null, null, null, null, null, null)::jobqueue.statistic;
        end if;
        return next s;
    end loop;
    if reaches_now then
        return query select * from statistics_now(_queue, minute);
        return query
            select c.queue, m, 1::smallint, c.sent, 0::bigint, 0::bigint, 0::bigint, 0::bigint, 0::double precision, 0::double precision,
                '{}'::bigint[], '{}'::bigint[], null::int, null::int, null::int, null::int, null::int, null::int, null::double precision
            from generate_series(greatest(_from, minute - interval '5 min', (
                select (x.state ->> 'sent_until')::timestamptz from maintenance x where x.step = 'sample_statistics')), minute, interval '1 min') m
            cross join lateral sent_in(m, _queue) c;
    end if;
end
$$;

-- statistics_now: how many jobs stand where now, as rows of statistics; the row without a name says that somebody looked.
create or replace function jobqueue.statistics_now(_queue text, _minute timestamptz)
returns setof jobqueue.statistic
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select g.queue, _minute, 1::smallint, 0::bigint, 0::bigint, 0::bigint, 0::bigint, 0::bigint, 0::double precision, 0::double precision,
        '{}'::bigint[], '{}'::bigint[], g.ready, g.scheduled, g.blocked, g.processing, g.paused, g.failed_jobs, g.oldest_ready_seconds
    from (
        select * from queue_gauges(_queue)
        union all
        select '', 0, 0, 0, 0, 0, 0, null) g
$$;
