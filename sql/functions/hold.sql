-- Keys that a job holds: at most one job of a queue has a held_key (index job_held_key). Which statuses hold it is data (hold_mask), so
-- that one index serves every policy and no index names the status. A transition writes held_key = case when its mask has the new
-- status then held_key end; nothing more is needed at completion.

-- hold_of: what a new job holds, by its options and the policy of its queue.
--   short: one job that has not started (per singleton key; without one, per queue)
--   exclusive: one job that has not ended
--   stately: one job that has not started, and one that waits for a retry; one at a time runs (admission.sql)
--   singleton_key in a queue without policy: one job of that key that has not ended. Where keys are lines of their own (policies singleton
--   and key_strict_fifo, key_concurrency, a rate per key) it is a line and holds nothing.
--   throttle_seconds, debounce_seconds: one job per slot of so many seconds; slot_until: window (until the slot is over, default) or
--   ended (until the job has ended)
create or replace function jobqueue.hold_of(_job jobqueue.job, _queue jobqueue.queue, _options jsonb)
returns jobqueue.job
language plpgsql volatile
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    r jobqueue.job := _job;
    slot interval := coalesce(to_interval(_options -> 'throttle_seconds', 'throttle_seconds'),
        to_interval(_options -> 'debounce_seconds', 'debounce_seconds'));
    until_when text := coalesce(to_text(_options -> 'slot_until', 'slot_until', 20), 'window');
begin
    if _options -> 'throttle_seconds' <> 'null' and _options -> 'debounce_seconds' <> 'null' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'throttle_seconds and debounce_seconds exclude each other.', 'Give one of the two.');
    elsif slot < interval '1 s' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'A slot lasts at least 1 second.');
    elsif until_when not in ('window', 'ended') then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('slot_until must be "window" or "ended", not "%s".', until_when), '',
            '{"option": "slot_until"}');
    end if;
    if slot is not null then
        r.held_key := slot_key(r.tenant, r.singleton_key, slot, now());
        r.hold_mask := case until_when when 'ended' then 15 else 191 end;
    elsif _queue.policy in ('short', 'stately') then
        r.held_key := policy_key(r.tenant, r.singleton_key);
        r.hold_mask := 11;
        r.options := coalesce(r.options, '{}') || jsonb_build_object('hold', r.held_key, 'hold_once', true)
            || case when _queue.policy = 'stately' then '{"hold_retry": true}' else '{}' end::jsonb;
    elsif _queue.policy = 'exclusive' or (_queue.policy = 'standard' and r.singleton_key is not null
        and _queue.key_concurrency is null and _queue.rate_limit ->> 'per' is distinct from 'key')
    then
        r.held_key := policy_key(r.tenant, r.singleton_key);
        r.hold_mask := 15;
        r.options := coalesce(r.options, '{}') || jsonb_build_object('hold', r.held_key);
    end if;
    return r;
end
$$;

-- held_name: a key under the name of its present generation. A key that is taken again and again would make every insert walk the index
-- entries of all its former holders while an old snapshot is open (10,000 buffers after 10,000 uses); a generation ends after some 64 uses.
create or replace function jobqueue.held_name(_queue text, _key text)
returns text
language sql volatile
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select coalesce((select _key || '#' || g.generation from key_generation g
        where g.queue = _queue and g.key = _key and g.generation > 0), _key)
$$;

-- name_to_hold: the same for those who are about to take the key. Who sees the past shares the row of its generation, so that the server
-- refuses (40001) if one has begun since: under the old name the key would have two holders.
create or replace function jobqueue.name_to_hold(_queue text, _key text)
returns text
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if _key is not null and sees_the_past() then
        insert into key_generation (queue, key) values (_queue, _key) on conflict on constraint key_generation_pkey do nothing;
        perform from key_generation g where g.queue = _queue and g.key = _key for share;
    end if;
    return held_name(_queue, _key);
end
$$;

-- store_held: insert a job that holds a key. Returns whether it was stored; null: the key has a new generation meanwhile, try again.
-- Who begins a generation has inserted under the old name first, so everybody who inserts under the old name waits for that one, looks at
-- the name once more and finds the new one.
create or replace function jobqueue.store_held(_job jobqueue.job)
returns boolean
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    key text := _job.options ->> 'hold';
begin
    insert into job select _job.* on conflict do nothing;
    if not found then
        return false;
    elsif held_name(_job.queue, key) <> _job.held_key then
        raise exception using errcode = 'JQ999', message = 'a new generation of the key';
    elsif random() < 1 / 64.0 then
        insert into key_generation as g (queue, key) values (_job.queue, key)
        on conflict on constraint key_generation_pkey do update set generation = g.generation + 1, used_at = now();
        update job j set held_key = held_name(_job.queue, key) where j.id = _job.id;
    end if;
    return true;
