// node example.mjs postgresql://user@host/database
//
// Sends three jobs (one of them in a transaction that is rolled back), works on what is there, and prints how it went.

import pg from 'pg';
import { progress, send } from './send.mjs';
import { HandlerError, Worker } from './worker.mjs';

// JOBQUEUE_DSN may also be a libpq string; pg reads URLs, PGHOST, PGPORT, PGUSER and PGDATABASE.
const pool = new pg.Pool(process.argv[2] ? { connectionString: process.argv[2] } : {});

const welcome = await send(pool, 'mail', { to: 'ada@example.com' }, { priority: 5, subject: 'person:ada' });
const broken = await send(pool, 'mail', { to: 'nobody' }, { singleton_key: 'nobody' });
const again = await send(pool, 'mail', { to: 'nobody' }, { singleton_key: 'nobody' });

const client = await pool.connect();
await client.query('begin');
await send(client, 'mail', { to: 'never sent' });
await client.query('rollback');
client.release();

const worker = new Worker(
  pool,
  {
    mail: async (job, signal) => {
      if (!job.payload.to.includes('@')) throw new HandlerError(`no address: ${job.payload.to}`, { errorClass: 'invalid' });
      await progress(pool, job, 1, 2, 'written');
      if (process.env.BEAT_TEST) {
        // as long as it takes a heartbeat to bring an order
        await new Promise((resolve, reject) => {
          const timer = setTimeout(resolve, 20_000);
          signal.addEventListener('abort', () => { clearTimeout(timer); reject(new Error(`asked to ${signal.reason}`)); });
          pool.query("select jobqueue.cancel($1, 'not needed any more')", [job.id]).catch(reject);
        });
      }
      return { sent_to: job.payload.to };
    },
  },
  { untilIdle: true, beatMs: process.env.BEAT_TEST ? 50 : undefined },
);
await worker.run();

const { rows } = await pool.query(
  'select id, status, result, error_class, error_message from jobqueue.jobs where id = any($1) order by priority desc',
  [[welcome.id, broken.id]],
);
console.log(JSON.stringify({ held: { id: again.id === broken.id, created: again.created, reason: again.reason }, jobs: rows }));
await pool.end();
