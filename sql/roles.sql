-- Who may do what. Roles belong to the whole cluster: another database may have made them, or be making them just now.
do $$
declare
    role text;
begin
    foreach role in array array['jobqueue_producer', 'jobqueue_worker', 'jobqueue_api', 'jobqueue_support_readonly', 'jobqueue_support'] loop
        if not exists (select from pg_catalog.pg_roles where rolname = role) then
            begin
                execute format('create role %I nologin', role);
            exception when duplicate_object or unique_violation then
                null;
            end;
        end if;
    end loop;
    if not pg_catalog.pg_has_role('jobqueue_support', 'jobqueue_support_readonly', 'member') then
        begin
            grant jobqueue_support_readonly to jobqueue_support;
        exception when unique_violation then
            null;
        end;
    end if;
end
$$;

-- New functions can be executed by everybody unless that is taken away each time.
revoke all on all functions in schema jobqueue from public;
revoke all on all tables in schema jobqueue from public, jobqueue_producer, jobqueue_worker, jobqueue_api, jobqueue_support_readonly, jobqueue_support;
revoke all on all functions in schema jobqueue from jobqueue_producer, jobqueue_worker, jobqueue_api, jobqueue_support_readonly, jobqueue_support;
-- every program compares the version of the schema with its own when it starts
do $$
begin
    if to_regclass('jobqueue.schema_migration') is not null then
        grant select (version) on jobqueue.schema_migration
            to jobqueue_producer, jobqueue_worker, jobqueue_api, jobqueue_support_readonly;
    end if;
end
$$;
grant usage on schema jobqueue to jobqueue_producer, jobqueue_worker, jobqueue_api, jobqueue_support_readonly, jobqueue_support;

-- sees what the policies below let through
grant select on jobqueue.jobs, jobqueue.attempts, jobqueue.stages, jobqueue.checkpoints, jobqueue.actions_taken, jobqueue.workers,
    jobqueue.queues, jobqueue.job, jobqueue.attempt, jobqueue.stage, jobqueue.checkpoint, jobqueue.done_key, jobqueue.audit,
    jobqueue.worker, jobqueue.queue, jobqueue.job_type, jobqueue.tenant_pause, jobqueue.schedules, jobqueue.schedule
    to jobqueue_api, jobqueue_support_readonly;
grant execute on function jobqueue.sees_tenant(text), jobqueue.is_only_api(name), jobqueue.visible_tenants(), jobqueue.sees_all_tenants()
    to jobqueue_api, jobqueue_support_readonly, jobqueue_producer, jobqueue_worker;

grant execute on function
    jobqueue.send(text, jsonb, jsonb), jobqueue.send_many(text, jsonb)
    to jobqueue_producer, jobqueue_worker, jobqueue_api;

grant execute on function
    jobqueue.claim(text[], uuid, int, jsonb),
    jobqueue.claim_queue(text, uuid, int[], bigint[], int[], bigint[], int, int, int, text[]),
    jobqueue.claim_ranges(uuid, text[], int[], bigint[], int[], int, int, int, text[]),
    jobqueue.snapshot_bounds(), jobqueue.next_due(text[]), jobqueue.promote(int, timestamptz),
    jobqueue.complete(uuid, uuid, jsonb, jsonb), jobqueue.complete_many(jsonb),
    jobqueue.settle(uuid, uuid[], uuid[], jsonb[], jsonb[], bigint[]),
    jobqueue.fail(uuid, uuid, jsonb, interval), jobqueue.fail_many(jsonb),
    jobqueue.snooze(uuid, uuid, interval), jobqueue.release(uuid, uuid), jobqueue.release_many(uuid[], uuid[]),
    jobqueue.acknowledge(uuid, uuid), jobqueue.cancel_own(uuid, uuid, text), jobqueue.last_checkpoint(uuid, uuid), jobqueue.stage_output(uuid, uuid, text),
    jobqueue.heartbeat(uuid, jsonb),
    jobqueue.progress(uuid, uuid, int, text, jsonb), jobqueue.stage(uuid, uuid, text, text, jsonb),
    jobqueue.checkpoint(uuid, uuid, text, jsonb, text, text, boolean), jobqueue.mark_done(uuid, uuid, text[]), jobqueue.done_keys(uuid),
    jobqueue.register_worker(uuid, jsonb), jobqueue.stop_worker(uuid), jobqueue.note_stuck(uuid, int, jsonb), jobqueue.queue_names(), jobqueue.register_job_types(jsonb),
    jobqueue.maintain(uuid, text[]), jobqueue.maintenance_is_due()
    to jobqueue_worker;

