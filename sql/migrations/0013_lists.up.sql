-- jobqueue: tx=no
-- Lists by what is rare: what has failed, by its class; what is paused, cancelled or skipped. Only such jobs have an entry: neither column is
-- set in a job that is sent, claimed and completed, so these stay as cheap as they were (docs/decisions/0015-lists.md).
create index concurrently job_error on jobqueue.job (tenant, error_class, created_at, id) where error_class is not null;

create index concurrently job_aside on jobqueue.job (tenant, created_at, id) where status_reason is not null;

-- The functions always give a reason; what a hand has changed may have none. From here on the guard gives one (functions/guard.sql).
update jobqueue.job set status_reason = 'changed by hand' where status in ('paused', 'cancelled', 'skipped') and status_reason is null;
