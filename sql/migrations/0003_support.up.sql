-- Subscriptions: which queues get a job when an event is published.

create table jobqueue.subscription (
    event text collate "C" not null,
    queue text collate "C" not null,
    created_at timestamptz not null default now(),
    primary key (event, queue),
    constraint subscription_event_is_plain check (event ~ '^[A-Za-z0-9_./:-]{1,200}$')
);