grant execute on function
    jobqueue.cancel(uuid, text, boolean), jobqueue.pause(uuid, text), jobqueue.resume(uuid, text), jobqueue.retry(uuid, text, boolean),
    jobqueue.skip(uuid, text), jobqueue.run_now(uuid, text), jobqueue.prioritize(uuid, int, text), jobqueue.delete_job(uuid, text)
    to jobqueue_api, jobqueue_support;
grant execute on function jobqueue.drain_worker(uuid, text) to jobqueue_api, jobqueue_support;

grant execute on function
    jobqueue.allowed_actions(uuid), jobqueue.actions(uuid), jobqueue.done_keys(uuid), jobqueue.watch(text, interval)
    to jobqueue_api, jobqueue_support_readonly, jobqueue_worker;

grant execute on function
    jobqueue.schedule(text, text, text, jsonb, jsonb), jobqueue.unschedule(text),
    jobqueue.preview_schedule(text, text, int, timestamptz)
    to jobqueue_producer, jobqueue_worker, jobqueue_support;
grant execute on function jobqueue.pause_schedule(text, text), jobqueue.resume_schedule(text, text) to jobqueue_api, jobqueue_support;
grant execute on function jobqueue.run_schedules(int), jobqueue.next_tick() to jobqueue_worker;

-- HTTP API: the functions of functions/http.sql. Login users of the API are granted jobqueue_api and take it in every transaction.
grant execute on function
    jobqueue.http_context(text, text, boolean), jobqueue.http_queue_position(uuid),
    jobqueue.http_job_body(uuid, text[], text[], boolean), jobqueue.http_with(text, text, json), jobqueue.http_more(uuid, boolean),
    jobqueue.http_job_state(uuid, text[], text[], text[], boolean),
    jobqueue.http_job(text, text, uuid, text[], text[], text[], boolean),
    jobqueue.http_read(text, text[], uuid[], text[], text[], text[], boolean),
    jobqueue.http_send_one(jsonb, jsonb, boolean), jobqueue.http_send_all(jsonb, jsonb, boolean),
    jobqueue.http_take_key(text, text, text), jobqueue.http_keep_key(text, text, uuid[]),
    jobqueue.http_send(text, text, jsonb, jsonb, boolean, text, text, text),
    jobqueue.http_watch(text, text[], interval), jobqueue.http_versions(text, uuid[])
    to jobqueue_api;
