-- Recurrence rules (RFC 5545): lines RRULE, DTSTART, RDATE, EXDATE; of RRULE the parts FREQ, INTERVAL, COUNT, UNTIL, BYMONTH,
-- BYMONTHDAY, BYDAY, BYHOUR, BYMINUTE, BYSECOND, BYSETPOS, WKST. What is not in this list is refused, never passed over.
--   A rule without DTSTART begins when the schedule is made. DTSTART is a tick only if the rule says so too.
--   DTSTART;TZID=… and DTSTART:…Z name the zone of the rule. UNTIL without a time, and EXDATE;VALUE=DATE, mean the whole day.

-- refuse_rule: JQ400 for a part of a rule.
create or replace function jobqueue.refuse_rule(_message text, _part text, _hint text default '')
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform jobqueue.refuse('JQ400', 'INVALID_ARGUMENT', _message, _hint, jsonb_build_object('option', 'expression', 'field', _part));
end
$$;

-- rule_numbers: a list of numbers within bounds, in order; with _signed also counted from the end (-1 is the last one). Null stays null.
create or replace function jobqueue.rule_numbers(_text text, _part text, _least int, _most int, _signed boolean default false)
returns int[]
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    item text;
    result int[];
begin
    foreach item in array coalesce(string_to_array(_text, ','), '{}') loop
        if item !~ '^[+-]?\d{1,7}$' or (item like '-%' and not _signed)
            or abs(item::int) not between _least and _most
        then
            perform refuse_rule(format('%s of the rule cannot be read: "%s".', _part, left(item, 50)), _part,
                format('It goes from %s to %s%s.', _least, _most, case when _signed then ', or with a minus from the end' else '' end));
        end if;
        result := result || item::int;
    end loop;
    return case when _text is not null then array(select distinct v from unnest(result) v order by v) end;
end
$$;

-- rule_time: 20301231, 20301231T120000 or 20301231T120000Z as a local time of a zone.
create or replace function jobqueue.rule_time(_text text, _part text, _zone text)
returns timestamp
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    n text[] := regexp_match(_text, '^(\d{4})(\d\d)(\d\d)(?:T(\d\d)(\d\d)(\d\d)(Z?))?$');
    result timestamp;
begin
    if n is not null then
        begin
            result := make_timestamp(n[1]::int, n[2]::int, n[3]::int, coalesce(n[4]::int, 0), coalesce(n[5]::int, 0), coalesce(n[6]::int, 0));
        exception when data_exception then
            result := null;
        end;
    end if;
    if result is null then
        perform jobqueue.refuse_rule(format('%s of the rule is not a time: "%s".', _part, left(_text, 50)), _part,
            'Give 20301231T120000, 20301231T120000Z for UTC, or 20301231.');
    end if;
    return case when n[7] = 'Z' then result at time zone 'UTC' at time zone _zone else result end;
end
$$;

-- rule_lines: the lines of an expression as rows: name and value in capitals, zone and kind of value from the parameters.
create or replace function jobqueue.rule_lines(_expression text)
returns table (name text, value text, zone text, kind text)
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    line text;
    part text[];
    parameter text;
begin
    -- a line that begins with a space goes on with the one before
    for line in select l from regexp_split_to_table(regexp_replace(_expression, E'\r?\n[ \t]', '', 'g'), E'\r?\n') l where btrim(l, E' \t') <> '' loop
        line := btrim(line, E' \t');
        part := regexp_match(case when line ~* '^freq=' then 'RRULE:' || line else line end, '^([A-Za-z-]+)((?:;[^:;]+)*):(.*)$');
        name := upper(part[1]); value := upper(part[3]); zone := null; kind := 'DATE-TIME';
        if part is null or name not in ('RRULE', 'DTSTART', 'RDATE', 'EXDATE') then
            perform refuse_rule(format('This line of the rule cannot be read: "%s".', left(line, 80)), coalesce(name, 'line'),
                'Known are RRULE, DTSTART, RDATE and EXDATE, each on a line of its own.');
        end if;
        foreach parameter in array string_to_array(ltrim(part[2], ';'), ';') loop
            if name <> 'RRULE' and parameter ~* '^tzid=.' then
                zone := substr(parameter, 6);
            elsif name <> 'RRULE' and upper(parameter) in ('VALUE=DATE', 'VALUE=DATE-TIME') then
                kind := upper(substr(parameter, 7));
            else
                perform refuse_rule(format('%s has no parameter "%s".', name, left(parameter, 50)), name, 'Known are TZID and VALUE=DATE.');
            end if;
        end loop;
        return next;
    end loop;
