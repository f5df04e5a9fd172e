-- Statistics: what ended, how long it waited and ran, and how many jobs stand where, per queue and minute, later per hour.
--
--   settle, end_attempt, expire  --> statistics_note   one append-only row per call and queue
--   maintain: fold_statistics    --> statistic         every 10 s, minutes; durations as a histogram (and totals for ever: totals.sql)
--   maintain: sample_statistics  --> statistic         once a minute: how many jobs are ready, scheduled …
--   maintain: keep_statistics                          minutes become hours after 7 days; hours go after 90
--
-- Durations lie in 255 bins, each 1.1 times as wide as the one before, from 0.1 ms to 37 days; a percentile is the geometric middle of its
-- bin, so that it is at most sqrt(1.1) - 1 = 4.9 % away from the true one. What is shorter than 0.1 ms counts as that.
-- A histogram is a list of bin + 256 * number: adding histograms is joining the lists.

-- bin_of: the bin of a duration in seconds.
create or replace function jobqueue.bin_of(_seconds double precision)
returns bigint
language sql immutable parallel safe
-- without a fixed search_path, so that it becomes a part of the query that calls it for every job
as $$
    select least(floor(pg_catalog.ln(greatest(_seconds, 0.0001) / 0.0001) / pg_catalog.ln(1.1::double precision)), 254)::bigint
$$;

-- add_bins: joined histograms with one entry per bin, in order.
create or replace function jobqueue.add_bins(_bins bigint[])
returns bigint[]
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(array_agg(b.bin + 256 * b.n order by b.bin), '{}')
    from (select v & 255 as bin, sum(v >> 8)::bigint as n from unnest(_bins) v group by 1) b
$$;

-- percentile: the duration in seconds that a share (0 to 1) of a histogram does not exceed, within 4.9 %; null if it is empty.
create or replace function jobqueue.percentile(_bins bigint[], _share double precision)
returns double precision
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
    select 0.0001 * power(1.1::double precision, b.bin + 0.5)
    from (select v & 255 as bin, sum(v >> 8) over (order by v & 255) as upto, sum(v >> 8) over () as total from unnest(_bins) v) b
    where b.upto >= ceil(_share * b.total)
    order by b.bin
    limit 1
$$;

-- note_completed: the notes of completed jobs of several queues, one per queue and job_type; settle writes those of one queue itself.
-- Index: job_pkey.
create or replace function jobqueue.note_completed(_ids uuid[])
returns void
language sql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    insert into statistics_note (queue, job_type, completed, waits, runs)
    select j.queue, nullif(j.job_type, j.queue), count(*), array_agg(date_part('epoch', j.started_at - greatest(j.run_at, j.created_at))::real),
        array_agg(date_part('epoch', j.completed_at - j.started_at)::real)
    from job j
    where j.id = any (_ids)
    group by j.queue, j.job_type
$$;

-- note_attempt: the note of an attempt that ended badly. What was released or snoozed did not fail, and a lost worker says nothing about
-- how long the attempt ran.
create or replace function jobqueue.note_attempt(_job jobqueue.job, _outcome text, _to text)
returns void
language sql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    insert into statistics_note (queue, job_type, failed, failed_attempts, retried, waits, runs)
    select _job.queue, nullif(_job.job_type, _job.queue), (_to = 'failed')::int, 1, (_to = 'pending')::int,
        case when _outcome <> 'lost' then array[date_part('epoch', _job.started_at - greatest(_job.run_at, _job.created_at))::real] end,
        case when _outcome <> 'lost' then array[date_part('epoch', now() - _job.started_at)::real] end
$$;

