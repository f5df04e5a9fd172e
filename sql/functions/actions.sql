-- What people do with jobs. Every action names a reason and is written to the audit with who did it, unless it changes nothing.

-- check_reason: a reason is not blank and at most 2,000 characters.
create or replace function jobqueue.check_reason(_reason text)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
begin
    if _reason is null or btrim(_reason, E' \t\n\r') = '' or length(_reason) > 2000 then
        perform refuse('JQ400', 'INVALID_ARGUMENT', 'A reason is needed: 1 to 2,000 characters.',
            'Say in a few words why, for those who read the audit later.', '{"option": "reason"}');
    end if;
end
$$;

-- note_action: one line of the audit. Who: the proven session_user, and jobqueue.actor as claimed by an application.
create or replace function jobqueue.note_action(
    _action text, _job uuid, _tenant text, _target text, _from text, _to text, _reason text, _details jsonb default null)
returns void
language sql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    insert into audit (action, job_id, tenant, target, from_status, to_status, reason, session_user_name, actor, application_name,
        client_addr, details)
    values (_action, _job, _tenant, _target, _from, _to, btrim(_reason), session_user,
        nullif(current_setting('jobqueue.actor', true), ''), nullif(current_setting('application_name', true), ''),
        inet_client_addr(), _details)
$$;

-- lock_job: a job that the caller may see, locked; JQ404 otherwise.
create or replace function jobqueue.lock_job(_id uuid)
returns jobqueue.job
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job;
begin
    select * into j from job where id = _id for update;
    if not found or not sees_tenant(j.tenant) then
        perform refuse_job(_id);
    end if;
    return j;
end
$$;

-- check_action: JQ409 with what is allowed instead, unless the action is allowed.
create or replace function jobqueue.check_action(_job jobqueue.job, _action text)
returns void
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    why text;
    can text[];
begin
    select a.reason into why from action_list(_job) a where a.action = _action and not a.allowed;
    if found then
        can := array(select a.action from action_list(_job) a where a.allowed);
        perform refuse('JQ409', 'INVALID_TRANSITION', format('Job %s: %s is refused, %s.', _job.id, _action, why),
            format('Allowed now: %s.', coalesce(nullif(array_to_string(can, ', '), ''), 'nothing')),
            jsonb_build_object('id', _job.id, 'status', _job.status, 'action', _action, 'allowed', to_jsonb(can), 'reason', why));
    end if;
end
$$;

-- change_job: write a change of status by hand of a person; the one place where waiting jobs leave or enter the line.
create or replace function jobqueue.change_job(_job jobqueue.job, _action text, _to text, _reason text)
returns text
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    waits boolean := _to = 'pending' and _action <> 'retry' and _job.run_at > now();
    ended boolean := _to in ('cancelled', 'skipped');
    now_version bigint;
begin
    if _job.options ? 'hold' and _job.held_key is null and _to = 'pending' then
        perform take_key_again(_job.id, _to);
    end if;
    update job j
    set status = _to,
        version = j.version + 1,
        ready_seq = case when _to = 'pending' and not waits then next_ready() end,
        wait_until = case when waits then j.run_at end,
        inbox_seq = null,
        park_seq = null,
        -- an end is one; taken up again the job runs however late
        expires_at = case when not ended then j.expires_at end,
        run_at = case when _to = 'pending' and not waits then now() else j.run_at end,
        held_key = case when j.hold_mask & status_bit(_to) <> 0 then coalesce(j.held_key, hold_key_again(j, _to)) end,
        claim_token = null,
        lease_until = null,
        handler_started = null,
        requested_action = null,
        completed_at = case when ended then now() end,
        failed_at = null,
        updated_at = now(),
        status_reason = btrim(_reason),
        pause_reason = case when _to = 'paused' then btrim(_reason) else j.pause_reason end,
        paused_at = case when _to = 'paused' then now() else j.paused_at end,
        resumed_at = case when _action = 'resume' then now() else j.resumed_at end,
        resume_count = j.resume_count + case when _action = 'resume' then 1 else 0 end,
        estimated_completion = null
    where j.id = _job.id
    returning j.version into now_version;
    -- a key that got a new generation just now has a new holder
    if _job.options ? 'hold' and _to = 'pending' and exists (select from job j
        where j.id = _job.id and j.held_key not in (held_name(j.queue, j.options ->> 'hold'), retry_key(j)))
    then
        perform refuse('JQ409', 'CONFLICT', 'The key of this job changes hands just now.', 'Try again.', jsonb_build_object('id', _job.id));
    end if;
    if _job.settle_flags & 256 <> 0 then
        perform leave_line(_job, _to);
        perform join_line(array[_job.id]);
    end if;
    if _to = 'pending' and not waits then
        perform wake_many(array[_job.queue]);
    end if;
    if ended then
        perform after_end(array[_job.id]);
    end if;
    perform publish_changes(array[_job.id]);
    return _to;
