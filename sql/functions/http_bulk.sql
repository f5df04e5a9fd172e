-- One action on many jobs, for the HTTP API. Up to 500 jobs are done at once; more are worked off by maintenance, 500 per transaction,
-- under a job of its own in the queue jobqueue.bulk: that can be watched, paused and cancelled like any other.

-- http_bulk_tenant: the tenant as which a bulk action runs: the one named, the only one of the caller, or * for those who see all.
-- Errors: JQ400 if it is one of several.
create or replace function jobqueue.http_bulk_tenant(_named text)
returns text
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    seen text[] := visible_tenants();
begin
    if _named is not null then
        return _named;
    elsif cardinality(seen) = 1 then
        return seen[1];
    end if;
    perform refuse('JQ400', 'INVALID_ARGUMENT', 'You see several tenants, and a bulk action is for one.',
        'Name it in the filter, or use the path of the tenant.', '{"option": "tenant"}');
end
$$;

-- http_bulk: POST /jobs/bulk as one call.
--   _body         {"action", "filter" (as of http_conditions; never empty), "reason", "dry_run", "expected_count"}
--   _owner, _key, _fingerprint   the idempotency key, if any
-- Returns the operation as JSON text (see http_bulk_row), and whether it was there already. Errors: JQ400, JQ409 CONFLICT if the set has
-- grown by more than 10 % over expected_count, JQ413 over 1,000,000 jobs.
create or replace function jobqueue.http_bulk(
    _role text, _tenants text, _actor text, _body jsonb, _owner text, _key text, _fingerprint text,
    out body text, out replayed boolean)
language plpgsql
as $$
declare
    wanted jsonb := _body -> 'filter';
    found_ids uuid[];
    key_ids uuid[];
begin
    perform jobqueue.http_context(_role, _tenants, false);
    perform jobqueue.http_actor(_actor);
    if _key is not null then
        key_ids := jobqueue.http_take_key(_owner, _key, _fingerprint);
    end if;
    replayed := key_ids is not null;
    if replayed then
        body := jobqueue.http_bulk_row(key_ids[1]);
        return;
    end if;
    found_ids := array(select f.id from jobqueue.http_found(wanted, null, null, 1000001, 0) f order by f.id);
    body := jobqueue.http_bulk_start(_body, found_ids, jobqueue.http_bulk_tenant(wanted ->> 'tenant'));
    if _key is not null then
        perform jobqueue.http_keep_key(_owner, _key, array[(body::jsonb ->> 'id')::uuid]);
    end if;
end
$$;

-- http_bulk_start: begin with an action on these jobs, which the caller sees; a small one is done with it. Returns the operation.
create or replace function jobqueue.http_bulk_start(_body jsonb, _ids uuid[], _tenant text)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    op jobqueue.bulk_operation;
    n int := cardinality(_ids);
    expected bigint := (_body ->> 'expected_count')::bigint;
begin
    -- * is seen by those only who see all
    if not sees_tenant(_tenant) then
        perform refuse('JQ403', 'FORBIDDEN', format('This session may not act for the tenant "%s".', left(_tenant, 200)));
    elsif n > expected * 1.1 then
        perform refuse('JQ409', 'CONFLICT', format('The filter means %s jobs by now, not %s.', n, expected),
            'Look again with dry_run, and give the new number.', jsonb_build_object('count', n));
    elsif n > 1000000 then
        perform refuse('JQ413', 'TOO_LARGE', 'The filter means more than 1,000,000 jobs.', 'Narrow it, for example by created_before.');
    end if;
    if coalesce((_body ->> 'dry_run')::boolean, false) then
        return jsonb_build_object('id', null, 'action', _body ->> 'action', 'status', 'dry_run', 'total', n, 'done', 0,
            'counts', case when n <= 20000 then bulk_portion(_body ->> 'action', _ids, 'dry run', true) end)::text;
    end if;
    insert into bulk_operation (tenant, action, reason, actor, filter, ids)
    values (_tenant, _body ->> 'action', http_reason(_body ->> 'reason'), nullif(current_setting('jobqueue.actor', true), ''),
        -- a list of ids is in ids; here their number is enough
        case when _body -> 'filter' ? 'ids' then _body -> 'filter' || jsonb_build_object('ids', n) else _body -> 'filter' end, _ids)
    returning * into op;
    perform check_reason(op.reason);
    if n <= 500 then
        update bulk_operation b
        set counts = bulk_portion(op.action, _ids, op.reason, false), done = n, ended_at = now()
        where b.id = op.id;
    else
        insert into queue (name) values ('jobqueue.bulk') on conflict (name) do nothing;
        perform send('jobqueue.bulk', jsonb_build_object('action', op.action, 'reason', op.reason, 'jobs', n), jsonb_build_object(
            'id', op.id, 'job_type', 'jobqueue.bulk', 'display_name', format('%s: %s jobs', op.action, n), 'timeout', null,
            'max_retries', 100, 'tenant', case _tenant when '*' then 'default' else _tenant end));
        -- who sees some tenants only does not see what is done with all
        update job j set tenant = _tenant, created_by = op.actor where j.id = op.id;
    end if;
    return http_bulk_row(op.id);
