-- Takes flows and batches away; their jobs stay. A job that waits for others would wait for ever: it is cancelled.
update jobqueue.job
set status = 'cancelled', completed_at = now(), updated_at = now(), version = version + 1, held_key = null, unfinished_parents = 0,
    status_reason = 'the schema knows no flows any more'
where status = 'blocked';
update jobqueue.job set settle_flags = settle_flags & ~518 where settle_flags & 518 <> 0;
delete from jobqueue.maintenance where step = 'batches';
drop table jobqueue.batch_note, jobqueue.batch, jobqueue.flow_member, jobqueue.flow, jobqueue.edge cascade;
drop type jobqueue.flow_plan cascade;
