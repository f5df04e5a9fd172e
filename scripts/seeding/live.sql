-- What has not ended: through the functions, as applications and people would. Statements end with a semicolon at the end of a line.
insert into jobqueue.queue (name)
select distinct k.queue from jsonb_to_recordset(%(kinds)s) k (queue text)
on conflict (name) do nothing;

select jobqueue.register_worker(%(worker)s, jsonb_build_object('name', 'seeded-1', 'hostname', 'app-7.example.org', 'pid', 4711, 'concurrency', 8,
    'queues', (select jsonb_agg(distinct k.queue) from jsonb_to_recordset(%(kinds)s) k (queue text))));

-- eight for the worker, with stages where their kind has some, then those that wait; one in five for later
select count(s.id)
from generate_series(1, 8 + %(live)s::bigint) n
cross join lateral (
    select k.* from jsonb_to_recordset(%(kinds)s) k (queue text, job_type text, label text, subject text, stages jsonb, above float8, upto float8)
    where (hashint8extended(n, %(seed)s + 20) & 1048575) / 1048576.0::float8 >= k.above and (hashint8extended(n, %(seed)s + 20) & 1048575) / 1048576.0::float8 < k.upto) k
cross join lateral jobqueue.send(k.queue, jsonb_build_object(k.subject, n, 'pages', 12), jsonb_strip_nulls(jsonb_build_object(
    'job_type', k.job_type, 'subject', k.subject || ':' || n, 'display_name', replace(k.label, '{}', n::text), 'stages', nullif(k.stages, '[]'),
    'tenant', case when %(tenants)s > 1 then 'tenant-' || 1 + n %% %(tenants)s else 'default' end, 'created_by', 'user-' || n %% 50,
    'priority', case when n <= 8 then 100 else 0 end, 'delay', case when n > 8 and n %% 5 = 0 then 60 * n end))) s;

select count(jobqueue.progress(c.id, c.claim_token, (c.n * 11)::int, 'Processing chunk ' || c.n || '/9', jsonb_build_object('done', c.n, 'total', 9)))
from (
    select c.id, c.claim_token, row_number() over (order by c.id) as n
    from jobqueue.claim((select array_agg(distinct k.queue) from jsonb_to_recordset(%(kinds)s) k (queue text)), %(worker)s, 8) c) c;

-- nobody beats for them: they are kept for a day, and one of them has said nothing for five minutes
update jobqueue.job j
set lease_until = now() + interval '1 day', heartbeat_at = now() + interval '1 day',
    life_at = case when j.progress_done = 1 then now() - interval '5 min' else j.life_at end
where j.status = 'processing' and j.worker_id = %(worker)s;

update jobqueue.claim_batch b set check_at = now() + interval '1 day' where b.worker_id = %(worker)s;

update jobqueue.worker w set heartbeat_at = now() + interval '1 day', running = 8 where w.id = %(worker)s;

select count(jobqueue.pause(p.id, 'waits for the numbers'))
from (select j.id from jobqueue.job j where j.status = 'pending' and j.wait_until is null order by j.id limit least(%(live)s / 20 + 1, 200)) p;

select count(f) from generate_series(1, 3) n
cross join lateral jobqueue.send_flow(jsonb_build_array(
    jsonb_build_object('ref', 'read', 'queue', (%(kinds)s::jsonb) #>> '{0,queue}', 'options', jsonb_build_object('display_name', 'Read part ' || n)),
    jsonb_build_object('ref', 'sum', 'queue', (%(kinds)s::jsonb) #>> '{0,queue}', 'depends_on', '["read"]'::jsonb),
    jsonb_build_object('ref', 'mail', 'queue', (%(kinds)s::jsonb) #>> '{0,queue}', 'depends_on', '["sum"]'::jsonb))) f;

select count(s.id)
from (select jobqueue.create_batch('{"name": "Import of March"}') as id) b
cross join generate_series(1, 20) n
cross join lateral jobqueue.send((%(kinds)s::jsonb) #>> '{0,queue}', jsonb_build_object('row', n), jsonb_build_object('batch', b.id)) s;

select jobqueue.schedule('nightly-report', (%(kinds)s::jsonb) #>> '{0,queue}', '0 3 * * 1-5', '{}', '{"time_zone": "Europe/Berlin"}');

-- the counters of monitoring, which otherwise grow with the notes of workers
insert into jobqueue.total (queue, job_type, completed, failed, cancelled, skipped, failed_attempts, wait_seconds, run_seconds, waits, runs)
select t.queue, t.job_type, sum(t.n) filter (where t.status = 'completed'), coalesce(sum(t.n) filter (where t.status = 'failed'), 0),
    coalesce(sum(t.n) filter (where t.status = 'cancelled'), 0), coalesce(sum(t.n) filter (where t.status = 'skipped'), 0),
    coalesce(sum(t.n) filter (where t.status = 'failed'), 0), coalesce(sum(t.waited), 0), coalesce(sum(t.ran), 0),
    coalesce(jobqueue.add_bins(array_agg(t.wait + 256 * t.n) filter (where t.wait is not null)), '{}'),
    coalesce(jobqueue.add_bins(array_agg(t.run + 256 * t.n) filter (where t.run is not null)), '{}')
from (
    select j.queue, j.job_type, j.status, jobqueue.bucket_of(extract(epoch from j.started_at - j.run_at)::real) as wait,
        jobqueue.bucket_of(extract(epoch from j.completed_at - j.started_at)::real) as run, count(*) as n,
        sum(extract(epoch from j.started_at - j.run_at)) as waited, sum(extract(epoch from j.completed_at - j.started_at)) as ran
    from jobqueue.job j
    where j.completed_at is not null
    group by 1, 2, 3, 4, 5) t
group by 1, 2
having sum(t.n) filter (where t.status = 'completed') > 0
on conflict do nothing;
