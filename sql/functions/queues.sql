-- Queues as people manage them: made, changed, paused, emptied, taken away. Who is bound to some tenants (jobqueue.tenants) changes
-- nothing that others share.

-- queue_options: the options of a queue that work.
create or replace function jobqueue.queue_options()
returns text[]
language sql immutable parallel safe
as $$
    select array['policy', 'max_retries', 'retry_delay', 'retry_backoff', 'retry_delay_max', 'timeout', 'max_runtime', 'lease',
        'expires_in', 'keep_completed', 'keep_ended', 'dead_letter', 'warn_backlog', 'concurrency', 'group_concurrency', 'key_concurrency',
        'rate_limit', 'ageing', 'fair_by']
$$;

-- check_shared: JQ403 for those who are bound to some tenants; what they ask for would touch the others. No tenant is called *.
create or replace function jobqueue.check_shared(_what text)
returns void
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if not sees_tenant('*') then
        perform refuse('JQ403', 'FORBIDDEN', format('This session may not %s: it is bound to some tenants.', _what),
            'Set jobqueue.tenants to * where that is allowed.');
    end if;
end
$$;

-- lock_queue: a queue, locked; JQ404 if there is none.
create or replace function jobqueue.lock_queue(_name text)
returns jobqueue.queue
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    q jobqueue.queue;
begin
    select * into q from queue x where x.name = _name for update;
    if not found then
        perform refuse_queue(_name);
    end if;
    return q;
end
$$;

-- keep_senders_out: wait for the senders that have read a queue, and let no other read one until this transaction ends. Every way of
-- sending reads the table before it stores a job, so that afterwards no job can be under way to a queue that is changed for good.
-- Its jobs in some statuses are locked, too. Whoever has locked a job may have to read a queue after that (every end of a job with limits
-- does), so this must not wait for a job while it holds the table: it gives the table back and begins again.
--   Errors: JQ409 if a transaction that has sent something or holds a job stays open for more than 3 seconds; all others wait meanwhile.
create or replace function jobqueue.keep_senders_out(_name text, _statuses text[])
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
-- shorter than deadlock_timeout (1 s): whoever is waited for in a circle must not be the one that is ended
set lock_timeout = '200ms'
as $$
declare
    until timestamptz := clock_timestamp() + interval '3 s';
begin
    loop
        begin
            -- the jobs first: who is about to end one waits for it and holds nothing; then those that came meanwhile
            perform lock_jobs_of(_name, _statuses);
            lock table queue in access exclusive mode;
            perform lock_jobs_of(_name, _statuses);
            return;
        exception when lock_not_available or deadlock_detected then
            -- what was locked in this block is free again
            if clock_timestamp() > until then
                perform refuse('JQ409', 'CONFLICT', format('The queue "%s" cannot be changed now: open transactions are using queues.',
                    left(_name, 200)), 'Try again; jobqueue.doctor() names the oldest transaction.', jsonb_build_object('queue', left(_name, 200)));
            end if;
        end;
        perform pg_sleep(0.005);
    end loop;
end
$$;

-- lock_jobs_of: lock the jobs of a queue in some statuses, in the order of ids; waits for each at most 0.1 s. Index: job_pkey.
create or replace function jobqueue.lock_jobs_of(_queue text, _statuses text[])
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set lock_timeout = '100ms'
as $$
declare
    place uuid := '00000000-0000-0000-0000-000000000000';
    ids uuid[];
begin
    loop
        ids := array(select j.id from job j where j.id > place order by j.id limit 10000);
        exit when ids = '{}';
        place := ids[cardinality(ids)];
        perform from job j where j.id = any (ids) and j.queue = _queue and j.status = any (_statuses) order by j.id for update;
    end loop;
end
$$;

-- queue_with: a queue with options over its own. Null clears those that may be without a value. Nothing is stored. Errors: JQ400.
create or replace function jobqueue.queue_with(_queue jobqueue.queue, _options jsonb)
returns jobqueue.queue
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    q jobqueue.queue := _queue;
    o jsonb := _options;
    kept jsonb;
    missing text;
