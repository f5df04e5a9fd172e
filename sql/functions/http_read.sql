-- GET /jobs/{id}, for as many requests as came while a process was busy (api/reads.py).

-- http_read: many jobs, each as its own request may see it, in the order asked for. A transaction of this kind costs 200 us before it reads
-- anything (role, settings, plans looked at again); requests that share one pay that once, and their jobs 80 us each.
--   _role     as of http_context
--   _tenants  of each request: its setting holds while its job is read, so the policies decide for each by itself
--   _ids      the jobs
--   _etags    what each request has, one per line ("*": anything); null: nothing
--   _fields, _include, _traces   as of http_job_body, the same for all
-- Returns per request a row of http_job_state; no job: version is null. Index: job_pkey.
create or replace function jobqueue.http_read(
    _role text, _tenants text[], _ids uuid[], _etags text[], _fields text[], _include text[], _traces boolean)
returns table (etag text, version bigint, status text, alive boolean, due_in double precision, ends_in double precision, body text)
language plpgsql
as $$
#variable_conflict use_column
declare
    mine text := _tenants[1];
    state record;
begin
    perform jobqueue.http_context(_role, mine, true);
    for n in 1 .. coalesce(cardinality(_ids), 0) loop
        if _tenants[n] is distinct from mine then
            mine := _tenants[n];
            perform pg_catalog.set_config('jobqueue.tenants', coalesce(mine, ''), true);
        end if;
        -- Assigned, not selected: as a row source the function would cost 40 us more.
        state := jobqueue.http_job_state(_ids[n], string_to_array(_etags[n], E'\n'), _fields, _include, _traces);
        etag := state.etag;
        version := state.version;
        status := state.status;
        alive := state.alive;
        due_in := state.due_in;
        ends_in := state.ends_in;
        body := state.body;
        return next;
    end loop;
end
$$;