end
$$;

-- rule_zone: the zone of a rule: what its DTSTART names, else the one of the schedule. JQ400 if they contradict each other.
create or replace function jobqueue.rule_zone(_expression text, _zone text)
returns text
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    named text;
begin
    select coalesce(l.zone, case when l.value like '%Z' then 'UTC' end) into named from rule_lines(_expression) l where l.name = 'DTSTART';
    if named is null then
        return zone_name(_zone);
    end if;
    named := zone_name(named);
    if coalesce(_zone, 'UTC') <> 'UTC' and zone_name(_zone) <> named then
        perform refuse_rule(format('DTSTART is in %s and time_zone is %s.', named, zone_name(_zone)), 'DTSTART',
            'Give one of the two; DTSTART;TZID=Europe/Berlin:20300101T090000 names the zone in the rule.');
    end if;
    return named;
end
$$;

-- rule_moments: the times of the lines RDATE or EXDATE, with the kind of value they were given as.
create or replace function jobqueue.rule_moments(_expression text, _name text, _zone text)
returns table (at timestamptz, day date)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select m.at, case when l.kind = 'DATE' or one !~ 'T' then t.local::date end
    from rule_lines(_expression) l
    cross join lateral (select case when l.zone is null then _zone else zone_name(l.zone) end as zone) z
    cross join lateral unnest(string_to_array(l.value, ',')) one
    cross join lateral (select rule_time(one, _name, z.zone) as local) t
    cross join lateral moment_of(z.zone, t.local) m
    where l.name = _name
$$;

-- rule_parts: the parts of the RRULE as an object; checked for what is unknown, doubled or contradictory.
create or replace function jobqueue.rule_parts(_rule text)
returns jsonb
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    known text[] := array['FREQ', 'INTERVAL', 'COUNT', 'UNTIL', 'BYMONTH', 'BYMONTHDAY', 'BYDAY', 'BYHOUR', 'BYMINUTE', 'BYSECOND', 'BYSETPOS', 'WKST'];
    item text;
    part text;
    parts jsonb := '{}';
begin
    foreach item in array string_to_array(rtrim(_rule, ';'), ';') loop
        part := split_part(item, '=', 1);
        if part <> all (known) then
            perform refuse_rule(format('A rule has no part "%s" here.', left(part, 50)), part, 'Known are: ' || array_to_string(known, ', ') || '.');
        elsif parts ? part or item !~ '=.' or (part in ('INTERVAL', 'COUNT', 'WKST') and item like '%,%') then
            perform refuse_rule(format('%s must be given once, with a value.', part), part);
        end if;
        parts := parts || jsonb_build_object(part, substr(item, length(part) + 2));
    end loop;
    if coalesce(parts ->> 'FREQ', '') not in ('YEARLY', 'MONTHLY', 'WEEKLY', 'DAILY', 'HOURLY', 'MINUTELY', 'SECONDLY') then
        perform refuse_rule('FREQ of the rule must be one of YEARLY, MONTHLY, WEEKLY, DAILY, HOURLY, MINUTELY, SECONDLY.', 'FREQ');
    elsif parts ? 'COUNT' and parts ? 'UNTIL' then
        perform refuse_rule('COUNT and UNTIL exclude each other.', 'COUNT');
    elsif parts ->> 'FREQ' = 'WEEKLY' and parts ? 'BYMONTHDAY' then
        perform refuse_rule('A weekly rule has no BYMONTHDAY.', 'BYMONTHDAY', 'Use FREQ=DAILY with BYDAY and BYMONTHDAY.');
    elsif parts ? 'BYSETPOS' and not exists (select from jsonb_object_keys(parts) k where k like 'BY%' and k <> 'BYSETPOS') then
        perform refuse_rule('BYSETPOS chooses among what another BY… part says, and there is none.', 'BYSETPOS');
    end if;
    return parts;
