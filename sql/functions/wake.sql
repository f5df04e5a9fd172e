-- Waking only those who sleep. NOTIFY takes a lock of the whole cluster until commit, so a sender notifies only if somebody waits:
-- an idle worker holds the advisory lock (27249, number of the queue) in shared mode; who can take it exclusively for a moment
-- knows that nobody does. Both calls stand in one expression, so this works through a transaction pooler too. Clients without
-- a session say watch('queue:<name>') instead. Inside a transaction that goes on after the call the lock would be looked at too
-- early, so there the notification is always sent. A transaction counts as such when it began 5 ms before the statement: each
-- message of the extended protocol moves the time of the statement by up to 1 ms, so that without this margin every call of a
-- driver with parameters would notify. What falls into the margin is found by the idle worker's re-checks.

-- may_notify: false if the transaction says so: jobqueue.notify = off. One that is to be prepared (PREPARE TRANSACTION) must not notify.
create or replace function jobqueue.may_notify()
returns boolean
language sql stable
as $$
    select coalesce(pg_catalog.current_setting('jobqueue.notify', true), '') <> 'off'
$$;

-- wake: tell idle workers of a queue that a job became ready. Call it last.
create or replace function jobqueue.wake(_queue text, _number int)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if jobqueue.may_notify() and (statement_timestamp() > now() + interval '5 ms'
        or not (case when pg_try_advisory_lock(27249, _number) then pg_advisory_unlock(27249, _number) else false end)
        or exists (select from jobqueue.watch w where w.topic = 'queue:' || _queue and w.until > now()))
    then
        perform pg_notify('jobqueue_ready', _queue);
    end if;
end
$$;

-- wake_many: the same for the queues of several jobs.
create or replace function jobqueue.wake_many(_queues text[])
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    name text;
    number int;
begin
    for name, number in select q.name, q.number from jobqueue.queue q where q.name = any (_queues) order by q.name loop
        perform jobqueue.wake(name, number);
    end loop;
end
$$;

-- watch: count the caller as a listener for a while. topic: 'job:<id>', 'tenant:<name>', 'all', or 'queue:<name>' as an idle worker.
--   duration: 1 minute unless told, at most an hour; call again to go on. Errors: JQ400.
create or replace function jobqueue.watch(topic text, duration interval default interval '1 min')
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    ends timestamptz := now() + duration;
begin
    if watch.topic is null or watch.topic !~ '^(all|(job|tenant|queue):.{1,250})$' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('There is no topic "%s".', left(watch.topic, 100)),
            'Topics are job:<id>, tenant:<name>, queue:<name> and all.');
    elsif duration is null or duration <= interval '0' or duration > interval '1 hour' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'A watch lasts more than 0 seconds and at most an hour.', 'Call watch again to go on.');
    end if;
    insert into watch as w (topic, until) values (watch.topic, ends)
    on conflict (topic) do update set until = excluded.until where w.until < excluded.until;
end
$$;

-- anyone_watches: whether somebody listens to jobs at all. Asked before anything is looked up for listeners.
create or replace function jobqueue.anyone_watches()
returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
    return jobqueue.may_notify() and (exists (select from jobqueue.watch w where w.topic < 'queue:' and w.until > now())
        or exists (select from jobqueue.watch w where w.topic >= 'tenant:' and w.until > now()));
end
$$;

-- publish_changes: tell listeners that jobs changed; ids and versions only, in portions that fit a notification.
create or replace function jobqueue.publish_changes(_ids uuid[])
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    everything boolean;
    portion text;
begin
    if not jobqueue.anyone_watches() then
        return;
    end if;
    everything := exists (select from jobqueue.watch w where w.topic = 'all' and w.until > now());
    for portion in
        select jsonb_agg(jsonb_build_array(c.id, c.version))::text
        from (
            select j.id, j.version, row_number() over () as n
            from unnest(_ids) x (id)
            join jobqueue.job j on j.id = x.id
            where everything
                or exists (select from jobqueue.watch w
                    where w.topic in ('job:' || j.id, 'tenant:' || j.tenant) and w.until > now())) c
        group by c.n / 120
    loop
        perform pg_notify('jobqueue_jobs', portion);
    end loop;
end
$$;

-- publish_order: tell the worker of one job at once, watched or not.
create or replace function jobqueue.publish_order(_id uuid, _version bigint)
returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
    select pg_notify('jobqueue_jobs', jsonb_build_array(jsonb_build_array(_id, _version))::text) where jobqueue.may_notify()
$$;