-- sum_notes: notes as rows of statistics, one per queue and minute. Index: statistics_note_pkey.
create or replace function jobqueue.sum_notes(_ids bigint[])
returns setof jobqueue.statistic
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set jit = off
as $$
    with note as materialized (
        select n.*, date_trunc('minute', n.noted_at, 'UTC') as minute from statistics_note n
        where n.id = any (_ids) and n.from_status is null),
    waited as (
        select b.queue, b.minute, sum(b.seconds) as seconds, array_agg(b.bin + 256 * b.n) as bins
        from (select n.queue, n.minute, bin_of(w) as bin, count(*) as n, sum(greatest(w, 0)::double precision) as seconds
            from note n cross join lateral unnest(n.waits) w group by 1, 2, 3) b
        group by 1, 2),
    ran as (
        select b.queue, b.minute, sum(b.seconds) as seconds, array_agg(b.bin + 256 * b.n) as bins
        from (select n.queue, n.minute, bin_of(r) as bin, count(*) as n, sum(greatest(r, 0)::double precision) as seconds
            from note n cross join lateral unnest(n.runs) r group by 1, 2, 3) b
        group by 1, 2),
    counted as (
        select n.queue, n.minute, sum(n.completed) as completed, sum(n.failed) as failed, sum(n.failed_attempts) as failed_attempts,
            sum(n.retried) as retried
        from note n
        group by 1, 2)
    select c.queue, c.minute, 1::smallint, 0::bigint, c.completed, c.failed, c.failed_attempts, c.retried, coalesce(w.seconds, 0),
        coalesce(r.seconds, 0), coalesce(w.bins, '{}'), coalesce(r.bins, '{}'), null::int, null::int, null::int, null::int, null::int, null::int,
        null::double precision
    from counted c
    left join waited w using (queue, minute)
    left join ran r using (queue, minute)
$$;

-- merge_statistic: add a row to what is stored for its queue and time; of the numbers of standing jobs the larger one stays.
create or replace function jobqueue.merge_statistic(_row jobqueue.statistic)
returns void
language sql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    insert into statistic as s
    select (_row).*
    on conflict (queue, begins_at, minutes) do update
    set sent = s.sent + excluded.sent,
        completed = s.completed + excluded.completed,
        failed = s.failed + excluded.failed,
        failed_attempts = s.failed_attempts + excluded.failed_attempts,
        retried = s.retried + excluded.retried,
        wait_seconds = s.wait_seconds + excluded.wait_seconds,
        run_seconds = s.run_seconds + excluded.run_seconds,
        waits = add_bins(s.waits || excluded.waits),
        runs = add_bins(s.runs || excluded.runs),
        ready = greatest(s.ready, excluded.ready),
        scheduled = greatest(s.scheduled, excluded.scheduled),
        blocked = greatest(s.blocked, excluded.blocked),
        processing = greatest(s.processing, excluded.processing),
        paused = greatest(s.paused, excluded.paused),
        failed_jobs = greatest(s.failed_jobs, excluded.failed_jobs),
        oldest_ready_seconds = greatest(s.oldest_ready_seconds, excluded.oldest_ready_seconds)
$$;

-- open_notes: the notes that have not been folded, oldest first. Under an old snapshot the folded ones stay in the index; they lie below
-- the floor that fold_statistics keeps.
create or replace function jobqueue.open_notes(_max int)
returns bigint[]
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
    select array(
        select n.id
        from statistics_note n
        where n.id > coalesce((select (m.state ->> 'floor')::bigint from maintenance m where m.step = 'fold_statistics'), 0)
        order by n.id
        limit _max)
$$;

-- fold_statistics: move notes into the rows of their minutes. Returns how many, and the state to keep: floor, below which no note can be;
-- it rises to next when every transaction of that time (xid) has ended, for a note that is not visible yet may have a lower number.
create or replace function jobqueue.fold_statistics(_state jsonb, _max int, out folded int, out state jsonb)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    ids bigint[] := open_notes(_max);
    oldest bigint := pg_snapshot_xmin(pg_current_snapshot())::text::bigint;
