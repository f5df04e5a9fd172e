-- Publish and subscribe: an event becomes one job in each queue that subscribed to it, all of them or none.

-- check_event: JQ400 unless it can be the name of an event.
create or replace function jobqueue.check_event(_event text)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if _event is null or _event !~ '^[A-Za-z0-9_./:-]{1,200}$' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('"%s" cannot be the name of an event.', left(_event, 100)),
            'Use 1 to 200 letters, digits, and _ . / : -', '{"option": "event"}');
    end if;
end
$$;

-- subscribe: let a queue have a job for every event of this name from now on. The queue is made if need be, as send would.
-- Returns whether that is new. Errors: JQ400, JQ403, JQ404 if queues are not made by sending.
create or replace function jobqueue.subscribe(event text, queue text)
returns boolean
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    q jobqueue.queue;
begin
    perform check_event(subscribe.event);
    perform check_shared('subscribe a queue');
    q := queue_for_send(subscribe.queue);
    insert into subscription as s (event, queue) values (subscribe.event, q.name) on conflict do nothing;
    return found;
end
$$;

-- unsubscribe: no more jobs for this event in this queue; those that are there stay. Returns whether it was subscribed. Errors: JQ403.
create or replace function jobqueue.unsubscribe(event text, queue text)
returns boolean
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
begin
    perform check_shared('unsubscribe a queue');
    delete from subscription s where s.event = unsubscribe.event and s.queue = unsubscribe.queue;
    return found;
end
$$;

-- publish: send one job to every queue that subscribed to an event, in the caller's transaction, all or none.
--   options  those of send but id; job_type, if given, holds in all queues
-- Returns one row (queue, id, created, reason) per subscribed queue, by name; created and reason as of send. No row: nobody subscribed.
-- Errors: those of send.
create or replace function jobqueue.publish(event text, payload jsonb default '{}', options jsonb default '{}')
returns table (queue text, id uuid, created boolean, reason text)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    q jobqueue.queue;
    queues text[] := '{}';
begin
    perform check_event(publish.event);
    perform refuse_unknown_option(coalesce(publish.options, '{}'), array_remove(job_options(), 'id'), 'publish');
    for q in
        select x.* from subscription s join queue x on x.name = s.queue where s.event = publish.event order by s.queue
    loop
        queue := q.name;
        perform hold_queue(queue);
        select o.id, o.created, o.reason into id, created, reason from send_one(q, publish.payload, publish.options) o;
        if created then
            queues := queues || queue;
        end if;
        return next;
    end loop;
    perform wake_many(queues);
end
$$;