end
$$;

-- ask_worker: request an action of the worker of a running job; it hears of it at once by notification, or with its next heartbeat.
create or replace function jobqueue.ask_worker(_job jobqueue.job, _action text, _reason text)
returns text
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    now_version bigint;
begin
    update job j
    set requested_action = _action, version = j.version + 1, updated_at = now(), status_reason = btrim(_reason),
        pause_reason = case when _action = 'pause' then btrim(_reason) else j.pause_reason end
    where j.id = _job.id
    returning j.version into now_version;
    perform note_action(_action, _job.id, _job.tenant, null, _job.status, null, _reason);
    perform publish_order(_job.id, now_version);
    return _job.status;
end
$$;

-- cancel: stop a job for good (resume takes it up again).
--   A running job is asked: it stays processing with requested_action = 'cancel' until its worker stops it; a completion that comes
--   first wins. force: at once; the worker's claim becomes stale.
-- Returns the job's status. Errors: JQ400 blank reason, JQ404, JQ409 INVALID_TRANSITION with what is allowed.
create or replace function jobqueue.cancel(id uuid, reason text, force boolean default false)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job;
begin
    perform check_reason(cancel.reason);
    j := lock_job(cancel.id);
    if j.status = 'cancelled' or (j.requested_action = 'cancel' and not coalesce(cancel.force, false)) then
        return j.status;
    end if;
    perform check_action(j, 'cancel');
    if j.status = 'processing' and not coalesce(cancel.force, false) then
        return ask_worker(j, 'cancel', cancel.reason);
    end if;
    if j.status = 'processing' then
        insert into attempt (job_id, attempt, tenant, claim_token, worker_id, started_at, outcome)
        values (j.id, j.attempt, j.tenant, j.claim_token, j.worker_id, j.started_at, 'cancelled');
        update stage s set status = 'pending' where s.job_id = j.id and s.status = 'in_progress';
        perform publish_order(j.id, j.version + 1);
    end if;
    perform change_job(j, 'cancel', 'cancelled', cancel.reason);
    perform note_action('cancel', j.id, j.tenant, null, j.status, 'cancelled', cancel.reason,
        case when cancel.force then '{"force": true}'::jsonb end);
    return 'cancelled';
end
$$;

-- pause: hold a waiting job, or ask a running one to stop at its next pause-safe checkpoint (refused unless it is pausable).
-- Returns the job's status. Errors: JQ400, JQ404, JQ409.
create or replace function jobqueue.pause(id uuid, reason text)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job;
begin
    perform check_reason(pause.reason);
    j := lock_job(pause.id);
    if j.status = 'paused' or j.requested_action = 'pause' then
        return j.status;
    end if;
    perform check_action(j, 'pause');
    if j.status = 'processing' then
        return ask_worker(j, 'pause', pause.reason);
    end if;
    perform change_job(j, 'pause', 'paused', pause.reason);
    perform note_action('pause', j.id, j.tenant, null, j.status, 'paused', pause.reason);
    return 'paused';
end
$$;

-- resume: take up a paused or cancelled job again; it keeps its checkpoint and what is done. Returns the job's status.
-- A job that waits or is blocked is where resume leads: nothing changes. Errors: JQ400, JQ404, JQ409.
create or replace function jobqueue.resume(id uuid, reason text)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job;
    to_status text;
begin
    perform check_reason(resume.reason);
    j := lock_job(resume.id);
    if j.status in ('pending', 'blocked') then
        return j.status;
    end if;
    perform check_action(j, 'resume');
    to_status := case when j.unfinished_parents > 0 then 'blocked' else 'pending' end;
    perform change_job(j, 'resume', to_status, resume.reason);
    perform note_action('resume', j.id, j.tenant, null, j.status, to_status, resume.reason);
    return to_status;
end
$$;

-- retry: run a failed job again, at once, with as many retries as it was sent with. Keeps partial progress; from_start drops the
-- checkpoint, the done keys and the outputs of stages ("restart"). Returns the job's status. Errors: JQ400, JQ404, JQ409.
create or replace function jobqueue.retry(id uuid, reason text, from_start boolean default false)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    j jobqueue.job;
    action text := case when coalesce(retry.from_start, false) then 'restart' else 'retry' end;
    to_status text;