end
$$;

-- rule_weekdays: BYDAY, for example MO,-1FR, as numbers: ordinal * 10 + weekday (Monday is 1); -1FR is -15, plain MO is 1.
create or replace function jobqueue.rule_weekdays(_text text, _freq text)
returns int[]
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    item text;
    part text[];
    result int[];
    number int;
begin
    foreach item in array coalesce(string_to_array(_text, ','), '{}') loop
        part := regexp_match(item, '^([+-]?\d{1,2})?(MO|TU|WE|TH|FR|SA|SU)$');
        number := part[1]::int;
        if part is null or number = 0 or abs(number) > 53 then
            perform refuse_rule(format('BYDAY of the rule cannot be read: "%s".', left(item, 50)), 'BYDAY', 'Give MO,WE or, for the last Friday, -1FR.');
        elsif number is not null and _freq not in ('MONTHLY', 'YEARLY') then
            perform refuse_rule(format('BYDAY of a %s rule has no numbers.', lower(_freq)), 'BYDAY', 'They count within a month or a year.');
        end if;
        result := result || (coalesce(abs(number), 0) * 10 + array_position(array['MO', 'TU', 'WE', 'TH', 'FR', 'SA', 'SU'], part[2]))
            * coalesce(sign(number), 1)::int;
    end loop;
    return result;
end
$$;

-- rule_fields: the parts of an RRULE as lists of numbers, with what RFC 5545 takes from the start where nothing is said.
create or replace function jobqueue.rule_fields(_parts jsonb, _start timestamp)
returns jsonb
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    freq text := _parts ->> 'FREQ';
    rank int := array_position(array['SECONDLY', 'MINUTELY', 'HOURLY', 'DAILY', 'WEEKLY', 'MONTHLY', 'YEARLY'], freq);
    hours int[] := rule_numbers(_parts ->> 'BYHOUR', 'BYHOUR', 0, 23);
    minutes int[] := rule_numbers(_parts ->> 'BYMINUTE', 'BYMINUTE', 0, 59);
    seconds int[] := rule_numbers(_parts ->> 'BYSECOND', 'BYSECOND', 0, 59);
    months int[] := rule_numbers(_parts ->> 'BYMONTH', 'BYMONTH', 1, 12);
    days int[] := rule_numbers(_parts ->> 'BYMONTHDAY', 'BYMONTHDAY', 1, 31, true);
    weekdays int[] := rule_weekdays(_parts ->> 'BYDAY', freq);
    places int[] := rule_numbers(_parts ->> 'BYSETPOS', 'BYSETPOS', 1, 366, true);
