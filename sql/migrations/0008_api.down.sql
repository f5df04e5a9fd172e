-- Takes keys, quotas and tickets away: the API is for this machine only again.
drop table jobqueue.stream_ticket;
drop table jobqueue.quota_use;
drop table jobqueue.api_key_state;
drop table jobqueue.api_key cascade;
