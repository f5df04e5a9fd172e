drop index jobqueue.audit_pauses;
drop table jobqueue.ui_session;
