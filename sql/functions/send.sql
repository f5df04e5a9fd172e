-- next_ready: the next place in the line. The transaction gets its id first, so that a number is never older than its transaction:
-- the sweep below the floors relies on it (docs/decisions/0003-claims.md).
create or replace function jobqueue.next_ready()
returns bigint
language sql volatile
as $$
    select case when pg_catalog.pg_current_xact_id() is not null then pg_catalog.nextval('jobqueue.ready_seq') end
$$;

-- sees_the_past: whether this transaction may see rows as they were before (REPEATABLE READ, SERIALIZABLE).
create or replace function jobqueue.sees_the_past()
returns boolean
language sql stable
as $$
    select pg_catalog.current_setting('transaction_isolation') in ('repeatable read', 'serializable')
$$;

-- hold_queue: whoever stores a job, and sees the past, shares the row of its queue: if the queue was changed since, the server refuses
-- (40001), else the job would never know of the limits that the queue has by now. Without that nobody waits for anybody.
create or replace function jobqueue.hold_queue(_name text)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if sees_the_past() then
        perform from queue q where q.name = _name for share;
    end if;
end
$$;

-- queue_for_send: the queue of a name; an unknown one is created with the defaults, unless the setting create_queues is false (JQ404).
create or replace function jobqueue.queue_for_send(_name text)
returns jobqueue.queue
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    q jobqueue.queue;
begin
    select * into q from queue where name = _name;
    if found then
        perform hold_queue(_name);
        return q;
    elsif _name is null or _name !~ '^[A-Za-z0-9_./:-]{1,200}$' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('"%s" cannot be the name of a queue.', left(_name, 100)),
            'Use 1 to 200 letters, digits, and _ . / : -');
    elsif setting_of('create_queues', 'true') = 'false' then
        perform refuse_queue(_name, 'Create it with jobqueue.create_queue.');
    end if;
    insert into queue (name) values (_name) on conflict (name) do nothing;
    select * into q from queue where name = _name;
    return q;
end
$$;

-- store_job: put one job into its line, or say who stands in its place. A debounced job whose slot is taken goes into the next slot;
-- if that is taken too it is merged there (merge_payload) or dropped. What cannot be merged, because the job there has begun, goes on to the
-- slot after it.
create or replace function jobqueue.store_job(
    _job jobqueue.job, _options jsonb, _policy text, out id uuid, out created boolean, out reason text, out due timestamptz)
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    r jobqueue.job := _job;
    slot interval := to_interval(_options -> 'debounce_seconds', 'debounce_seconds');
    stages jsonb;
    stored boolean;
    waits_for_jobs boolean := coalesce(jsonb_typeof(_options -> 'depends_on'), 'null') <> 'null';
begin
    if waits_for_jobs then
        r := wait_for_parents(r, _options);
    end if;
    -- again if the one in its place went away between the insert and the look
    for round in 1 .. 5 loop
        r.wait_until := case when r.status = 'pending' and r.run_at > now() then r.run_at end;
        r.ready_seq := case when r.status = 'pending' and r.wait_until is null then next_ready() end;
        if r.settle_flags & 256 <> 0 then
            r.inbox_seq := r.ready_seq;
            r.ready_seq := null;
        end if;
        if r.options ? 'hold' then
            r.held_key := name_to_hold(r.queue, r.options ->> 'hold');
            stored := store_held(r);
            continue when stored is null;
        else
            insert into job select r.* on conflict do nothing;
            stored := found;
        end if;
        if stored then
            if r.inbox_seq is not null then
                insert into admission_line select l.* from queue q cross join lateral line_of(r, q) l where q.name = r.queue;
            end if;
            if r.total_stages > 0 then
                stages := coalesce(_options -> 'stages', (select t.stages from job_type t where t.name = r.job_type));
                insert into stage (job_id, tenant, name, position, weight)
                select r.id, r.tenant, s.name, s.position, s.weight from stage_list(stages) s;
            end if;
            if waits_for_jobs then
                perform tie_to_parents(r, _options);
            end if;
            id := r.id; created := true; reason := null; due := case when r.status = 'blocked' then 'infinity' else r.run_at end;
            return;
        end if;
        select h.id, h.reason into id, reason from holder_of(r, _options, _policy) h;
        created := false;
        if reason = 'debounced' and r.run_at < slot_end(slot, now()) then
            r.run_at := slot_end(slot, now());
            r.held_key := slot_key(r.tenant, r.singleton_key, slot, r.run_at);
        elsif reason = 'debounced' and to_boolean(_options -> 'merge_payload', 'merge_payload') then
            update job j
            set payload = case when jsonb_typeof(j.payload) = 'object' and jsonb_typeof(r.payload) = 'object'
                    then j.payload || r.payload else r.payload end,
                version = j.version + 1, updated_at = now()
            where j.id = store_job.id and j.status in ('blocked', 'pending', 'paused');
            if found then
                perform refuse_large((select j.payload from job j where j.id = store_job.id), 'payload', 8388608);
                return;
            end if;
            r.run_at := slot_end(slot, r.run_at);
            r.held_key := slot_key(r.tenant, r.singleton_key, slot, r.run_at);
        elsif reason is not null then
            return;
        end if;
    end loop;
    perform refuse('JQ409', 'CONFLICT', 'The key of this job changes hands too quickly.', 'Send it again.');
