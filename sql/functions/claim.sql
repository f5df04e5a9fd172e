-- Claims. A claim reads the index job_claim from its front, where the dead entries of consumed jobs lie. A worker therefore remembers,
-- per priority, the smallest ready_seq of its last claim (its floor) and reads only the ranges between the holes that it knows:
-- with floors {r1: f1, r2: f2} the keys (-2^31, 0)..r1, (r1, f1)..r2, (r2, f2)..2^31-1. A rank is -priority.
-- Measurements and the traps that these statements avoid: docs/decisions/0003-claims.md.

-- claim_queue: claim jobs of one queue from ranges of its line.
--   _ranks_from, _seqs_from, _ranks_to  range i holds the keys from (rank, seq) up to, excluding, the rank _ranks_to[i]
--   _seqs_to     if given, range i is instead the one rank _ranks_from[i], up to, excluding, this seq (the sweep below the floors)
--   _start       so many of the jobs start at once; the rest waits in the worker (decides what a lost worker costs)
--   _suspects    how many jobs that have lost a worker may be among them; null: any number
--   _job_types   only these; null: any
-- Returns the jobs in the order of the line. Index: job_claim, job_suspects.
create or replace function jobqueue.claim_queue(
    _queue text, _worker uuid, _ranks_from int[], _seqs_from bigint[], _ranks_to int[], _seqs_to bigint[],
    _max_jobs int, _start int, _suspects int, _job_types text[])
returns table (
    claim_id bigint, id uuid, claim_token uuid, queue text, job_type text, payload jsonb, priority int, ready_seq bigint,
    tenant text, subject text, display_name text, metadata jsonb, stats jsonb, options jsonb, attempt int, retry_count int,
    created_at timestamptz, created_by text, started_at timestamptz, lease_until timestamptz, timeout double precision, max_runtime double precision,
    suspect boolean, checkpoint_id bigint, total_stages int, batch_id uuid, group_key text, singleton_key text, run_at timestamptz)
language plpgsql security definer
-- jobqueue twice: it notes itself what it claims (guard.sql)
set search_path = pg_catalog, jobqueue, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set enable_sort = off
set jit = off
-- never planned anew: a claim of one job took 1.7 ms with a plan for its values, 1.2 ms with the generic one
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
    lease interval;
    not_types text[];
    not_tenants text[];
    targets tid[];
    seqs bigint[];
    more tid[];
    more_seqs bigint[];
    wanted int := _max_jobs;
    seconds double precision;
    most_seconds double precision;
    limited boolean;