exception when sqlstate 'JQ999' then
    return null;
end
$$;

-- policy_key, slot_key: a key as it is held: per tenant; without a key per queue, over all tenants. Lengths keep "a:b" and "a", "b" apart.
create or replace function jobqueue.policy_key(_tenant text, _key text)
returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select case when _key is null then 'queue' else format('key:%s:%s:%s', length(_tenant), _tenant, _key) end
$$;

create or replace function jobqueue.slot_key(_tenant text, _key text, _slot interval, _at timestamptz)
returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select format('slot:%s:%s:%s:%s:%s', extract(epoch from _slot)::numeric(20, 3),
        floor(extract(epoch from _at) / extract(epoch from _slot)), length(_tenant), _tenant, coalesce(_key, ''))
$$;

-- slot_end: when the slot of a time is over.
create or replace function jobqueue.slot_end(_slot interval, _at timestamptz)
returns timestamptz
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select to_timestamp((floor(extract(epoch from _at) / extract(epoch from _slot)) + 1) * extract(epoch from _slot))
$$;

-- slot_is_over: whether the time of a slot has passed; what else a job holds is none. Until then a throttled job is kept, however short.
create or replace function jobqueue.slot_is_over(_held_key text)
returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select _held_key not like 'slot:%'
        or (split_part(_held_key, ':', 3)::numeric + 1) * split_part(_held_key, ':', 2)::numeric <= extract(epoch from now())
$$;

-- hold_key_again: the key that a job takes up when a person puts it back into the line; JQ409 with the holder if it is taken.
create or replace function jobqueue.hold_key_again(_job jobqueue.job, _to text)
returns text
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    key text := name_to_hold(_job.queue, _job.options ->> 'hold');
    holder jobqueue.job;
begin
    if key is null or (_job.options ? 'hold_once' and _job.retry_count > 0 and not _job.options ? 'hold_retry') then
        return null;
    elsif _job.options ? 'hold_retry' and _job.retry_count > 0 then
        key := retry_key(_job);
    end if;
    select * into holder from job j where j.queue = _job.queue and j.held_key = key and j.id <> _job.id;
    if found then
        perform refuse('JQ409', 'CONFLICT', format('Job %s holds the key of this job.', case when sees_tenant(holder.tenant) then holder.id::text
                else 'of another tenant' end),
            'Wait until it has ended, or cancel it.',
            jsonb_build_object('id', _job.id, 'holder', case when sees_tenant(holder.tenant) then holder.id end));
    end if;
    return key;
end
$$;

-- take_key_again: write that key on the job; JQ409 also if somebody takes it at this very moment. Index: job_held_key.
create or replace function jobqueue.take_key_again(_id uuid, _to text)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    update job j set held_key = hold_key_again(j, _to) where j.id = _id and j.held_key is null and j.hold_mask & status_bit(_to) <> 0;
exception when unique_violation then
    perform refuse('JQ409', 'CONFLICT', 'Another job has taken the key of this job just now.', 'Wait until it has ended, or cancel it.',
        jsonb_build_object('id', _id));
end
$$;

-- hold_if_free: a job that was given back without a retry counts as one that has not started; it takes its key up again unless another one
-- has it by now: then both are there, since neither may be lost.
create or replace function jobqueue.hold_if_free(_job jobqueue.job)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    key text := name_to_hold(_job.queue, _job.options ->> 'hold');
begin
    update job j set held_key = key
    where j.id = _job.id and not exists (select from job h where h.queue = _job.queue and h.held_key = key);
exception when unique_violation then
    null;
end
$$;

-- retry_key: what a job of a stately queue holds while it waits for a retry.
create or replace function jobqueue.retry_key(_job jobqueue.job)
returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select 'retry:' || (_job.options ->> 'hold')
$$;

-- holder_of: who stands in the place of a job that could not be stored; a holder of another tenant is told without its id.
create or replace function jobqueue.holder_of(_job jobqueue.job, _options jsonb, _policy text, out id uuid, out reason text)
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    holder jobqueue.job;
begin
    select * into holder from job j where j.id = _job.id;
    if found then
        if holder.tenant <> _job.tenant then
            perform refuse('JQ409', 'CONFLICT', 'This id is taken.', 'Give another id, or none.');
        end if;
        id := holder.id; reason := 'duplicate_id';
        return;
    end if;
    select * into holder from job j where j.queue = _job.queue and j.held_key = _job.held_key;
    if found then
        id := case when holder.tenant = _job.tenant then holder.id end;
        reason := case
            when nullif(_options -> 'debounce_seconds', 'null') is not null then 'debounced'
            when nullif(_options -> 'throttle_seconds', 'null') is not null then 'throttled'
            when _policy <> 'standard' then 'policy'
            else 'singleton' end;
    end if;
end
$$;
