-- What estimates are learned from: rows of jobqueue.pace, written while jobs run, read by maintenance into jobqueue.estimate.
-- No completion waits for a row that all completions share.

-- begin_count: remember where an attempt began to count, in its stage ('': outside of stages): a first attempt at 0, others at what they
-- took over, that is their first count, if it is not more than the last one before them. Called for every report; writes once.
create or replace function jobqueue.begin_count(_job jobqueue.job, _stage text, _first bigint, _before bigint)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    start bigint := case when _job.attempt > 1 and _before is not null then least(_first, _before) else 0 end;
begin
    if exists (select from pace p where p.job_id = _job.id and p.stage = _stage and p.attempt = _job.attempt and p.base is not null) then
        return;
    end if;
    insert into pace as p (job_id, stage, job_type, attempt, base)
    values (_job.id, _stage, _job.job_type, _job.attempt, start)
    on conflict (job_id, stage) do update set attempt = excluded.attempt, base = excluded.base;
end
$$;

-- note_stage: a stage of a job begins (_took null) or is completed after so many seconds: for the history.
create or replace function jobqueue.note_stage(_job jobqueue.job, _stage text, _took double precision)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if _took is null then
        insert into pace as p (job_id, stage, job_type, attempt) values (_job.id, '', _job.job_type, _job.attempt)
        on conflict (job_id, stage) do update set attempt = excluded.attempt, base = null where p.attempt <> excluded.attempt;
        -- a stage that runs again begins to count again
        update pace p set base = null, seconds = null, counted = null where p.job_id = _job.id and p.stage = _stage;
        return;
    end if;
    insert into pace as p (job_id, stage, job_type, attempt, seconds) values (_job.id, _stage, _job.job_type, _job.attempt, _took)
    on conflict (job_id, stage) do update set
        attempt = excluded.attempt,
        seconds = excluded.seconds,
        base = case when p.attempt = excluded.attempt then p.base end,
        counted = case when p.attempt = excluded.attempt then greatest(0, _job.progress_total - p.base) end;
end
$$;

-- sample_runs: pick a few jobs whose runs are to be learned although they say nothing of themselves: of the newest claims, and those that
-- ended since the last look among the newest jobs. At most 40 look-ups and 5,000 rows in wait, however many jobs run.
-- Index: claim_batch_pkey, job_pkey (version 7 ids sort by time).
create or replace function jobqueue.sample_runs(_since timestamptz)
returns int
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    newest uuid := (lpad(to_hex((extract(epoch from now()) * 1000)::bigint + 1000), 12, '0') || repeat('f', 20))::uuid;
    n int;
begin
    insert into pace (job_id, stage, job_type, attempt)
    select x.id, '', x.job_type, 1
    from (
        select j.id, j.job_type
        from (select b.job_ids[1:4] as ids from claim_batch b order by b.id desc limit 5) c
        cross join unnest(c.ids) u (id)
        join job j on j.id = u.id
        where j.status = 'processing' and j.attempt = 1
        union
        select k.id, k.job_type
        from (select * from job j where j.id <= newest order by j.id desc limit 20) k
        where k.status = 'completed' and k.attempt = 1 and k.completed_at > _since) x
    where (select count(*) from (select from pace limit 5000) p) < 5000
    on conflict do nothing;
    get diagnostics n = row_count;
    return n;
end
$$;

-- learn_estimates: read what has ended among the rows of pace into estimate, and drop those rows; a portion of _max, from _from on.
-- A run that took up the work of an earlier one says what a unit takes, but not what a run takes. Returns how many runs were learned,
-- and where to go on; null when all were looked at. Index: pace_pkey, job_pkey.
create or replace function jobqueue.learn_estimates(_from uuid, _max int, out learned int, out next_from uuid)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    seen bigint;
begin
    with walked as materialized (
        select p.*, j.id is null or j.status in ('completed', 'failed', 'cancelled', 'skipped') as ended,
            j.status = 'completed' and j.attempt = p.attempt as completed,
            extract(epoch from j.completed_at - j.started_at)::double precision as took, j.progress_total
        from (
            select * from pace x where x.job_id >= coalesce(_from, '00000000-0000-0000-0000-000000000000')
            order by x.job_id, x.stage limit _max) p
        left join job j on j.id = p.job_id),
    runs as materialized (
        select w.job_id, w.job_type, w.stage, coalesce(w.seconds, w.took) as seconds,
            coalesce(w.base = 0, w.attempt = 1) as whole,
            case when w.base > 0 then coalesce(w.counted, w.progress_total - w.base)
                when w.base = 0 or w.attempt = 1
                    then coalesce(w.units, w.counted, case when w.base is not null then w.progress_total end) end as units
        from walked w
        where w.seconds is not null or w.stage = '' and w.completed),
    dropped as (
        delete from pace p using walked w
        where p.job_id = w.job_id and p.stage = w.stage and (w.ended or w.seconds is not null)),
    means as (
        -- one run in a hundred that hangs must not spoil the mean: at most ten times what is known
        select r.job_type, r.stage, count(*) filter (where r.whole) as n,
            avg(least(r.seconds, case when e.runs >= 5 then 10 * e.seconds else r.seconds end)) filter (where r.whole) as seconds,
            count(*) filter (where r.units > 0) as unit_n,
            sum(r.seconds) filter (where r.units > 0) / sum(r.units) filter (where r.units > 0) as unit_seconds
        from runs r
        left join estimate e on e.job_type = r.job_type and e.stage = r.stage
        group by r.job_type, r.stage),
    stored as (
        -- the mean of all as long as they are few, then a tenth for each new one
        insert into estimate as e (job_type, stage, seconds, runs, unit_seconds, unit_runs)
        select m.job_type, m.stage, m.seconds, m.n, m.unit_seconds, m.unit_n from means m
        on conflict (job_type, stage) do update set
            seconds = coalesce(e.seconds + (excluded.seconds - e.seconds)
                * greatest(1 - power(0.9, excluded.runs), excluded.runs::double precision / greatest(1, e.runs + excluded.runs)),
                excluded.seconds, e.seconds),
            runs = e.runs + excluded.runs,
            unit_seconds = coalesce(e.unit_seconds + (excluded.unit_seconds - e.unit_seconds)
                * greatest(1 - power(0.9, excluded.unit_runs), excluded.unit_runs::double precision / greatest(1, e.unit_runs + excluded.unit_runs)),
                excluded.unit_seconds, e.unit_seconds),
            unit_runs = e.unit_runs + excluded.unit_runs,
            updated_at = now())
    select (select count(*) from runs), count(*), max(w.job_id::text)::uuid into learned, seen, next_from from walked w;
    if seen < _max then
        next_from := null;
    end if;
end
$$;
