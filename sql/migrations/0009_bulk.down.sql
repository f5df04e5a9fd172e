delete from jobqueue.maintenance where step = 'bulk';
drop table jobqueue.bulk_operation;
