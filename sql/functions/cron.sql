-- Cron expressions: 5 fields (minute hour day-of-month month day-of-week) or 6 (second first), read as Debian's cron reads them.
--   *  7  1-5  */10  0-30/5  5/15 (from 5 on)  1,15  JAN-MAR  mon-fri ; day-of-week 0 and 7 are Sunday
--   If day-of-month and day-of-week are both given, a day needs only one of them; if either begins with *, it needs both.
--   @yearly @annually @monthly @weekly @daily @midnight @hourly

-- cron_value: one number or name of a field; null if it is neither.
create or replace function jobqueue.cron_value(_text text, _least int, _most int, _names text[])
returns int
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select case
        when _text ~ '^\d{1,4}$' then case when _text::int between _least and _most then _text::int end
        else array_position(_names, lower(_text)) - 1 + _least end
$$;

-- cron_item: the values of one item of a list, for example 10-50/20; null if it cannot be read.
create or replace function jobqueue.cron_item(_item text, _least int, _most int, _names text[])
returns int[]
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    part text[] := regexp_match(_item, '^(?:(\*)|([0-9A-Za-z]+)(?:-([0-9A-Za-z]+))?)(?:/(\d{1,4}))?$');
    first int;
    last int;
begin
    if part is null or part[4]::int = 0 then
        return null;
    elsif part[1] is not null then
        first := _least; last := _most;
    else
        first := cron_value(part[2], _least, _most, _names);
        last := case
            -- a week may end with Sunday
            when lower(part[3]) = 'sun' then 7
            when part[3] is not null then cron_value(part[3], _least, _most, _names)
            when part[4] is not null then _most
            else first end;
    end if;
    if first is null or last is null or first > last then
        return null;
    end if;
    return array(select generate_series(first, last, coalesce(part[4]::int, 1)));
end
$$;

-- cron_field: the values of a field, in order. JQ400 names the field.
create or replace function jobqueue.cron_field(_field text, _name text, _least int, _most int, _names text[] default '{}')
returns int[]
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    item text;
    found_values int[];
    result int[] := '{}';
begin
    foreach item in array string_to_array(_field, ',') loop
        found_values := cron_item(item, _least, _most, _names);
        if found_values is null then
            perform refuse('JQ400', 'INVALID_ARGUMENT',
                format('The %s of the cron expression cannot be read: "%s".', _name, left(item, 50)),
                format('It goes from %s to %s%s: *, 7, 1-5, */10, 0-30/5, and lists of these with commas.', _least, _most,
                    case when cardinality(_names) > 0 then format(' or %s to %s', upper(_names[1]), upper(_names[cardinality(_names)])) else '' end),
                jsonb_build_object('option', 'expression', 'field', _name));
        end if;
        result := result || found_values;
    end loop;
    return array(select distinct v from unnest(result) v order by v);
end
$$;

-- cron_spec: an expression as fields, each a list of numbers. JQ400 says which field is wrong.
create or replace function jobqueue.cron_spec(_expression text)
returns jsonb
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    plain text := coalesce(
        '{"@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0", "@daily": "0 0 * * *",
          "@midnight": "0 0 * * *", "@hourly": "0 * * * *"}'::jsonb ->> lower(btrim(_expression, E' \t\r\n')),
        btrim(_expression, E' \t\r\n'));
    field text[] := regexp_split_to_array(plain, '\s+');
    spec jsonb;