end
$$;

-- bulk_portion: do an action with each of some jobs, in the order in which they are given; tenants that the caller does not see are left alone.
-- All locks are taken first. What still meets another transaction in a circle (ids that senders chose, keys that change hands, a transaction
-- of several actions) is taken back and done again: nobody has seen it. Returns counts per outcome: done, asked, unchanged, refused, gone.
-- Errors: 40P01 after five such meetings, so that whoever holds locks from before this call learns of it.
create or replace function jobqueue.bulk_portion(_action text, _ids uuid[], _reason text, _dry_run boolean)
returns jsonb
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    meetings int := 0;
begin
    if _dry_run then
        return bulk_each(_action, _ids, _reason, true);
    end if;
    loop
        begin
            perform lock_for_bulk(_action, _ids);
            return bulk_each(_action, _ids, _reason, false);
        exception when deadlock_detected then
            meetings := meetings + 1;
            if meetings = 5 then
                raise;
            end if;
        end;
        -- the other one takes what is free now
        perform pg_sleep(0.02 * meetings);
    end loop;
end
$$;

-- lock_for_bulk: lock what an action on some jobs is going to write, in the order in which all lock: jobs by their ids, which has parents
-- before their children, then flows, then batches.
--   jobs: their own; those that end or are released with them; their copies in dead letter queues, which go, and what ends with those
-- Index: job_pkey, job_dead_letter, edge_of_parent, flow_member_pkey.
create or replace function jobqueue.lock_for_bulk(_action text, _ids uuid[])
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    -- what ends badly by it; one that runs is only asked
    ending uuid[] := case
        when _action = 'cancel' then array(select j.id from job j where j.id = any (_ids) and j.status in ('blocked', 'pending', 'paused'))
        when _action in ('retry', 'restart', 'skip') then array(
            select j.id from job j where j.dead_letter_of = any (_ids) and j.status in ('pending', 'paused'))
        else '{}' end;
    children uuid[] := case when _action in ('skip', 'delete') then array(
            select e.child_id from job j join edge e on e.parent_id = j.id and not e.passed
            where j.id = any (_ids) and j.settle_flags & 2 <> 0)
        else '{}' end;
begin
    perform from job j
    where j.id = any (_ids || ending || children || array(select b from jobs_below(ending) b))
    order by j.id
    for update;
    if _action = 'delete' then
        perform from flow f where f.id in (select m.flow_id from flow_member m where m.job_id = any (_ids)) order by f.id for no key update;
        perform from batch b where b.id in (select j.batch_id from job j where j.id = any (_ids)) order by b.id for no key update;
    end if;
end
$$;

-- bulk_each: the same, one by one, without locking anything before. Returns counts per outcome.
create or replace function jobqueue.bulk_each(_action text, _ids uuid[], _reason text, _dry_run boolean)
returns jsonb
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    one uuid;
    outcome text;
    counts jsonb := '{}';
begin
    foreach one in array _ids loop
        outcome := case when exists (select from job j where j.id = one and not sees_tenant(j.tenant)) then 'gone'
            else bulk_one(_action, one, _reason, _dry_run) end;
        counts := counts || jsonb_build_object(outcome, coalesce((counts ->> outcome)::int, 0) + 1);
    end loop;
    return counts;
end
$$;

-- bulk_sum: counts of two portions together.
create or replace function jobqueue.bulk_sum(_a jsonb, _b jsonb)
returns jsonb
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(jsonb_object_agg(k, coalesce((_a ->> k)::int, 0) + coalesce((_b ->> k)::int, 0)), '{}')
    from (select jsonb_object_keys(_a || _b)) x (k)
