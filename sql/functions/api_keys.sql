-- Keys of the HTTP API. The key itself never comes here, only its SHA-256. Who may make keys could give himself every right, so these
-- functions are granted to nobody: the schema's owner calls them (jobqueue keys …).

-- api_key_changed: API processes that look at the state, once a second each, learn that what they know of keys is old.
create or replace function jobqueue.api_key_changed()
returns trigger
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    update api_key_state
    set version = version + 1, any_keys = exists (select from api_key);
    return null;
end
$$;

create or replace trigger api_key_changed
    after insert or delete or truncate or update of id, secret_hash, previous_hash, previous_until, tenants, scopes, subject, act_as,
        quota_reads, quota_writes, quota_streams, expires_at, revoked_at
    on jobqueue.api_key
    for each statement execute function jobqueue.api_key_changed();

-- json_names: an array of different strings of 1 to 200 characters, at least one; null stays null. Errors: JQ400.
create or replace function jobqueue.json_names(_value jsonb, _name text)
returns text[]
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    names text[];
begin
    if _value is null or jsonb_typeof(_value) = 'null' then
        return null;
    end if;
    if jsonb_typeof(_value) = 'array' then
        select array_agg(distinct to_text(e, _name, 200)) into names from jsonb_array_elements(_value) e;
    end if;
    if names is null or array_position(names, null) is not null then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('%s must be an array of strings, at least one.', _name), '',
            jsonb_build_object('option', _name));
    end if;
    return names;
end
$$;

-- check_key_names: JQ400 for a tenant that cannot be one and a scope that is not known.
create or replace function jobqueue.check_key_names(_tenants text[], _scopes text[])
returns void
language plpgsql immutable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    bad text;
begin
    select t into bad from unnest(_tenants) t where t ~ '[,\x01-\x1f\x7f]' or t = '*' and cardinality(_tenants) > 1 limit 1;
    if bad is not null then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('"%s" is not a tenant''s name.', left(bad, 100)),
            'A name has no commas and no control characters; * stands alone and means all.', '{"option": "tenants"}');
    end if;
    select s into bad from unnest(_scopes) s where s not in ('jobs:read', 'jobs:write', 'jobs:act', 'metrics', 'admin') limit 1;
    if bad is not null then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('There is no scope "%s".', left(bad, 100)),
            'Scopes are jobs:read, jobs:write, jobs:act, metrics and admin.', '{"option": "scopes"}');
    end if;
end
$$;

-- create_api_key: let a new key in.
--   id           the public part of the key, 8 to 40 letters and digits
--   secret_hash  sha256() of the whole key
--   options      name; tenants (["default"]; ["*"]: all); scopes (["jobs:read", "jobs:write", "jobs:act"]); subject; act_as (false);
--                quota_reads, quota_writes, quota_streams: requests per hour (null: any number); expires_at, or expires_in (null: never)
-- Errors: JQ400, UNKNOWN_OPTION, JQ409 if the id exists.
create or replace function jobqueue.create_api_key(id text, secret_hash bytea, options jsonb default '{}')
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    o jsonb := create_api_key.options;
    tenants text[] := coalesce(json_names(o -> 'tenants', 'tenants'), array['default']);
    scopes text[] := coalesce(json_names(o -> 'scopes', 'scopes'), array['jobs:read', 'jobs:write', 'jobs:act']);
    ends timestamptz := coalesce(to_time(o -> 'expires_at', 'expires_at'), now() + to_interval(o -> 'expires_in', 'expires_in'));
begin
    perform refuse_unknown_option(o, array['name', 'tenants', 'scopes', 'subject', 'act_as', 'quota_reads', 'quota_writes',
        'quota_streams', 'expires_at', 'expires_in'], 'create_api_key');
    perform check_key_names(tenants, scopes);
    if coalesce(create_api_key.id !~ '^[A-Za-z0-9]{8,40}$' or length(create_api_key.secret_hash) <> 32, true) then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'The id has 8 to 40 letters and digits, the hash 32 bytes.',
            'Use the command "jobqueue keys create"; it makes both.');
    end if;
    insert into api_key (id, name, secret_hash, tenants, scopes, subject, act_as, quota_reads, quota_writes, quota_streams, created_by,
        expires_at)
    values (create_api_key.id, coalesce(to_text(o -> 'name', 'name', 200), create_api_key.id), create_api_key.secret_hash, tenants, scopes,
        to_text(o -> 'subject', 'subject', 200), coalesce(to_boolean(o -> 'act_as', 'act_as'), false),
        to_int(o -> 'quota_reads', 'quota_reads', 1, 2147483647), to_int(o -> 'quota_writes', 'quota_writes', 1, 2147483647),
        to_int(o -> 'quota_streams', 'quota_streams', 1, 2147483647), who_acts(), ends)
    on conflict do nothing;
    if not found then
        perform refuse('JQ409', 'CONFLICT', format('There is a key %s already.', create_api_key.id), 'Choose another id.');
    end if;
    perform note_action('create_key', null, null, create_api_key.id, null, null, 'a new key',
        jsonb_strip_nulls(o) || jsonb_build_object('tenants', tenants, 'scopes', scopes));
end
$$;

