-- The HTTP API: keys, quotas, tickets for streams.

create table jobqueue.api_key (
    id text collate "C" primary key,
    name text not null,
    -- SHA-256 of the whole key; its secret has 190 random bits, so nothing slower is needed
    secret_hash bytea not null,
    previous_hash bytea,
    previous_until timestamptz,
    tenants text[] not null,
    scopes text[] not null,
    subject text,
    act_as boolean not null default false,
    quota_reads int,
    quota_writes int,
    quota_streams int,
    created_at timestamptz not null default now(),
    created_by text not null,
    expires_at timestamptz,
    rotated_at timestamptz,
    revoked_at timestamptz,
    revoke_reason text,
    last_used_at timestamptz,
    constraint api_key_id_is_plain check (id ~ '^[A-Za-z0-9]{8,40}$'),
    constraint api_key_is_named check (name <> '' and length(name) <= 200),
    constraint api_key_hashes_are_sha256 check (length(secret_hash) = 32 and (previous_hash is null or length(previous_hash) = 32)),
    constraint api_key_overlap_has_an_end check ((previous_hash is null) = (previous_until is null)),
    constraint api_key_scopes_are_known check (
        cardinality(scopes) > 0 and scopes <@ array['jobs:read', 'jobs:write', 'jobs:act', 'metrics', 'admin']),
    constraint api_key_tenants_are_named check (
        cardinality(tenants) > 0 and array_position(tenants, '') is null and array_to_string(tenants, '') !~ '[,\x01-\x1f\x7f]'
        and ('*' <> all (tenants) or tenants = array['*'])),
    constraint api_key_quotas_are_positive check (least(quota_reads, quota_writes, quota_streams) > 0)
) with (fillfactor = 70);

-- One row: API processes read it once a second and forget what they knew of keys when the version is another one.
create table jobqueue.api_key_state (
    id boolean primary key default true,
    version bigint not null default 0,
    any_keys boolean not null default false,
    constraint api_key_state_is_one_row check (id)
) with (fillfactor = 50);
insert into jobqueue.api_key_state default values;

-- Requests of this hour, by owner (a key's id, or who a token names) and bucket. Half-full pages: every change is HOT.
create table jobqueue.quota_use (
    owner text collate "C" not null,
    bucket text collate "C" not null,
    window_ends timestamptz not null,
    used int not null,
    primary key (owner, bucket),
    constraint quota_use_bucket_is_known check (bucket in ('reads', 'writes', 'streams')),
    constraint quota_use_is_counted check (used >= 0)
) with (fillfactor = 50);

-- A ticket stands for a key in the address of a stream, once; an EventSource cannot send headers.
create table jobqueue.stream_ticket (
    hash bytea primary key,
    principal jsonb not null,
    path text not null,
    expires_at timestamptz not null,
    constraint stream_ticket_hash_is_sha256 check (length(hash) = 32)
);
create index stream_ticket_age on jobqueue.stream_ticket (expires_at);
