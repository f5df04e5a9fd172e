-- Pauses of a queue, of a job_type and of a tenant: nothing of it is claimed; what runs goes on. A pause that is there already and a
-- resume of what is not paused change nothing and are not audited.

-- who_acts: who is named as the one who paused: jobqueue.actor as claimed by an application, else the proven session_user.
create or replace function jobqueue.who_acts()
returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(nullif(current_setting('jobqueue.actor', true), ''), session_user)
$$;

-- pause_queue: claim nothing of a queue until it is resumed. Errors: JQ400 blank reason, JQ403, JQ404.
create or replace function jobqueue.pause_queue(name text, reason text)
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    q jobqueue.queue;
begin
    perform check_reason(pause_queue.reason);
    perform check_shared('pause a queue');
    q := lock_queue(pause_queue.name);
    if q.paused_at is null then
        update queue x set paused_at = now(), pause_reason = btrim(pause_queue.reason), paused_by = who_acts() where x.name = q.name;
        perform note_action('pause_queue', null, null, q.name, null, null, pause_queue.reason);
    end if;
end
$$;

-- resume_queue: claim again. Errors: JQ400 blank reason, JQ403, JQ404.
create or replace function jobqueue.resume_queue(name text, reason text)
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    q jobqueue.queue;
begin
    perform check_reason(resume_queue.reason);
    perform check_shared('resume a queue');
    q := lock_queue(resume_queue.name);
    if q.paused_at is not null then
        update queue x set paused_at = null, pause_reason = null, paused_by = null where x.name = q.name;
        perform note_action('resume_queue', null, null, q.name, null, null, resume_queue.reason);
        perform wake(q.name, q.number);
    end if;
end
$$;

-- lock_job_type: a registered job_type, locked; JQ404 if there is none.
create or replace function jobqueue.lock_job_type(_name text)
returns jobqueue.job_type
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    t jobqueue.job_type;
begin
    select * into t from job_type x where x.name = _name for update;
    if not found then
        perform refuse('JQ404', 'JOB_TYPE_NOT_FOUND', format('There is no job_type "%s".', left(_name, 200)),
            'Workers register theirs when they start: select name from jobqueue.job_type.',
            jsonb_build_object('job_type', left(_name, 200)));
    end if;
    return t;
end
$$;

-- pause_job_type: claim no job of a type until it is resumed. A type that no worker has registered yet can be paused, if jobs of that
-- name are to wait for it. Errors: JQ400 blank reason or no name, JQ403.
create or replace function jobqueue.pause_job_type(name text, reason text)
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    kind text := to_text(coalesce(to_jsonb(pause_job_type.name), '""'), 'name', 200);
begin
    perform check_reason(pause_job_type.reason);
    perform check_shared('pause a job_type');
    insert into job_type as t (name) values (kind) on conflict (name) do nothing;
    update job_type t
    set paused_at = now(), pause_reason = btrim(pause_job_type.reason), paused_by = who_acts()
    where t.name = kind and t.paused_at is null;
    if found then
        perform take_back_ready(null, kind);
        perform note_action('pause_job_type', null, null, kind, null, null, pause_job_type.reason);
    end if;
end
$$;

-- resume_job_type: claim jobs of that type again. Errors: JQ400 blank reason, JQ403, JQ404.
create or replace function jobqueue.resume_job_type(name text, reason text)
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    t jobqueue.job_type;
begin
    perform check_reason(resume_job_type.reason);
    perform check_shared('resume a job_type');
    t := lock_job_type(resume_job_type.name);
    if t.paused_at is not null then
        update job_type x set paused_at = null, pause_reason = null, paused_by = null where x.name = t.name;
        perform note_action('resume_job_type', null, null, t.name, null, null, resume_job_type.reason);
        perform look_again();
        -- its jobs may wait in any queue
        perform wake_many(array(select q.name from queue q));
    end if;
end
$$;

-- pause_tenant: claim no job of a tenant until it is resumed. Errors: JQ400 blank reason or no name, JQ403.
create or replace function jobqueue.pause_tenant(name text, reason text)
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
declare
    whose text := to_text(coalesce(to_jsonb(pause_tenant.name), '""'), 'name', 200);
begin
    perform check_reason(pause_tenant.reason);
    perform check_tenant(whose);
    insert into tenant_pause (tenant, pause_reason, paused_by)
    values (whose, btrim(pause_tenant.reason), who_acts())
    on conflict (tenant) do nothing;
    if found then
        perform take_back_ready(whose, null);
        perform note_action('pause_tenant', null, whose, whose, null, null, pause_tenant.reason);
    end if;
end
$$;

-- resume_tenant: claim jobs of that tenant again. Errors: JQ400 blank reason, JQ403.
create or replace function jobqueue.resume_tenant(name text, reason text)
returns void
language plpgsql security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
#variable_conflict use_column
begin
    perform check_reason(resume_tenant.reason);
    perform check_tenant(resume_tenant.name);
    delete from tenant_pause p where p.tenant = resume_tenant.name;
    if found then
        perform note_action('resume_tenant', null, resume_tenant.name, resume_tenant.name, null, null, resume_tenant.reason);
        perform look_again();
        perform wake_many(array(select q.name from queue q));
    end if;
end
$$;
