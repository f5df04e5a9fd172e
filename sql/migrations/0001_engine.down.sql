-- Takes everything away that 0001 made, jobs included.
drop table jobqueue.idempotency_key, jobqueue.watch, jobqueue.maintenance, jobqueue.audit, jobqueue.claim_batch, jobqueue.worker,
    jobqueue.done_key, jobqueue.checkpoint, jobqueue.stage, jobqueue.attempt, jobqueue.job, jobqueue.tenant_pause,
    jobqueue.job_type, jobqueue.queue, jobqueue.setting cascade;
drop sequence jobqueue.ready_seq;
drop function jobqueue.new_id() cascade;
drop function if exists jobqueue.refuse_inconsistent(uuid, text) cascade;
