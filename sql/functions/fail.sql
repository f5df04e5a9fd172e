-- How an attempt ends without success. All ways lead through end_attempt, so that they write the same history.

-- retry_delay_of: how long the next retry waits: the n-th after 1 to 2 times of the delay, doubled n - 1 times, at random (so that
-- jobs that failed together do not come back together), at most retry_delay_max. Without backoff: the delay.
create or replace function jobqueue.retry_delay_of(_options jsonb, _queue jobqueue.queue, _n int)
returns interval
language sql volatile
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select case
        when coalesce((_options ->> 'retry_backoff')::boolean, _queue.retry_backoff) then
            -- in seconds: a long delay doubled often is more than an interval holds
            make_interval(secs => least(extract(epoch from d.delay)::double precision * power(2, least(_n - 1, 30)) * (1 + random()),
                extract(epoch from coalesce(d.most, interval '1000 years'))::double precision))
        else d.delay end
    from (select option_interval(_options, 'retry_delay', _queue.retry_delay) as delay,
        option_interval(_options, 'retry_delay_max', _queue.retry_delay_max) as most) d
$$;

-- end_attempt: end the attempt of a locked, processing job without success.
--   _outcome   failed, timed_out, lost, released, snoozed, cancelled, paused (the history's word)
--   _to        the status to go to
--   _run_at    when it may run again, for pending
--   _error     {"class", "code", "message", "detail"} or null
--   _changes   retry_count and lost_count after it
create or replace function jobqueue.end_attempt(
    _job jobqueue.job, _outcome text, _to text, _run_at timestamptz, _error jsonb, _retry_count int, _lost_count int,
    _suspect boolean, _seq bigint, _reason text)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    waits boolean := _to = 'pending' and _run_at > now();
    ended boolean := _to in ('failed', 'cancelled');
begin
    insert into attempt (job_id, attempt, tenant, claim_token, worker_id, started_at, outcome, error_class, error_code, error_message,
        error_detail, next_run_at)
    values (_job.id, _job.attempt, _job.tenant, _job.claim_token, _job.worker_id, _job.started_at, _outcome, _error ->> 'class',
        _error ->> 'code', _error ->> 'message', _error ->> 'detail', case when _to = 'pending' then _run_at end);
    if _error is not null then
        perform note_attempt(_job, _outcome, _to);
    end if;
    update job j
    set status = _to,
        version = j.version + 1,
        ready_seq = case when _to = 'pending' and not waits then coalesce(_seq, next_ready()) end,
        wait_until = case when waits then _run_at end,
        run_at = case when _to = 'pending' then _run_at else j.run_at end,
        held_key = case when _retry_count > 0 and j.options ? 'hold_retry' and _to in ('pending', 'paused') then retry_key(_job)
            when j.hold_mask & status_bit(_to) <> 0 then j.held_key end,
        retry_count = _retry_count,
        lost_count = _lost_count,
        suspect = _suspect,
        claim_token = null,
        lease_until = null,
        handler_started = null,
        requested_action = null,
        life_at = null,
        completed_at = case when ended then now() end,
        failed_at = case when _to = 'failed' then now() end,
        paused_at = case when _to = 'paused' then now() else j.paused_at end,
        updated_at = now(),
        estimated_completion = null,
        -- what people asked for keeps the reason that they gave
        status_reason = case when _to in ('cancelled', 'paused') then coalesce(_reason, j.status_reason) else _reason end,
        error_class = coalesce(_error ->> 'class', j.error_class),
        error_code = case when _error is null then j.error_code else _error ->> 'code' end,
        error_message = case when _error is null then j.error_message else _error ->> 'message' end
    where j.id = _job.id;
    if _job.options ? 'hold_once' and _retry_count = 0 and _to in ('pending', 'paused') then
        perform hold_if_free(_job);
    end if;
    if _job.settle_flags & 256 <> 0 then
        perform leave_line(_job, _to);
        if _to = 'pending' then
            perform join_line(array[_job.id]);
        end if;
    end if;
    update stage s
    set status = case when _error is null then 'pending' else 'failed' end,
        completed_at = case when _error is null then null else now() end,
        error = coalesce(_error ->> 'message', s.error)
    where s.job_id = _job.id and s.status = 'in_progress';
    if _to = 'failed' then
        perform after_failure(_job.id, _error);
    elsif _to = 'pending' and _run_at < now() + interval '5 s' then
        perform wake_many(array[_job.queue]);
    end if;
    perform publish_changes(array[_job.id]);
    if ended and _job.settle_flags <> 0 then
        perform after_end(array[_job.id]);
    end if;
end
$$;

-- status_bit: the bit of a status in a mask of statuses that hold a key.
create or replace function jobqueue.status_bit(_status text)
returns int
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select 1 << (array_position(
        array['blocked', 'pending', 'processing', 'paused', 'completed', 'failed', 'cancelled', 'skipped'], _status) - 1)
$$;

-- after_failure: what a job that ended as failed brings about: a copy in its dead letter queue. Nothing in here may refuse: a failure
-- must always be stored. So the queue is created whatever the setting says, and neither limits nor tenants are looked at again.
create or replace function jobqueue.after_failure(_id uuid, _error jsonb)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job;
    target text;
    dead jobqueue.queue;
    copy uuid;
begin
    select * into j from job where id = _id;
    if j.batch_id is not null then
        perform note_failure(j.batch_id);
    end if;
    select case when j.options ? 'dead_letter' then j.options ->> 'dead_letter' else q.dead_letter end into target
    from queue q where q.name = j.queue;
    if target is null or target = j.queue then
        return;
    end if;
    insert into queue (name) values (target) on conflict (name) do nothing;
    select * into dead from queue q where q.name = target;
    insert into job (queue, job_type, tenant, payload, priority, subject, display_name, created_by, metadata, group_key, tier, pausable,
        dead_letter_of, options, ready_seq, expires_at, settle_flags)
    values (target, j.job_type, j.tenant, j.payload, j.priority, j.subject, j.display_name, j.created_by, j.metadata, j.group_key, j.tier,
        j.pausable, j.id, trace_option(j.options), next_ready(), now() + dead.expires_in,
        case when dead.keep_completed = interval '0' then 1 else 0 end | case when dead.limited then 256 else 0 end)
    returning job.id into copy;
    if dead.limited then
        perform join_line(array[copy]);
    end if;
    perform wake_many(array[target]);
end
$$;

-- clean_error: an error as it is stored: a known class, a code, texts cut to 2,000 and 64,000 characters.
create or replace function jobqueue.clean_error(_error jsonb)
returns jsonb
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    class text := coalesce(_error ->> 'class', 'transient');
begin
    if jsonb_typeof(_error) is distinct from 'object' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'error must be a JSON object.',
            'Give {"class": "transient", "code": "TIMEOUT", "message": "…", "detail": "…"}.');
    elsif class not in ('transient', 'permanent', 'quota', 'invalid', 'lost') then
        perform refuse('JQ400', 'INVALID_ARGUMENT', format('There is no error class "%s".', left(class, 100)),
            'Classes are transient, permanent, quota, invalid and lost.', '{"option": "class"}');
    end if;
    return jsonb_build_object(
        'class', class,
        'code', clean_text(coalesce(nullif(_error ->> 'code', ''), 'ERROR'), 200),
        'message', clean_text(coalesce(nullif(_error ->> 'message', ''), 'The handler failed without a message.'), 2000),
        'detail', clean_text(_error ->> 'detail', 64000));
