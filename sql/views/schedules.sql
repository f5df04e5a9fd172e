-- schedules: what is sent when; state says in one word whether it goes well.
create or replace view jobqueue.schedules with (security_invoker = true) as
select s.name::text as name, s.queue::text as queue, s.expression, s.time_zone, s.missed, s.payload, s.options,
    case
        when s.paused_at is not null then 'paused'
        when s.next_at is null then 'finished'
        when s.failures > 0 then 'failing'
        else 'active' end as state,
    s.next_at, s.last_at, s.last_job_id, s.last_reason, s.last_error, s.failures, s.retry_at, s.gap_from, s.gap_until,
    s.paused_at, s.pause_reason, s.paused_by, s.tenant::text as tenant, s.created_at, s.updated_at
from jobqueue.schedule s;
