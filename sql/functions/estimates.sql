-- Estimates: what jobs have taken, and how long one will still take. The model and how well it does: docs/decisions/0007-estimates.md.
-- History is written by maintenance only, so that no completion waits for a row that all completions share.

-- estimate_name: job_type and stage as settings name them: "process document", "ocr" -> PROCESS_DOCUMENT__OCR; stage '': without it.
create or replace function jobqueue.estimate_name(_job_type text, _stage text)
returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select upper(regexp_replace(_job_type, '[^A-Za-z0-9]+', '_', 'g'))
        || case when _stage <> '' then '__' || upper(regexp_replace(_stage, '[^A-Za-z0-9]+', '_', 'g')) else '' end
$$;

-- set_estimates: what is expected as long as nothing has been learned; workers call it with their JOBQUEUE_ESTIMATE__… variables.
--   defaults  {"PROCESS_DOCUMENT__OCR_MS": 3000, "PROCESS_DOCUMENT__OCR_MS_PER_UNIT": 150}; milliseconds, null takes one away
-- Returns how many changed. Errors: JQ400.
create or replace function jobqueue.set_estimates(defaults jsonb)
returns int
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    odd text;
    n int;
    gone int;
begin
    if jsonb_typeof(set_estimates.defaults) is distinct from 'object' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'defaults must be a JSON object.', 'Give something like {"PROCESS_DOCUMENT__OCR_MS": 3000}.');
    end if;
    select d.key into odd
    from jsonb_each(set_estimates.defaults) d
    where d.key !~ '^[A-Z0-9_]+_MS(_PER_UNIT)?$' or length(d.key) > 500 or jsonb_typeof(d.value) not in ('number', 'null')
        or case when jsonb_typeof(d.value) = 'number' then d.value::numeric not between 0 and 1e13 end
    order by d.key limit 1;
    if odd is not null then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('"%s" is not an estimate in milliseconds.', left(odd, 200)),
            'Name it <JOB_TYPE>__<STAGE>_MS or …_MS_PER_UNIT and give a number from 0.', jsonb_build_object('option', left(odd, 200)));
    end if;
    delete from setting s
    using jsonb_each(set_estimates.defaults) d
    where s.name = 'estimate:' || d.key and d.value = 'null';
    get diagnostics gone = row_count;
    insert into setting as s (name, value)
    select 'estimate:' || d.key, d.value from jsonb_each(set_estimates.defaults) d where d.value <> 'null' order by d.key
    on conflict (name) do update set value = excluded.value where s.value <> excluded.value;
    get diagnostics n = row_count;
    return n + gone;
end
$$;

-- expected_seconds: how long a stage ('': the whole job) is expected to take: by its units if it says how many and what one takes is
-- known, else by its mean; learned values before defaults. Null: nobody knows. Index: estimate_pkey, setting_pkey.
create or replace function jobqueue.expected_seconds(_job_type text, _stage text, _units double precision)
returns double precision
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    e jobqueue.estimate;
    name text;
    per_unit double precision;
begin
    select * into e from estimate x where x.job_type = _job_type and x.stage = _stage;
    if e.unit_seconds is null and _units is not null or e.seconds is null then
        name := 'estimate:' || estimate_name(_job_type, _stage);
        per_unit := (setting_of(name || '_MS_PER_UNIT', null))::double precision / 1000;
    end if;
    return coalesce(_units * coalesce(e.unit_seconds, per_unit), e.seconds,
        case when name is not null then (setting_of(name || '_MS', null))::double precision / 1000 end);
end
$$;

-- left_of: seconds that a piece of work still takes.
--   _prior     what it was expected to take in all; null: nobody knows
--   _elapsed   what it has taken so far
--   _fraction  how much of it is done, 0 to 1; null: it does not say
-- The speed so far is weighed against the expectation, which counts as if a quarter of the work had been seen at its speed. Without a
-- fraction the expectation runs down, and never below a tenth of what has passed: a piece that is late is late in proportion.
create or replace function jobqueue.left_of(_prior double precision, _elapsed double precision, _fraction double precision)
returns double precision
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select case
        when _fraction >= 1 then 0
        when _fraction > 0 then (1 - _fraction) * (0.25 * coalesce(_prior, 0) + greatest(_elapsed, 0))
            / (case when _prior is null then 0 else 0.25 end + _fraction)
        when _prior is not null then greatest(_prior - greatest(_elapsed, 0), 0.1 * greatest(_elapsed, 0))
    end
