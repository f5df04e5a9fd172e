// Sending from Node. The job belongs to the client's transaction: commit and it is there, roll back and it never was.

/**
 * Send one job.
 * @param client   a pg Client or Pool; inside of a transaction: the Client that has it open. Role jobqueue_producer
 * @param options  of send: priority, run_at, delay, singleton_key, tenant, …
 * @returns {{id: string, created: boolean, reason: string|null}}
 */
export async function send(client, queue, payload = {}, options = {}) {
  const { rows } = await client.query('select id, created, reason from jobqueue.send($1, $2::jsonb, $3::jsonb)', [
    queue, JSON.stringify(payload), JSON.stringify(options),
  ]);
  return rows[0];
}

/** Report progress of a claimed job; answers what is asked of it: 'cancel', 'pause' or null. */
export async function progress(client, job, done, total, message) {
  const { rows } = await client.query('select jobqueue.progress($1, $2, null, $3, $4::jsonb) as command', [
    job.id, job.claim_token, message, JSON.stringify({ done, total }),
  ]);
  return rows[0].command;
}
