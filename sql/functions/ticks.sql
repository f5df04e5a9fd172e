-- From an expression to the moments when it happens. cron.sql and rrule.sql count in local time; here local time becomes real time.
--
-- Daylight saving, as in Debian's cron. A cron expression whose minute and hour both do not begin with *, and a rule that is DAILY or
-- rarer, names fixed times; all others are like intervals.
--                       an hour is skipped                             an hour is repeated
--   fixed times         once, at the first moment after the hour       once, the first time
--   like intervals      only what really comes                         both times

-- utc_offset: what a zone's clocks show beyond UTC at a moment.
create or replace function jobqueue.utc_offset(_zone text, _at timestamptz)
returns interval
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select (_at at time zone _zone) - (_at at time zone 'UTC')
$$;

-- clock_change: the moment, after _from and not after _to, when the clocks of a zone change; they must differ between the two.
create or replace function jobqueue.clock_change(_zone text, _from timestamptz, _to timestamptz)
returns timestamptz
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    low bigint := floor(extract(epoch from _from));
    high bigint := ceil(extract(epoch from _to));
    middle bigint;
    before interval := utc_offset(_zone, to_timestamp(low));
begin
    while high - low > 1 loop
        middle := (low + high) / 2;
        if utc_offset(_zone, to_timestamp(middle)) = before then
            low := middle;
        else
            high := middle;
        end if;
    end loop;
    return to_timestamp(high);
end
$$;

-- moment_of: when the clocks of a zone show a local time: the first time if they show it twice; the first moment after it, and skipped,
-- if they never do. (at time zone would take the second time, and move a skipped one by the length of the gap.)
create or replace function jobqueue.moment_of(_zone text, _local timestamp, out at timestamptz, out skipped boolean)
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    as_utc timestamptz := _local at time zone 'UTC';
    before interval := utc_offset(_zone, as_utc - interval '24 hours');
    behind interval := utc_offset(_zone, as_utc + interval '24 hours');
begin
    skipped := false;
    at := as_utc - before;
    if before = behind or at at time zone _zone = _local then
        return;
    end if;
    at := as_utc - behind;
    if at at time zone _zone <> _local then
        skipped := true;
        at := clock_change(_zone, as_utc - behind, as_utc - before);
    end if;
end
$$;

-- local_next: the first tick of a rule after a local time, in local time.
create or replace function jobqueue.local_next(_spec jsonb, _after timestamp)
returns timestamp
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select case _spec ->> 'kind' when 'cron' then jobqueue.cron_next(_spec, _after) else jobqueue.rrule_next(_spec, _after) end
$$;

-- fixed_tick_after: the first moment after _after of a rule with fixed times.
create or replace function jobqueue.fixed_tick_after(_spec jsonb, _zone text, _after timestamptz)
returns timestamptz
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    local timestamp := _after at time zone _zone;
    first_shown timestamptz;
    at timestamptz;
begin
    select m.at into first_shown from moment_of(_zone, local) m;
    if first_shown < _after then
        -- shown for the second time: all until the end of the repeated hour has been
        local := (clock_change(_zone, first_shown, _after) - interval '1 s') at time zone _zone;
    end if;
    loop
        local := local_next(_spec, local);
        select m.at into at from moment_of(_zone, local) m;
        if local is null or at > _after then
            return at;
        end if;
    end loop;
end
$$;

-- interval_tick_after: the first moment after _after of a rule that is like an interval. Goes from one change of the clocks to the next.
create or replace function jobqueue.interval_tick_after(_spec jsonb, _zone text, _after timestamptz)
returns timestamptz
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    place timestamptz := _after;
    local timestamp := _after at time zone _zone;
    next timestamp;
    at timestamptz;
    change timestamptz;
    is_skipped boolean;
begin
    for i in 1 .. 200 loop
        next := local_next(_spec, local);
        if next is null then
            return null;
        end if;
        at := next at time zone 'UTC' - utc_offset(_zone, place);
        if utc_offset(_zone, place) <> utc_offset(_zone, place + interval '24 hours') then
            change := clock_change(_zone, place, place + interval '24 hours');
            if at < change then
                return at;
            end if;
        elsif at <= place + interval '24 hours' then
            return at;
        else
            select m.at, m.skipped into at, is_skipped from moment_of(_zone, next) m;
            if not is_skipped then
                return at;
            end if;
            change := at;
        end if;
        place := change;
        local := (change at time zone _zone) - interval '1 s';
    end loop;
    return null;
end
$$;

-- rule_tick_after: the first moment after _after of the rule itself.
create or replace function jobqueue.rule_tick_after(_spec jsonb, _after timestamptz)
returns timestamptz
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    zone text := _spec ->> 'zone';
begin
    if zone = 'UTC' then
        return local_next(_spec, _after at time zone 'UTC') at time zone 'UTC';
    elsif (_spec ->> 'fixed')::boolean then
        return fixed_tick_after(_spec, zone, _after);
    end if;
    return interval_tick_after(_spec, zone, _after);