begin
    if days is null and weekdays is null and rank > 4 then
        if freq = 'WEEKLY' then
            weekdays := array[extract(isodow from _start)::int];
        else
            days := array[extract(day from _start)::int];
            if freq = 'YEARLY' then
                months := coalesce(months, array[extract(month from _start)::int]);
            end if;
        end if;
    end if;
    hours := case when rank > 3 then coalesce(hours, array[extract(hour from _start)::int]) else hours end;
    minutes := case when rank > 2 then coalesce(minutes, array[extract(minute from _start)::int]) else minutes end;
    seconds := case when rank > 1 then coalesce(seconds, array[extract(second from _start)::int]) else seconds end;
    if places is not null and (array[1, 1, 1, 1, 7, 31, 366])[rank] * coalesce(case when rank > 3 then cardinality(hours) end, 1)
        * coalesce(case when rank > 2 then cardinality(minutes) end, 1) * coalesce(cardinality(seconds), 1) > 50000
    then
        perform refuse_rule('BYSETPOS would choose among more than 50,000 times.', 'BYSETPOS', 'Name fewer hours, minutes and seconds.');
    end if;
    return jsonb_strip_nulls(jsonb_build_object(
        'freq', freq, 'interval', coalesce((rule_numbers(_parts ->> 'INTERVAL', 'INTERVAL', 1, 1000000))[1], 1),
        'hours', hours::text, 'minutes', minutes::text, 'seconds', seconds::text, 'months', months::text, 'days', days::text,
        'weekdays', weekdays::text, 'places', places::text,
        'week_start', coalesce((rule_weekdays(_parts ->> 'WKST', 'WKST'))[1], 1), 'fixed', rank > 3));
end
$$;

-- rrule_spec: an expression as data. JQ400 says which part is wrong.
create or replace function jobqueue.rrule_spec(_expression text, _zone text, _starts timestamptz)
returns jsonb
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    zone text := rule_zone(_expression, _zone);
    start timestamp := date_trunc('second', _starts at time zone zone);
    rule text;
    begins text;
    parts jsonb;
    spec jsonb;
begin
    if exists (select from rule_lines(_expression) l where l.name in ('RRULE', 'DTSTART') group by l.name having count(*) > 1) then
        perform refuse_rule('RRULE and DTSTART can be given once.', 'RRULE', 'Make a schedule for each rule.');
    end if;
    select l.value into begins from rule_lines(_expression) l where l.name = 'DTSTART';
    select l.value into rule from rule_lines(_expression) l where l.name = 'RRULE';
    if begins is not null then
        start := rule_time(begins, 'DTSTART', zone);
    end if;
    spec := jsonb_build_object('kind', 'rrule', 'zone', zone, 'start', start, 'fixed', true,
        'added', array(select utc_text(m.at) from rule_moments(_expression, 'RDATE', zone) m order by 1)::text,
        'excluded', array(select utc_text(m.at) from rule_moments(_expression, 'EXDATE', zone) m where m.day is null order by 1)::text,
        'excluded_days', array(select to_char(m.day, 'YYYY-MM-DD') from rule_moments(_expression, 'EXDATE', zone) m
            where m.day is not null order by 1)::text);
    if rule is not null then
        parts := rule_parts(rule);
        spec := spec || rule_fields(parts, start);
        if parts ? 'COUNT' and begins is null then
            perform refuse_rule('COUNT needs a DTSTART to count from.', 'COUNT', 'Add a line such as DTSTART:20300101T090000.');
        end if;
        spec := spec || jsonb_build_object('until', rule_end(spec, parts));
    end if;
    return jsonb_strip_nulls(spec);
end
$$;

-- rule_end: the last moment of a rule with UNTIL or COUNT; null if it has no end. COUNT counts what EXDATE takes out, as RFC 5545 says.
create or replace function jobqueue.rule_end(_spec jsonb, _parts jsonb)
returns timestamptz
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    zone text := _spec ->> 'zone';
    number int := (rule_numbers(_parts ->> 'COUNT', 'COUNT', 1, 10000))[1];
    local timestamp := (_spec ->> 'start')::timestamp - interval '1 s';
    next timestamp;
    result timestamptz;
begin
    if _parts ? 'UNTIL' then
        local := rule_time(_parts ->> 'UNTIL', 'UNTIL', zone);
        select m.at into result from moment_of(zone, local) m;
        return case when _parts ->> 'UNTIL' ~ 'T' then result else day_end(zone, result) end;
    elsif number is null then
        return null;
    end if;
    for i in 1 .. number loop
        next := rrule_next(_spec, local);
        exit when next is null;
        local := next;
    end loop;
    select m.at into result from moment_of(zone, local) m;
    return result;
end
$$;
