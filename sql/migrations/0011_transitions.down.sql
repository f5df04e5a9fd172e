-- Takes the counters of monitoring away; statistics stay.
drop table jobqueue.transition_total cascade;
drop table jobqueue.total cascade;
alter table jobqueue.statistics_note
    drop column job_type,
    drop column job_types,
    drop column from_status,
    drop column to_status,
    drop column changes;
