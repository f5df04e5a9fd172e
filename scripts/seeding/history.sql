-- Jobs that have ended, numbers %(first)s to %(last)s of %(jobs)s, spread over %(days)s days before %(until)s: busy by day, quiet by night.
-- Everything about job n follows from n and %(seed)s. Written by the owner as a dump is restored: inserts pass no guard, only the table's CHECK.
with kind as materialized (
    select k.* from jsonb_to_recordset(%(kinds)s) k (queue text, job_type text, above float8, upto float8, seconds float8, failing float8,
        label text, subject text, stages text[])),
chance as (
    -- numbers from 0 to 1, one for each question; offset 0: each is drawn once, not wherever it is used
    select n,
        (hashint8extended(n, %(seed)s) & 1048575) / 1048576.0::float8 as kind,
        (hashint8extended(n, %(seed)s + 1) & 1048575) / 1048576.0::float8 as ending,
        (hashint8extended(n, %(seed)s + 2) & 1048575) / 1048576.0::float8 as class,
        (hashint8extended(n, %(seed)s + 3) & 1048575) / 1048576.0::float8 as tenant,
        (hashint8extended(n, %(seed)s + 4) & 1048575) / 1048576.0::float8 as person,
        (hashint8extended(n, %(seed)s + 5) & 1048575) / 1048576.0::float8 as waiting,
        (hashint8extended(n, %(seed)s + 6) & 1048575) / 1048576.0::float8 as running,
        (hashint8extended(n, %(seed)s + 7) & 1048575) / 1048576.0::float8 as retrying,
        lpad(to_hex(hashint8extended(n, %(seed)s + 8)), 16, '0') as digits,
        (n - 0.5) / %(jobs)s as x
    from generate_series(%(first)s::bigint, %(last)s::bigint) n
    offset 0),
drawn as (
    select c.*, k.queue, k.job_type, k.label, k.subject, k.stages, k.failing, k.seconds,
        %(until)s::timestamptz - %(days)s * interval '1 day' * (1 - c.x + 0.7 * sin(2 * pi() * %(days)s * c.x) / (2 * pi() * %(days)s)) as at,
        case when c.ending < k.failing then 'failed' when c.ending < k.failing + 0.015 then 'cancelled'
            when c.ending < k.failing + 0.017 then 'skipped' else 'completed' end as status
    from chance c
    join kind k on c.kind >= k.above and c.kind < k.upto
    offset 0),
timed as (
    select d.*,
        case when d.status = 'cancelled' then 0 when d.status in ('failed', 'skipped') then case when d.class < 0.7 then 4 else 1 end
            when d.retrying < 0.05 then 2 else 1 end as attempt,
        least(d.at + 0.05 * (1 / (1.001 - d.waiting)) * interval '1 s', %(until)s) as started,
        -- most take about as long as typical, a few twenty times as long
        d.seconds * (0.4 + d.running + 0.05 / (1.0025 - d.running)) as took,
        case when d.status in ('failed', 'skipped') or d.retrying < 0.05 and d.status = 'completed' then
            case when d.class < 0.7 or d.status = 'completed' then 'transient' when d.class < 0.85 then 'permanent' when d.class < 0.95 then 'invalid'
                when d.class < 0.99 then 'quota' else 'lost' end end as error_class
    from drawn d
    offset 0),
