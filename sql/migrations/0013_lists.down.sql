-- jobqueue: tx=no
drop index concurrently if exists jobqueue.job_error;

drop index concurrently if exists jobqueue.job_aside;