$$;

-- counted_fraction: how much of what an attempt had to count is done: (done - base) of (total - base). Null: it does not count.
create or replace function jobqueue.counted_fraction(_job jobqueue.job, _pace jobqueue.pace)
returns double precision
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select case
        when _pace.base is null or _pace.attempt <> _job.attempt then null
        when _job.progress_total is not null and _job.progress_done is not null then case
            when _job.progress_total > _pace.base
                then least(1, greatest(0, (_job.progress_done - _pace.base)::double precision / (_job.progress_total - _pace.base)))
            else 1 end
        when _pace.stage = '' and _pace.base < 100
            then least(1, greatest(0, (_job.progress_pct - _pace.base)::double precision / (100 - _pace.base)))
    end
$$;

-- seconds_left: how long a running job will still take; null if nothing is known of it. Index: estimate_pkey, pace_pkey, stage_pkey.
create or replace function jobqueue.seconds_left(_job jobqueue.job)
returns double precision
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    p jobqueue.pace;
    fraction double precision;
    prior double precision;
begin
    if _job.current_stage is not null or _job.total_stages is not null then
        return stages_left(_job);
    end if;
    select * into p from pace x where x.job_id = _job.id and x.stage = '';
    fraction := counted_fraction(_job, p);
    prior := expected_seconds(_job.job_type, '', coalesce(p.units, case when p.base is not null then _job.progress_total end));
    -- what an earlier attempt has done is not done again
    if p.base > 0 and p.base < _job.progress_total then
        prior := prior * (_job.progress_total - p.base) / _job.progress_total;
    end if;
    return left_of(prior, extract(epoch from now() - _job.started_at), fraction);
end
$$;

-- stages_left: the same for a job with stages: what is left of the one under way, and those that are still to come. Stages that are done
-- tell by how much this job is larger or slower than usual; that ratio goes for the others too. Null if one of them is unknown.
create or replace function jobqueue.stages_left(_job jobqueue.job)
returns double precision
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    x record;
    p jobqueue.pace;
    ratio double precision := 1;
    per_weight double precision;
    prior double precision;
    own double precision := 0;
begin
    select * into x from stage_sums(_job);
    if x.foretold > 0 then
        -- one stage that is done weighs ten times its share against "as usual"
        ratio := least(10, greatest(0.1, (0.1 * x.usual + x.took) / (0.1 * x.usual + x.foretold)));
    end if;
    per_weight := coalesce(x.took_all / nullif(x.weight_done, 0), ratio * x.usual / nullif(x.weight_known, 0));
    if x.now_started is not null then
        select * into p from pace k where k.job_id = _job.id and k.stage = _job.current_stage;
        prior := coalesce(x.now_by_units, ratio * x.now_usual, per_weight * x.now_weight);
        if p.base > 0 and p.base < _job.progress_total then
            prior := prior * (_job.progress_total - p.base) / _job.progress_total;
        end if;
        own := left_of(prior, extract(epoch from now() - x.now_started)::double precision, counted_fraction(_job, p));
        per_weight := coalesce(per_weight, (extract(epoch from now() - x.now_started)::double precision + own) / x.now_weight);
        -- what is large in this stage is large in the next ones
        ratio := coalesce(least(10, greatest(0.1,
            (0.1 * x.usual + coalesce(x.took, 0) + extract(epoch from now() - x.now_started)::double precision + own)
                / nullif(0.1 * x.usual + coalesce(x.foretold, 0) + x.now_usual, 0))), ratio);
    end if;
    if own is null or x.rest_weight > 0 and per_weight is null then
        return null;
    end if;
    return own + x.rest_by_units + ratio * x.rest_usual + coalesce(x.rest_weight * per_weight, 0)
        + case when _job.total_stages = x.n then 0 else unseen_stages(_job, x.n::int, ratio, per_weight) end;
end
$$;

