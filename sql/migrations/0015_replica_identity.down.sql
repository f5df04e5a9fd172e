alter table jobqueue.admission_note replica identity default;
