-- Takes the statistics away; jobs stay.
delete from jobqueue.maintenance where step in ('fold_statistics', 'keep_statistics', 'sample_statistics');
drop table jobqueue.statistics_note, jobqueue.statistic, jobqueue.standing cascade;
