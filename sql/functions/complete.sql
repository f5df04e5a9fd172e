-- Completion. Rows are locked in the order of ids, so that two batches with common jobs never wait for each other.

-- settle: complete many claims of a worker.
--   _ids, _tokens, _results, _stats  element i is one job; null for _results or _stats: none has any
--   _finished_claims  claims of this worker of which every job has ended; their notes in claim_batch are dropped
-- Returns only what was not completed: (id, token, outcome), outcome already (this token completed it before), lost or failed (a result that
-- cannot be stored). Index: job_pkey.
create or replace function jobqueue.settle(
    _worker uuid, _ids uuid[], _tokens uuid[], _results jsonb[], _stats jsonb[], _finished_claims bigint[])
returns table (id uuid, token uuid, outcome text)
language plpgsql security definer
-- jobqueue twice: it notes itself what it completes (guard.sql)
set search_path = pg_catalog, jobqueue, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set enable_sort = off
set jit = off
-- with statistics the plan made for the values at hand walks the whole primary key; the generic one looks ids up: 36 -> 13 us per job
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
    done uuid[];
    flagged uuid[];
    large uuid[];
    lowest text;
    highest text;
    types text[];
    waits real[];
    runs real[];
begin
    if _results is not null then
        select array_agg(x.id) into large
        from unnest(_ids, _results) x (id, result)
        where is_too_large(x.result, 'result', 8388608);
    end if;
    -- one job alone goes without the machinery for many: that saves what the note for the statistics costs (468 -> 474 us)
    if cardinality(_ids) = 1 then
        update job j
        set status = 'completed',
            version = j.version + 1,
            progress_pct = 100,
            held_key = case when j.hold_mask & 16 <> 0 then j.held_key end,
            lost_count = 0,
            suspect = false,
            requested_action = null,
            lease_until = null,
            completed_at = now(),
            updated_at = now(),
            result = _results[1],
            stats = case when _stats[1] is null then j.stats else coalesce(j.stats, '{}') || _stats[1] end,
            estimated_completion = null,
            status_reason = null,
            error_class = null,
            error_code = null,
            error_message = null
        where j.id = _ids[1] and j.claim_token = _tokens[1] and j.status = 'processing' and large is null
        returning array[j.id], case when j.settle_flags <> 0 then array[j.id] end, j.queue, j.queue,
            case when j.job_type <> j.queue then array[j.job_type] end,
            array[date_part('epoch', j.started_at - greatest(j.run_at, j.created_at))::real], array[date_part('epoch', now() - j.started_at)::real]
        into done, flagged, lowest, highest, types, waits, runs;
    else
        with settled as (
            update job j
            set status = 'completed',
                version = j.version + 1,
                progress_pct = 100,
                held_key = case when j.hold_mask & 16 <> 0 then j.held_key end,
                lost_count = 0,
                suspect = false,
                requested_action = null,
                lease_until = null,
                completed_at = now(),
                updated_at = now(),
                result = x.result,
                stats = case when x.stats is null then j.stats else coalesce(j.stats, '{}') || x.stats end,
                estimated_completion = null,
                status_reason = null,
                error_class = null,
                error_code = null,
                error_message = null
            from (select * from unnest(_ids, _tokens, _results, _stats) x (id, token, result, stats) order by 1) x
            where j.id = x.id and j.claim_token = x.token and j.status = 'processing'
                and (large is null or x.id <> all (large))
            returning j.id, j.settle_flags, j.queue, j.job_type, date_part('epoch', j.started_at - greatest(j.run_at, j.created_at))::real as wait,
                date_part('epoch', now() - j.started_at)::real as run)
        select array_agg(s.id), array_agg(s.id) filter (where s.settle_flags <> 0), min(s.queue), max(s.queue),
            array_agg(s.job_type) filter (where s.job_type <> s.queue), array_agg(s.wait), array_agg(s.run)
        into done, flagged, lowest, highest, types, waits, runs
        from settled s;
    end if;
    if lowest = highest then
        -- job_types other than the queue's name: none, the same one, or others for all; else the jobs are read again
        if types is null or cardinality(types) = cardinality(done) and types[1] = all (types) then
            insert into statistics_note (queue, completed, waits, runs, job_type) values (lowest, cardinality(done), waits, runs, types[1]);
        elsif cardinality(types) = cardinality(done) then
            insert into statistics_note (queue, completed, waits, runs, job_types) values (lowest, cardinality(done), waits, runs, types);
        else
            perform note_completed(done);
        end if;
    elsif lowest is not null then
        perform note_completed(done);
    end if;
    if _finished_claims is not null then
        -- a crash of the server may take back the last numbers and give them to the claims of others
        delete from claim_batch b where b.id = any (_finished_claims) and b.worker_id = _worker;
    end if;
    if flagged is not null then
        perform give_slots_of(flagged);
        perform after_end(flagged);
    end if;
    if cardinality(done) is distinct from cardinality(_ids) then
        return query select * from refused_of(_ids, _tokens, large, done);
    end if;
    if anyone_watches() then
        perform publish_changes(_ids);
    end if;