-- stage_sums: the stages of a job in one row: what those that are done took (took where a usual time is known, took_all) and were usually
-- to take (foretold); the one under way (now_…); the rest by the best that is known of each: its units, its usual time, its weight.
create or replace function jobqueue.stage_sums(_job jobqueue.job)
returns table (n bigint, usual double precision, foretold double precision, took double precision, took_all double precision,
    weight_done double precision, weight_known double precision, now_started timestamptz, now_by_units double precision,
    now_usual double precision, now_weight double precision, rest_by_units double precision, rest_usual double precision,
    rest_weight double precision)
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
begin
    return query select count(*), sum(x.usual), sum(x.usual) filter (where x.took is not null), sum(x.took) filter (where x.usual is not null),
        sum(x.took), sum(x.weight) filter (where x.took is not null), sum(x.weight) filter (where x.usual is not null),
        max(x.started_at) filter (where x.is_now), max(x.by_units) filter (where x.is_now), max(x.usual) filter (where x.is_now),
        max(x.weight) filter (where x.is_now),
        coalesce(sum(x.by_units) filter (where x.to_come), 0),
        coalesce(sum(x.usual) filter (where x.to_come and x.by_units is null), 0),
        coalesce(sum(x.weight) filter (where x.to_come and x.by_units is null and x.usual is null), 0)
    from (
        select s.weight, s.started_at, s.status in ('pending', 'failed') as to_come,
            s.status = 'in_progress' and s.name = _job.current_stage as is_now,
            case when s.status = 'completed' then extract(epoch from s.completed_at - s.started_at)::double precision end as took,
            case when s.status <> 'skipped' then coalesce(e.seconds, expected_seconds(_job.job_type, s.name, null)) end as usual,
            case when u.units is not null and s.status <> 'completed' then expected_seconds(_job.job_type, s.name, u.units) end as by_units
        from stage s
        left join estimate e on e.job_type = _job.job_type and e.stage = s.name
        left join pace p on p.job_id = s.job_id and p.stage = s.name
        -- what the stage under way counts are its units, if it names no others
        cross join lateral (select coalesce(p.units, case
            when s.name = _job.current_stage and p.base is not null and p.attempt = _job.attempt then _job.progress_total end) as units) u
        where s.job_id = _job.id) x;
end
$$;

-- unseen_stages: what stages take that the job has not named yet: those that earlier jobs of its type had, as many as it says there are;
-- without a number those that at least half of them had.
create or replace function jobqueue.unseen_stages(_job jobqueue.job, _named int, _ratio double precision, _per_weight double precision)
returns double precision
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select coalesce(sum(x.seconds * _ratio), 0)
        + coalesce(greatest(0, coalesce(_job.total_stages, 0) - _named - count(x.seconds)) * _per_weight, 0)
    from (
        select e.seconds
        from estimate e
        where e.job_type = _job.job_type and e.stage <> '' and e.seconds is not null
            and not exists (select from stage s where s.job_id = _job.id and s.name = e.stage)
            and (_job.total_stages is not null
                or e.runs * 2 >= (select max(m.runs) from estimate m where m.job_type = _job.job_type and m.stage <> ''))
        order by e.runs desc
        limit case when _job.total_stages is not null then greatest(0, _job.total_stages - _named) else 1000 end) x
$$;

-- next_estimate: the time at which a running job is expected to end, after it has said something new. A change of less than 5 % of what is
-- left, or a second, is none: people watch this figure. What is unknown stays as it was.
create or replace function jobqueue.next_estimate(_job jobqueue.job)
returns timestamptz
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    seconds double precision := seconds_left(_job);
    ends timestamptz;
begin
    if seconds is null then
        return _job.estimated_completion;
    end if;
    ends := now() + make_interval(secs => least(seconds, 315360000));
    if _job.estimated_completion >= now()
        and abs(extract(epoch from ends - _job.estimated_completion)) < greatest(1, 0.05 * seconds)
    then
        return _job.estimated_completion;
    end if;
    return ends;
end
$$;

-- late_estimate: the time at which a job that says nothing is expected to end, for its heartbeat: from history at the beginning; once that
-- time has passed, a tenth of what it has taken so far later, at least 5 s. Null: as it was.
create or replace function jobqueue.late_estimate(_job_type text, _started_at timestamptz, _ends timestamptz)
returns timestamptz
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if _ends < now() then
        return now() + greatest(interval '5 s', (now() - _started_at) / 10);
    end if;
    return now() + make_interval(secs =>
        left_of(expected_seconds(_job_type, '', null), extract(epoch from now() - _started_at)::double precision, null));
