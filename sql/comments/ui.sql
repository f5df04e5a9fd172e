-- The dashboard: sessions of browsers.

comment on table jobqueue.ui_session is 'Browsers that are logged in to the dashboard; only hashes of their tokens.';
comment on column jobqueue.ui_session.hash is 'SHA-256 of the token in the browser''s cookie.';
comment on column jobqueue.ui_session.key_id is 'The API key that was shown at the login; its rights are the session''s.';
comment on column jobqueue.ui_session.key_hash is 'SHA-256 of that key as it was shown; with another secret the session ends.';
comment on column jobqueue.ui_session.created_at is 'When the login was.';
comment on column jobqueue.ui_session.last_used_at is 'When it was used last; at most a minute late.';
comment on column jobqueue.ui_session.expires_at is 'When it ends, the latest: 12 hours after the login, or with its key.';
comment on constraint ui_session_hashes_are_sha256 on jobqueue.ui_session is 'Hashes have 32 bytes.';
comment on function jobqueue.start_ui_session(bytea, text, bytea, interval) is 'Lets a browser in that has shown a key; null for a key that is not let in.';
comment on function jobqueue.find_ui_session(bytea) is 'The rights of who has a session''s token.';
comment on function jobqueue.end_ui_session(bytea) is 'Logs a browser out.';
comment on function jobqueue.unfinished_ids(int) is 'The ids among which all unfinished jobs are; null if they may be more than so many.';
comment on function jobqueue.http_unfinished(text, text, jsonb, timestamptz, uuid, int, text[]) is 'The unfinished jobs that a filter means, for the dashboard.';
