-- Dead letters on their way back.

-- redrive_options: what redrive and preview_redrive know.
create or replace function jobqueue.redrive_options()
returns text[]
language sql immutable parallel safe
as $$
    select array['destination', 'source', 'payload', 'created_before', 'ids', 'max_jobs']
$$;

-- to_ids: a list of at most 10,000 uuids, or null. Errors: JQ400.
create or replace function jobqueue.to_ids(_value jsonb, _name text)
returns uuid[]
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if coalesce(jsonb_typeof(_value), 'null') = 'null' then
        return null;
    elsif jsonb_typeof(_value) <> 'array' or jsonb_array_length(_value) > 10000
        or exists (select from jsonb_array_elements(_value) e where not coalesce(is_uuid(e #>> '{}'), false))
    then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('%s must be a list of at most 10,000 uuids.', _name), '',
            jsonb_build_object('option', _name));
    end if;
    return array(select (e #>> '{}')::uuid from jsonb_array_elements(_value) e);
end
$$;

-- way_back: where a dead letter goes, and whether its original goes under its own id.
--   With a destination that is not the original's queue, or once the original is gone, a new job is sent. Where to, if nobody says: the
--   source asked for, else the queue that has this dead letter queue, if there is only one or it is that of the job_type.
-- Null: nowhere.
create or replace function jobqueue.way_back(
    _copy jobqueue.job, _destination text, _source text, out source text, out target text, out original boolean)
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    sources text[];
    usual text;
begin
    select j.queue into source from job j where j.id = _copy.dead_letter_of;
    original := found and coalesce(_destination, source) = source;
    if source is null then
        sources := array(select q.name from queue q where q.dead_letter = _copy.queue order by q.name);
        select t.queue into usual from job_type t where t.name = _copy.job_type;
        source := case when usual = any (sources) then usual when cardinality(sources) = 1 then sources[1]
            when _source = any (sources) then _source else usual end;
    end if;
    target := coalesce(_destination, source, _source);
end
$$;

-- dead_letters: the waiting copies of a dead letter queue that the options name and the caller may see, oldest first.
-- Index: job_dead_letter. Errors: JQ400, JQ404 no such queue.
create or replace function jobqueue.dead_letters(_queue text, _options jsonb)
returns setof jobqueue.job
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    o jsonb := coalesce(_options, '{}');
    source text;
    destination text;
    ids uuid[];
    before timestamptz;
    most int;
begin
    perform refuse_unknown_option(o, redrive_options(), 'redrive');
    source := to_text(o -> 'source', 'source', 200);
    destination := to_text(o -> 'destination', 'destination', 200);
    ids := to_ids(o -> 'ids', 'ids');
    before := to_time(o -> 'created_before', 'created_before');
    most := coalesce(to_int(o -> 'max_jobs', 'max_jobs', 1, 100000), 1000);
    if not exists (select from queue q where q.name = _queue) then
        perform refuse_queue(_queue);
    elsif destination = _queue then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'The destination is the dead letter queue itself.', 'Name another queue, or none.',
            '{"option": "destination"}');
    end if;
    return query
        select j.* from job j
        where j.dead_letter_of is not null and j.queue = _queue and j.status in ('pending', 'paused')
            and (ids is null or j.id = any (ids) or j.dead_letter_of = any (ids))
            and (before is null or j.created_at < before)
            and (coalesce(o -> 'payload', 'null') = 'null' or j.payload @> (o -> 'payload'))
            and sees_tenant(j.tenant)
            and (source is null or (way_back(j, destination, source)).source = source)
        order by j.created_at, j.id
        limit most;
end
$$;

-- redrive: send dead letters back. The copy is cancelled (reason redriven); its original goes back to pending under its own id, with as
-- many retries as it was sent with. If the original is gone, or another destination is named, a new job is sent instead.
--   dead_letter  the dead letter queue
--   options      destination (another queue), source (only what came from this queue), payload (only what contains this JSON),
--                created_before (time), ids (of copies or of originals), max_jobs (1,000; oldest first)
-- Returns how many originals went back (redriven), how many new jobs were sent (sent), how many could not go because another job holds
-- their key or changed just now (conflicts), and how many have no queue to go to (unroutable); the copies of the last two stay.
-- Errors: JQ400, JQ404.
create or replace function jobqueue.redrive(
    dead_letter text, options jsonb default '{}', out redriven bigint, out sent bigint, out conflicts bigint, out unroutable bigint)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    ids uuid[];
    originals uuid[];
    id uuid;
    outcome text;
begin
    redriven := 0; sent := 0; conflicts := 0; unroutable := 0;
    select array_agg(d.id order by d.created_at, d.id), array_agg(d.dead_letter_of) into ids, originals
    from dead_letters(redrive.dead_letter, redrive.options) d;
    -- all of them in the order of their ids, as bulk actions go, and not one by one in the order of their copies
    perform from job j where j.id = any (ids || originals) order by j.id for update;
    foreach id in array coalesce(ids, '{}') loop
        outcome := redrive_one(id, redrive.options ->> 'destination', redrive.options ->> 'source');
        case outcome
            when 'redriven' then redriven := redriven + 1;
            when 'sent' then sent := sent + 1;
            when 'unroutable' then unroutable := unroutable + 1;
            else conflicts := conflicts + 1;
        end case;
    end loop;
    if redriven + sent > 0 then
        perform note_action('redrive', null, null, redrive.dead_letter, null, null, 'redriven',
            jsonb_build_object('redriven', redriven, 'sent', sent, 'conflicts', conflicts, 'options', redrive.options));
    end if;
end
$$;

-- redrive_one: one copy. Returns redriven, sent, unroutable or conflict; what is refused to one leaves the others alone.
create or replace function jobqueue.redrive_one(_id uuid, _destination text, _source text)
returns text
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    copy jobqueue.job;
    way record;
    target jobqueue.queue;
    answer record;
begin
    -- the original before its copy, as retry and skip lock them
    perform from job j where j.id = (select x.dead_letter_of from job x where x.id = _id) for update;
    select * into copy from job j where j.id = _id and j.status in ('pending', 'paused') for update;
    if not found then
        return 'conflict';
    end if;
    way := way_back(copy, _destination, _source);
    if way.target is null then
        return 'unroutable';
    end if;
    perform change_job(copy, 'cancel', 'cancelled', 'redriven');
    if way.original then
        perform retry(copy.dead_letter_of, format('redriven from %s', copy.queue));
        return 'redriven';
    end if;
    target := queue_for_send(way.target);
    select s.created, s.due into answer from send_one(target, copy.payload, options_of_copy(copy)) s;
    if not answer.created then
        perform refuse('JQ409', 'CONFLICT', 'Another job stands in its place.');
    end if;
    perform wake(target.name, target.number);
    return 'sent';
exception when others then
    -- only what the engine itself refuses is a conflict; the copy waits on
    if sqlstate not like 'JQ%' then
        raise;
    end if;
    return 'conflict';
end
$$;

-- options_of_copy: the options by which a dead letter is sent anew; its key is that of its original, as long as that is there.
create or replace function jobqueue.options_of_copy(_copy jobqueue.job)
returns jsonb
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select jsonb_object_agg(o.key, o.value)
    from jsonb_each(jsonb_build_object('job_type', _copy.job_type, 'tenant', _copy.tenant, 'priority', _copy.priority,
        'subject', _copy.subject, 'display_name', _copy.display_name, 'created_by', _copy.created_by, 'metadata', _copy.metadata,
        'group', _copy.group_key, 'tier', _copy.tier, 'trace_context', _copy.options -> 'trace_context',
        'singleton_key', (select j.singleton_key from jobqueue.job j where j.id = _copy.dead_letter_of))) o
    where o.value <> 'null'
$$;

-- preview_redrive: what redrive would do with the same arguments, as far as can be known: per destination how many originals would go
-- back and how many new jobs would be sent. destination null: those that have no queue to go to. Errors: JQ400, JQ404.
create or replace function jobqueue.preview_redrive(dead_letter text, options jsonb default '{}')
returns table (destination text, originals bigint, new_jobs bigint)
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
begin
    return query
        select w.target, count(*) filter (where w.original), count(*) filter (where not w.original)
        from dead_letters(preview_redrive.dead_letter, preview_redrive.options) d
        cross join lateral way_back(d, preview_redrive.options ->> 'destination', preview_redrive.options ->> 'source') w
        group by w.target
        order by w.target;
end
$$;