end
$$;

-- estimate_units: how much work there is, in units of the handler's own (pages, files): what a unit takes is learned, and the next job
-- is estimated by how many it has.
--   units  a number from 0; stage: the stage that they belong to, null: the whole job
-- Returns the new estimated_completion, or null. Errors: JQ400, JQ404, JQ409 LEASE_LOST.
create or replace function jobqueue.estimate_units(id uuid, token uuid, units double precision, stage text default null)
returns timestamptz
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    j jobqueue.job := lock_claim(estimate_units.id, estimate_units.token);
    ends timestamptz;
begin
    if estimate_units.units is null or not estimate_units.units between 0 and 1e15 then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'units must be a number from 0.', 'Count what takes about the same time each: pages, files.');
    elsif estimate_units.stage = '' or length(estimate_units.stage) > 200 then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'stage must be a name of 1 to 200 characters.');
    end if;
    insert into pace as p (job_id, stage, job_type, attempt, units)
    values (j.id, coalesce(estimate_units.stage, ''), j.job_type, j.attempt, estimate_units.units)
    on conflict (job_id, stage) do update set
        attempt = excluded.attempt,
        units = excluded.units,
        base = case when p.attempt = excluded.attempt then p.base end;
    ends := next_estimate(j);
    update job x
    set life_at = now(),
        estimated_completion = ends,
        version = x.version + (ends is distinct from x.estimated_completion)::int,
        updated_at = case when ends is distinct from x.estimated_completion then now() else x.updated_at end
    where x.id = j.id;
    if ends is distinct from j.estimated_completion then
        perform publish_changes(array[j.id]);
    end if;
    return ends;
end
$$;

-- estimate: when a job will begin and end, as far as that can be known.
--   queue_position  its place in the line, from 1; 10,000 means 10,000 or more; null unless it is pending and due
--   wait_seconds    jobs ahead times their mean duration, divided by the slots of the workers that run them
--   run_seconds     what a run of its type takes; for a running job what is left
--   starts_at, ends_at   null where nobody knows
-- Errors: JQ404. Index: job_claim.
create or replace function jobqueue.estimate(id uuid)
returns table (queue_position int, wait_seconds double precision, run_seconds double precision, starts_at timestamptz, ends_at timestamptz)
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    j jobqueue.job;
begin
    select * into j from job x where x.id = estimate.id;
    if not found or not sees_tenant(j.tenant) then
        perform refuse_job(estimate.id);
    end if;
    run_seconds := run_expectation(j.job_type);
    if j.status = 'processing' then
        starts_at := j.started_at;
        ends_at := greatest(j.estimated_completion, now());
        run_seconds := coalesce(extract(epoch from ends_at - now()), run_seconds);
    elsif j.status = 'pending' then
        select a.queue_position, a.wait_seconds into queue_position, wait_seconds from wait_of(j) a;
        starts_at := case when j.wait_until is not null then greatest(j.wait_until, now())
            else now() + make_interval(secs => wait_seconds) end;
        ends_at := starts_at + make_interval(secs => run_seconds);
    end if;
    return next;
end
$$;

-- run_expectation: what a run of a job_type takes: by whole runs, else by the sum of its stages.
create or replace function jobqueue.run_expectation(_job_type text)
returns double precision
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select coalesce(expected_seconds(_job_type, '', null),
        (select sum(e.seconds) from estimate e where e.job_type = _job_type and e.stage <> ''))
$$;