-- lock_api_key: a key, locked; JQ404 if there is none.
create or replace function jobqueue.lock_api_key(_id text)
returns jobqueue.api_key
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    k jobqueue.api_key;
begin
    select * into k from api_key x where x.id = _id for update;
    if not found then
        perform refuse('JQ404', 'NOT_FOUND', format('There is no key %s.', left(_id, 100)), 'jobqueue keys list shows all.');
    end if;
    return k;
end
$$;

-- rotate_api_key: give a key a new secret. The old one goes on for a while, so that clients can be changed one after the other; its
-- quota and its idempotency keys stay.
--   overlap  how long the old secret is still let in; 1 day unless told, 0: not any more
-- Errors: JQ400, JQ404, JQ409 if it was revoked.
create or replace function jobqueue.rotate_api_key(id text, secret_hash bytea, overlap interval default interval '1 day', reason text default 'rotated')
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    k jobqueue.api_key;
begin
    perform check_reason(rotate_api_key.reason);
    if coalesce(overlap < interval '0' or overlap > interval '1 year' or length(rotate_api_key.secret_hash) <> 32, true) then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'The overlap is 0 to 365 days, and the hash has 32 bytes.', '');
    end if;
    k := lock_api_key(rotate_api_key.id);
    if k.revoked_at is not null then
        perform refuse('JQ409', 'CONFLICT', format('The key %s was revoked.', k.id), 'Create a new one.');
    end if;
    update api_key x
    set secret_hash = rotate_api_key.secret_hash, rotated_at = now(),
        previous_hash = case when overlap > interval '0' then k.secret_hash end,
        previous_until = case when overlap > interval '0' then now() + overlap end
    where x.id = k.id;
    perform note_action('rotate_key', null, null, k.id, null, null, rotate_api_key.reason, jsonb_build_object('overlap', overlap));
end
$$;

-- revoke_api_key: let a key in no more; for good, and within a second everywhere. One that was revoked already stays as it is.
-- Errors: JQ400 blank reason, JQ404.
create or replace function jobqueue.revoke_api_key(id text, reason text)
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    k jobqueue.api_key;
begin
    perform check_reason(revoke_api_key.reason);
    k := lock_api_key(revoke_api_key.id);
    if k.revoked_at is null then
        update api_key x
        set revoked_at = now(), revoke_reason = btrim(revoke_api_key.reason), previous_hash = null, previous_until = null
        where x.id = k.id;
        perform note_action('revoke_key', null, null, k.id, null, null, revoke_api_key.reason);
    end if;
end
$$;

-- api_keys_state: which version of the keys is in force, and whether there are any (also revoked ones: revoking the last key must not
-- open the server).
create or replace function jobqueue.api_keys_state(out version bigint, out any_keys boolean)
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select s.version, s.any_keys from api_key_state s
$$;

-- find_api_key: the rights of a key, for who knows it; no row for anybody else. Notes its use, at most once a minute.
-- Returns problem (revoked, expired, or null) and valid_for: seconds until it, or this secret of it, ends (null: no end).
create or replace function jobqueue.find_api_key(_id text, _hash bytea)
returns table (subject text, tenants text[], scopes text[], act_as boolean, quota_reads int, quota_writes int, quota_streams int,
    problem text, valid_for double precision)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    k jobqueue.api_key;
    ends timestamptz;
begin
    select * into k from api_key x where x.id = _id and (x.secret_hash = _hash or x.previous_hash = _hash);
    if not found then
        return;
    end if;
    ends := least(k.expires_at, case when k.secret_hash <> _hash then k.previous_until end);
    problem := case when k.revoked_at is not null then 'revoked' when ends <= now() then 'expired' end;
    valid_for := extract(epoch from ends - now());
    if problem is null and coalesce(k.last_used_at < now() - interval '1 min', true) then
        update api_key x set last_used_at = now()
        where x.id in (select y.id from api_key y where y.id = _id for no key update skip locked);
    end if;
    return query select k.subject, k.tenants, k.scopes, k.act_as, k.quota_reads, k.quota_writes, k.quota_streams, problem, valid_for;
end
$$;

-- api_key_is_live: whether a key is let in at all now. Owners that are no keys (who a token names) are; they end with their token.
create or replace function jobqueue.api_key_is_live(_id text)
returns boolean
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select coalesce(
        (select k.revoked_at is null and coalesce(k.expires_at > now(), true) from api_key k where k.id = _id),
        true)
$$;

-- keep_ticket: a ticket for one stream, for a minute. principal: whom it stands for; path: the stream's path with its query.
create or replace function jobqueue.keep_ticket(_hash bytea, _principal jsonb, _path text, _lasts interval default interval '60 s')
returns timestamptz
language sql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    insert into stream_ticket (hash, principal, path, expires_at) values (_hash, _principal, _path, now() + _lasts)
    returning expires_at
$$;

-- use_ticket: whom a ticket stands for, once; null if it is unknown, used, too old, or for another stream.
create or replace function jobqueue.use_ticket(_hash bytea, _path text)
returns jsonb
language sql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    delete from stream_ticket t where t.hash = _hash and t.path = _path and t.expires_at > now() returning t.principal
$$;
