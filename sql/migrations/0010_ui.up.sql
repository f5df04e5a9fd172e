-- The dashboard: sessions of browsers.

-- A browser that showed an API key has a token; the key itself stays nowhere but with its owner.
create table jobqueue.ui_session (
    hash bytea primary key,
    key_id text collate "C" not null,
    -- of the key as it was shown: a session ends with the secret that opened it, also when a key is rotated
    key_hash bytea not null,
    created_at timestamptz not null default now(),
    last_used_at timestamptz not null default now(),
    expires_at timestamptz not null,
    constraint ui_session_hashes_are_sha256 check (length(hash) = 32 and length(key_hash) = 32)
) with (fillfactor = 70);

-- those that have ended, to be removed at the next login
create index ui_session_age on jobqueue.ui_session (expires_at);

-- jobs that somebody has paused; no index of jobs leads to them
create index audit_pauses on jobqueue.audit (id) where action = 'pause' and job_id is not null;