end
$$;

-- refused_of: why the rest of a settle was not completed; results that cannot be stored end their attempt.
create or replace function jobqueue.refused_of(_ids uuid[], _tokens uuid[], _large uuid[], _done uuid[])
returns table (id uuid, token uuid, outcome text)
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    given record;
begin
    for given in
        select x.id, x.token, x.id = any (_large) as large, j.id is not null as there, j.claim_token = x.token as owned, j.status,
            coalesce(x.id = any (_done), false) as ended_now
        from unnest(_ids, _tokens) x (id, token)
        left join job j on j.id = x.id
    loop
        if given.large and given.owned and given.status = 'processing' then
            perform fail_one(given.id, given.token, jsonb_build_object('class', 'permanent', 'code', 'RESULT_TOO_LARGE',
                'message', 'The result is too large to be stored.'), null);
            id := given.id; token := given.token; outcome := 'failed';
            return next;
        elsif not coalesce(given.owned, false) or given.status <> 'completed' then
            id := given.id; token := given.token; outcome := 'lost';
            return next;
        elsif not given.ended_now then
            id := given.id; token := given.token; outcome := 'already';
            return next;
        end if;
    end loop;
end
$$;

-- complete: the job is done.
--   id, token      the job and the claim token of its claim
--   result, stats  JSON or null; stats are merged into those that the job has
-- Returns ok, already (this claim completed it before) or failed (the result is larger than 8 MB: the attempt ended as failed,
-- RESULT_TOO_LARGE). Errors: JQ409 LEASE_LOST if the token is stale, so that the caller's transaction rolls back; JQ404.
create or replace function jobqueue.complete(id uuid, token uuid, result jsonb default null, stats jsonb default null)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    outcome text;
begin
    perform check_stats(complete.stats);
    select s.outcome into outcome
    from settle(null, array[complete.id], array[complete.token], array[complete.result], array[complete.stats], null) s;
    if outcome = 'lost' then
        perform refuse_lost(complete.id);
    end if;
    return coalesce(outcome, 'ok');
end
$$;

-- complete_many: several jobs are done; one stale job does not keep the others back.
--   results  [{"id", "token", "result", "stats"}, …]
-- Returns (id, outcome) per element, in order: ok, already, lost or failed. Errors: JQ400.
create or replace function jobqueue.complete_many(results jsonb)
returns table (id uuid, outcome text)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    odd bigint;
begin
    if jsonb_typeof(complete_many.results) is distinct from 'array' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'results must be a JSON array.', 'Give [{"id": …, "token": …, "result": …}, …].');
    end if;
    select min(i - 1) into odd
    from jsonb_array_elements(complete_many.results) with ordinality e (e, i)
    where case when jsonb_typeof(e) = 'object'
        then not coalesce(is_uuid(e ->> 'id') and is_uuid(e ->> 'token'), false)
            or coalesce(jsonb_typeof(e -> 'stats'), 'null') not in ('null', 'object')
        else true end;
    if odd is not null then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('Element %s needs an id and a token (uuids); stats must be an object.', odd), '',
            jsonb_build_object('index', odd));
    end if;
    -- a job that is named twice is settled once
    return query
        with given as materialized (
            select (e ->> 'id')::uuid as id, (e ->> 'token')::uuid as token, nullif(e -> 'result', 'null') as result,
                nullif(e -> 'stats', 'null') as stats, i
            from jsonb_array_elements(complete_many.results) with ordinality x (e, i)),
        first as materialized (
            select distinct on (g.id, g.token) g.* from given g order by g.id, g.token, g.i),
        refused as materialized (
            select s.id, s.token, s.outcome
            from (select array_agg(f.id) as ids, array_agg(f.token) as tokens, array_agg(f.result) as results,
                    array_agg(f.stats) as stats from first f) a
            cross join lateral settle(null, a.ids, a.tokens, a.results, a.stats, null) s
            where a.ids is not null)
        select g.id, coalesce(r.outcome, 'ok')
        from given g
        left join refused r on r.id = g.id and r.token = g.token
        order by g.i;
end
$$;

-- is_uuid: whether a text can be cast to uuid.
create or replace function jobqueue.is_uuid(_text text)
returns boolean
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select _text ~* '^([0-9a-f]{4}-?){7}[0-9a-f]{4}$'
$$;

-- check_stats: stats are an object, or nothing.
create or replace function jobqueue.check_stats(_stats jsonb)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if coalesce(jsonb_typeof(_stats), 'null') not in ('object', 'null') then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'stats must be a JSON object.', 'Give something like {"files": 12}.');
    end if;
    perform refuse_large(_stats, 'stats', 1048576);
end
$$;