begin
    if plain like '@%' or cardinality(field) not in (5, 6) then
        perform refuse('JQ400', 'INVALID_ARGUMENT', case
                when plain like '@%' then format('There is no "%s".', left(plain, 50))
                else format('A cron expression has 5 or 6 fields, not %s.', case when plain = '' then 0 else cardinality(field) end) end,
            'Give [second] minute hour day-of-month month day-of-week, one of @hourly, @daily, @weekly, @monthly, @yearly, '
            'or a rule such as RRULE:FREQ=DAILY;BYHOUR=9.',
            '{"option": "expression"}');
    end if;
    if cardinality(field) = 5 then
        field := '0'::text || field;
    end if;
    spec := jsonb_build_object(
        'kind', 'cron',
        'seconds', cron_field(field[1], 'second', 0, 59)::text,
        'minutes', cron_field(field[2], 'minute', 0, 59)::text,
        'hours', cron_field(field[3], 'hour', 0, 23)::text,
        'days', cron_field(field[4], 'day-of-month', 1, 31)::text,
        'months', cron_field(field[5], 'month', 1, 12,
            array['jan', 'feb', 'mar', 'apr', 'may', 'jun', 'jul', 'aug', 'sep', 'oct', 'nov', 'dec'])::text,
        'weekdays', array(select distinct d % 7 from unnest(
            cron_field(field[6], 'day-of-week', 0, 7, array['sun', 'mon', 'tue', 'wed', 'thu', 'fri', 'sat'])) d)::text,
        'both_days', field[4] like '*%' or field[6] like '*%',
        -- how ticks in a skipped or repeated hour are taken, see ticks.sql
        'fixed', field[2] not like '*%' and field[3] not like '*%');
    if cron_day(spec, '2000-01-01') is null then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('The cron expression never happens: "%s".', left(plain, 100)),
            'No month that it names has such a day.', '{"option": "expression", "field": "day-of-month"}');
    end if;
    return spec;
end
$$;

-- time_at_or_after: the first time of day, of the given hours, minutes and seconds (in order), that is not before _from; null if none.
create or replace function jobqueue.time_at_or_after(_hours int[], _minutes int[], _seconds int[], _from time)
returns time
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    h int := extract(hour from _from);
    m int := extract(minute from _from);
    s int := ceil(extract(second from _from));
    next int;
begin
    if h = any (_hours) then
        if m = any (_minutes) then
            select min(x) into next from unnest(_seconds) x where x >= s;
            if next is not null then
                return make_time(h, m, next);
            end if;
        end if;
        select min(x) into next from unnest(_minutes) x where x > m;
        if next is not null then
            return make_time(h, next, _seconds[1]);
        end if;
    end if;
    select min(x) into next from unnest(_hours) x where x > h;
    return make_time(next, _minutes[1], _seconds[1]);
end
$$;

-- cron_day: the first day, not before _from, on which an expression has ticks; null if there is none within 50 years (29 February can
-- fall on a given weekday after 40). Goes month by month.
create or replace function jobqueue.cron_day(_spec jsonb, _from date)
returns date
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    days int[] := (_spec ->> 'days')::int[];
    months int[] := (_spec ->> 'months')::int[];
    weekdays int[] := (_spec ->> 'weekdays')::int[];
    needs_both boolean := (_spec ->> 'both_days')::boolean;
    month date := date_trunc('month', _from::timestamp);
    day date;
    in_days boolean;
    in_weekdays boolean;
begin
    for i in 0 .. 600 loop
        if extract(month from month)::int = any (months) then
            day := greatest(month, _from);
            while day < (month + interval '1 month')::date loop
                in_days := extract(day from day)::int = any (days);
                in_weekdays := extract(dow from day)::int = any (weekdays);
                if (in_days and in_weekdays) or (not needs_both and (in_days or in_weekdays)) then
                    return day;
                end if;
                day := day + 1;
            end loop;
        end if;
        month := (month + interval '1 month')::date;
    end loop;
    return null;
end
$$;

-- cron_next: the first tick after _after, both in local time; null if it never happens.
create or replace function jobqueue.cron_next(_spec jsonb, _after timestamp)
returns timestamp
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    wanted timestamp := date_trunc('second', _after) + interval '1 s';
    day date := cron_day(_spec, wanted::date);
    at time;
begin
    at := time_at_or_after((_spec ->> 'hours')::int[], (_spec ->> 'minutes')::int[], (_spec ->> 'seconds')::int[],
        case when day = wanted::date then wanted::time else '00:00' end);
    if at is null then
        day := cron_day(_spec, day + 1);
        at := time_at_or_after((_spec ->> 'hours')::int[], (_spec ->> 'minutes')::int[], (_spec ->> 'seconds')::int[], '00:00');
    end if;
    return day + at;
end
$$;
