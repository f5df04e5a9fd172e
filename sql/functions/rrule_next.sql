-- How a recurrence rule counts, in local time. What a rule may say is in rrule.sql, where local becomes real time in ticks.sql.

-- rule_has_day: whether a rule has ticks on a day, by month, day of the month and day of the week.
create or replace function jobqueue.rule_has_day(_spec jsonb, _day date)
returns boolean
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    month_day int := extract(day from _day);
    month_end int;
begin
    if _spec ? 'months' and extract(month from _day)::int <> all ((_spec ->> 'months')::int[]) then
        return false;
    end if;
    if _spec ? 'days' then
        month_end := extract(day from date_trunc('month', _day::timestamp) + interval '1 month - 1 day');
        if month_day <> all ((_spec ->> 'days')::int[]) and month_day - month_end - 1 <> all ((_spec ->> 'days')::int[]) then
            return false;
        end if;
    end if;
    return not _spec ? 'weekdays' or rule_has_weekday(_spec, _day);
end
$$;

-- rule_has_weekday: whether BYDAY names a day. Its numbers count within the month, in a yearly rule without BYMONTH within the year.
create or replace function jobqueue.rule_has_weekday(_spec jsonb, _day date)
returns boolean
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    weekdays int[] := (_spec ->> 'weekdays')::int[];
    weekday int := extract(isodow from _day);
    unit text := case when _spec ->> 'freq' = 'YEARLY' and not _spec ? 'months' then 'year' else 'month' end;
    first date := date_trunc(unit, _day::timestamp);
    last date := date_trunc(unit, _day::timestamp) + ('1 ' || unit)::interval - interval '1 day';
begin
    return weekday = any (weekdays)
        or ((_day - first) / 7 + 1) * 10 + weekday = any (weekdays)
        or -(((last - _day) / 7 + 1) * 10 + weekday) = any (weekdays);
end
$$;

-- rrule_next: the first tick after _after, both in local time; null if there is none within a hundred years.
create or replace function jobqueue.rrule_next(_spec jsonb, _after timestamp)
returns timestamp
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    wanted timestamp := greatest(date_trunc('second', _after) + interval '1 s', (_spec ->> 'start')::timestamp);
begin
    if _spec ->> 'freq' in ('YEARLY', 'MONTHLY', 'WEEKLY') then
        return rule_next_by_calendar(_spec, wanted);
    end if;
    return rule_next_by_clock(_spec, wanted);
end
$$;

-- rule_next_by_calendar: for yearly, monthly and weekly rules: period after period, in each the first time not before _wanted.
create or replace function jobqueue.rule_next_by_calendar(_spec jsonb, _wanted timestamp)
returns timestamp
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    unit text := case _spec ->> 'freq' when 'YEARLY' then 'year' when 'MONTHLY' then 'month' else 'week' end;
    every int := (_spec ->> 'interval')::int;
    -- weeks begin on Monday for date_trunc
    shift int := case unit when 'week' then (_spec ->> 'week_start')::int - 1 else 0 end;
    origin date := date_trunc(unit, (_spec ->> 'start')::timestamp - make_interval(days => shift))::date + shift;
    period date := date_trunc(unit, _wanted - make_interval(days => shift))::date + shift;
    number int;
    result timestamp;
begin
    number := case unit
        when 'year' then extract(year from period) - extract(year from origin)
        when 'month' then (extract(year from period) - extract(year from origin)) * 12 + extract(month from period) - extract(month from origin)
        else (period - origin) / 7 end;
    number := ((number + every - 1) / every) * every;
    for i in 1 .. case unit when 'week' then 5300 when 'month' then 1300 else 110 end loop
        period := (origin + number * ('1 ' || unit)::interval)::date;
        exit when extract(year from period) > 9999 or (period > _wanted + interval '100 years' and i > 1);
        result := rule_first_of_period(_spec, period, (period + ('1 ' || unit)::interval)::date - 1, _wanted);
        exit when result is not null;
        number := number + every;
    end loop;
    return result;
end
$$;

-- rule_first_of_period: the first time not before _wanted among those of a period of days; null if it has none.
create or replace function jobqueue.rule_first_of_period(_spec jsonb, _first date, _last date, _wanted timestamp)
returns timestamp
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    hours int[] := (_spec ->> 'hours')::int[];
    minutes int[] := (_spec ->> 'minutes')::int[];
    seconds int[] := (_spec ->> 'seconds')::int[];
    day date := case when _spec ? 'places' then _first else greatest(_first, _wanted::date) end;
    days date[] := '{}';
    at time;
