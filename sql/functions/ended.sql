-- What the end of a job brings about besides. Most jobs have no flag and never come here.

-- after_end: called in the transaction that ended the jobs, for those with any flag (settle_flags):
--   2    others wait for it: they are released, or end as their edges ask, generation by generation
--   4    it is the witness of a batch, which may have ended with it
--   1, 16  it is kept for no time once completed (1) or ended otherwise (16): it goes at once, if that still holds (whoever sent it may have
--        read the queue before it was changed; retention takes what should have gone at once by such a change). Members of a flow or of a batch are left to
--        retention: taken one by one out of the counts of their flow or batch they would queue for one row. So is what holds a slot until its
--        time is over, and the failed head of a key in strict order for which others wait
-- Index: job_pkey.
create or replace function jobqueue.after_end(_ids uuid[])
returns void
language plpgsql
set search_path = pg_catalog, jobqueue, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    ended uuid[] := _ids;
    flags int;
    parents uuid[];
    batches uuid[];
    generation int := 1;
begin
    while ended is not null loop
        select bit_or(j.settle_flags), array_agg(j.id) filter (where j.settle_flags & 2 <> 0),
            array_agg(distinct j.batch_id) filter (where j.settle_flags & 4 <> 0)
        into flags, parents, batches
        from job j
        where j.id = any (ended);
        if batches is not null then
            perform look_at_batch(b) from unnest(batches) b;
        end if;
        if flags & 17 <> 0 then
            delete from job j
            using queue q
            where j.id = any (ended)
                and q.name = j.queue
                and j.settle_flags & 514 = 0
                and j.batch_id is null
                and j.held_key is null
                and not (j.settle_flags & 8 <> 0 and has_followers(j))
                and j.settle_flags & case j.status when 'completed' then 1 else 16 end <> 0
                and stamped_flags(j, q) & case j.status when 'completed' then 1 else 16 end <> 0
                and j.status in ('completed', 'failed', 'cancelled', 'skipped');
        end if;
        ended := case when parents is not null then end_parents(parents, generation > 1) end;
        generation := generation + 1;
    end loop;
end
$$;