-- ahead_of: the job_types of the jobs that are claimed before a pending one, at most so many. _line: its row in the admission line; null if it
-- is ready. One that waits for a slot of its key or group, or for a token of its key, stands in the line of those only. With fairness the
-- lanes take turns. Index: job_claim, admission_line_order, admission_gate, each read backwards from the job, so that the entries of jobs long
-- claimed at the front are met last. Its settings are those of its callers.
create or replace function jobqueue.ahead_of(_job jobqueue.job, _line jobqueue.admission_line, _max int)
returns setof text
language plpgsql stable
as $$
begin
    if _line.stage in (1, 2, 3) then
        return query select j.job_type
        from (select x.job_id from admission_line x
            where x.queue_number = _line.queue_number and x.stage = _line.stage and x.line = _line.line
                and (x.rank, x.seq) < (_line.rank, _line.seq)
            order by x.rank desc, x.seq desc limit _max) a
        join job j on j.id = a.job_id;
        return;
    end if;
    if _line.job_id is null then
        return query select x.job_type
        from job x
        where x.queue = _job.queue and x.ready_seq is not null and (-x.priority, x.ready_seq) < (-_job.priority, _job.ready_seq)
        order by (-x.priority) desc, x.ready_seq desc
        limit _max;
        return;
    end if;
    return query select x.job_type
    from job x
    where x.queue = _job.queue and x.ready_seq is not null
    order by (-x.priority) desc, x.ready_seq desc
    limit _max;
    if _line.stage = 4 then
        return query select j.job_type
        from (select g.job_id, g.rank, row_number() over (partition by g.rank, g.line order by g.seq) as turn, g.line = _line.line as mine, g.seq
            from (select x.* from admission_line x
                where x.queue_number = _line.queue_number and x.stage = 4 and x.rank <= _line.rank order by x.rank desc limit _max) g) a
        join job j on j.id = a.job_id
        where a.rank < _line.rank or a.turn < (
                select count(*) + 1 from admission_line y
                where y.queue_number = _line.queue_number and y.stage = 4 and y.rank = _line.rank and y.line = _line.line and y.seq < _line.seq)
            or (a.mine and a.seq < _line.seq);
    else
        -- it has just come: those at the gate, and who came with it
        return query select j.job_type
        from (select x.job_id, x.own_rank, 0 as seq from (select y.* from admission_line y
                where y.queue_number = _line.queue_number and y.stage = 4 order by y.rank limit _max) x
            union all select x.job_id, x.own_rank, x.seq from (select y.* from admission_line y
                where y.queue_number = _line.queue_number and y.stage = 0 and y.line = '' and y.rank = 0 order by y.seq desc limit _max) x) a
        join job j on j.id = a.job_id
        where (a.own_rank, a.seq) < (_line.own_rank, _line.seq)
        limit _max;
    end if;
end
$$;

-- wait_of: the place of a pending job in its line and how long it waits there: the jobs ahead times what they take, divided by the slots
-- of the workers that would run them, or of the limit if that is less; a rate may ask for more. In a line that is full it waits for one end
-- more than jobs are ahead. Null if there is no such worker, or nothing is known of those jobs.
create or replace function jobqueue.wait_of(_job jobqueue.job, out queue_position int, out wait_seconds double precision)
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    q jobqueue.queue := (select x from queue x where x.name = _job.queue);
    l jobqueue.admission_line;
    slots bigint;
    work double precision;
begin
    if _job.ready_seq is null then
        select * into l from admission_line x where x.job_id = _job.id and x.stage <> 6;
        if not found then
            return;
        end if;
    end if;
    -- types without a history count as the mean of the others
    select 1 + coalesce(sum(k.n), 0), sum(k.n * k.seconds) * sum(k.n) / nullif(sum(k.n) filter (where k.seconds is not null), 0)
    into queue_position, work
    from (
        select a.job_type, count(*) as n, run_expectation(a.job_type) as seconds
        from ahead_of(_job, l, 9999) a (job_type)
        group by a.job_type) k;
    if l.stage between 1 and 4 then
        work := coalesce(work * queue_position / nullif(queue_position - 1, 0), run_expectation(_job.job_type));
    end if;
    select least(sum(coalesce(w.concurrency, greatest(w.running, 1))), q.concurrency,
        case when l.stage in (1, 2) then stage_limit(q, l.stage, l.tier) end) into slots
    from worker w
    where w.stopped_at is null and w.drain_requested_at is null and w.heartbeat_at > now() - interval '30 s'
        and (w.queues is null or _job.queue = any (w.queues)) and (w.job_types is null or _job.job_type = any (w.job_types));
    wait_seconds := case when slots is null then null when work is null and queue_position = 1 then 0 else work / slots end;
    if l.stage = 3 or l.stage = 4 and q.rate_limit ->> 'per' = 'queue' then
        wait_seconds := greatest(wait_seconds,
            queue_position * (q.rate_limit ->> 'period')::double precision / (q.rate_limit ->> 'limit')::double precision);
    end if;
end
$$;
