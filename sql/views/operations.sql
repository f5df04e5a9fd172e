-- workers: the processes that work, and those that stopped within a day.
create or replace view jobqueue.workers with (security_invoker = true) as
select w.id, w.name, w.hostname, w.pid, w.version, w.queues, w.job_types, w.concurrency, w.running, w.started_at, w.heartbeat_at,
    w.stopped_at,
    case
        when w.stopped_at is not null then 'stopped'
        when w.heartbeat_at < now() - interval '30 s' then 'lost'
        when w.drain_requested_at is not null then 'draining'
        else 'working' end as state,
    w.drain_reason, coalesce((w.stuck ->> 'slots')::int, 0) as stuck
from jobqueue.worker w;

-- queues: the queues with their options; durations as intervals.
create or replace view jobqueue.queues with (security_invoker = true) as
select q.name::text as name, q.policy, q.max_retries, q.retry_delay, q.retry_backoff, q.retry_delay_max, q.timeout, q.max_runtime,
    q.lease, q.expires_in, q.keep_completed, q.keep_ended, q.dead_letter::text as dead_letter, q.concurrency, q.group_concurrency,
    q.key_concurrency, q.rate_limit, q.ageing, q.fair_by, q.warn_backlog, q.paused_at, q.pause_reason, q.paused_by, q.created_at,
    q.updated_at
from jobqueue.queue q;