end
$$;

-- send: add one job to a queue, in the caller's transaction.
--   queue    its name; an unknown queue is created unless the setting create_queues is false
--   payload  any JSON, at most 8 MB
--   options  see jobqueue.job_options(); unknown ones are refused
-- Returns (id, created, reason): on a collision the id of the job that is there instead, created = false and why.
-- Errors: JQ400 bad argument, JQ403 not your tenant, JQ404 no such queue, JQ409 id taken, JQ413 too large.
create or replace function jobqueue.send(
    queue text, payload jsonb default '{}', options jsonb default '{}', out id uuid, out created boolean, out reason text)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    number int;
    plain boolean;
    watched boolean;
    due timestamptz;
begin
    -- one look-up for the short way: a queue whose jobs need nothing but a place in the line, and a job_type that says nothing of them
    select q.number, is_plain(q) and not exists (select from job_type t where t.name = q.name and t.applies) and not sees_the_past(),
        exists (select from watch w where w.topic = 'queue:' || q.name and w.until > now())
    into number, plain, watched
    from queue q where q.name = send.queue;
    if plain and send.options = '{}' and pg_column_size(send.payload) < 100000 and not is_bound_to_tenants() then
        insert into job (queue, job_type, payload, ready_seq)
        values (send.queue, send.queue, coalesce(send.payload, '{}'), next_ready())
        returning job.id into id;
        created := true;
        -- wake(), written out: its call and its look-up would cost a tenth of the whole
        if may_notify() and (watched or statement_timestamp() > now() + interval '5 ms'
            or not (case when pg_try_advisory_lock(27249, number) then pg_advisory_unlock(27249, number) else false end))
        then
            perform pg_notify('jobqueue_ready', send.queue);
        end if;
        return;
    elsif plain and is_only_traced(send.options) and pg_column_size(send.payload) < 100000 and not is_bound_to_tenants() then
        insert into job (queue, job_type, payload, options, ready_seq)
        values (send.queue, send.queue, coalesce(send.payload, '{}'), trace_option(send.options), next_ready())
        returning job.id into id;
        created := true;
        perform wake(send.queue, number);
        return;
    end if;
    select s.id, s.created, s.reason, s.due, q.number into id, created, reason, due, number
    from queue_for_send(send.queue) q
    cross join lateral send_one(q, send.payload, send.options) s;
    if created and due < now() + interval '5 s' then
        perform wake(send.queue, number);
    end if;
end
$$;

-- is_plain: a queue whose jobs need nothing but a place in the line when they are sent.
create or replace function jobqueue.is_plain(_queue jobqueue.queue)
returns boolean
language sql immutable
as $$
    select _queue.policy = 'standard' and _queue.expires_in is null
        and _queue.keep_completed is distinct from interval '0' and _queue.keep_ended is distinct from interval '0'
        and _queue.concurrency is null and _queue.group_concurrency is null and _queue.key_concurrency is null
        and _queue.rate_limit is null
$$;

-- is_bound_to_tenants: whether this transaction may not send for every tenant.
create or replace function jobqueue.is_bound_to_tenants()
returns boolean
language sql stable
as $$
    select coalesce(pg_catalog.current_setting('jobqueue.tenants', true), '') not in ('', '*')
        or pg_catalog.current_setting('role', true) = 'jobqueue_api'
$$;

-- send_one: the general way of one job; due is when it may run.
create or replace function jobqueue.send_one(
    _queue jobqueue.queue, _payload jsonb, _options jsonb, out id uuid, out created boolean, out reason text, out due timestamptz)
language sql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select s.*
    from new_job(_queue, _payload, coalesce(_options, '{}')) r
    cross join lateral store_job(r, coalesce((select t.options from job_type t where t.name = r.job_type), '{}')
        || coalesce(_options, '{}'), _queue.policy) s
$$;