end
$$;

-- lock_claim: the job of a valid claim, locked; raises JQ409 LEASE_LOST or JQ404 otherwise.
create or replace function jobqueue.lock_claim(_id uuid, _token uuid)
returns jobqueue.job
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job;
begin
    select * into j from job where id = _id and claim_token = _token and status = 'processing' for update;
    if not found then
        perform refuse_lost(_id);
    end if;
    return j;
end
$$;

-- fail_claim: decide what a failed attempt of a locked job leads to, and do it. Returns the new status.
create or replace function jobqueue.fail_claim(_job jobqueue.job, _outcome text, _error jsonb, _retry_in interval)
returns text
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    q jobqueue.queue;
    error jsonb := clean_error(_error);
    lost boolean := error ->> 'class' = 'lost';
    retried boolean;
    to_status text;
    due timestamptz := now();
begin
    select * into q from queue where name = _job.queue;
    retried := _job.retry_count < coalesce(_job.max_retries, q.max_retries)
        and (error ->> 'class' in ('transient', 'lost') or _retry_in is not null)
        and not (lost and _job.lost_count >= 2);
    to_status := case
        when not retried then 'failed'
        when _job.requested_action = 'cancel' then 'cancelled'
        when _job.requested_action = 'pause' then 'paused'
        else 'pending' end;
    if retried and not lost then
        due := now() + coalesce(_retry_in, retry_delay_of(_job.options, q, _job.retry_count + 1));
    end if;
    -- a stately queue has one job that waits for a retry; who finds another there is not retried
    if _job.options ? 'hold_retry' and to_status in ('pending', 'paused')
        and exists (select from job j where j.queue = _job.queue and j.held_key = retry_key(_job) and j.id <> _job.id)
    then
        retried := false;
        to_status := 'failed';
    elsif _job.options ? 'hold_retry' and to_status in ('pending', 'paused') then
        begin
            perform end_attempt(_job, _outcome, to_status, due, error, _job.retry_count + 1, case when lost then _job.lost_count + 1 else 0 end,
                lost, null, case to_status when 'pending' then 'waits for a retry' end);
            return to_status;
        exception when unique_violation then
            -- a person has put the other one there at this moment
            retried := false;
            to_status := 'failed';
        end;
    end if;
    perform end_attempt(_job, _outcome, to_status, due, error,
        case when retried then _job.retry_count + 1 else _job.retry_count end,
        case when lost then _job.lost_count + 1 else 0 end, lost, null,
        case to_status when 'pending' then 'waits for a retry' end);
    return to_status;
