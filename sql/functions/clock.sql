-- The database's clock, for programs. A client that compares a time with its own clock is wrong by the difference of the two; and in
-- tests the clock of the functions can stand still (jobqueue.testing.frozen) while now() in a client's statement goes on. So no
-- statement of ours says now(): it asks here.

-- What the server's clock was set to for a while by mistake must not hold anything up once it is right again. Times are compared with those
-- that cannot be: a lease of a claim that begins later than now, a token that comes back later than a period from now. Small jumps back are
-- left alone: leases, delays and ticks then last as much longer, and no tick happens twice. When a job was to run is not known any more: one
-- that was put off while the clock was ahead waits for its run_at (see run_now).

-- accept_clock: schedules and workers that were seen later than now: the clock was ahead. A schedule goes on with its next tick if it was
-- 3 hours or more. Returns how many. Leases: remove_old; tokens: recount_slots; the steps of maintenance: maintain.
create or replace function jobqueue.accept_clock()
returns int
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    n int;
    total int;
begin
    update worker w set heartbeat_at = now() where w.heartbeat_at > now() + interval '1 min';
    get diagnostics total = row_count;
    update watch w set until = now() + interval '1 hour' where w.until > now() + interval '1 hour';
    update schedule s
    set next_at = tick_after(s.spec, now()), retry_at = null, updated_at = now(), last_at = least(s.last_at, now()),
        gap_from = least(s.gap_from, now()), gap_until = least(s.gap_until, now())
    where s.name in (
        select x.name from schedule x
        where greatest(x.updated_at, x.last_at, x.gap_until) > now() + interval '3 hours'
        order by x.name
        for update skip locked);
    get diagnostics n = row_count;
    return total + n;
end
$$;

-- seconds_until: how far ahead a time lies, in seconds; negative: so long ago. Null for null.
create or replace function jobqueue.seconds_until(_at timestamptz)
returns double precision
language sql volatile
as $$
    select extract(epoch from _at - clock_timestamp())::double precision
$$;

-- now_minus: the time that lies so far back. Null for null.
create or replace function jobqueue.now_minus(_duration interval)
returns timestamptz
language sql stable
as $$
    select now() - _duration
$$;