grant select on jobqueue.bulk_operation to jobqueue_api, jobqueue_support_readonly;
-- functions/http_lists.sql, http_pages.sql, http_history.sql, http_actions.sql, http_streams.sql, http_lookup.sql
grant execute on function
    jobqueue.http_some(uuid, text[], text[]), jobqueue.http_fields(), jobqueue.http_attempts(uuid, boolean),
    jobqueue.http_names(jsonb, text), jobqueue.http_conditions(jsonb), jobqueue.http_candidates(jsonb), jobqueue.http_tenants(jsonb),
    jobqueue.look_back(), jobqueue.has_own_index(text), jobqueue.http_way(jsonb), jobqueue.http_source(text, text),
    jobqueue.http_found(jsonb, timestamptz, uuid, int, int), jobqueue.http_total(jsonb, int),
    jobqueue.http_jobs(text, text, jsonb, timestamptz, uuid, int, int, text[]),
    jobqueue.http_recent(int), jobqueue.first_id(timestamptz), jobqueue.http_worker_rows(boolean),
    jobqueue.http_active(text, text, text, int, text[]), jobqueue.http_counts(jsonb), jobqueue.http_stats(text, text, jsonb),
    jobqueue.http_history(text, text, uuid, text, boolean), jobqueue.http_audit_row(jobqueue.audit, boolean),
    jobqueue.http_audit(text, text, jsonb, bigint, int, boolean),
    jobqueue.http_actor(text), jobqueue.http_reason(text), jobqueue.http_act(text, text, text, uuid, text, jsonb),
    jobqueue.http_move(uuid, jsonb, text), jobqueue.http_delete(text, text, text, uuid, text),
    jobqueue.http_administer(text, text, text, text, text, text),
    jobqueue.http_bulk_tenant(text), jobqueue.http_bulk(text, text, text, jsonb, text, text, text),
    jobqueue.http_bulk_start(jsonb, uuid[], text), jobqueue.http_bulk_row(uuid), jobqueue.http_bulk_read(text, text, uuid),
    jobqueue.http_snapshots(text, uuid[]), jobqueue.http_signals(text, uuid[]), jobqueue.http_summary(text, text),
    jobqueue.http_seconds(interval), jobqueue.http_queue_rows(text), jobqueue.http_ready(text), jobqueue.http_list(text, text, text),
    jobqueue.http_flow(text, text, uuid), jobqueue.http_batch(text, text, uuid)
    to jobqueue_api;
-- end of HTTP API

-- Administration of queues and support: functions/queues.sql, pauses.sql, explain.sql, redrive.sql, publish.sql, find.sql, help.sql
grant select on jobqueue.subscription to jobqueue_api, jobqueue_support_readonly;
grant execute on function
    jobqueue.create_queue(text, jsonb), jobqueue.publish(text, jsonb, jsonb), jobqueue.subscribe(text, text), jobqueue.unsubscribe(text, text),
    jobqueue.upsert(text, jsonb, jsonb), jobqueue.update_jobs(text, jsonb, jsonb)
    to jobqueue_producer, jobqueue_worker;
grant execute on function
    jobqueue.create_queue(text, jsonb), jobqueue.update_queue(text, jsonb), jobqueue.delete_queue(text),
    jobqueue.subscribe(text, text), jobqueue.unsubscribe(text, text),
    jobqueue.purge_queue(text, text), jobqueue.purge_tenant(text, text), jobqueue.redrive(text, jsonb)
    to jobqueue_support;
grant execute on function
    jobqueue.pause_queue(text, text), jobqueue.resume_queue(text, text), jobqueue.pause_job_type(text, text),
    jobqueue.resume_job_type(text, text), jobqueue.pause_tenant(text, text), jobqueue.resume_tenant(text, text),
    jobqueue.bulk(text, jsonb, text, boolean, int)
    to jobqueue_api, jobqueue_support;
grant execute on function
    jobqueue.explain(uuid), jobqueue.find_jobs(text, jsonb, int, uuid), jobqueue.help(), jobqueue.health(), jobqueue.blocked_keys(text),
    jobqueue.preview_redrive(text, jsonb)
    to jobqueue_api, jobqueue_support_readonly;
-- names the logins of the server
grant execute on function jobqueue.doctor() to jobqueue_support_readonly;
-- end of administration

-- Keys and quotas of the HTTP API: functions/api_keys.sql, quotas.sql. Who could make keys could give himself every right: only the owner.
grant execute on function
    jobqueue.api_keys_state(), jobqueue.find_api_key(text, bytea), jobqueue.take_quota(text, text, int, int),
    jobqueue.give_quota(text[], text[], int[], bigint[]), jobqueue.keep_ticket(bytea, jsonb, text, interval),
    jobqueue.use_ticket(bytea, text), jobqueue.api_key_is_live(text)
    to jobqueue_api;
