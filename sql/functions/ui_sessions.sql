-- Sessions of browsers in the dashboard. As with keys, only hashes are kept: of the session's token and of the key that opened it.
-- Nobody reads the table but these functions, and they answer only who has the token.

-- start_ui_session: let a browser in that has shown a key.
--   _hash      sha256() of the session's token
--   _key       the key's id, _key_hash: sha256() of the whole key
--   _lasts     how long at most; 12 hours unless told
-- Returns when it ends, the latest; null for a key that is not let in. Sessions that have ended are removed.
-- Index: ui_session_pkey, ui_session_age.
create or replace function jobqueue.start_ui_session(_hash bytea, _key text, _key_hash bytea, _lasts interval default interval '12 hours')
returns timestamptz
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    ends timestamptz;
begin
    delete from ui_session s where s.expires_at < now();
    select least(now() + _lasts, now() + make_interval(secs => k.valid_for)) into ends
    from find_api_key(_key, _key_hash) k
    where k.problem is null;
    if found then
        insert into ui_session (hash, key_id, key_hash, expires_at) values (_hash, _key, _key_hash, ends);
    end if;
    return ends;
end
$$;

-- find_ui_session: the rights of who has a session's token; no row for anybody else, nor once its key has been revoked, has expired, or has
-- got another secret. ends: when the session does, the latest, in epoch seconds. Notes the use, at most once a minute.
-- Index: ui_session_pkey.
create or replace function jobqueue.find_ui_session(_hash bytea)
returns table (key_id text, subject text, tenants text[], scopes text[], act_as boolean, quota_reads int, quota_writes int,
    quota_streams int, ends double precision)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    s jobqueue.ui_session;
begin
    select * into s from ui_session x where x.hash = _hash and x.expires_at > now();
    if not found then
        return;
    end if;
    if s.last_used_at < now() - interval '1 min' then
        update ui_session x set last_used_at = now()
        where x.hash in (select y.hash from ui_session y where y.hash = _hash for no key update skip locked);
    end if;
    return query
        select s.key_id, k.subject, k.tenants, k.scopes, k.act_as, k.quota_reads, k.quota_writes, k.quota_streams,
            extract(epoch from s.expires_at)::double precision
        from find_api_key(s.key_id, s.key_hash) k
        where k.problem is null;
end
$$;

-- end_ui_session: log out. Index: ui_session_pkey.
create or replace function jobqueue.end_ui_session(_hash bytea)
returns void
language sql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    delete from ui_session s where s.hash = _hash
$$;
