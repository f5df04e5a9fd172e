-- For people at psql: what there is, how it goes, what is wrong.

-- help: the functions of the schema that people call, by task.
create or replace function jobqueue.help()
returns table (task text, call text, what text)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select * from (values
        ('look', 'select * from jobqueue.jobs where status = ''failed'' order by created_at desc limit 20', 'jobs, one row each'),
        ('look', 'select * from jobqueue.explain(id)', 'why a job is not running, or why it ended as it did'),
        ('look', 'select * from jobqueue.actions(id)', 'what can be done with a job now, and why not the rest'),
        ('look', 'select * from jobqueue.attempts where job_id = id', 'its attempts and their errors'),
        ('look', 'select * from jobqueue.actions_taken order by id desc limit 20', 'who did what, when and why'),
        ('look', 'select * from jobqueue.workers', 'the processes that run jobs'),
        ('look', 'select * from jobqueue.parents(id), jobqueue.children(id), jobqueue.flow_status(id)', 'jobs that wait for each other'),
        ('look', 'select * from jobqueue.batch_status(id)', 'how far a batch is'),
        ('look', 'select * from jobqueue.find_jobs(queue, filter, max_jobs, after)', 'the jobs of a queue, page by page'),
        ('act', 'select jobqueue.retry(id, reason)', 'run a failed job again; restart: retry(id, reason, true)'),
        ('act', 'select jobqueue.cancel(id, reason)', 'stop a job; at once: cancel(id, reason, true)'),
        ('act', 'select jobqueue.pause(id, reason), jobqueue.resume(id, reason)', 'hold a job, take it up again'),
        ('act', 'select jobqueue.skip(id, reason)', 'go on without a failed job'),
        ('act', 'select jobqueue.run_now(id, reason)', 'do not wait for run_at'),
        ('act', 'select jobqueue.prioritize(id, priority, reason)', 'higher runs first'),
        ('act', 'select * from jobqueue.bulk(action, filter, reason, dry_run => true)', 'one action on many jobs; look first'),
        ('queues', 'select * from jobqueue.queues', 'the queues and their options'),
        ('queues', 'select * from jobqueue.queue_stats(queue, since, until, bucket)', 'throughput, times and backlog, minute by minute'),
        ('queues', 'select jobqueue.create_queue(name, options), jobqueue.update_queue(name, options)', 'make or change a queue'),
        ('queues', 'select jobqueue.pause_queue(name, reason), jobqueue.resume_queue(name, reason)', 'also pause_job_type, pause_tenant'),
        ('queues', 'select * from jobqueue.purge_queue(name, reason)', 'cancel what waits, delete what ended'),
        ('queues', 'select * from jobqueue.preview_redrive(dead_letter), jobqueue.redrive(dead_letter)', 'dead letters on their way back'),
        ('operate', 'select * from jobqueue.health()', 'how it goes, in a few numbers'),
        ('operate', 'select * from jobqueue.doctor()', 'what is wrong, and what to do'),
        ('operate', 'select * from jobqueue.metrics()', 'counters and gauges for monitoring, as GET /metrics has them'),
        ('operate', 'select jobqueue.drain_worker(id, reason)', 'let a worker finish what it has and stop')) h (task, call, what)
$$;

-- health: how it goes. status is ok, warn or fail; the same rows for people, alerts and the API.
create or replace function jobqueue.health()
returns table (name text, status text, detail text, what_to_do text)
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select * from check_workers()
    union all select * from check_stuck()
    union all select * from check_leases()
    union all select * from check_maintenance()
    union all select * from check_backlog()
    union all select * from check_slow_jobs()
    union all select * from check_slow_handlers()
    union all select * from check_statements()
    union all select * from check_failures()
    union all select * from check_table_size()
    union all select * from check_pauses()
$$;