end
$$;

-- tick_after: the first moment after _after when an expression happens; null if it does not any more.
--   _spec  what schedule_spec read
create or replace function jobqueue.tick_after(_spec jsonb, _after timestamptz)
returns timestamptz
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    at timestamptz := _after;
    added timestamptz;
begin
    if _spec ->> 'kind' = 'cron' then
        return rule_tick_after(_spec, _after);
    end if;
    if _spec ? 'freq' then
        loop
            at := rule_tick_after(_spec, at);
            if at > (_spec ->> 'until')::timestamptz then
                at := null;
            end if;
            exit when not coalesce(is_excluded(_spec, at), false);
            if (at at time zone (_spec ->> 'zone'))::date = any ((_spec ->> 'excluded_days')::date[]) then
                at := day_end(_spec ->> 'zone', at);
            end if;
        end loop;
    else
        at := null;
    end if;
    select min(d) into added from unnest((_spec ->> 'added')::timestamptz[]) d where d > _after and not is_excluded(_spec, d);
    return least(at, added);
end
$$;

-- day_end: the last microsecond of the local day of a moment.
create or replace function jobqueue.day_end(_zone text, _at timestamptz)
returns timestamptz
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select m.at - interval '1 us' from jobqueue.moment_of(_zone, date_trunc('day', _at at time zone _zone) + interval '1 day') m
$$;

-- is_excluded: whether an EXDATE takes a moment out.
create or replace function jobqueue.is_excluded(_spec jsonb, _at timestamptz)
returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select _at = any ((_spec ->> 'excluded')::timestamptz[])
        or (_at at time zone (_spec ->> 'zone'))::date = any ((_spec ->> 'excluded_days')::date[])
$$;

-- ticks_between: the last _max ticks after _from and not after _until, in order. However long the time is, no more than some thousand
-- ticks are looked at: the beginning is searched by halves.
create or replace function jobqueue.ticks_between(_spec jsonb, _from timestamptz, _until timestamptz, _max int)
returns timestamptz[]
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    low timestamptz := _from;
    high timestamptz := _until;
    middle timestamptz;
    ticks timestamptz[] := first_ticks(_spec, _from, _until, _max + 1);
    fewer timestamptz[];
begin
    while cardinality(ticks) > _max and high - low > interval '1 ms' loop
        middle := low + (high - low) / 2;
        fewer := first_ticks(_spec, middle, _until, _max + 1);
        if cardinality(fewer) >= _max then
            low := middle;
            ticks := fewer;
        else
            high := middle;
        end if;
    end loop;
    return ticks[greatest(cardinality(ticks) - _max, 0) + 1 :];
end
$$;

-- first_ticks: the first _max ticks after _from and not after _until, in order.
create or replace function jobqueue.first_ticks(_spec jsonb, _from timestamptz, _until timestamptz, _max int)
returns timestamptz[]
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    at timestamptz := _from;
    ticks timestamptz[] := '{}';
begin
    while cardinality(ticks) < _max loop
        at := tick_after(_spec, at);
        exit when at is null or at > _until;
        ticks := ticks || at;
    end loop;
    return ticks;
end
$$;

-- utc_text: a moment as RFC 3339 in UTC, whatever the session's settings are.
create or replace function jobqueue.utc_text(_at timestamptz)
returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select to_char(_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
$$;

-- zone_name: the name of a time zone as the IANA database spells it. JQ400 for others: Postgres itself would take "Foo5" for a zone.
create or replace function jobqueue.zone_name(_zone text)
returns text
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    result text;
begin
    if upper(coalesce(_zone, 'UTC')) = 'UTC' then
        return 'UTC';
    end if;
    select z.name into result from pg_timezone_names z where lower(z.name) = lower(_zone) and z.name not like 'posix%' limit 1;
    if result is null then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('There is no time zone "%s".', left(_zone, 100)),
            'Give a name of the IANA database such as Europe/Berlin; select name from pg_timezone_names lists them.',
            '{"option": "time_zone"}');
    end if;
    return result;
end
$$;

-- schedule_spec: an expression as data. JQ400 if it cannot be read.
--   _starts  where a rule without DTSTART begins
create or replace function jobqueue.schedule_spec(_expression text, _zone text, _starts timestamptz)
returns jsonb
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if _expression is null or length(_expression) > 20000 then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'An expression has at most 20,000 characters.',
            'Give a cron expression such as "0 3 * * *" or a rule such as RRULE:FREQ=DAILY;BYHOUR=3.', '{"option": "expression"}');
    elsif _expression ~* '^\s*(rrule|dtstart|rdate|exdate|exrule)\s*[;:]|^\s*freq=' then
        return rrule_spec(_expression, _zone, _starts);
    end if;
    return cron_spec(_expression) || jsonb_build_object('zone', zone_name(_zone));
end
$$;