begin
    -- what is paused, and the defaults of the queue, in one look-up
    select q.lease, extract(epoch from q.timeout), extract(epoch from q.max_runtime), q.limited,
        (select array_agg(t.name) from job_type t where t.paused_at is not null),
        (select array_agg(p.tenant) from tenant_pause p)
    into lease, seconds, most_seconds, limited, not_types, not_tenants
    from queue q where q.name = _queue and q.paused_at is null;
    if not found then
        return;
    end if;
    if limited then
        perform admit_for_claim(_queue, _max_jobs);
    end if;

    -- a job that has lost a worker first: it can only start at once, and a line that never empties must not keep it out
    if _suspects > 0 and _seqs_to is null then
        select array_agg(x.t), array_agg(x.s) into more, more_seqs
        from (
            select j.ctid as t, j.ready_seq as s
            from job j
            where j.queue = _queue and j.suspect and j.ready_seq is not null
                and (_job_types is null or j.job_type = any (_job_types))
                and (not_types is null or j.job_type <> all (not_types))
                and (not_tenants is null or j.tenant <> all (not_tenants))
            order by (-j.priority), j.ready_seq
            limit least(_suspects, _max_jobs)
            for update skip locked) x;
        wanted := _max_jobs - coalesce(cardinality(more), 0);
    end if;

    if _seqs_to is not null then
        select array_agg(x.t), array_agg(x.s) into targets, seqs
        from (
            select x.t, x.s
            from unnest(_ranks_from, _seqs_from, _seqs_to) r (rank, low, high)
            cross join lateral (
                select j.ctid as t, j.ready_seq as s
                from job j
                where j.queue = _queue and j.ready_seq is not null
                    and (-j.priority) = r.rank and j.ready_seq >= r.low and j.ready_seq < r.high
                    and not j.suspect
                    and (_job_types is null or j.job_type = any (_job_types))
                    and (not_types is null or j.job_type <> all (not_types))
                    and (not_tenants is null or j.tenant <> all (not_tenants))
                    and (j.expires_at is null or j.expires_at > now())
                order by (-j.priority), j.ready_seq
                limit _max_jobs
                for update skip locked) x
            limit _max_jobs) x;
    else
        select array_agg(x.t), array_agg(x.s) into targets, seqs
        from (
            select x.t, x.s
            from unnest(_ranks_from, _seqs_from, _ranks_to) r (rank, low, rank_to)
            cross join lateral (
                select j.ctid as t, j.ready_seq as s
                from job j
                where j.queue = _queue and j.ready_seq is not null
                    -- the row comparison is a lower bound only: as an upper bound it does not stop the scan before PostgreSQL 16
                    and (-j.priority, j.ready_seq) >= (r.rank, r.low) and (-j.priority) < r.rank_to
                    and (_suspects is null or not j.suspect)
                    and (_job_types is null or j.job_type = any (_job_types))
                    and (not_types is null or j.job_type <> all (not_types))
                    and (not_tenants is null or j.tenant <> all (not_tenants))
                    and (j.expires_at is null or j.expires_at > now())
                order by (-j.priority), j.ready_seq
                limit wanted
                for update skip locked) x
            limit wanted) x;
    end if;
    targets := more || targets;
    seqs := more_seqs || seqs;
    if targets is null then
        return;
    end if;
    return query
        with taken as (
            update job j
            set status = 'processing',
                version = j.version + 1,
                ready_seq = null,
                expires_at = null,
                held_key = case when j.hold_mask & 4 <> 0 then j.held_key end,
                attempt = j.attempt + 1,
                handler_started = c.n <= _start or j.suspect,
                claim_token = gen_random_uuid(),
                worker_id = _worker,
                started_at = now(),
                updated_at = now(),
                lease_until = now() + option_interval(j.options, 'lease', lease),
                heartbeat_at = null,
                life_at = null,
                status_reason = null
            from unnest(targets, seqs) with ordinality c (t, s, n)
            where j.ctid = c.t
            returning j.*, c.n, c.s),
        noted as (
            insert into claim_batch (worker_id, check_at, job_ids)
            select _worker, min(t.lease_until), array_agg(t.id) from taken t having count(*) > 0
            returning claim_batch.id)
        select noted.id, t.id, t.claim_token, t.queue, t.job_type, t.payload, t.priority, t.s,
            t.tenant, t.subject, t.display_name, t.metadata, t.stats, t.options, t.attempt, t.retry_count,
            t.created_at, t.created_by, t.started_at, t.lease_until,
            case when t.options ? 'timeout' then (t.options ->> 'timeout')::double precision else seconds end,
            case when t.options ? 'max_runtime' then (t.options ->> 'max_runtime')::double precision else most_seconds end,
            t.suspect, t.checkpoint_id, t.total_stages, t.batch_id, t.group_key, t.singleton_key, t.run_at
        from noted cross join taken t
        order by t.n;
    if limited then
        perform note_starts(q, b.job_ids)
        from claim_batch b, queue q
        where b.id = currval('jobqueue.claim_batch_id_seq') and q.name = _queue and q.rate_limit is not null;
    end if;
    if anyone_watches() then
        perform publish_changes((select b.job_ids from claim_batch b where b.id = currval('jobqueue.claim_batch_id_seq')));
    end if;
end
$$;

-- claim_ranges: claim from the ranges of several queues; over all of them in the order of the line.
-- The best keys are read without locks first, so that no more is locked than is taken.
create or replace function jobqueue.claim_ranges(
    _worker uuid, _queues text[], _ranks_from int[], _seqs_from bigint[], _ranks_to int[],
    _max_jobs int, _start int, _suspects int, _job_types text[])
returns table (
    claim_id bigint, id uuid, claim_token uuid, queue text, job_type text, payload jsonb, priority int, ready_seq bigint,
    tenant text, subject text, display_name text, metadata jsonb, stats jsonb, options jsonb, attempt int, retry_count int,
    created_at timestamptz, created_by text, started_at timestamptz, lease_until timestamptz, timeout double precision, max_runtime double precision,
    suspect boolean, checkpoint_id bigint, total_stages int, batch_id uuid, group_key text, singleton_key text, run_at timestamptz)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
