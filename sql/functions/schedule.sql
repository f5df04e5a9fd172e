-- Schedules. The clock is the database's. A tick and its job are one transaction: next_at moves on with the send, so that there is one
-- job per tick however many workers look, and a tick whose send fails stays where it is and is tried again.
--
--   on time   a tick that is at most a minute late gets its job; so does every one that could not be sent while sending failed
--   missed    nobody ran schedules for longer than that:
--             skip  only the last tick, if it is not older than a minute (default)
--             once  the last tick
--             all   the last 100 ticks
--   paused    ticks that come while a schedule is paused are not made up for

-- schedule_options: what schedule knows beside the options of send.
create or replace function jobqueue.schedule_options()
returns text[]
language sql immutable parallel safe
as $$
    select array['time_zone', 'missed'] || array_remove(jobqueue.job_options(), 'id')
$$;

-- check_schedule: JQ400 unless a schedule can be made of this, as far as can be known before its first tick.
create or replace function jobqueue.check_schedule(_name text, _queue jobqueue.queue, _payload jsonb, _options jsonb)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if _name is null or _name !~ '^[A-Za-z0-9_./:-]{1,200}$' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('"%s" cannot be the name of a schedule.', left(_name, 100)),
            'Use 1 to 200 letters, digits, and _ . / : -', '{"option": "name"}');
    end if;
    perform refuse_unknown_option(_options, schedule_options(), 'schedule');
    if coalesce(to_text(_options -> 'missed', 'missed', 10), 'skip') not in ('skip', 'once', 'all') then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('missed cannot be %s.', _options -> 'missed'),
            'It is one of skip (default), once, all.', '{"option": "missed"}');
    end if;
    -- the job of the first tick, made and thrown away: what send would refuse is refused now
    perform new_job(_queue, _payload, _options - array['time_zone', 'missed']);
end
$$;

-- schedule: send a job at every tick; the schedule of this name is replaced.
--   name        1 to 200 letters, digits, and _ . / : -
--   expression  cron with 5 or 6 fields, @daily and the like, or lines of RFC 5545 (see cron.sql and rrule.sql)
--   options     time_zone (UTC), missed (skip, once, all; skip) and those of send but id; every job has metadata.schedule {name, tick}
-- A schedule that is made again with the same expression and zone keeps its place, its pause and what it has missed.
-- Returns the next tick. Errors: JQ400 with the field that is wrong or "never happens", JQ403 not your tenant, JQ404 no such queue,
-- JQ409 the name is another tenant's, JQ413.
create or replace function jobqueue.schedule(
    name text, queue text, expression text, payload jsonb default '{}', options jsonb default '{}')
returns timestamptz
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    o jsonb := coalesce(schedule.options, '{}');
    old jobqueue.schedule;
    s jobqueue.schedule;
begin
    perform refuse_unknown_option(o, schedule_options(), 'schedule');
    perform check_schedule(schedule.name, queue_for_send(schedule.queue), coalesce(schedule.payload, '{}'), o);
    s.name := schedule.name;
    s.tenant := coalesce(o ->> 'tenant', 'default');
    s.expression := schedule.expression;
    s.spec := schedule_spec(schedule.expression, to_text(o -> 'time_zone', 'time_zone', 100), now());
    s.time_zone := s.spec ->> 'zone';
    perform pg_advisory_xact_lock(27250, hashtext(s.name));
    select * into old from schedule x where x.name = s.name for update;
    if found and not sees_tenant(old.tenant) then
        perform refuse('JQ409', 'CONFLICT', 'The name of this schedule is taken.', 'Give it another name.');
    end if;
    if (old.expression, old.time_zone) is not distinct from (s.expression, s.time_zone) then
        s := old;
    else
        s.next_at := tick_after(s.spec, now());
        if s.next_at is null then
            perform refuse('JQ400', 'INVALID_ARGUMENT', format('The expression never happens: "%s".', left(s.expression, 100)),
                'select * from jobqueue.preview_schedule(expression, time_zone, 5) shows when one happens.', '{"option": "expression"}');
        end if;
    end if;
    insert into schedule as x (name, tenant, queue, expression, time_zone, spec, payload, options, missed, next_at)
    values (s.name, coalesce(o ->> 'tenant', 'default'), schedule.queue, s.expression, s.time_zone, s.spec,
        coalesce(schedule.payload, '{}'), o - array['time_zone', 'missed'], coalesce(o ->> 'missed', 'skip'), s.next_at)
    on conflict (name) do update set tenant = excluded.tenant, queue = excluded.queue, expression = excluded.expression,
        time_zone = excluded.time_zone, spec = excluded.spec, payload = excluded.payload, options = excluded.options,
        missed = excluded.missed, next_at = s.next_at, retry_at = s.retry_at, failures = coalesce(s.failures, 0),
        last_error = s.last_error, updated_at = now();
    return s.next_at;