end
$$;

-- fail_one: fail without the checks of the public form; null if the claim is lost.
create or replace function jobqueue.fail_one(_id uuid, _token uuid, _error jsonb, _retry_in interval)
returns text
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job;
begin
    select * into j from job where id = _id and claim_token = _token and status = 'processing' for update;
    if not found then
        return null;
    end if;
    return fail_claim(j, case when _error ->> 'code' = 'TIMEOUT' then 'timed_out' else 'failed' end, _error, _retry_in);
end
$$;

-- fail: the attempt failed.
--   id, token  the job and the claim token of its claim
--   error      {"class": transient | permanent | quota | invalid | lost, "code", "message", "detail"}; class: transient unless told
--   retry_in   wait this long instead of the job's own delay; makes a class that is not retried retryable
-- Returns the new status: pending (a retry is left), failed, or what was asked of the job meanwhile (cancelled, paused).
-- Errors: JQ400, JQ404, JQ409 LEASE_LOST.
create or replace function jobqueue.fail(id uuid, token uuid, error jsonb, retry_in interval default null)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if fail.retry_in < interval '0' or fail.retry_in > interval '1000 years' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'retry_in must be from 0 seconds to 1000 years.');
    end if;
    perform clean_error(fail.error);
    return fail_claim(lock_claim(fail.id, fail.token), case when fail.error ->> 'code' = 'TIMEOUT' then 'timed_out' else 'failed' end,
        fail.error, fail.retry_in);
end
$$;