-- send_many: add many jobs to a queue in one call; all or none.
--   jobs  [{"payload": …, "options": {…}}, …], at most 100,000
-- Returns one row (id, created, reason) per element, in order. Errors: those of send; DETAIL names the index of the element.
create or replace function jobqueue.send_many(queue text, jobs jsonb)
returns table (id uuid, created boolean, reason text)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set jit = off
as $$
#variable_conflict use_column
declare
    q jobqueue.queue;
    n bigint;
    odd bigint;
    kinds text;
begin
    if jsonb_typeof(jobs) is distinct from 'array' or jsonb_array_length(jobs) > 100000 then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'jobs must be a JSON array of at most 100,000 elements.',
            'Give [{"payload": {…}, "options": {…}}, …].');
    end if;
    q := queue_for_send(send_many.queue);
    select count(*), min(i - 1) filter (where jsonb_typeof(e) <> 'object') into n, odd
    from jsonb_array_elements(jobs) with ordinality x (e, i)
    where case when jsonb_typeof(e) = 'object' then e - 'payload' <> '{}' or pg_column_size(e) > 100000 else true end;
    if odd is not null then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('Element %s is not an object.', odd),
            'Give {"payload": {…}, "options": {…}}.', jsonb_build_object('index', odd));
    end if;
    if n = 0 and is_plain(q) and not is_bound_to_tenants() and not exists (select from job_type t where t.name = q.name and t.applies) then
        return query
            with s as materialized (
                select i, new_id() as new, coalesce(e -> 'payload', '{}') as payload
                from jsonb_array_elements(jobs) with ordinality x (e, i)),
            stored as (
                insert into job (id, queue, job_type, payload, ready_seq)
                select new, q.name, q.name, payload, next_ready() from s)
            select s.new, true, null::text from s;
    elsif is_plain(q) and not is_bound_to_tenants() and not exists (select from job_type t where t.name = q.name and t.applies)
        and are_only_traced(jobs)
    then
        return query
            with s as materialized (
                select i, new_id() as new, coalesce(e -> 'payload', '{}') as payload, trace_option(e -> 'options') as options
                from jsonb_array_elements(jobs) with ordinality x (e, i)),
            stored as (
                insert into job (id, queue, job_type, payload, options, ready_seq)
                select new, q.name, q.name, payload, options, next_ready() from s)
            select s.new, true, null::text from s;
    else
        return query select * from send_each(q, jobs);
    end if;
    perform wake(q.name, q.number);
end
$$;

-- take_turns: callers that store several keys or ids in one call, in whatever order, must not wait for each other in a circle. Who has more
-- than one element takes the locks of their keys first, in one order, till the end of the transaction: 64 for each queue, since a call may have
-- 100,000 keys. A single send takes one key only, and none of these.
create or replace function jobqueue.take_turns(_queue jobqueue.queue, _jobs jsonb)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if jsonb_array_length(_jobs) > 1 and _jobs @? '$[*].options ? (exists(@.singleton_key) || exists(@.id))' then
        perform pg_advisory_xact_lock(27253, t.turn)
        from (
            select distinct _queue.number * 64 + (hashtext(k.key) & 63) as turn
            from jsonb_array_elements(_jobs) e
            cross join lateral (values (coalesce(e -> 'options' ->> 'singleton_key', '')), (e -> 'options' ->> 'id')) k (key)
            where k.key is not null
            order by turn) t;
    end if;
end
$$;

-- send_each: the general way of many jobs; an error names the element.
create or replace function jobqueue.send_each(_queue jobqueue.queue, _jobs jsonb)
returns table (id uuid, created boolean, reason text)
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    element jsonb;
    n bigint;
    state text;
    message text;
    hint text;
    detail text;
begin
    perform take_turns(_queue, _jobs);
    for element, n in select e, i - 1 from jsonb_array_elements(_jobs) with ordinality x (e, i) loop
        perform refuse_unknown_option(element, array['payload', 'options'], 'an element of send_many');
        if coalesce(jsonb_typeof(element -> 'options'), 'null') not in ('object', 'null') then
            perform refuse('JQ400', 'INVALID_ARGUMENT', 'options must be a JSON object.');
        end if;
        select s.id, s.created, s.reason into id, created, reason
        from send_one(_queue, element -> 'payload', nullif(element -> 'options', 'null')) s;
        return next;
    end loop;
-- around the loop and not inside it: a block with an exception clause is a subtransaction
exception when others then
    get stacked diagnostics state = returned_sqlstate, message = message_text, hint = pg_exception_hint, detail = pg_exception_detail;
    if state not like 'JQ%' then
        raise;
    end if;
    perform refuse(state, detail::jsonb ->> 'code', format('Element %s: %s', n, message), hint,
        (detail::jsonb - 'code') || jsonb_build_object('index', n));
end
$$;