end
$$;

-- unschedule: remove a schedule; jobs that it has sent stay. Returns whether there was one.
create or replace function jobqueue.unschedule(name text)
returns boolean
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
begin
    delete from schedule x where x.name = unschedule.name and sees_tenant(x.tenant);
    return found;
end
$$;

-- preview_schedule: the next ticks of an expression, nothing is stored.
--   count  1 to 1,000, default 5; after  default now
-- Fewer rows, or none, if it happens less often. Errors: JQ400.
create or replace function jobqueue.preview_schedule(
    expression text, time_zone text default 'UTC', count int default 5, after timestamptz default now())
returns table (tick timestamptz)
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if preview_schedule.count is null or preview_schedule.count not between 1 and 1000 then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('count must be from 1 to 1000, not %s.', preview_schedule.count), '',
            '{"option": "count"}');
    end if;
    return query select t from unnest(first_ticks(
        schedule_spec(preview_schedule.expression, preview_schedule.time_zone, preview_schedule.after),
        coalesce(preview_schedule.after, now()), 'infinity', preview_schedule.count)) t;
end
$$;

-- lock_schedule: a schedule that the caller may see, locked; JQ404 otherwise.
create or replace function jobqueue.lock_schedule(_name text)
returns jobqueue.schedule
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    s jobqueue.schedule;
begin
    select * into s from schedule x where x.name = _name for update;
    if not found or not sees_tenant(s.tenant) then
        perform refuse('JQ404', 'SCHEDULE_NOT_FOUND', format('There is no schedule "%s".', left(_name, 200)),
            'select name from jobqueue.schedules lists them.', jsonb_build_object('schedule', left(_name, 200)));
    end if;
    return s;
end
$$;

-- pause_schedule: send nothing until it is resumed. Errors: JQ400 blank reason, JQ404.
create or replace function jobqueue.pause_schedule(name text, reason text)
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    s jobqueue.schedule;
begin
    perform check_reason(pause_schedule.reason);
    s := lock_schedule(pause_schedule.name);
    if s.paused_at is null then
        update schedule x
        set paused_at = now(), pause_reason = btrim(pause_schedule.reason), updated_at = now(),
            paused_by = coalesce(nullif(current_setting('jobqueue.actor', true), ''), session_user)
        where x.name = s.name;
        perform note_action('pause_schedule', null, s.tenant, s.name, null, null, pause_schedule.reason);
    end if;
end
$$;

-- resume_schedule: go on with the next tick from now on. Errors: JQ400 blank reason, JQ404.
create or replace function jobqueue.resume_schedule(name text, reason text)
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    s jobqueue.schedule;
begin
    perform check_reason(resume_schedule.reason);
    s := lock_schedule(resume_schedule.name);
    if s.paused_at is not null then
        update schedule x
        set paused_at = null, pause_reason = null, paused_by = null, updated_at = now(), next_at = tick_after(s.spec, now()),
            retry_at = null, failures = 0, last_error = null
        where x.name = s.name;
        perform note_action('resume_schedule', null, s.tenant, s.name, null, null, resume_schedule.reason);
    end if;
end
$$;

