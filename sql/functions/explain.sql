-- explain: why a job is not running, or why it ended as it did. Each cause is one row, the weightiest first. Of other tenants' jobs no
-- more than a number is said.

-- ago: a time in the past as people say it: "2030-01-31 12:30:05 UTC (3 min 2 s ago)".
create or replace function jobqueue.ago(_at timestamptz)
returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select format('%s UTC (%s ago)', to_char(_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS'), jobqueue.for_people(now() - _at))
$$;

-- for_people: a duration as people say it: the two largest units, never negative.
create or replace function jobqueue.for_people(_duration interval)
returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select case
        when s < 60 then format('%s s', s)
        when s < 3600 then format('%s min %s s', s / 60, s % 60)
        when s < 86400 then format('%s h %s min', s / 3600, s % 3600 / 60)
        else format('%s d %s h', s / 86400, s % 86400 / 3600) end
    from (select greatest(0, ceil(extract(epoch from _duration)))::bigint as s) x
$$;

-- actor_of: who did something with a job last, from the audit: "anna (login support)", or "anna" if both are the same.
create or replace function jobqueue.actor_of(_job uuid, _actions text[])
returns text
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select case when coalesce(a.actor, a.session_user_name) = a.session_user_name then a.session_user_name
        else format('%s (login %s)', a.actor, a.session_user_name) end
    from audit a
    where a.job_id = _job and a.action = any (_actions)
    order by a.id desc
    limit 1
$$;

-- explain: why a job is not running / why it ended so.
-- Returns ordered rows (reason, detail, what_to_do); the first row is the answer, the others add to it. reason is one word for programs:
--   waiting: queue_paused, job_type_paused, tenant_paused, waits_until, waits_for_retry, no_worker, no_handler, workers_busy, workers_stuck, jobs_ahead,
--     ready, expires; blocked, parent_failed, parent_cancelled, waits_for, paused; running: processing, not_alive, cancel_requested, pause_requested
--   ended: completed, failed, cancelled, skipped; besides: dead_letter, dead_letter_of, key_taken
-- Errors: JQ404. Index: job_pkey, job_claim, audit_of_job, job_dead_letter.
create or replace function jobqueue.explain(id uuid)
returns table (reason text, detail text, what_to_do text)
language plpgsql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    j jobqueue.job;
begin
    select * into j from job x where x.id = explain.id;
    if not found or not sees_tenant(j.tenant) then
        perform refuse_job(explain.id);
    end if;
    if j.status in ('pending', 'processing') then
        return query select * from explain_pauses(j);
    end if;
    if j.status = 'pending' then
        return query select * from explain_waiting(j);
    elsif j.status = 'processing' then
        return query select * from explain_running(j);
    elsif j.status in ('blocked', 'paused') then
        return query select * from explain_held(j);
    else
        return query select * from explain_end(j);
    end if;
    return query select * from explain_relations(j);
end
$$;

-- explain_pauses: what holds back all jobs like this one. A job that runs is not touched by it.
create or replace function jobqueue.explain_pauses(_job jobqueue.job)
returns table (reason text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select p.reason, format('The %s is paused since %s by %s: %s.', p.what, ago(p.paused_at), p.paused_by, rtrim(p.pause_reason, '.')),
        case when _job.status = 'processing' then 'Nothing: it runs to its end; only its retries wait.' else p.what_to_do end
    from (
        select 1 as place, 'queue_paused' as reason, format('queue "%s"', q.name) as what, q.paused_at, q.paused_by, q.pause_reason,
            format('select jobqueue.resume_queue(%L, ''reason'')', q.name) as what_to_do
        from queue q where q.name = _job.queue
        union all
        select 2, 'job_type_paused', format('job_type "%s"', t.name), t.paused_at, t.paused_by, t.pause_reason,
            format('select jobqueue.resume_job_type(%L, ''reason'')', t.name)
        from job_type t where t.name = _job.job_type
        union all
        select 3, 'tenant_paused', format('tenant "%s"', t.tenant), t.paused_at, t.paused_by, t.pause_reason,
            format('select jobqueue.resume_tenant(%L, ''reason'')', t.tenant)
        from tenant_pause t where t.tenant = _job.tenant) p
    where p.paused_at is not null
    order by p.place
$$;

-- explain_held: a job that somebody paused, or that waits for others.
create or replace function jobqueue.explain_held(_job jobqueue.job)
returns table (reason text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select 'paused', format('It is paused since %s by %s: %s.', ago(_job.paused_at),
            coalesce(actor_of(_job.id, array['pause']), 'its handler'),
            rtrim(coalesce(_job.pause_reason, _job.status_reason, 'no reason was given'), '.')),
        format('select jobqueue.resume(%L, ''reason''); it goes on %s.', _job.id,
            coalesce((select format('after its checkpoint "%s"', c.stage) from checkpoint c where c.id = _job.checkpoint_id), 'from its start'))
    where _job.status = 'paused'
    union all
    select * from explain_parents(_job, true)
    union all
    select 'blocked', format('It waits until %s other %s ended.', _job.unfinished_parents,
            case when _job.unfinished_parents = 1 then 'job has' else 'jobs have' end),
        'See to those; it becomes pending by itself.'
    where _job.status = 'blocked'
    union all
    select * from explain_parents(_job, false)
$$;

-- explain_parents: the jobs that a blocked job waits for, at most ten: those that ended badly, which somebody has to see to, or the others.
create or replace function jobqueue.explain_parents(_job jobqueue.job, _ended boolean)
returns table (reason text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_hashjoin = off set jit = off
as $$
    select case when _ended then 'parent_' || p.status else 'waits_for' end,
        format('It waits for job %s (%s"%s"), which %s.', p.id, coalesce(format('"%s" of its flow, in ', m.ref), 'in '), p.queue,
            case p.status
                when 'failed' then format('ended as failed: %s, %s', p.error_code, rtrim(left(p.error_message, 300), '.'))
                when 'cancelled' then 'was cancelled: ' || rtrim(coalesce(p.status_reason, 'no reason was given'), '.')
                else 'is ' || p.status end),
        case p.status
            when 'failed' then format('select jobqueue.retry(%L, ''reason''), or jobqueue.skip(%L, ''reason'') to go on without it.', p.id, p.id)
            when 'cancelled' then format('select jobqueue.resume(%L, ''reason''), or cancel this job too.', p.id)
            else format('select * from jobqueue.explain(%L)', p.id) end
    from edge e
    join job p on p.id = e.parent_id
    left join flow_member m on m.job_id = p.id
    where _job.status = 'blocked' and e.child_id = _job.id and is_waited_for(p.status, e.on_failure) and not e.passed
        and (p.status in ('failed', 'cancelled')) = _ended
    order by p.id
    limit 10
$$;

-- explain_waiting: a pending job: its time, its workers, its place in the line.
create or replace function jobqueue.explain_waiting(_job jobqueue.job)
returns table (reason text, detail text, what_to_do text)
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    ahead int;
    budget int := coalesce(_job.max_retries, (select q.max_retries from queue q where q.name = _job.queue));
begin
    if _job.wait_until is not null then
        reason := case when _job.error_class is not null and _job.retry_count > 0 then 'waits_for_retry' else 'waits_until' end;
        detail := case when _job.wait_until <= now() then format('Its time came at %s; it takes its place in the line as soon as a worker '
                'looks after waiting jobs.', ago(_job.wait_until))
            else format('It starts at %s UTC, in %s%s.', to_char(_job.wait_until at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS'),
                for_people(_job.wait_until - now()),
                case when reason = 'waits_for_retry' then format(': retry %s of %s, after %s (%s)', _job.retry_count, budget,
                    _job.error_code, rtrim(left(_job.error_message, 300), '.')) else '' end) end;
        what_to_do := format('select jobqueue.run_now(%L, ''reason'')', _job.id);
        return next;
    end if;
    return query select * from explain_limits(_job);
    return query select * from explain_workers(_job);
    if _job.ready_seq is not null and coalesce(_job.expires_at > now(), true) then
        ahead := jobs_ahead(_job);
        reason := case when ahead > 0 then 'jobs_ahead' else 'ready' end;
        detail := case when ahead = 0 then format('It is the first in the line of "%s", ready since %s.', _job.queue, ago(_job.updated_at))
            else format('%s ready %s in "%s" with a higher priority or an earlier place.',
                case when ahead = 10000 then '10,000 or more' else ahead::text end,
                case when ahead = 1 then 'job stands before it' else 'jobs stand before it' end, _job.queue) end;
        what_to_do := case when ahead = 0 then 'Wait for a free worker.'
            else format('Wait, run more workers, or select jobqueue.prioritize(%L, 100, ''reason'')', _job.id) end;
        return next;
    end if;
    if _job.expires_at is not null then
        reason := 'expires';
        detail := format(case when _job.expires_at > now() then 'If it has not started by %s UTC it ends as failed, EXPIRED.'
                else 'It has not started by %s UTC: no worker takes it any more, maintenance ends it as failed, EXPIRED.' end,
            to_char(_job.expires_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS'));
        what_to_do := 'Nothing, if that is meant.';
        return next;
    end if;
end
$$;

-- jobs_ahead: how many jobs of its queue, of all tenants, are claimed before a ready job; counted up to 10,000. Read backwards from the
-- job, so that the dead entries at the front of the line are met last. Index: job_claim.
create or replace function jobqueue.jobs_ahead(_job jobqueue.job)
returns int
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
    select count(*)::int
    from (
        select from job x
        where x.queue = _job.queue and x.ready_seq is not null and (-x.priority, x.ready_seq) < (-_job.priority, _job.ready_seq)
        order by (-x.priority) desc, x.ready_seq desc
        limit 10000) ahead
$$;

-- explain_workers: whether anybody could take the job: a live worker that serves its queue, has a handler for it, and room.
-- A worker is live if it has not stopped, was not asked to, and was heard of within 30 s.
create or replace function jobqueue.explain_workers(_job jobqueue.job)
returns table (reason text, detail text, what_to_do text)
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    serving int;
    able int;
    free int;
    lost int;
    slots int;
    kept int;
begin
    select count(*) filter (where w.alive), count(*) filter (where w.alive and w.knows),
        count(*) filter (where w.alive and w.knows and (w.concurrency is null or w.running + w.stuck < w.concurrency)),
        count(*) filter (where not w.alive), sum(w.concurrency) filter (where w.alive and w.knows),
        sum(least(w.stuck, w.concurrency)) filter (where w.alive and w.knows)
    into serving, able, free, lost, slots, kept
    from (
        select x.concurrency, x.running, coalesce((x.stuck ->> 'slots')::int, 0) as stuck, x.job_types is null or _job.job_type = any (x.job_types) as knows,
            x.heartbeat_at > now() - interval '30 s' and x.drain_requested_at is null as alive
        from worker x
        where x.stopped_at is null and (x.queues is null or _job.queue = any (x.queues))) w;
    if serving = 0 then
        reason := 'no_worker';
        detail := format('No live worker serves the queue "%s"%s.', _job.queue,
            case when lost > 0 then format(' (%s lost or draining)', lost) else '' end);
        what_to_do := format('Start one: jobqueue worker your.app --queues %s', _job.queue);
        return next;
    elsif able = 0 then
        reason := 'no_handler';
        detail := format('None of the %s live workers of the queue "%s" has a handler for the job_type "%s".', serving, _job.queue, _job.job_type);
        what_to_do := 'Start a worker of a version that has it; the job stays pending until then.';
        return next;
    elsif free = 0 and kept = slots then
        reason := 'workers_stuck';
        detail := format('All %s slots of the live workers that could run it are kept by handlers that go on after their attempts have ended.', slots);
        what_to_do := 'Restart these workers, or run another one; jobqueue.health() names the jobs.';
        return next;
    elsif free = 0 then
        reason := 'workers_busy';
        detail := format('All %s live workers that could run it have as many jobs as they may%s.', able,
            case when kept > 0 then format('; %s of their %s slots are kept by handlers that go on after their attempts have ended', kept, slots)
                else '' end);
        what_to_do := 'Wait, run more workers, or raise their concurrency.';
        return next;
    end if;
end
$$;

-- explain_running: a job in the hands of a worker, and what was asked of it.
create or replace function jobqueue.explain_running(_job jobqueue.job)
returns table (reason text, detail text, what_to_do text)
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    w jobqueue.worker;
    beat timestamptz := coalesce(_job.heartbeat_at, _job.started_at);
    who text;
begin
    select * into w from worker x where x.id = _job.worker_id;
    if _job.requested_action is not null then
        reason := _job.requested_action || '_requested';
        detail := format('%s asked to %s it: %s. Its worker has not acknowledged yet.',
            coalesce(actor_of(_job.id, array[_job.requested_action]), 'Somebody'), _job.requested_action,
            rtrim(coalesce(_job.status_reason, 'no reason was given'), '.'));
        what_to_do := case _job.requested_action
            when 'cancel' then format('Wait for the handler to stop, or select jobqueue.cancel(%L, ''reason'', force => true)', _job.id)
            else 'Wait for its next pause-safe checkpoint.' end;
        return next;
    end if;
    if beat <= now() - interval '10 s' then
        reason := 'not_alive';
        detail := format('Its worker was last heard of %s; its lease %s.', ago(beat),
            case when _job.lease_until > now() then format('lasts %s more', for_people(_job.lease_until - now()))
                else format('has run out since %s', ago(_job.lease_until)) end);
        what_to_do := 'Nothing: when the lease has run out any live worker rescues it.';
        return next;
    end if;
    -- machines are nobody's business who may see single tenants only
    if visible_tenants() is null or sees_all_tenants() then
        who := format(' (%s)', coalesce(nullif(concat_ws(', ', w.name, w.hostname, 'pid ' || w.pid), ''), 'unnamed'));
    end if;
    reason := 'processing';
    detail := format('Attempt %s %s since %s at worker %s%s%s; lease until %s UTC.', _job.attempt,
        case when coalesce(_job.handler_started, true) then 'runs' else 'is in the worker''s hands, not started,' end,
        ago(_job.started_at), _job.worker_id, who,
        concat(', ' || _job.current_stage, ', ' || _job.progress_pct || ' %', ', ' || _job.progress_message),
        to_char(_job.lease_until at time zone 'UTC', 'HH24:MI:SS'));
    what_to_do := format('Wait, or select jobqueue.cancel(%L, ''reason'')', _job.id);
    return next;
end
$$;

-- explain_end: why a job ended as it did.
create or replace function jobqueue.explain_end(_job jobqueue.job)
returns table (reason text, detail text, what_to_do text)
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    budget int := coalesce(_job.max_retries, (select q.max_retries from queue q where q.name = _job.queue));
    who text := actor_of(_job.id, array['cancel', 'skip', 'bulk']);
    why text := rtrim(coalesce(_job.status_reason, 'no reason was given'), '.');
begin
    reason := _job.status;
    case _job.status
        when 'completed' then
            detail := format('It completed at %s, in attempt %s.', ago(_job.completed_at), _job.attempt);
            what_to_do := 'Nothing.';
        when 'skipped' then
            detail := format('%s skipped it at %s: %s.', coalesce(who, 'Somebody'), ago(_job.completed_at), why);
            what_to_do := 'Nothing: skipped is final. Send a new job if the work is needed after all.';
        when 'cancelled' then
            detail := format('%s at %s: %s.', coalesce('Cancelled by ' || who, 'Cancelled'), ago(_job.completed_at), why);
            what_to_do := format('select jobqueue.resume(%L, ''reason'') takes it up again.', _job.id);
        else
            if _job.error_code = 'EXPIRED' then
                detail := format('It expired at %s: no worker took it in time.', ago(_job.failed_at));
            elsif _job.error_code = 'PARENT_FAILED' then
                detail := _job.error_message;
            else
                detail := format('%s, %s: %s. %s, %s of %s retries spent%s.', _job.error_class, _job.error_code,
                    rtrim(_job.error_message, '.'), _job.attempt || case _job.attempt when 1 then ' attempt' else ' attempts' end, _job.retry_count, budget,
                    case when _job.error_class = 'lost' and _job.lost_count >= 2 then '; three workers in a row were lost'
                        when _job.retry_count < budget then format('; errors of class %s are not retried', _job.error_class)
                        else '' end);
            end if;
            what_to_do := format('select jobqueue.retry(%L, ''reason''), or skip it; its attempts: select * from jobqueue.attempts '
                'where job_id = %L', _job.id, _job.id);
    end case;
    return next;
end
$$;

-- explain_relations: dead letters, and who holds the key that the job would need to come back.
create or replace function jobqueue.explain_relations(_job jobqueue.job)
returns table (reason text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    (select 'dead_letter', format('Its copy %s in the dead letter queue "%s" is %s.', c.id, c.queue, c.status),
        case when c.status in ('pending', 'paused') then format('select * from jobqueue.redrive(%L) sends it back.', c.queue)
            else 'Nothing.' end
    from job c
    where c.dead_letter_of = _job.id
    order by c.created_at desc
    limit 5)
    union all
    select 'dead_letter_of', format('It is the dead letter of job %s%s.', _job.dead_letter_of,
            coalesce((select format(' (%s, in "%s": %s)', o.status, o.queue, o.error_message) from job o where o.id = _job.dead_letter_of),
                ', which is gone')),
        format('select * from jobqueue.redrive(%L) sends it back.', _job.queue)
    where _job.dead_letter_of is not null
    union all
    select 'key_taken', format('Its key is held by %s, which is %s; until that has ended it cannot come back.',
            case when sees_tenant(h.tenant) then format('job %s', h.id) else 'a job of another tenant' end, h.status),
        'Wait for that job, or cancel it.'
    from job h
    where _job.status in ('failed', 'cancelled') and h.queue = _job.queue and h.held_key = held_name(_job.queue, _job.options ->> 'hold') and h.id <> _job.id
$$;