begin
    folded := cardinality(ids);
    state := coalesce(_state, '{}');
    if (state ->> 'xid')::bigint > pg_snapshot_xmax(pg_current_snapshot())::text::bigint then
        -- an id of the server that this database was dumped on
        state := state || jsonb_build_object('xid', pg_snapshot_xmax(pg_current_snapshot())::text::bigint);
    elsif coalesce((state ->> 'xid')::bigint <= oldest, true) then
        state := jsonb_build_object('floor', coalesce((state ->> 'next')::bigint, 0),
            'next', coalesce(ids[folded], (state ->> 'next')::bigint, 0), 'xid', pg_snapshot_xmax(pg_current_snapshot())::text::bigint);
    end if;
    if folded > 0 then
        perform merge_statistic(s) from sum_notes(ids) s;
        perform add_totals(ids);
        delete from statistics_note n where n.id = any (ids);
    end if;
end
$$;

-- keep_statistics: make one row of an hour out of the minutes that are older than the setting statistics_keep_minutes (7 days), and drop
-- the hours older than statistics_keep_hours (90 days). At most a day's worth per call. Returns how many rows went. Index: statistic_age.
create or replace function jobqueue.keep_statistics()
returns int
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set jit = off
as $$
declare
    upto timestamptz := date_trunc('hour',
        now() - to_interval(setting_of('statistics_keep_minutes', '"7 days"'), 'statistics_keep_minutes'), 'UTC');
    low timestamptz;
    s jobqueue.statistic;
    n int := 0;
    total int := 0;
begin
    select min(x.begins_at) into low from statistic x where x.minutes = 1 and x.begins_at < upto;
    upto := least(upto, date_trunc('hour', low, 'UTC') + interval '1 day');
    for s in
        delete from statistic x where x.minutes = 1 and x.begins_at < upto returning x.*
    loop
        s.begins_at := date_trunc('hour', s.begins_at, 'UTC');
        s.minutes := 60;
        perform merge_statistic(s);
        total := total + 1;
    end loop;
    delete from statistic x
    where x.minutes = 60
        and x.begins_at < now() - to_interval(setting_of('statistics_keep_hours', '"90 days"'), 'statistics_keep_hours');
    get diagnostics n = row_count;
    return total + n;
end
$$;

-- first_id: the lowest id that a job of a time can have; ids are version 7 uuids unless the sender chose others.
create or replace function jobqueue.first_id(_at timestamptz)
returns uuid
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select rpad(lpad(to_hex((extract(epoch from _at) * 1000)::bigint), 12, '0'), 32, '0')::uuid
$$;

-- sent_in: how many jobs with an id of a minute there are, per queue; counted no further than 100,000. Without those that were sent with an
-- id of their own or are gone already: a send leaves no note, so that it costs nothing more. Index: job_pkey.
create or replace function jobqueue.sent_in(_minute timestamptz, _queue text default null)
returns table (queue text, sent bigint)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
    select j.queue, count(*)
    from (select k.queue from job k where k.id >= first_id(_minute) and k.id < first_id(_minute + interval '1 min') limit 100000) j
    where _queue is null or j.queue = _queue
    group by j.queue
$$;

-- sample_statistics: note how many jobs stand where now, and how many were sent in the minutes before. Returns how many rows were written,
-- and the state: sent_until, up to which sent jobs are counted.
create or replace function jobqueue.sample_statistics(_state jsonb, out sampled int, out state jsonb)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    minute timestamptz := date_trunc('minute', now(), 'UTC');
    upto timestamptz := greatest(coalesce((_state ->> 'sent_until')::timestamptz, minute - interval '1 min'), minute - interval '1 hour');
    low timestamptz := upto;
begin
    select count(*) into sampled from (select merge_statistic(g) from statistics_now(null, minute) g) m;
    -- ten minutes at a time: nothing else is maintained meanwhile
    while upto < least(minute, low + interval '10 min') loop
        perform merge_statistic(row(c.queue, upto, 1, c.sent, 0, 0, 0, 0, 0, 0, '{}', '{}', null, null, null, null, null, null, null)::jobqueue.statistic)
        from sent_in(upto) c;
        upto := upto + interval '1 min';
    end loop;
    state := jsonb_build_object('sent_until', upto);
end
$$;
