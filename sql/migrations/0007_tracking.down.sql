-- Takes tracking away; stages, checkpoints and done keys stay.
delete from jobqueue.maintenance where step in ('estimates', 'stage_history');
drop table jobqueue.pace cascade;
drop table jobqueue.estimate cascade;
