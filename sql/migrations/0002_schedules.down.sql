-- Takes the schedules away; jobs that they sent stay.
delete from jobqueue.maintenance where step = 'schedules';
drop table jobqueue.schedule cascade;