-- doctor: health, and what is wrong with the database around it.
create or replace function jobqueue.doctor()
returns table (name text, status text, detail text, what_to_do text)
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select * from check_versions()
    union all select * from health()
    union all select * from check_horizon()
    union all select * from check_indexes()
    union all select * from check_autovacuum()
    union all select * from check_grants()
$$;

-- check_workers: live workers, and those that vanished without a word.
create or replace function jobqueue.check_workers()
returns table (name text, status text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select 'workers', case when w.lost > 0 or (w.live = 0 and waiting) then 'warn' else 'ok' end,
        format('%s live, %s lost (no heartbeat for 30 s)%s', w.live, w.lost, case when w.live = 0 and waiting then '; jobs wait' else '' end),
        case when w.live = 0 and waiting then 'Start one: jobqueue worker your.app'
            when w.lost > 0 then 'See what became of them: select * from jobqueue.workers where state = ''lost''; their jobs are rescued.' end
    from (select count(*) filter (where x.heartbeat_at > now() - interval '30 s') as live,
            count(*) filter (where x.heartbeat_at <= now() - interval '30 s') as lost
        from worker x where x.stopped_at is null) w
    cross join lateral (select exists (select from job j where j.ready_seq is not null) as waiting) j
$$;

-- check_stuck: slots of live workers that are kept by handlers that go on after their attempts have ended (a thread cannot be stopped); a
-- worker without any other slot takes no job any more.
create or replace function jobqueue.check_stuck()
returns table (name text, status text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select 'stuck handlers', case when bool_or(w.slots >= w.concurrency) then 'fail' when count(w.id) > 0 then 'warn' else 'ok' end,
        case when count(w.id) > 0 then format('%s of %s slots of %s %s kept by handlers whose attempts have ended: %s', sum(w.slots),
                coalesce(sum(w.concurrency)::text, '?'), string_agg(coalesce(w.name, w.id::text), ', ' order by w.slots desc, w.name),
                case when sum(w.slots) = 1 then 'is' else 'are' end, min(j.named))
            else 'no handler goes on after its attempt has ended' end,
        case when count(w.id) > 0 then 'Restart the worker; its threads end with it. Then give what they call a time-out, or use executor="process".' end
    from (select x.id, x.name, x.concurrency, (x.stuck ->> 'slots')::int as slots
        from worker x
        where x.stuck is not null and x.stopped_at is null and x.heartbeat_at > now() - interval '30 s') w
    cross join lateral (
        -- the same for every row: the three that have been at it for the longest
        select string_agg(format('job %s (%s) since %s', y.job ->> 'id', y.job ->> 'job_type', ago((y.job ->> 'since')::timestamptz)), ', ') as named
        from (select e as job
            from worker x cross join lateral jsonb_array_elements(x.stuck -> 'jobs') e
            where x.stopped_at is null and x.heartbeat_at > now() - interval '30 s'
            order by (e ->> 'since')::timestamptz limit 3) y) j
$$;

-- check_leases: claims whose lease ended over 2 minutes ago and that nobody has rescued. Index: claim_batch_due.
create or replace function jobqueue.check_leases()
returns table (name text, status text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select 'leases', case when count(*) > 0 then 'fail' else 'ok' end,
        format('%s running %s lost the lease over 2 minutes ago without being rescued', count(*), case when count(*) = 1 then 'job' else 'jobs' end),
        case when count(*) > 0 then 'Start a worker: every worker rescues. By hand: select * from jobqueue.maintain(null, array[''rescue'']).' end
    from (select distinct j.id
        from claim_batch b
        cross join lateral unnest(b.job_ids) x (id)
        join job j on j.id = x.id
        where b.check_at < now() - interval '2 min' and j.status = 'processing' and j.lease_until < now() - interval '2 min') late
$$;

-- check_maintenance: steps that fail, and steps that nobody runs.
create or replace function jobqueue.check_maintenance()
returns table (name text, status text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select 'maintenance: ' || m.step, case when failing then 'fail' when late then 'warn' else 'ok' end,
        case when failing then format('failed at %s: %s', m.state ->> 'failed_at', m.state ->> 'error')
            when late then format('due since %s', ago(m.next_at))
            when m.last_at is null then 'has not run yet' else format('ran at %s', ago(m.last_at)) end,
        case when failing then 'Run it by hand to see why: ' || format('select * from jobqueue.maintain(null, array[%L])', m.step)
            when late then 'Start a worker: every worker keeps house.' end
    from (
        select x.*, x.next_at < now() - greatest(interval '5 min', 3 * x.every) as late,
            -- the error of a run before the last one is history
            coalesce((x.state ->> 'failed_at')::timestamptz >= x.last_at, false) as failing
        from maintenance x order by x.step) m
$$;

-- check_backlog: queues with more ready jobs than their warn_backlog; counted no further. Index: job_claim.
create or replace function jobqueue.check_backlog()
returns table (name text, status text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select 'backlog: ' || q.name, case when b.n > q.warn_backlog then 'warn' else 'ok' end,
        case when b.n > q.warn_backlog then format('more than %s jobs are ready', q.warn_backlog)
            else format('%s of %s ready jobs', b.n, q.warn_backlog) end,
        case when b.n > q.warn_backlog then 'Run more workers, or see why the jobs take longer.' end
    from queue q
    cross join lateral (
        select count(*) as n
        from (select from job j where j.queue = q.name and j.ready_seq is not null limit q.warn_backlog::bigint + 1) x) b
    where q.warn_backlog is not null
    order by q.name
$$;

-- check_pauses: what is paused, so that nobody forgets it.
create or replace function jobqueue.check_pauses()
returns table (name text, status text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select 'paused: ' || p.what, 'warn', format('since %s by %s: %s', ago(p.paused_at), p.paused_by, p.pause_reason), 'Resume it when it may go on.'
    from (
        select 'queue ' || q.name as what, q.paused_at, q.paused_by, q.pause_reason from queue q where q.paused_at is not null
        union all select 'job_type ' || t.name, t.paused_at, t.paused_by, t.pause_reason from job_type t where t.paused_at is not null
        union all select 'tenant ' || t.tenant, t.paused_at, t.paused_by, t.pause_reason from tenant_pause t where sees_tenant(t.tenant)) p
    order by p.what
$$;

-- check_versions: the server and the schema.
create or replace function jobqueue.check_versions()
returns table (name text, status text, detail text, what_to_do text)
language plpgsql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
declare
    version int;
begin
    name := 'server';
    status := case when current_setting('server_version_num')::int < 150000 then 'fail' else 'ok' end;
    detail := 'PostgreSQL ' || current_setting('server_version');
    what_to_do := case status when 'fail' then 'jobqueue needs PostgreSQL 15 or newer.' end;
    return next;
    name := 'schema';
    status := 'ok';
    detail := 'applied with psql; its version is not recorded';
    what_to_do := null;
    -- made by the program, not by the migrations
    if to_regclass('jobqueue.schema_migration') is not null then
        execute 'select max(m.version) from jobqueue.schema_migration m' into version;
        detail := format('version %s', version);
    end if;
    return next;
end
$$;

-- check_horizon: the oldest transaction; while it is open no dead row can be cleaned up.
create or replace function jobqueue.check_horizon()
returns table (name text, status text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select 'oldest transaction', case when o.pid is null or o.age < interval '5 min' then 'ok' when o.age < interval '1 h' then 'warn' else 'fail' end,
        case when o.pid is null then 'none is open'
            else format('%s old: pid %s, %s, %s, user %s', for_people(o.age), o.pid, coalesce(nullif(o.application_name, ''), 'unnamed'), o.state, o.usename) end,
        case when o.age >= interval '5 min' then format('End it in its program, or: select pg_terminate_backend(%s). It keeps dead rows of the '
            'whole database from being cleaned up.', o.pid) end
    from (select) one
    left join lateral (
        select a.pid, now() - a.xact_start as age, a.application_name, coalesce(a.state, a.backend_type) as state, a.usename
        from pg_stat_activity a
        where a.backend_xmin is not null and a.datname = current_database() and a.pid <> pg_backend_pid() and a.xact_start is not null
            and a.backend_type <> 'autovacuum worker'
        order by age(a.backend_xmin) desc, a.xact_start
        limit 1) o on true
    union all
    select 'prepared transactions', 'warn', format('%s, the oldest of %s', count(*), ago(min(p.prepared))),
        'Commit or roll back: select * from pg_prepared_xacts.'
    from pg_prepared_xacts p
    where p.database = current_database()
    having count(*) > 0
    union all
    select 'replication slot: ' || s.slot_name, 'warn', format('inactive, and keeps rows since transaction %s', coalesce(s.xmin, s.catalog_xmin)),
        format('Start its consumer, or: select pg_drop_replication_slot(%L).', s.slot_name)
    from pg_replication_slots s
    where not s.active and s.xmin is not null
$$;

-- check_indexes: indexes that are not valid serve no query and are still written.
create or replace function jobqueue.check_indexes()
returns table (name text, status text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select 'indexes', case when count(*) > 0 then 'fail' else 'ok' end,
        case when count(*) > 0 then 'not valid: ' || string_agg(c.relname, ', ' order by c.relname) else 'all are valid' end,
        case when count(*) > 0 then string_agg(format('reindex index concurrently jobqueue.%I;', c.relname), ' ' order by c.relname) end
    from pg_index i
    join pg_class c on c.oid = i.indexrelid
    where c.relnamespace = 'jobqueue'::regnamespace and not (i.indisvalid and i.indisready)
$$;

-- check_autovacuum: autovacuum must be on, for the server and for each table of the schema.
create or replace function jobqueue.check_autovacuum()
returns table (name text, status text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select 'autovacuum', case when off.server or off.tables is not null then 'fail' else 'ok' end,
        case when off.server then 'is off for the whole server' when off.tables is not null then 'is off for ' || off.tables else 'is on' end,
        case when off.server then 'alter system set autovacuum = on; select pg_reload_conf();'
            when off.tables is not null then 'alter table … reset (autovacuum_enabled)' end
    from (
        select current_setting('autovacuum') = 'off' as server,
            (select string_agg(c.relname, ', ' order by c.relname)
            from pg_class c
            where c.relnamespace = 'jobqueue'::regnamespace and c.relkind = 'r'
                and exists (select from unnest(c.reloptions) o where o in ('autovacuum_enabled=false', 'autovacuum_enabled=off'))) as tables) off
$$;

-- check_grants: nothing of the schema is open to everybody, and nobody but its owner writes a table.
create or replace function jobqueue.check_grants()
returns table (name text, status text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select 'grants', case when count(*) > 0 then 'fail' else 'ok' end,
        case when count(*) > 0 then format('%s open to public: %s', count(*), left(string_agg(g.what, ', ' order by g.what), 500))
            else 'nothing is open to public' end,
        case when count(*) > 0 then 'revoke all on all tables in schema jobqueue from public; revoke all on all functions in schema jobqueue from public; '
            'revoke all on schema jobqueue from public' end
    from (
        select c.relname::text as what
        from pg_class c cross join lateral aclexplode(c.relacl) a
        where c.relnamespace = 'jobqueue'::regnamespace and a.grantee = 0
        union
        select p.oid::regprocedure::text
        from pg_proc p cross join lateral aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
        where p.pronamespace = 'jobqueue'::regnamespace and a.grantee = 0
        union
        select 'schema ' || n.nspname
        from pg_namespace n cross join lateral aclexplode(n.nspacl) a
        where n.nspname = 'jobqueue' and a.grantee = 0) g
$$;