begin
    perform check_reason(retry.reason);
    j := lock_job(retry.id);
    if j.status in ('pending', 'blocked') and j.retry_count > 0
        and (action = 'retry' or j.checkpoint_id is null and j.progress_pct = 0
            and not exists (select from done_key d where d.job_id = j.id))
    then
        return j.status;
    end if;
    perform check_action(j, action);
    to_status := case when j.unfinished_parents > 0 then 'blocked' else 'pending' end;
    if action = 'restart' then
        perform forget_progress(j.id);
    end if;
    update job x
    set retry_count = x.retry_count + 1,
        max_retries = x.retry_count + 1 + coalesce(x.retry_budget, (select q.max_retries from queue q where q.name = x.queue)),
        lost_count = 0,
        suspect = false,
        checkpoint_id = case when action = 'restart' then null else x.checkpoint_id end,
        progress_pct = case when action = 'restart' then 0 else x.progress_pct end,
        progress_done = case when action = 'restart' then null else x.progress_done end,
        progress_message = case when action = 'restart' then null else x.progress_message end,
        current_stage = case when action = 'restart' then null else x.current_stage end,
        substage = case when action = 'restart' then null else x.substage end,
        completed_stages = case when action = 'restart' and x.total_stages is not null then 0 else x.completed_stages end
    where x.id = j.id;
    perform change_job(j, 'retry', to_status, retry.reason);
    perform note_action(action, j.id, j.tenant, null, j.status, to_status, retry.reason);
    perform drop_dead_letters(j.id, 'its original was retried');
    return to_status;
end
$$;

-- skip: go on without a failed job. Returns the job's status. Errors: JQ400, JQ404, JQ409.
create or replace function jobqueue.skip(id uuid, reason text)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    j jobqueue.job;
begin
    perform check_reason(skip.reason);
    j := lock_job(skip.id);
    if j.status = 'skipped' then
        return j.status;
    end if;
    perform check_action(j, 'skip');
    perform change_job(j, 'skip', 'skipped', skip.reason);
    perform note_action('skip', j.id, j.tenant, null, j.status, 'skipped', skip.reason);
    perform drop_dead_letters(j.id, 'its original was skipped');
    return 'skipped';
end
$$;

-- drop_dead_letters: cancel the waiting copies of a job in its dead letter queue.
create or replace function jobqueue.drop_dead_letters(_id uuid, _reason text)
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    copy jobqueue.job;
begin
    for copy in select * from job where dead_letter_of = _id and status in ('pending', 'paused') order by id for update loop
        perform change_job(copy, 'cancel', 'cancelled', _reason);
    end loop;
end
$$;

-- run_now: do not wait for run_at. Returns the job's status. Errors: JQ400, JQ404, JQ409.
create or replace function jobqueue.run_now(id uuid, reason text)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    j jobqueue.job;
begin
    perform check_reason(run_now.reason);
    j := lock_job(run_now.id);
    if j.status = 'pending' and j.wait_until is null then
        return j.status;
    end if;
    perform check_action(j, 'run_now');
    update job x
    set ready_seq = next_ready(), wait_until = null, run_at = now(), updated_at = now(), version = x.version + 1,
        status_reason = btrim(run_now.reason)
    where x.id = j.id;
    perform join_line(array[j.id]);
    perform note_action('run_now', j.id, j.tenant, null, j.status, j.status, run_now.reason);
    perform wake_many(array[j.queue]);
    perform publish_changes(array[j.id]);
    return j.status;
end
$$;

-- prioritize: give a waiting job another priority (higher first). Returns the job's status. Errors: JQ400, JQ404, JQ409.
create or replace function jobqueue.prioritize(id uuid, priority int, reason text)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    j jobqueue.job;
begin
    perform check_reason(prioritize.reason);
    perform to_int(coalesce(to_jsonb(prioritize.priority), '"null"'), 'priority', -2147483646, 2147483647);
    j := lock_job(prioritize.id);
    if j.priority = prioritize.priority and j.status in ('blocked', 'pending') then
        return j.status;
    end if;
    perform check_action(j, 'prioritize');
    update job x
    set priority = prioritize.priority, updated_at = now(), version = x.version + 1,
        -- a new place in the line of its new priority: with its old number it could lie below the floors of busy workers
        ready_seq = case when x.ready_seq is not null then next_ready() end
    where x.id = j.id;
    perform change_rank(j, prioritize.priority);
    perform note_action('prioritize', j.id, j.tenant, null, j.status, j.status, prioritize.reason,
        jsonb_build_object('from', j.priority, 'to', prioritize.priority));
    perform publish_changes(array[j.id]);
    return j.status;
end
$$;

-- delete_job: remove an ended job and what hangs on it. Returns the status that it had. Errors: JQ400, JQ404, JQ409.
create or replace function jobqueue.delete_job(id uuid, reason text)
returns text
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    j jobqueue.job;
begin
    perform check_reason(delete_job.reason);
    j := lock_job(delete_job.id);
    perform check_action(j, 'delete');
    perform publish_changes(array[j.id]);
    delete from job x where x.id = j.id;
    perform note_action('delete', j.id, j.tenant, null, j.status, null, delete_job.reason);
    return j.status;
end
$$;