-- fail_many: several attempts failed; a stale claim does not keep the others back.
--   failures  [{"id", "token", "error", "retry_in"}], retry_in in seconds
-- Returns (id, outcome ok or lost, status).
create or replace function jobqueue.fail_many(_failures jsonb)
returns table (id uuid, outcome text, status text)
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    f jsonb;
begin
    -- all that could end with them, before any of it is changed: the loop must not come to a job after the children of another
    perform lock_below(array(select (e ->> 'id')::uuid from jsonb_array_elements(_failures) e));
    for f in select e from jsonb_array_elements(_failures) e order by e ->> 'id' loop
        id := (f ->> 'id')::uuid;
        status := fail_one(id, (f ->> 'token')::uuid, f -> 'error', to_interval(f -> 'retry_in', 'retry_in'));
        outcome := case when status is null then 'lost' else 'ok' end;
        return next;
    end loop;
end
$$;

-- give_back: end a locked claim without spending a retry: to pending at a time, or to what was asked.
create or replace function jobqueue.give_back(_job jobqueue.job, _outcome text, _run_at timestamptz, _seq bigint)
returns text
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    to_status text := case _job.requested_action when 'cancel' then 'cancelled' when 'pause' then 'paused' else 'pending' end;
begin
    perform end_attempt(_job, case to_status when 'pending' then _outcome else to_status end, to_status, _run_at, null,
        _job.retry_count, 0, false, _seq, case to_status when 'pending' then _outcome else null end);
    return to_status;
end
$$;

-- snooze: not now; run again after a delay, without spending a retry. Returns the new status. Errors: JQ400, JQ404, JQ409.
create or replace function jobqueue.snooze(id uuid, token uuid, delay interval)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if snooze.delay is null or snooze.delay < interval '0' or snooze.delay > interval '1000 years' then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'delay must be given, from 0 seconds to 1000 years.');
    end if;
    return give_back(lock_claim(snooze.id, snooze.token), 'snoozed', now() + snooze.delay, null);
end
$$;

-- release: give a claimed job back at once, without spending a retry (a worker that stops). Returns the new status.
create or replace function jobqueue.release(id uuid, token uuid)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    return give_back(lock_claim(release.id, release.token), 'released', now(), null);
end
$$;

-- release_many: claims whose handlers never started, or were stopped at shutdown. Stale ones are passed over. Returns how many went back.
create or replace function jobqueue.release_many(_ids uuid[], _tokens uuid[])
returns int
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    given record;
    j jobqueue.job;
    n int := 0;
begin
    -- each is read when its turn comes: the end of one may write another (the next witness of their batch), and a cursor passes over what
    -- was written after it was opened
    for given in select x.id, x.token from unnest(_ids, _tokens) x (id, token) order by x.id loop
        select * into j from job k where k.id = given.id and k.claim_token = given.token and k.status = 'processing' for update;
        if found then
            perform give_back(j, 'released', now(), null);
            n := n + 1;
        end if;
    end loop;
    return n;
end
$$;

-- acknowledge: the worker stopped the handler as it was asked: cancel makes the job cancelled, pause makes it paused.
-- Returns the new status. Errors: JQ409 if nothing was asked (CONFLICT) or the token is stale (LEASE_LOST); JQ404.
create or replace function jobqueue.acknowledge(id uuid, token uuid)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job := lock_claim(acknowledge.id, acknowledge.token);
begin
    if j.requested_action is null then
        perform refuse('JQ409', 'CONFLICT', format('Nothing was asked of job %s.', j.id), 'Complete, fail, snooze or release it.');
    end if;
    return give_back(j, 'released', now(), null);
end
$$;

-- cancel_own: the handler itself decided that the job is to be given up. Returns the new status. Errors: JQ404, JQ409 LEASE_LOST.
create or replace function jobqueue.cancel_own(id uuid, token uuid, reason text)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    perform end_attempt(j, 'cancelled', 'cancelled', now(), null, j.retry_count, 0, false, null,
        clean_text(coalesce(nullif(btrim(cancel_own.reason), ''), 'cancelled by its handler'), 2000))
    from lock_claim(cancel_own.id, cancel_own.token) j;
    return 'cancelled';
end
$$;
