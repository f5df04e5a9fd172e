alter table jobqueue.worker drop column stuck;
