-- The database's clock, for programs. A client that compares a time with its own clock is wrong by the difference of the two; and in
-- tests the clock of the functions can stand still (jobqueue.testing.frozen) while now() in a client's statement goes on. So no
-- statement of ours says now(): it asks here.

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
