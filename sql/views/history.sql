-- attempts: every attempt of a job, the one under way or the successful one included.
create or replace view jobqueue.attempts with (security_invoker = true) as
select a.job_id, a.attempt, a.tenant::text as tenant, a.outcome, a.worker_id, a.started_at, a.ended_at,
    a.error_class, a.error_code, a.error_message, a.error_detail, a.next_run_at
from jobqueue.attempt a
union all
select j.id, j.attempt, j.tenant::text, case j.status when 'processing' then 'processing' else 'completed' end, j.worker_id, j.started_at,
    j.completed_at, null, null, null, null, null
from jobqueue.job j
where j.status in ('processing', 'completed') and j.attempt > 0;

-- stages: the stages of jobs, in their order.
create or replace view jobqueue.stages with (security_invoker = true) as
select s.job_id, s.tenant::text as tenant, s.position, s.name, s.status, s.weight, s.attempt, s.started_at, s.completed_at, s.error,
    s.metadata, s.output
from jobqueue.stage s;

-- checkpoints: the checkpoints of jobs, the newest with its data.
create or replace view jobqueue.checkpoints with (security_invoker = true) as
select c.id, c.job_id, c.tenant::text as tenant, c.attempt, c.stage, c.data, c.reference, c.hash, c.pause_safe, c.created_at
from jobqueue.checkpoint c;

-- actions_taken: who did what, when and why.
create or replace view jobqueue.actions_taken with (security_invoker = true) as
select a.id, a.at, a.action, a.job_id, a.tenant::text as tenant, a.target, a.from_status, a.to_status, a.reason,
    a.session_user_name, a.actor, a.application_name, a.client_addr, a.details
from jobqueue.audit a;