begin
    perform refuse_unknown_option(o, queue_options(), 'a queue');
    kept := coalesce(kept_options(o), '{}');
    select n into missing from unnest(array['policy', 'max_retries', 'retry_backoff']) n where o -> n = 'null' limit 1;
    if missing is not null then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('%s cannot be null.', missing), '', jsonb_build_object('option', missing));
    end if;
    q.policy := coalesce(to_text(o -> 'policy', 'policy', 100), q.policy);
    if q.policy not in ('standard', 'short', 'singleton', 'stately', 'exclusive', 'key_strict_fifo') then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('There is no policy "%s".', q.policy),
            'Policies, each per key: standard, short (one that has not started), singleton (one that runs), stately (one of each), exclusive '
            '(one that has not ended) and key_strict_fifo (one after the other).',
            '{"option": "policy"}');
    end if;
    q.max_retries := coalesce(to_int(o -> 'max_retries', 'max_retries', 0, 1000000), q.max_retries);
    q.retry_backoff := coalesce((kept ->> 'retry_backoff')::boolean, q.retry_backoff);
    q.retry_delay := option_interval(kept, 'retry_delay', q.retry_delay);
    q.retry_delay_max := option_interval(kept, 'retry_delay_max', q.retry_delay_max);
    q.timeout := option_interval(kept, 'timeout', q.timeout);
    q.max_runtime := option_interval(kept, 'max_runtime', q.max_runtime);
    q.lease := option_interval(kept, 'lease', q.lease);
    q.keep_completed := option_interval(kept, 'keep_completed', q.keep_completed);
    q.keep_ended := option_interval(kept, 'keep_ended', q.keep_ended);
    if o ? 'expires_in' then
        q.expires_in := make_interval(secs => extract(epoch from to_interval(o -> 'expires_in', 'expires_in'))::double precision);
        if q.expires_in = interval '0' then
            perform refuse('JQ400', 'INVALID_ARGUMENT', 'expires_in must be more than 0 seconds.', 'Give null for never.',
                '{"option": "expires_in"}');
        end if;
    end if;
    if o ? 'warn_backlog' then
        q.warn_backlog := to_int(o -> 'warn_backlog', 'warn_backlog', 1, 2147483647);
    end if;
    if o ? 'dead_letter' then
        q.dead_letter := kept ->> 'dead_letter';
        if q.dead_letter = q.name then
            perform refuse('JQ400', 'INVALID_ARGUMENT', 'A queue cannot be its own dead letter queue.', 'Name another queue, or null.',
                '{"option": "dead_letter"}');
        end if;
    end if;
    return queue_with_limits(q, o);
end
$$;