grant select on jobqueue.api_keys, jobqueue.quota_use to jobqueue_support_readonly;
-- all but the hashes
grant select (id, name, tenants, scopes, subject, act_as, quota_reads, quota_writes, quota_streams, created_at, created_by, expires_at,
    rotated_at, previous_until, revoked_at, revoke_reason, last_used_at) on jobqueue.api_key to jobqueue_support_readonly;
-- end of keys and quotas

-- procrastinate applications: functions/procrastinate.sql, procrastinate_lists.sql
grant execute on function
    jobqueue.procrastinate_defer(jsonb), jobqueue.procrastinate_defer_periodic(text, bigint, jsonb),
    jobqueue.procrastinate_adopt_queue(text, boolean), jobqueue.procrastinate_cancel(uuid, boolean, boolean), jobqueue.procrastinate_job_status(uuid), jobqueue.procrastinate_queues(),
    jobqueue.procrastinate_jobs(uuid, text, text, text, text, text, uuid), jobqueue.procrastinate_counts(text, text, text, text, text)
    to jobqueue_producer, jobqueue_worker;
grant execute on function
    jobqueue.procrastinate_start(uuid, uuid), jobqueue.procrastinate_settle(jsonb), jobqueue.procrastinate_retry(uuid, uuid, jsonb), jobqueue.procrastinate_finish(uuid, jsonb),
    jobqueue.procrastinate_tick(text, text, text, bigint), jobqueue.procrastinate_to_abort(text),
    jobqueue.procrastinate_stalled(double precision, double precision, text, text),
    jobqueue.procrastinate_prune(double precision), jobqueue.procrastinate_delete_old(double precision, text, text[])
    to jobqueue_worker;
-- end of procrastinate applications

-- Tracking: functions/progress.sql, stages.sql, estimates.sql
grant select on jobqueue.estimate to jobqueue_api, jobqueue_support_readonly;
grant execute on function
    jobqueue.estimate_units(uuid, uuid, double precision, text), jobqueue.reject_checkpoint(uuid, uuid, text), jobqueue.set_estimates(jsonb)
    to jobqueue_worker;
grant execute on function jobqueue.estimate(uuid) to jobqueue_api, jobqueue_support_readonly, jobqueue_worker;
-- end of tracking

-- The clock: functions/clock.sql
grant execute on function jobqueue.seconds_until(timestamptz), jobqueue.now_minus(interval)
    to jobqueue_producer, jobqueue_worker, jobqueue_api, jobqueue_support_readonly;
-- end of the clock

-- Statistics: functions/queue_stats.sql, gauges.sql, warnings.sql. Numbers of whole queues, so no tenant is asked for.
grant execute on function jobqueue.queue_stats(text, timestamptz, timestamptz, interval), jobqueue.queue_gauges(text)
    to jobqueue_api, jobqueue_support_readonly, jobqueue_producer, jobqueue_worker;
grant execute on function jobqueue.warnings() to jobqueue_worker, jobqueue_support_readonly;
-- end of statistics

-- Metrics: functions/metrics.sql. Numbers of whole queues, so no tenant is asked for.
grant execute on function jobqueue.metrics() to jobqueue_api, jobqueue_support_readonly;
-- end of metrics

-- Flows and batches: functions/flow.sql, batch.sql
grant select on jobqueue.edge, jobqueue.flow, jobqueue.flow_member, jobqueue.batch to jobqueue_api, jobqueue_support_readonly;
grant execute on function
    jobqueue.send_flow(jsonb), jobqueue.create_batch(jsonb), jobqueue.close_batch(uuid)
    to jobqueue_producer, jobqueue_worker, jobqueue_api;
grant execute on function
    jobqueue.parents(uuid), jobqueue.children(uuid), jobqueue.flow_status(uuid), jobqueue.batch_status(uuid)
    to jobqueue_producer, jobqueue_worker, jobqueue_api, jobqueue_support_readonly;
