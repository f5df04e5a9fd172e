-- api_keys: who may use the HTTP API; never a secret.
create or replace view jobqueue.api_keys with (security_invoker = true) as
select k.id::text as id, k.name,
    case
        when k.revoked_at is not null then 'revoked'
        when k.expires_at <= now() then 'expired'
        when k.previous_until > now() then 'rotating'
        else 'active' end as state,
    k.tenants, k.scopes, k.subject, k.act_as, k.quota_reads, k.quota_writes, k.quota_streams, k.created_at, k.created_by, k.expires_at,
    k.last_used_at, k.rotated_at, k.previous_until, k.revoked_at, k.revoke_reason
from jobqueue.api_key k;
