-- Takes admission away. Jobs that wait to be admitted go into the line of their queue first; limits no longer hold.
update jobqueue.job set ready_seq = nextval('jobqueue.ready_seq'), inbox_seq = null where inbox_seq is not null;
update jobqueue.job set settle_flags = settle_flags & ~488 where settle_flags & 488 <> 0;
delete from jobqueue.maintenance where step = 'admission';
drop table jobqueue.key_generation, jobqueue.admission, jobqueue.admission_note, jobqueue.admission_slot, jobqueue.admission_line;
alter table jobqueue.queue drop constraint queue_limits_are_sane, drop column limited;
