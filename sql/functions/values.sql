-- What comes in as JSON, checked and turned into values.

-- to_interval: a number is seconds, a string a Postgres interval or an ISO 8601 duration; null stays null. Never negative.
create or replace function jobqueue.to_interval(_value jsonb, _name text)
returns interval
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    result interval;
begin
    begin
        result := case jsonb_typeof(_value)
            when 'number' then make_interval(secs => (_value #>> '{}')::double precision)
            when 'string' then (_value #>> '{}')::interval
        end;
    exception when data_exception then
        result := null;
    end;
    if _value is null or jsonb_typeof(_value) = 'null' then
        return null;
    end if;
    if result is null or result < interval '0' or result > interval '1000 years' then
        perform jobqueue.refuse('JQ400', 'INVALID_ARGUMENT', format('%s is not a duration: %s.', _name, left(_value::text, 100)),
            'Give seconds as a number, or a string such as "5 minutes" or "PT5M"; at least 0.',
            jsonb_build_object('option', _name));
    end if;
    return result;
end
$$;

-- to_time: an RFC 3339 time with an offset; null stays null.
create or replace function jobqueue.to_time(_value jsonb, _name text)
returns timestamptz
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    given text := _value #>> '{}';
    result timestamptz;
begin
    if given is null then
        return null;
    end if;
    if jsonb_typeof(_value) = 'string'
        and given ~* '^\d{4}-\d\d-\d\d[t ]\d\d:\d\d(:\d\d(\.\d+)?)?\s?(z|[+-]\d\d(:?\d\d)?)$' then
        begin
            result := given::timestamptz;
            -- an offset leads out of the years that clients can read
            if result not between timestamptz '0001-01-02 00:00:00 UTC' and timestamptz '9999-12-30 23:59:59.999999 UTC' then
                result := null;
            end if;
        exception when data_exception then
            result := null;
        end;
    end if;
    if result is null then
        perform jobqueue.refuse('JQ400', 'INVALID_ARGUMENT', format('%s is not a time with an offset: %s.', _name, left(_value::text, 100)),
            'Give RFC 3339, for example "2030-01-31T12:00:00Z" or "2030-01-31T13:00:00+01:00".',
            jsonb_build_object('option', _name));
    end if;
    return result;
end
$$;

-- to_int: a whole number within bounds; null stays null.
create or replace function jobqueue.to_int(_value jsonb, _name text, _least bigint, _most bigint)
returns int
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    given numeric;
begin
    if _value is null or jsonb_typeof(_value) = 'null' then
        return null;
    end if;
    if jsonb_typeof(_value) = 'number' then
        given := (_value #>> '{}')::numeric;
        if given = trunc(given) and given between _least and _most then
            return given::int;
        end if;
    end if;
    perform jobqueue.refuse('JQ400', 'INVALID_ARGUMENT',
        format('%s must be a whole number from %s to %s, not %s.', _name, _least, _most, left(_value::text, 100)), '',
        jsonb_build_object('option', _name));
end
$$;

-- to_weight: the share of a stage, above 0 and at most a million; null stays null.
create or replace function jobqueue.to_weight(_value jsonb, _name text)
returns double precision
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    given numeric;
begin
    if _value is null or jsonb_typeof(_value) = 'null' then
        return null;
    elsif jsonb_typeof(_value) = 'number' then
        given := (_value #>> '{}')::numeric;
        if given between 0.000001 and 1000000 then
            return given::double precision;
        end if;
    end if;
    perform jobqueue.refuse('JQ400', 'INVALID_ARGUMENT',
        format('%s must be a number above 0 and at most a million, not %s.', _name, left(_value::text, 100)), '',
        jsonb_build_object('option', _name));
end
$$;

-- to_bigint: a whole number from 0; fractions are cut. Null stays null.
create or replace function jobqueue.to_bigint(_value jsonb, _name text)
returns bigint
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    given numeric;
begin
    if _value is null or jsonb_typeof(_value) = 'null' then
        return null;
    elsif jsonb_typeof(_value) = 'number' then
        given := trunc((_value #>> '{}')::numeric);
        if given between 0 and 9007199254740991 then
            return given::bigint;
        end if;
    end if;
    perform jobqueue.refuse('JQ400', 'INVALID_ARGUMENT', format('%s must be a number from 0, not %s.', _name, left(_value::text, 100)),
        '', jsonb_build_object('option', _name));
end
$$;

-- to_text: a string of at most _most characters, not empty; null stays null.
create or replace function jobqueue.to_text(_value jsonb, _name text, _most int)
returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    given text := _value #>> '{}';
begin
    if given is null then
        return null;
    end if;
    if jsonb_typeof(_value) <> 'string' or given = '' or length(given) > _most then
        perform jobqueue.refuse('JQ400', 'INVALID_ARGUMENT',
            format('%s must be a string of 1 to %s characters, not %s.', _name, _most, left(_value::text, 100)), '',
            jsonb_build_object('option', _name));
    end if;
    return given;
end
$$;

-- to_boolean: true or false; null stays null.
create or replace function jobqueue.to_boolean(_value jsonb, _name text)
returns boolean
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if jsonb_typeof(_value) = 'boolean' then
        return _value::boolean;
    elsif _value is null or jsonb_typeof(_value) = 'null' then
        return null;
    end if;
    perform jobqueue.refuse('JQ400', 'INVALID_ARGUMENT', format('%s must be true or false, not %s.', _name, left(_value::text, 100)),
        '', jsonb_build_object('option', _name));
end
$$;

-- setting_of: a setting of the installation, or its default.
create or replace function jobqueue.setting_of(_name text, _default jsonb)
returns jsonb
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce((select value from jobqueue.setting where name = _name), _default)
$$;

-- refuse_large: JQ413 if a value is over its limit (settings max_payload_bytes, max_result_bytes, max_checkpoint_bytes: 8 MB;
-- max_metadata_bytes: 1 MB). The exact size is taken only of values that could be near the limit; #> '{}' unpacks a value that comes
-- from a table, which would else be measured compressed.
create or replace function jobqueue.is_too_large(_value jsonb, _what text, _default bigint)
returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
    return _value is not null
        and pg_column_size(_value #> '{}') > 100000
        and octet_length(_value::text) > (jobqueue.setting_of('max_' || _what || '_bytes', to_jsonb(_default)))::bigint;
end
$$;

create or replace function jobqueue.refuse_large(_value jsonb, _what text, _default bigint)
returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if jobqueue.is_too_large(_value, _what, _default) then
        perform jobqueue.refuse('JQ413', 'TOO_LARGE', format('The %s is too large: %s bytes of at most %s.', _what,
                octet_length(_value::text), jobqueue.setting_of('max_' || _what || '_bytes', to_jsonb(_default))),
            'Store it elsewhere and put a reference into the job.', jsonb_build_object('what', _what));
    end if;
end
$$;

-- clean_text: text that can be stored and shown: cut to a number of characters.
create or replace function jobqueue.clean_text(_value text, _most int)
returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select case when length(_value) > _most then left(_value, _most - 1) || '…' else _value end
$$;

-- option_interval: a duration among the normalised options of a job (seconds), else what its queue says.
create or replace function jobqueue.option_interval(_options jsonb, _name text, _default interval)
returns interval
language sql immutable
as $$
    select case when _options ? _name then make_interval(secs => (_options ->> _name)::double precision) else _default end
$$;
