-- The only table without a primary key. With a publication that has it (one for all tables: change data capture, an upgrade by logical
-- replication) every claim from a queue with limits would fail with 55000. Only the catalog changes; the lock is one of an instant.
alter table jobqueue.admission_note replica identity full;
