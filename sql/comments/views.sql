-- What \df+ shows of the functions that only the dashboard calls (functions/http_failures.sql, http_views.sql).

comment on function jobqueue.http_message_shape is 'An error message without what differs from job to job: numbers, ids and quoted words become #.';
comment on function jobqueue.http_fingerprint is 'Failures with the same one are the same failure: the code, and the shape of the message. 12 hex digits.';
comment on function jobqueue.http_failed is 'The newest failed jobs of the last 7 days that the caller may see; what is read is bounded.';
comment on function jobqueue.http_failures is 'The inbox of failures as one call: groups of failed jobs by job_type, class and fingerprint.';
comment on function jobqueue.http_failure_bulk is 'Retry or skip every job of a group of failures, as one call.';
comment on function jobqueue.http_sparks is 'What ended in each queue in each of the last 60 minutes, the oldest first.';
comment on function jobqueue.http_queue_workers is 'How many live workers serve each queue.';
comment on function jobqueue.http_overview is 'The first page of the dashboard as one call: queues with what stands where, and what needs attention.';
comment on function jobqueue.http_running is 'What each worker runs now, of the tenants that the caller sees; at most 20 jobs of a worker.';
comment on function jobqueue.http_workers is 'The workers with what they run, live ones first, as one call.';
comment on function jobqueue.http_ticks is 'When a schedule sends next, as a JSON list.';
comment on function jobqueue.http_schedules is 'The schedules of the caller''s tenants, each with its next three times, as one call.';
comment on function jobqueue.http_batch_jobs is 'Jobs of a batch as one call: failed ones first, then those under way.';
comment on function jobqueue.http_tenant_page is 'What one tenant is waiting for, of its newest 5,000 jobs, as one call.';
comment on function jobqueue.http_tables is 'The tables of the schema with their sizes in bytes and what vacuum has left to do.';
comment on function jobqueue.http_settings is 'The settings that are stored in the database; secrets are hidden.';
comment on function jobqueue.http_system is 'The database as operators see it, as one call: checks of doctor(), tables, settings. Errors: JQ403.';
comment on function jobqueue.http_database is 'What http_system returns. Errors: JQ403.';
comment on function jobqueue.http_bulks is 'Bulk operations, the newest first, as one call.';
comment on column jobqueue.bulk_operation.filter is 'Which jobs were meant, as it was given; of a list of ids their number. Null: from before this was kept.';
comment on column jobqueue.bulk_operation.total is 'How many jobs that was.';