-- queue_values: the options of a queue, durations in seconds: 7 days and 168 hours are the same.
create or replace function jobqueue.queue_values(_queue jobqueue.queue)
returns jsonb
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select jsonb_object_agg(o.key, case when jsonb_typeof(o.value) = 'string' and o.key not in ('policy', 'dead_letter', 'fair_by')
        then to_jsonb(extract(epoch from (o.value #>> '{}')::interval)::double precision) else o.value end)
    from jsonb_each(to_jsonb(_queue)) o
    where o.key = any (jobqueue.queue_options())
$$;

-- store_queue: write the options of a queue; its dead letter queue is made if need be, as send would.
create or replace function jobqueue.store_queue(_queue jobqueue.queue)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    r jobqueue.queue := _queue;
begin
    if r.dead_letter is not null then
        perform queue_for_send(r.dead_letter);
    end if;
    update queue q
    set policy = r.policy, max_retries = r.max_retries, retry_delay = r.retry_delay, retry_backoff = r.retry_backoff,
        retry_delay_max = r.retry_delay_max, timeout = r.timeout, max_runtime = r.max_runtime, lease = r.lease, expires_in = r.expires_in,
        keep_completed = r.keep_completed, keep_ended = r.keep_ended, dead_letter = r.dead_letter, warn_backlog = r.warn_backlog,
        concurrency = r.concurrency, group_concurrency = r.group_concurrency, key_concurrency = r.key_concurrency, rate_limit = r.rate_limit,
        ageing = r.ageing, fair_by = r.fair_by, updated_at = now()
    where q.name = r.name;
end
$$;

-- create_queue: make a queue.
--   name     1 to 200 letters, digits, and _ . / : -
--   options  see jobqueue.queue_options(): policy (standard, short, singleton, stately, exclusive, key_strict_fifo), the limits concurrency,
--            group_concurrency {"default", "tiers"}, key_concurrency, rate_limit {"limit", "period", "per"}, the order by fair_by or ageing,
--            warn_backlog, and as defaults of its jobs every retry and time option of send
-- A queue that is there already stays as it is: fine if it has the values that are named here (those not named are not compared).
-- Returns whether it was made. Errors: JQ400, JQ409 CONFLICT if it has other values; DETAIL names them.
create or replace function jobqueue.create_queue(name text, options jsonb default '{}')
returns boolean
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    q jobqueue.queue;
    wanted jobqueue.queue;
    other text[];
    made boolean;
begin
    if create_queue.name is null or create_queue.name !~ '^[A-Za-z0-9_./:-]{1,200}$' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('"%s" cannot be the name of a queue.', left(create_queue.name, 100)),
            'Use 1 to 200 letters, digits, and _ . / : -', '{"option": "name"}');
    end if;
    select * into q from queue x where x.name = create_queue.name;
    made := not found;
    if made then
        insert into queue as x (name) values (create_queue.name) on conflict (name) do nothing;
        made := found;
        select * into q from queue x where x.name = create_queue.name;
    end if;
    wanted := queue_with(q, coalesce(create_queue.options, '{}'));
    if made then
        perform store_queue(wanted);
        return true;
    end if;
    other := array(select n.key from jsonb_each(queue_values(wanted)) n where n.value <> queue_values(q) -> n.key order by n.key);
    if other <> '{}' then
        perform refuse('JQ409', 'CONFLICT', format('The queue "%s" is there already, with other values of: %s.', q.name, array_to_string(other, ', ')),
            'Use jobqueue.update_queue to change them.', jsonb_build_object('queue', q.name, 'options', to_jsonb(other)));
    end if;
    return false;
end
$$;

-- update_queue: change options of a queue; what is not named stays. They are looked up when they are used, so that waiting jobs follow,
-- unless they were sent with values of their own. null: no limit, for ever, nowhere.
-- Errors: JQ400, JQ403, JQ404, JQ409 if the policy is to change while the queue has jobs that have not ended.
create or replace function jobqueue.update_queue(name text, options jsonb)
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    q jobqueue.queue;
    wanted jobqueue.queue;
begin
    perform check_shared('change a queue');
    perform pg_advisory_xact_lock(27251, 0);
    -- before the queue is locked: whoever pauses it would wait for that lock while this waits for the table
    if exists (select from queue x where x.name = update_queue.name and x.policy <> update_queue.options ->> 'policy')
        or update_queue.options ?| array['concurrency', 'group_concurrency', 'key_concurrency', 'rate_limit', 'ageing', 'fair_by']
    then
        perform keep_senders_out(update_queue.name, array['blocked', 'pending', 'processing', 'paused', 'failed', 'cancelled']);
    end if;
    q := lock_queue(update_queue.name);
    if coalesce(update_queue.options, '{}') = '{}' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'There is nothing to change.', 'Name at least one option, such as {"max_retries": 5}.');
    end if;
    wanted := queue_with(q, update_queue.options);
    if wanted.policy <> q.policy and has_unended_jobs(q.name) then
        perform refuse('JQ409', 'CONFLICT', format('The policy of "%s" cannot change while it has jobs that have not ended.', q.name),
            'Wait until they have ended, or cancel them with jobqueue.purge_queue.', jsonb_build_object('queue', q.name));
    end if;
    perform store_queue(wanted);
    if (wanted.policy, wanted.concurrency, wanted.group_concurrency, wanted.key_concurrency, wanted.rate_limit, wanted.ageing, wanted.fair_by)
        is distinct from (q.policy, q.concurrency, q.group_concurrency, q.key_concurrency, q.rate_limit, q.ageing, q.fair_by)
    then
        perform carry_starts(q, x), readmit_queue(x) from queue x where x.name = q.name;
    end if;
    if (wanted.expires_in, wanted.keep_completed, wanted.keep_ended) is distinct from (q.expires_in, q.keep_completed, q.keep_ended) then
        perform restamp_jobs(q, wanted);
    end if;
end
$$;

-- has_unended_jobs: whether a queue has jobs that wait or run. Index: job_claim; the rest is a scan.
create or replace function jobqueue.has_unended_jobs(_queue text)
returns boolean
language sql volatile
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select exists (select from job j where j.queue = _queue and j.ready_seq is not null)
        or exists (select from job j where j.queue = _queue and j.status in ('blocked', 'pending', 'processing', 'paused'))
$$;

-- restamp_jobs: the little that is written on a job when it is sent, written anew where it came from the queue: whether it is kept for no
-- time once it has ended, and when it expires. Walks the primary key in portions. Index: job_pkey.
create or replace function jobqueue.restamp_jobs(_old jobqueue.queue, _new jobqueue.queue)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    place uuid := '00000000-0000-0000-0000-000000000000';
    ids uuid[];
begin
    loop
        ids := array(select j.id from job j where j.id > place order by j.id limit 10000);
        exit when ids = '{}';
        place := ids[cardinality(ids)];
        -- both values are taken from the row as it is when it is locked: a worker may be claiming it
        update job j
        set settle_flags = stamped_flags(j, _new), expires_at = stamped_expiry(j, _old, _new)
        where j.id = any (ids) and j.queue = _new.name and j.status in ('blocked', 'pending', 'processing', 'paused')
            and (j.settle_flags, j.expires_at) is distinct from (stamped_flags(j, _new), stamped_expiry(j, _old, _new));
    end loop;
end
$$;

-- stamped_flags: the settle_flags of a job in a queue: 1 and 16 say that it is kept for no time.
create or replace function jobqueue.stamped_flags(_job jobqueue.job, _queue jobqueue.queue)
returns int
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select _job.settle_flags & ~17
        | case when option_interval(_job.options, 'keep_completed', _queue.keep_completed) = interval '0' then 1 else 0 end
        | case when option_interval(_job.options, 'keep_ended', _queue.keep_ended) = interval '0' then 16 else 0 end
$$;

-- stamped_expiry: when a job expires after its queue has changed: it follows if it has never run and its time is the one that the queue
-- gave it. What was taken up again after an end has none and keeps none.
create or replace function jobqueue.stamped_expiry(_job jobqueue.job, _old jobqueue.queue, _new jobqueue.queue)
returns timestamptz
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select case when _job.status not in ('processing', 'blocked') and _job.attempt = 0 and _job.retry_count = 0
            and (_job.expires_at is not null or _job.resume_count = 0)
            and not coalesce(_job.options ? 'expires_in', false)
            and not exists (select from job_type t where t.name = _job.job_type and t.options ? 'expires_in')
            and _job.expires_at is not distinct from greatest(_job.run_at, _job.created_at) + _old.expires_in
        then greatest(_job.run_at, _job.created_at) + _new.expires_in
        else _job.expires_at end
$$;

-- delete_queue: take a queue away with its ended jobs and its subscriptions. Returns how many jobs went.
-- Errors: JQ403, JQ404, JQ409 while it has jobs that have not ended or that jobs of others wait for, or a queue or a schedule names it;
-- DETAIL has them.
create or replace function jobqueue.delete_queue(name text)
returns bigint
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    q jobqueue.queue;
    users text[];
    n bigint;
begin
    perform check_shared('delete a queue');
    perform pg_advisory_xact_lock(27251, 0);
    perform keep_senders_out(delete_queue.name, array['completed', 'failed', 'cancelled', 'skipped']);
    q := lock_queue(delete_queue.name);
    users := array(select 'queue ' || x.name from queue x where x.dead_letter = q.name
        union all select 'schedule ' || s.name from schedule s where s.queue = q.name order by 1);
    if users <> '{}' then
        perform refuse('JQ409', 'CONFLICT', format('The queue "%s" is named by %s.', q.name, array_to_string(users, ', ')),
            'Give those another queue first: jobqueue.update_queue, jobqueue.unschedule.',
            jsonb_build_object('queue', q.name, 'named_by', to_jsonb(users)));
    elsif has_unended_jobs(q.name) then
        perform refuse('JQ409', 'CONFLICT', format('The queue "%s" has jobs that have not ended.', q.name),
            'Wait until they have ended, or cancel them with jobqueue.purge_queue.', jsonb_build_object('queue', q.name));
    end if;
    n := delete_ended(q.name, null);
    users := array(select j.id from job j where j.queue = q.name);
    if users <> '{}' then
        perform refuse('JQ409', 'CONFLICT', format('The queue "%s" has %s ended job(s) that jobs of other queues wait for, such as %s.',
                q.name, cardinality(users), users[1]),
            'select * from jobqueue.children(id) lists them; cancel them first, or let them end.',
            jsonb_build_object('queue', q.name, 'jobs', cardinality(users)));
    end if;
    delete from admission_slot s where s.queue_number = q.number;
    delete from admission_note n where n.queue_number = q.number;
    delete from admission a where a.queue_number = q.number;
    delete from key_generation g where g.queue = q.name;
    delete from subscription s where s.queue = q.name;
    delete from queue x where x.name = q.name;
    perform note_action('delete_queue', null, null, q.name, null, null, 'no reason is asked for', jsonb_build_object('deleted', n));
    return n;
end
$$;

-- delete_ended: delete the ended jobs of a queue or of a tenant (the other one null), in portions. Returns how many. Index: job_pkey.
create or replace function jobqueue.delete_ended(_queue text, _tenant text)
returns bigint
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    place uuid := '00000000-0000-0000-0000-000000000000';
    ids uuid[];
    n bigint;
    total bigint := 0;
begin
    loop
        ids := array(select j.id from job j where j.id > place order by j.id limit 10000);
        exit when ids = '{}';
        place := ids[cardinality(ids)];
        with ended as materialized (
            select j.id from job j
            where j.id = any (ids) and (_queue is null or j.queue = _queue) and (_tenant is null or j.tenant = _tenant)
                and j.status in ('completed', 'failed', 'cancelled', 'skipped')
                and not (j.settle_flags & 2 <> 0 and has_waiting_children(j.id))
                and not (j.settle_flags & 8 <> 0 and has_followers(j))
            order by j.id
            for update)
        delete from job j using ended e where j.id = e.id;
        get diagnostics n = row_count;
        total := total + n;
    end loop;
    return total;
end
$$;

-- cancel_waiting: cancel the jobs of a queue or of a tenant (the other one null) that wait; one that its worker has claimed meanwhile is
-- passed over. Again from the beginning after the end of one with children: those that go on after it (on_failure run) wait as well now.
-- Returns how many.
create or replace function jobqueue.cancel_waiting(_queue text, _tenant text, _reason text)
returns bigint
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    place uuid := '00000000-0000-0000-0000-000000000000';
    ids uuid[];
    j jobqueue.job;
    n bigint := 0;
    again boolean := false;
begin
    loop
        ids := array(select k.id from job k where k.id > place order by k.id limit 10000);
        exit when ids = '{}' and not again;
        if ids = '{}' then
            again := false;
            place := '00000000-0000-0000-0000-000000000000';
            continue;
        end if;
        place := ids[cardinality(ids)];
        perform lock_for_bulk('cancel', array(
            select k.id from job k
            where k.id = any (ids) and (_queue is null or k.queue = _queue) and (_tenant is null or k.tenant = _tenant)
                and k.status in ('blocked', 'pending', 'paused')));
        for j in
            select * from job k
            where k.id = any (ids) and (_queue is null or k.queue = _queue) and (_tenant is null or k.tenant = _tenant)
                and k.status in ('blocked', 'pending', 'paused')
            order by k.id
            for update
        loop
            -- ended with its parent a moment ago, as its edge asks
            continue when j.status = 'blocked' and not exists (select from job k where k.id = j.id and k.status = 'blocked');
            perform change_job(j, 'purge', 'cancelled', _reason);
            n := n + 1;
            again := again or j.settle_flags & 2 <> 0;
        end loop;
    end loop;
    return n;
end
$$;

-- purge_queue: cancel what waits in a queue and delete what has ended. Jobs that run are left alone.
-- Returns how many were cancelled, deleted (those just cancelled among them) and left running. Errors: JQ400 blank reason, JQ403, JQ404.
create or replace function jobqueue.purge_queue(queue text, reason text, out cancelled bigint, out deleted bigint, out running bigint)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    q jobqueue.queue;
begin
    perform check_reason(purge_queue.reason);
    perform check_shared('purge a queue');
    q := lock_queue(purge_queue.queue);
    cancelled := cancel_waiting(q.name, null, purge_queue.reason);
    deleted := delete_ended(q.name, null);
    running := (select count(*) from job j where j.queue = q.name and j.status = 'processing');
    perform note_action('purge_queue', null, null, q.name, null, null, purge_queue.reason,
        jsonb_build_object('cancelled', cancelled, 'deleted', deleted, 'running', running));
end
$$;

-- purge_tenant: the same for all jobs of a tenant. Errors: JQ400 blank reason, JQ403.
create or replace function jobqueue.purge_tenant(tenant text, reason text, out cancelled bigint, out deleted bigint, out running bigint)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    whose text := to_text(coalesce(to_jsonb(purge_tenant.tenant), '""'), 'tenant', 200);
begin
    perform check_reason(purge_tenant.reason);
    perform check_tenant(whose);
    cancelled := cancel_waiting(null, whose, purge_tenant.reason);
    deleted := delete_ended(null, whose);
    running := (select count(*) from job j where j.tenant = whose and j.status = 'processing');
    perform note_action('purge_tenant', null, whose, whose, null, null, purge_tenant.reason,
        jsonb_build_object('cancelled', cancelled, 'deleted', deleted, 'running', running));
end
$$;