set jit = off
as $$
#variable_conflict use_column
declare
    part record;
    found_now int;
    left_over int := _max_jobs;
    left_to_start int := _start;
    left_suspects int := _suspects;
    exhausted text[] := '{}';
    exhausted_before int;
begin
    perform admit_for_claim(q.name, _max_jobs) from queue q where q.name = any (_queues) and q.limited and q.paused_at is null;
    -- as in claim_queue, a job that has lost a worker first: it came back at the end of the line, and a long one would keep it for hours
    if _suspects > 0 then
        for part in
            select s.queue
            from (
                select q.name as queue, x.rank, x.seq
                from (select distinct n as name from unnest(_queues) n) q
                cross join lateral (
                    select (-j.priority) as rank, j.ready_seq as seq
                    from job j
                    where j.queue = q.name and j.suspect and j.ready_seq is not null
                    order by (-j.priority), j.ready_seq
                    limit 1) x) s
            order by s.rank, s.seq
        loop
            return query
                select c.*
                from claim_queue(part.queue, _worker, '{}', '{}', '{}', null, least(left_suspects, left_over), left_to_start,
                    least(left_suspects, left_over), _job_types) c;
            get diagnostics found_now = row_count;
            left_suspects := left_suspects - found_now;
            left_over := left_over - found_now;
            left_to_start := greatest(0, left_to_start - found_now);
            exit when left_suspects = 0 or left_over = 0;
        end loop;
    end if;
    -- again without the queues that had less than was read of them: they are paused, or others were faster
    loop
        exit when left_over = 0;
        exhausted_before := cardinality(exhausted);
        for part in
            select h.queue, count(*)::int as n, count(*) filter (where h.suspect)::int as suspects
            from (
                select r.queue, x.rank, x.seq, x.suspect
                from unnest(_queues, _ranks_from, _seqs_from, _ranks_to) r (queue, rank, low, rank_to)
                cross join lateral (
                    select (-j.priority) as rank, j.ready_seq as seq, j.suspect
                    from job j
                    where j.queue = r.queue and r.queue <> all (exhausted) and j.ready_seq is not null
                        and (-j.priority, j.ready_seq) >= (r.rank, r.low) and (-j.priority) < r.rank_to
                        and (left_suspects is null or left_suspects > 0 or not j.suspect)
                        and (_job_types is null or j.job_type = any (_job_types))
                        and j.job_type <> all (array(select t.name from job_type t where t.paused_at is not null))
                        and j.tenant <> all (array(select p.tenant from tenant_pause p))
                        and (j.expires_at is null or j.expires_at > now())
                    order by (-j.priority), j.ready_seq
                    limit left_over) x
                order by x.rank, x.seq
                limit left_over) h
            group by h.queue
            order by min(h.rank), min(h.seq)
        loop
            return query
                select c.*
                from (
                    select array_agg(r.rank) as ranks, array_agg(r.low) as lows, array_agg(r.rank_to) as ranks_to
                    from unnest(_queues, _ranks_from, _seqs_from, _ranks_to) r (queue, rank, low, rank_to)
                    where r.queue = part.queue) r
                cross join lateral claim_queue(part.queue, _worker, r.ranks, r.lows, r.ranks_to, null,
                    part.n, left_to_start, case when left_suspects is not null then least(left_suspects, part.suspects) end, _job_types) c;
            get diagnostics found_now = row_count;
            if found_now < part.n then
                exhausted := exhausted || part.queue;
            end if;
            left_suspects := left_suspects - least(left_suspects, part.suspects);
            left_over := left_over - found_now;
            left_to_start := greatest(0, left_to_start - found_now);
        end loop;
        exit when cardinality(exhausted) = exhausted_before;
    end loop;
end
$$;

-- claim: take jobs to work on. For every language; jobs come back as processing, with a lease that heartbeat() extends.
--   queues    names of queues
--   worker    any uuid that names this worker; an unknown one is registered
--   max_jobs  1 to 10,000
--   options   job_types (list), min_priority, max_priority
-- Returns at most max_jobs jobs, by priority, then in the order of becoming ready. Errors: JQ400.
-- Keep claim_token: everything that is said of the job later must name it.
create or replace function jobqueue.claim(queues text[], worker uuid, max_jobs int, options jsonb default '{}')
returns table (
    id uuid, claim_token uuid, queue text, job_type text, status text, payload jsonb, priority int, tenant text, subject text,
    display_name text, metadata jsonb, stats jsonb, attempt int, retry_count int, created_at timestamptz, created_by text,
    run_at timestamptz, started_at timestamptz, lease_until timestamptz, timeout double precision, max_runtime double precision,
    singleton_key text, group_key text, batch_id uuid, checkpoint jsonb, checkpoint_stage text, checkpoint_data jsonb,
    checkpoint_reference text, checkpoint_hash text, checkpoint_at timestamptz)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    known text[];
    kinds text[];
    low int;
    high int;
