-- sees_tenant: whether this transaction may see and act for a tenant. The setting jobqueue.tenants is a list ('a,b') or '*'.
-- Unset means all for the roles that have functions only (producers, workers, support), and none for jobqueue_api and for logins that
-- are nothing but its members.
-- After a transaction that set it locally the setting is '' and not null: treated as unset.
create or replace function jobqueue.sees_tenant(_tenant text)
returns boolean
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
    select case coalesce(current_setting('jobqueue.tenants', true), '')
        when '' then not jobqueue.is_only_api(
            case coalesce(current_setting('role', true), 'none') when 'none' then session_user else current_setting('role') end::name)
        when '*' then true
        else _tenant = any (string_to_array(current_setting('jobqueue.tenants', true), ','))
    end
$$;

-- is_only_api: whether a role has its rights from jobqueue_api alone.
create or replace function jobqueue.is_only_api(_role name)
returns boolean
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
    select _role = 'jobqueue_api' or (
        not (select r.rolsuper from pg_roles r where r.rolname = _role)
        and pg_has_role(_role, 'jobqueue_api', 'member')
        and not pg_has_role(_role, 'jobqueue_support_readonly', 'member')
        and not pg_has_role(_role, 'jobqueue_worker', 'member')
        and not pg_has_role(_role, (select n.nspowner from pg_namespace n where n.nspname = 'jobqueue'), 'member'))
$$;

-- visible_tenants: for the policies on tables: the tenants of this transaction, null for all. Read once per query, so that the
-- index on tenant is used (measured: 0.03-0.9 ms instead of 16 ms with a function per row).
create or replace function jobqueue.visible_tenants()
returns text[]
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
    select string_to_array(nullif(current_setting('jobqueue.tenants', true), ''), ',')
$$;

create or replace function jobqueue.sees_all_tenants()
returns boolean
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(current_setting('jobqueue.tenants', true), '') = '*'
$$;
