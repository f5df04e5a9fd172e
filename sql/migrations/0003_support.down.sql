-- Takes the subscriptions away; jobs that were published stay.
drop table jobqueue.subscription;