begin
    perform refuse_unknown_option(claim.options, array['job_types', 'min_priority', 'max_priority'], 'claim');
    if claim.worker is null then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'worker must be a uuid.', 'Choose one when the worker starts, for example gen_random_uuid().');
    elsif claim.max_jobs is null or claim.max_jobs not between 1 and 10000 then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('max_jobs must be from 1 to 10000, not %s.', claim.max_jobs));
    elsif coalesce(cardinality(claim.queues), 0) = 0 then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'queues must name at least one queue.');
    end if;
    if claim.options ? 'job_types' then
        begin
            kinds := array(select jsonb_array_elements_text(claim.options -> 'job_types'));
        exception when invalid_parameter_value then
            perform refuse('JQ400', 'INVALID_ARGUMENT', 'job_types must be a list of names.');
        end;
    end if;
    low := -coalesce(to_int(claim.options -> 'max_priority', 'max_priority', -2147483646, 2147483647), 2147483647);
    high := -coalesce(to_int(claim.options -> 'min_priority', 'min_priority', -2147483646, 2147483647), -2147483646) + 1;
    perform see_worker(claim.worker);
    known := array(select distinct q from unnest(claim.queues) q where q is not null);
    return query
        select c.id, c.claim_token, c.queue, c.job_type, 'processing'::text, c.payload, c.priority, c.tenant, c.subject,
            c.display_name, c.metadata, c.stats, c.attempt, c.retry_count, c.created_at, c.created_by,
            c.run_at, c.started_at, c.lease_until, c.timeout, c.max_runtime, c.singleton_key, c.group_key, c.batch_id,
            case when k.id is not null then jsonb_build_object('stage', k.stage, 'data', k.data, 'reference', k.reference,
                'hash', k.hash, 'at', k.created_at, 'pause_safe', k.pause_safe) end,
            k.stage, k.data, k.reference, k.hash, k.created_at
        from claim_any(claim.worker, known, low, high, claim.max_jobs, kinds) c
        left join checkpoint k on k.id = c.checkpoint_id
        order by (-c.priority), c.ready_seq;
end
$$;

-- claim_any: claim without floors, from one queue or from several.
create or replace function jobqueue.claim_any(_worker uuid, _queues text[], _rank_from int, _rank_to int, _max_jobs int, _job_types text[])
returns table (
    claim_id bigint, id uuid, claim_token uuid, queue text, job_type text, payload jsonb, priority int, ready_seq bigint,
    tenant text, subject text, display_name text, metadata jsonb, stats jsonb, options jsonb, attempt int, retry_count int,
    created_at timestamptz, created_by text, started_at timestamptz, lease_until timestamptz, timeout double precision, max_runtime double precision,
    suspect boolean, checkpoint_id bigint, total_stages int, batch_id uuid, group_key text, singleton_key text, run_at timestamptz)
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
begin
    if cardinality(_queues) = 1 then
        return query select * from claim_queue(_queues[1], _worker, array[_rank_from], array[0::bigint], array[_rank_to], null,
            _max_jobs, _max_jobs, null, _job_types);
    else
        return query select * from claim_ranges(_worker, _queues, array_fill(_rank_from, array[cardinality(_queues)]),
            array_fill(0::bigint, array[cardinality(_queues)]), array_fill(_rank_to, array[cardinality(_queues)]),
            _max_jobs, _max_jobs, null, _job_types);
    end if;
end
$$;

-- snapshot_bounds: transactions below xmin have ended; those from xmax on had not begun. For the bound of the sweep.
create or replace function jobqueue.snapshot_bounds()
returns table (xmin bigint, xmax bigint)
language sql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
    select pg_snapshot_xmin(s)::text::bigint, pg_snapshot_xmax(s)::text::bigint from pg_current_snapshot() s
$$;
