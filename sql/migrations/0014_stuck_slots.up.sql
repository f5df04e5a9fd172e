-- Handlers that outlived their attempts keep slots of their worker, and health(), explain() and the list of workers say so. Nullable and without a
-- default: no row is written, the lock is one of an instant.
alter table jobqueue.worker add column stuck jsonb;
