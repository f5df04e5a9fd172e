-- refuse: raise one of the queue's own errors.
--   _sqlstate  JQ400 bad argument, JQ403 not yours, JQ404 unknown, JQ409 conflict, JQ413 too large, JQ429 limit reached
--   _code      the name that programs test, for example JOB_NOT_FOUND
--   _message   one sentence for people; _hint what to do about it; _details go into DETAIL beside the code
create or replace function jobqueue.refuse(
    _sqlstate text, _code text, _message text, _hint text default '', _details jsonb default '{}')
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception using
        errcode = _sqlstate,
        message = _message,
        hint = _hint,
        detail = (jsonb_build_object('code', _code) || _details)::text;
end
$$;

-- edit_distance: Levenshtein's distance of two short words, for "did you mean".
create or replace function jobqueue.edit_distance(_a text, _b text)
returns int
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    before int[];
    row int[];
begin
    select array_agg(g) into before from generate_series(0, length(_b)) g;
    for i in 1 .. length(_a) loop
        row := array[i];
        for j in 1 .. length(_b) loop
            row := row || least(
                before[j + 1] + 1,
                row[j] + 1,
                before[j] + case when substr(_a, i, 1) = substr(_b, j, 1) then 0 else 1 end);
        end loop;
        before := row;
    end loop;
    return before[cardinality(before)];
end
$$;

-- refuse_unknown_option: raise UNKNOWN_OPTION for the first key of _options that is not in _known, with the nearest known name.
create or replace function jobqueue.refuse_unknown_option(_options jsonb, _known text[], _what text)
returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    unknown text;
    nearest text;
begin
    if jsonb_typeof(_options) is distinct from 'object' then
        perform jobqueue.refuse('JQ400', 'INVALID_ARGUMENT', format('The options of %s must be a JSON object.', _what),
            'Give something like {"priority": 5}.');
    end if;
    select k into unknown from jsonb_object_keys(_options) k where k <> all (_known) order by k limit 1;
    if unknown is null then
        return;
    end if;
    select n into nearest from unnest(_known) n order by jobqueue.edit_distance(left(unknown, 40), n), n limit 1;
    perform jobqueue.refuse('JQ400', 'UNKNOWN_OPTION', format('%s has no option "%s".', _what, left(unknown, 200)),
        format('Did you mean "%s"? Known are: %s.', nearest, array_to_string(_known, ', ')),
        jsonb_build_object('option', left(unknown, 200), 'nearest', nearest));
end
$$;

-- refuse_job: JQ404 for a job that does not exist or that the caller may not see.
create or replace function jobqueue.refuse_job(_id uuid)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform jobqueue.refuse('JQ404', 'JOB_NOT_FOUND', format('There is no job %s.', coalesce(_id::text, 'without an id')),
        'It may have been deleted after its time of keeping, or it belongs to a tenant that you do not see.',
        jsonb_build_object('id', _id));
end
$$;

-- refuse_lost: JQ409 for a worker whose claim is not valid any more; JQ404 if the job is gone.
create or replace function jobqueue.refuse_lost(_id uuid)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    now_status text;
begin
    select status into now_status from jobqueue.job where id = _id;
    if not found then
        perform jobqueue.refuse_job(_id);
    end if;
    perform jobqueue.refuse('JQ409', 'LEASE_LOST',
        format('The claim token given for job %s is not valid any more; the job is %s.', _id, now_status),
        'Another claim has the job or it has ended: stop working on it and keep its effects out.',
        jsonb_build_object('id', _id, 'status', now_status));
end
$$;

-- refuse_queue: JQ404 QUEUE_NOT_FOUND, wherever a queue is named that is not there, with the nearest name.
--   _hint  what else can be done about it
create or replace function jobqueue.refuse_queue(_name text, _hint text default 'select name from jobqueue.queues lists them.')
returns void
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    nearest text := nearest_queue(_name);
begin
    perform refuse('JQ404', 'QUEUE_NOT_FOUND', format('There is no queue "%s".', left(_name, 200)),
        coalesce(format('Did you mean "%s"? ', nearest), '') || _hint,
        jsonb_strip_nulls(jsonb_build_object('queue', left(_name, 200), 'nearest', nearest)));
end
$$;

-- nearest_queue: the queue that somebody most likely meant; null if none has a name like it. Names of about the same length that begin or
-- end alike are compared, at most 20 of them: a comparison takes up to 1 ms, and whoever asks for unknown queues may do so often.
create or replace function jobqueue.nearest_queue(_name text)
returns text
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select n.name
    from (
        select q.name::text as name from queue q
        where length(_name) <= 60 and abs(length(q.name) - length(_name)) <= 3
            and (left(lower(q.name), 1) = left(lower(_name), 1) or right(lower(q.name), 1) = right(lower(_name), 1))
        order by left(lower(q.name), 4) = left(lower(_name), 4) desc, left(lower(q.name), 1) = left(lower(_name), 1) desc, q.name
        limit 20) n
    cross join lateral (select edit_distance(lower(_name), lower(n.name)) as distance) d
    where d.distance <= greatest(2, length(_name) / 4)
    order by d.distance, n.name
    limit 1
$$;
