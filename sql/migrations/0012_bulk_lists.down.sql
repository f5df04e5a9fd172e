alter table jobqueue.bulk_operation drop column filter, drop column total;