begin
    while day <= _last loop
        if rule_has_day(_spec, day) then
            if _spec ? 'places' then
                days := days || day;
            else
                at := time_at_or_after(hours, minutes, seconds, case when day = _wanted::date then _wanted::time else '00:00' end);
                if at is not null then
                    return day + at;
                end if;
            end if;
        end if;
        day := day + 1;
    end loop;
    return rule_first_of_set(days, hours, minutes, seconds, (_spec ->> 'places')::int[], _wanted);
end
$$;

-- rule_first_of_set: the first time not before _wanted among those that BYSETPOS chooses of a period.
create or replace function jobqueue.rule_first_of_set(_days date[], _hours int[], _minutes int[], _seconds int[], _places int[], _wanted timestamp)
returns timestamp
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select min(x.at)
    from (
        select d + make_time(h, m, s) as at, row_number() over (order by d, h, m, s) as place, count(*) over () as places
        from unnest(_days) d, unnest(_hours) h, unnest(_minutes) m, unnest(_seconds) s) x
    where x.at >= _wanted and (x.place = any (_places) or x.place - x.places - 1 = any (_places))
$$;

-- rule_day: the first day of a rule not before _from; null if there is none within 50 years.
create or replace function jobqueue.rule_day(_spec jsonb, _from date)
returns date
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    day date := _from;
begin
    while day < _from + 18300 loop
        if _spec ? 'months' and extract(month from day)::int <> all ((_spec ->> 'months')::int[]) then
            day := date_trunc('month', day::timestamp) + interval '1 month';
        elsif rule_has_day(_spec, day) then
            return day;
        else
            day := day + 1;
        end if;
    end loop;
    return null;
end
$$;

-- rule_next_by_clock: for daily, hourly, minutely and secondly rules: steps from the start, of which whole days, hours and minutes are
-- left out that the rule does not name. Null after 20,000 places without a tick.
create or replace function jobqueue.rule_next_by_clock(_spec jsonb, _wanted timestamp)
returns timestamp
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    unit text := case _spec ->> 'freq' when 'DAILY' then 'day' when 'HOURLY' then 'hour' when 'MINUTELY' then 'minute' else 'second' end;
    hours int[] := (_spec ->> 'hours')::int[];
    minutes int[] := (_spec ->> 'minutes')::int[];
    seconds int[] := (_spec ->> 'seconds')::int[];
    origin timestamp := date_trunc(unit, (_spec ->> 'start')::timestamp);
    step bigint := (_spec ->> 'interval')::bigint * case unit when 'day' then 86400 when 'hour' then 3600 when 'minute' then 60 else 1 end;
    place timestamp := date_trunc(unit, _wanted);
    day date;
    result timestamp;
begin
    for i in 1 .. 20000 loop
        -- the first step at or after the place
        place := origin + make_interval(secs => ceil(extract(epoch from place - origin) / step) * step);
        if place::date is distinct from day then
            day := rule_day(_spec, place::date);
            exit when day is null;
        end if;
        if day > place::date then
            place := day;
        elsif unit <> 'day' and extract(hour from place)::int <> all (hours) then
            place := date_trunc('hour', place) + interval '1 hour';
        elsif unit in ('minute', 'second') and extract(minute from place)::int <> all (minutes) then
            place := date_trunc('minute', place) + interval '1 minute';
        elsif unit = 'second' and extract(second from place)::int <> all (seconds) then
            place := place + interval '1 s';
        else
            result := rule_first_of_step(_spec, place, _wanted);
            exit when result is not null;
            place := place + make_interval(secs => step);
        end if;
    end loop;
    return result;
end
$$;

-- rule_first_of_step: the first time not before _wanted within the day, hour, minute or second that begins at _place; null if none.
create or replace function jobqueue.rule_first_of_step(_spec jsonb, _place timestamp, _wanted timestamp)
returns timestamp
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    freq text := _spec ->> 'freq';
    hours int[] := case freq when 'DAILY' then (_spec ->> 'hours')::int[] else array[extract(hour from _place)::int] end;
    minutes int[] := case when freq in ('DAILY', 'HOURLY') then (_spec ->> 'minutes')::int[] else array[extract(minute from _place)::int] end;
    seconds int[] := case freq when 'SECONDLY' then array[extract(second from _place)::int] else (_spec ->> 'seconds')::int[] end;
begin
    if _spec ? 'places' then
        return rule_first_of_set(array[_place::date], hours, minutes, seconds, (_spec ->> 'places')::int[], _wanted);
    end if;
    return _place::date + time_at_or_after(hours, minutes, seconds,
        case when _place::date = _wanted::date then _wanted::time else '00:00' end);
end
$$;
