-- What workers warn of by themselves, in their log and to the app's hook; health() and doctor() have the same rows.

-- warnings: the causes that hold now. Cheap enough for every worker to ask once a minute.
create or replace function jobqueue.warnings()
returns table (name text, status text, detail text, what_to_do text)
language sql stable security definer
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select w.name, w.status, w.detail, w.what_to_do
    from (
        select * from check_backlog()
        union all select * from check_slow_jobs()
        union all select * from check_failures()
        union all select * from check_slow_handlers()
        union all select * from check_statements()
        union all select * from check_table_size()
        union all select * from check_maintenance()) w
    where w.status <> 'ok'
$$;

-- check_slow_jobs: jobs that run without progress, stage or checkpoint for longer than the setting warn_slow_job (30 min).
-- Index: claim_batch (all of it: one row per claim), job_pkey.
create or replace function jobqueue.check_slow_jobs()
returns table (name text, status text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    select 'slow jobs', case when count(s.id) > 0 then 'warn' else 'ok' end,
        case when count(s.id) > 0 then format('%s %s for over %s without progress: %s%s', count(s.id), case when count(s.id) = 1 then 'runs' else 'run' end,
                for_people(max(l.most)), array_to_string((array_agg(s.id order by s.since))[1:3], ', '), case when count(s.id) > 3 then ', …' else '' end)
            else format('none runs for over %s without progress', for_people(max(l.most))) end,
        case when count(s.id) > 0 then 'See what it does: select * from jobqueue.explain(id). Stop it: select jobqueue.cancel(id, reason).' end
    from (select to_interval(setting_of('warn_slow_job', '"30 min"'), 'warn_slow_job') as most) l
    left join lateral (
        select distinct j.id, greatest(j.started_at, j.updated_at, j.life_at) as since
        from claim_batch b
        cross join lateral unnest(b.job_ids) x (id)
        join job j on j.id = x.id and j.status = 'processing'
        where j.started_at < now() - l.most and greatest(j.started_at, j.updated_at, j.life_at) < now() - l.most) s on true
$$;

-- check_slow_handlers: queues whose attempts took at least three times as long, and a second, in the last 15 minutes as in the day before; of
-- each there must have been 10. Index: statistic_age.
create or replace function jobqueue.check_slow_handlers()
returns table (name text, status text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    with part as (
        select s.queue, s.begins_at >= now() - interval '15 min' as late, sum(s.run_seconds) / nullif(sum(s.completed + s.failed_attempts), 0) as mean,
            sum(s.completed + s.failed_attempts) as n
        from statistic s
        where s.begins_at >= now() - interval '1 day'
        group by 1, 2
        having sum(s.completed + s.failed_attempts) >= 10)
    select 'slow handlers: ' || a.queue, 'warn',
        format('attempts took %s s on average in the last 15 minutes, %s s in the day before', round(a.mean::numeric, 1), round(b.mean::numeric, 1)),
        format('See when it began: select * from jobqueue.queue_stats(%L).', a.queue)
    from part a
    join part b on b.queue = a.queue and not b.late
    where a.late and a.mean >= 1 and a.mean >= 3 * b.mean
    order by a.queue
$$;

-- check_statements: statements of jobqueue's programs that have been running for longer than the setting warn_slow_statement (30 s).
create or replace function jobqueue.check_statements()
returns table (name text, status text, detail text, what_to_do text)
language sql stable
set search_path = pg_catalog, jobqueue, pg_temp
as $$
    select 'slow statements', case when count(a.pid) > 0 then 'warn' else 'ok' end,
        case when count(a.pid) > 0 then format('%s run for over %s; the longest: pid %s, %s, for %s%s', count(a.pid), for_people(max(l.most)),
                (array_agg(a.pid order by a.query_start))[1], (array_agg(a.application_name order by a.query_start))[1],
                for_people(now() - min(a.query_start)), coalesce(', waits for ' || (array_agg(a.wait_event order by a.query_start))[1], ''))
            else format('none of jobqueue''s runs for over %s', for_people(max(l.most))) end,
        case when count(a.pid) > 0 then 'If it waits for a lock, end the transaction that holds it: select pg_blocking_pids(pid).' end
    from (select to_interval(setting_of('warn_slow_statement', '"30 s"'), 'warn_slow_statement') as most) l
    left join pg_stat_activity a on a.datname = current_database() and a.application_name like 'jobqueue%' and a.state = 'active'
        and a.pid <> pg_backend_pid() and a.query_start < now() - l.most
$$;