$$;

-- http_bulk_row: an operation as JSON text, as the caller may see it; null if there is none. status is that of its job, completed
-- without one.
create or replace function jobqueue.http_bulk_row(_id uuid)
returns text
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select jsonb_build_object('id', b.id, 'action', b.action, 'status', coalesce(j.status, 'completed'), 'reason', b.reason,
        'total', cardinality(b.ids), 'done', b.done, 'counts', b.counts, 'created_at', b.created_at, 'ended_at', b.ended_at)::text
    from bulk_operation b
    left join job j on j.id = b.id
    where b.id = _id and sees_tenant(b.tenant)
$$;

-- http_bulk_read: GET /bulk/{id} as one call; null if there is none that the caller sees.
create or replace function jobqueue.http_bulk_read(_role text, _tenants text, _id uuid)
returns text
language plpgsql
as $$
begin
    perform jobqueue.http_context(_role, _tenants, true);
    return jobqueue.http_bulk_row(_id);
end
$$;

-- run_bulk: the next portion of the oldest operation that nobody else works on. Each portion is one transaction with its count, so
-- nothing is done twice, whoever dies. Returns how many jobs were looked at.
--   _worker  who keeps house; _max  jobs per portion
create or replace function jobqueue.run_bulk(_worker uuid, _max int default 500)
returns int
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
-- set for an operation below, and back at the end
set jobqueue.tenants = '*'
set jobqueue.actor = ''
-- longer than maintain would wait: a portion is 500 jobs, and any of them may be locked for a moment
set lock_timeout = '5s'
as $$
declare
    op jobqueue.bulk_operation;
    j jobqueue.job;
    n int;
begin
    delete from bulk_operation b where b.ended_at < now() - interval '7 days';
    if not exists (select from bulk_operation b where b.ended_at is null) then
        return 0;
    end if;
    update bulk_operation b set ended_at = now() where b.ended_at is null and not exists (select from job x where x.id = b.id);
    op := next_bulk(_worker);
    if op.id is null then
        return 0;
    end if;
    select * into j from job x where x.id = op.id;
    if j.requested_action is not null then
        perform acknowledge(j.id, j.claim_token);
        return 0;
    end if;
    perform set_config('jobqueue.tenants', op.tenant, true), set_config('jobqueue.actor', coalesce(op.actor, ''), true);
    op.counts := bulk_sum(op.counts, bulk_portion(op.action, op.ids[op.done + 1:op.done + _max], op.reason, false));
    perform set_config('jobqueue.tenants', '*', true);
    n := least(_max, cardinality(op.ids) - op.done);
    op.done := op.done + n;
    update bulk_operation b
    set done = op.done, counts = op.counts, ended_at = case when op.done = cardinality(op.ids) then now() end
    where b.id = op.id;
    if op.done = cardinality(op.ids) then
        perform complete(j.id, j.claim_token, op.counts);
    else
        perform progress(j.id, j.claim_token, (op.done::bigint * 100 / cardinality(op.ids))::int, null,
            jsonb_build_object('done', op.done, 'total', cardinality(op.ids)));
        update job x set lease_until = now() + interval '1 min', heartbeat_at = now() where x.id = j.id;
    end if;
    return n;
end
$$;

-- next_bulk: the operation to go on with, locked: one under way, else the next in its line. A job of that line without an operation
-- was sent by somebody else and fails.
create or replace function jobqueue.next_bulk(_worker uuid)
returns jobqueue.bulk_operation
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    op jobqueue.bulk_operation;
    claimed record;
begin
    select b.* into op
    from bulk_operation b join job j on j.id = b.id and j.status = 'processing'
    where b.ended_at is null
    order by b.id limit 1
    for update of b skip locked;
    if found then
        return op;
    end if;
    select c.id, c.claim_token into claimed
    from claim(array['jobqueue.bulk'], coalesce(_worker, '00000000-0000-4000-8000-000000000000'), 1) c;
    if claimed.id is null then
        return null;
    end if;
    select * into op from bulk_operation b where b.id = claimed.id and b.ended_at is null for update;
    if not found then
        perform fail(claimed.id, claimed.claim_token,
            '{"class": "invalid", "code": "NO_OPERATION", "message": "This queue is for POST /jobs/bulk."}');
    end if;
    return op;
end
$$;