-- due_ticks: the ticks of a schedule that are to be sent now, in order: the one it waits for and those since, as its policy says.
create or replace function jobqueue.due_ticks(_schedule jobqueue.schedule)
returns timestamptz[]
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    late boolean := _schedule.next_at < now() - interval '1 min' and _schedule.failures = 0;
    most int := case when late and _schedule.missed <> 'all' then 1 else 100 end;
    ticks timestamptz[] := ticks_between(_schedule.spec, _schedule.next_at, now(), most);
begin
    if cardinality(ticks) < most then
        ticks := _schedule.next_at || ticks;
    end if;
    if late and _schedule.missed = 'skip' and ticks[1] < now() - interval '1 min' then
        return '{}';
    end if;
    return ticks;
end
$$;

-- tick_options: the options of the job of a tick.
create or replace function jobqueue.tick_options(_schedule jobqueue.schedule, _tick timestamptz)
returns jsonb
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select _schedule.options || jsonb_build_object('metadata',
        coalesce(nullif(_schedule.options -> 'metadata', 'null'),
            (select nullif(t.options -> 'metadata', 'null') from job_type t
                where t.name = coalesce(_schedule.options ->> 'job_type', _schedule.queue)), '{}')
        || jsonb_build_object('schedule', jsonb_build_object('name', _schedule.name, 'tick', utc_text(_tick))))
$$;

-- run_schedule: send the jobs of one locked schedule that is due; returns how many. If that fails its ticks are kept and tried again
-- after 1, 2, 4 … 60 seconds, and the other schedules go on.
create or replace function jobqueue.run_schedule(_schedule jobqueue.schedule)
returns int
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    ticks timestamptz[];
    tick timestamptz;
    answer record;
    message text;
begin
    begin
        ticks := due_ticks(_schedule);
        foreach tick in array ticks loop
            select s.id, s.reason into answer
            from send_one(queue_for_send(_schedule.queue), _schedule.payload, tick_options(_schedule, tick)) s;
        end loop;
        update schedule x
        set next_at = tick_after(x.spec, now()), retry_at = null, failures = 0, last_error = null, last_at = coalesce(tick, x.last_at),
            gap_from = case when x.next_at < now() - interval '1 min' then x.next_at else x.gap_from end,
            gap_until = case when x.next_at < now() - interval '1 min' then now() else x.gap_until end
        where x.name = _schedule.name;
        if tick is not null then
            update schedule x set last_job_id = answer.id, last_reason = answer.reason where x.name = _schedule.name;
        end if;
        return cardinality(ticks);
    exception when others then
        get stacked diagnostics message = message_text;
        update schedule x
        set failures = x.failures + 1, last_error = clean_text(message, 2000),
            retry_at = now() + least(interval '1 s' * power(2, least(x.failures, 6)), interval '60 s')
        where x.name = _schedule.name;
        return 0;
    end;
end
$$;

-- run_schedules: send the jobs of the schedules that are due, each tick once in the whole installation; passes over what another worker
-- has locked, and tries again later what has to wait for somebody (a key that an open transaction has taken). Returns how many jobs were sent, and when the next schedule is due. Index: schedule_due.
create or replace function jobqueue.run_schedules(_max int default 500, out sent int, out next_due timestamptz)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set lock_timeout = '200ms'
-- whoever keeps house does so for all tenants
set jobqueue.tenants = '*'
as $$
declare
    s jobqueue.schedule;
    queues text[] := '{}';
    n int;
begin
    sent := 0;
    for s in
        select * from schedule x
        where coalesce(x.retry_at, x.next_at) <= now() and x.next_at is not null and x.paused_at is null
        order by coalesce(x.retry_at, x.next_at)
        limit _max
        for update skip locked
    loop
        n := run_schedule(s);
        sent := sent + n;
        if n > 0 then
            queues := queues || s.queue;
        end if;
    end loop;
    next_due := next_tick();
    if sent > 0 then
        perform wake_many(queues);
    end if;
end
$$;

-- next_tick: when the next schedule is due; null if none is. Volatile, so that it sees what the same statement has just done.
create or replace function jobqueue.next_tick()
returns timestamptz
language plpgsql volatile security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    return (
        select min(coalesce(x.retry_at, x.next_at)) from schedule x where x.paused_at is null and x.next_at is not null);
end
$$;
