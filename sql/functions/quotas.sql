-- Quotas of the HTTP API: requests per hour, by owner and bucket. API processes take small portions and bring back what they did not
-- use, so that most requests cost no statement and the count is right over all processes (docs/decisions/0008-http-identity.md).

-- take_quota: take up to _want requests out of this hour's _limit; a twentieth of what is left at most, and one if there is any, so that
-- near the end no process sits on what another one needs.
-- Returns granted (0: used up), remaining (after it), ends (epoch seconds of the hour's end) and ends_in (seconds to it). An hour begins
-- with the first request. Not waited for on disk: a crash forgets the last fraction of a second.
-- Index: the primary key.
create or replace function jobqueue.take_quota(_owner text, _bucket text, _limit int, _want int,
    out granted int, out remaining int, out ends bigint, out ends_in double precision)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    u jobqueue.quota_use;
    fresh timestamptz := date_trunc('second', now()) + interval '1 hour';
begin
    perform set_config('synchronous_commit', 'off', true);
    select * into u from quota_use x where x.owner = _owner and x.bucket = _bucket for no key update;
    if not found then
        insert into quota_use (owner, bucket, window_ends, used) values (_owner, _bucket, fresh, 0) on conflict do nothing;
        select * into u from quota_use x where x.owner = _owner and x.bucket = _bucket for no key update;
    end if;
    -- one that ends later than an hour from now began while the clock was ahead
    if u.window_ends <= now() or u.window_ends > fresh then
        u.used := 0;
        u.window_ends := fresh;
    end if;
    granted := greatest(0, least(_want, _limit - u.used, greatest(1, (_limit - u.used) / 20)));
    if granted > 0 then
        update quota_use x set used = u.used + granted, window_ends = u.window_ends where x.owner = _owner and x.bucket = _bucket;
    end if;
    remaining := greatest(0, _limit - u.used - granted);
    ends := extract(epoch from u.window_ends);
    ends_in := extract(epoch from u.window_ends - now());
end
$$;

-- give_quota: bring back what was not used; portions of an hour that has ended are dropped.
--   _ends  what take_quota said
create or replace function jobqueue.give_quota(_owners text[], _buckets text[], _amounts int[], _ends bigint[])
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    g record;
begin
    perform set_config('synchronous_commit', 'off', true);
    for g in
        select o as owner, b as bucket, a as amount, to_timestamp(e) as window_ends
        from unnest(_owners, _buckets, _amounts, _ends) x (o, b, a, e)
        order by o, b
    loop
        update quota_use x set used = greatest(0, x.used - g.amount)
        where x.owner = g.owner and x.bucket = g.bucket and x.window_ends = g.window_ends;
    end loop;
end
$$;