made as (
    insert into jobqueue.job (id, created_at, priority, queue, job_type, tenant, payload, subject, display_name, created_by, run_at, status, version,
        attempt, retry_count, max_retries, progress_pct, worker_id, started_at, completed_at, failed_at, updated_at, status_reason, result, stats,
        current_stage, total_stages, completed_stages, error_class, error_code, error_message)
    select (lpad(to_hex((extract(epoch from t.at) * 1000)::bigint), 12, '0') || '7' || lpad(to_hex(t.n & 4095), 3, '0') || '8'
            || substr(t.digits, 2))::uuid,
        t.at, case when t.person > 0.97 then 10 else 0 end, t.queue, t.job_type,
        case when %(tenants)s = 1 then 'default' else 'tenant-' || 1 + floor(%(tenants)s * t.tenant * t.tenant) end,
        jsonb_build_object(t.subject, t.n, 'pages', 1 + (t.running * 400)::int),
        t.subject || ':' || (t.n / 3), replace(t.label, '{}', (t.n / 3)::text),
        case when t.person < 0.7 then 'user-' || (t.person * 50)::int end,
        t.at, t.status, 2 + 2 * t.attempt,
        t.attempt, greatest(t.attempt - 1, 0), 3,
        case t.status when 'completed' then 100 when 'failed' then (t.running * 90)::int else 0 end,
        case when t.attempt > 0 then %(worker)s::uuid end,
        case when t.attempt > 0 then t.started end,
        e.ended, case when t.status = 'failed' then e.ended end, e.ended,
        case t.status when 'cancelled' then 'no longer needed' when 'skipped' then 'done by hand' end,
        case when t.status = 'completed' then jsonb_build_object('pages', 1 + (t.running * 400)::int) end,
        case when t.status = 'completed' and t.job_type = 'index_repository' then
            jsonb_build_object('files_indexed', 50 + (t.person * 150)::int, 'symbols', 500 + (t.class * 1500)::int) end,
        case when t.status <> 'cancelled' then t.stages[cardinality(t.stages)] end,
        nullif(cardinality(t.stages), 0), case when t.status = 'completed' then nullif(cardinality(t.stages), 0) end,
        r.class, r.code, r.message
    from timed t
    cross join lateral (select least(t.started + t.took * interval '1 s', %(until)s) as ended) e
    left join lateral (
        select t.error_class as class,
            case t.error_class when 'transient' then 'TimeoutError' when 'permanent' then 'UnicodeDecodeError' when 'invalid' then 'ValidationError'
                when 'quota' then 'QUOTA' else 'LOST' end as code,
            case t.error_class when 'transient' then 'page ' || (t.running * 400)::int || ' took longer than 30 s'
                when 'permanent' then 'byte 0xff in position ' || t.n %% 1000 || ' cannot be decoded' when 'invalid' then 'pages must be at least 1'
                when 'quota' then 'the credits of this month are used up' else 'the worker was lost' end as message) r
        on t.status in ('failed', 'skipped')
    returning id, created_at, tenant, queue, status, attempt, worker_id, started_at, completed_at, run_at, error_class, error_code, error_message,
        status_reason),
attempted as (
    insert into jobqueue.attempt (job_id, attempt, tenant, worker_id, started_at, ended_at, outcome, error_class, error_code, error_message)
    select m.id, a, m.tenant, m.worker_id, m.started_at, m.completed_at, case m.error_class when 'lost' then 'lost' else 'failed' end,
        coalesce(m.error_class, 'transient'), coalesce(m.error_code, 'ConnectionResetError'), coalesce(m.error_message, 'connection reset by peer')
    from made m
    cross join generate_series(1, case m.status when 'completed' then m.attempt - 1 else m.attempt end) a),
audited as (
    insert into jobqueue.audit (at, action, job_id, tenant, from_status, to_status, reason, session_user_name, actor)
    select m.completed_at, case m.status when 'skipped' then 'skip' else 'cancel' end, m.id, m.tenant,
        case m.status when 'skipped' then 'failed' else 'pending' end, m.status, m.status_reason, session_user, 'support@example.org'
    from made m
    where m.status in ('cancelled', 'skipped')),
ended as (
    select m.queue, m.status, date_trunc(case when m.completed_at > %(until)s - interval '7 days' then 'minute' else 'hour' end, m.completed_at, 'UTC') as at,
        case when m.completed_at > %(until)s - interval '7 days' then 1 else 60 end as minutes,
        extract(epoch from m.started_at - m.run_at)::float8 as waited, extract(epoch from m.completed_at - m.started_at)::float8 as ran
    from made m)
select count(jobqueue.merge_statistic(row(s.queue, s.at, s.minutes, s.sent, s.completed, s.failed, s.failed, 0, coalesce(s.waited, 0), coalesce(s.ran, 0),
    jobqueue.add_bins(s.waits), jobqueue.add_bins(s.runs), null, null, null, null, null, null, null)::jobqueue.statistic))
from (
    select e.queue, e.at, e.minutes, count(*) as sent, count(*) filter (where e.status = 'completed') as completed,
        count(*) filter (where e.status = 'failed') as failed, sum(e.waited) as waited, sum(e.ran) as ran,
        coalesce(array_agg(256 + jobqueue.bin_of(e.waited)) filter (where e.waited is not null), '{}') as waits,
        coalesce(array_agg(256 + jobqueue.bin_of(e.ran)) filter (where e.ran is not null), '{}') as runs
    from ended e
    group by 1, 2, 3) s