-- end of flows and batches

-- Pages of the dashboard: functions/http_failures.sql, http_views.sql
grant execute on function
    jobqueue.http_message_shape(text), jobqueue.http_fingerprint(text, text), jobqueue.http_failed(text, text, int),
    jobqueue.http_failures(text, text, jsonb, int, int), jobqueue.http_failure_bulk(text, text, text, jsonb, int),
    jobqueue.http_sparks(), jobqueue.http_queue_workers(), jobqueue.http_overview(text, text), jobqueue.http_running(),
    jobqueue.http_workers(text, text), jobqueue.http_ticks(text, int), jobqueue.http_schedules(text, text),
    jobqueue.http_batch_jobs(text, text, uuid, int), jobqueue.http_tenant_page(text, text, text, int),
    jobqueue.http_system(text, text), jobqueue.http_database(), jobqueue.http_bulks(text, text, uuid, int)
    to jobqueue_api;
-- end of pages of the dashboard

-- The dashboard: functions/ui_sessions.sql, http_unfinished.sql
grant execute on function
    jobqueue.start_ui_session(bytea, text, bytea, interval), jobqueue.find_ui_session(bytea), jobqueue.end_ui_session(bytea),
    jobqueue.unfinished_ids(int), jobqueue.http_unfinished(text, text, jsonb, timestamptz, uuid, int, text[])
    to jobqueue_api;
-- end of the dashboard

-- Telemetry: functions/trace.sql
grant execute on function jobqueue.with_trace_context(jsonb, jsonb) to jobqueue_producer, jobqueue_worker, jobqueue_api;
grant execute on function jobqueue.trace_context(uuid) to jobqueue_api, jobqueue_support_readonly;
-- end of telemetry

-- Rows: jobqueue_api sees the tenants of its transaction, support sees all. Nobody else has a policy, so nobody else sees a row. What is as it
-- should be is left alone: every program would wait for the lock on the table until the end of the migration. `printed` is the condition as
-- PostgreSQL shows it; where it shows another one the policy is made anew.
do $$
declare
    tenants text[] := array['job', 'attempt', 'stage', 'checkpoint', 'done_key', 'audit', 'tenant_pause', 'schedule', 'edge', 'flow',
        'flow_member', 'batch', 'bulk_operation'];
    want record;
begin
    for want in
        select t.name, 'tenant_read' as policy, 'jobqueue_api' as role,
            '(tenant = any ((select jobqueue.visible_tenants())::text[]) or (select jobqueue.sees_all_tenants()))' as condition,
            '((tenant = ANY (( SELECT visible_tenants() AS visible_tenants)::text[])) OR ( SELECT sees_all_tenants() AS sees_all_tenants))' as printed
        from unnest(tenants) t (name)
        union all
        select t.name, 'support_read', 'jobqueue_support_readonly', '(true)', 'true'
        from unnest(tenants || array['api_key', 'quota_use']) t (name)
    loop
        continue when exists (select from pg_catalog.pg_policies p
            where p.schemaname = 'jobqueue' and p.tablename = want.name and p.policyname = want.policy
                and p.permissive = 'PERMISSIVE' and p.cmd = 'SELECT' and p.roles = array[want.role]::name[] and p.qual = want.printed);
        execute format('drop policy if exists %I on jobqueue.%I', want.policy, want.name);
        execute format('create policy %I on jobqueue.%I for select to %I using %s', want.policy, want.name, want.role, want.condition);
    end loop;
    for want in
        select c.relname as name from pg_catalog.pg_class c
        where c.relnamespace = 'jobqueue'::regnamespace and not c.relrowsecurity
            -- the last two: nobody reads them but their functions
            and c.relname = any (tenants || array['api_key', 'quota_use', 'stream_ticket', 'ui_session'])
    loop
        execute format('alter table jobqueue.%I enable row level security', want.name);
    end loop;
end
$$;
