// A worker for jobqueue in Node: claim, heartbeat, complete, fail. Everything else is decided by the database.
//
//   claim ──► handler ──► complete | fail | snooze        heartbeat: every 5 s, keeps the leases and brings orders
//
// Bounds: a lease is 30 s unless the queue says otherwise, so a beat every 5 s may fail a few times. Deliver at least once:
// a worker that dies loses its lease, and the job runs again.

import { randomUUID } from 'node:crypto';

const BEAT_MS = 5_000;
const POLL_MS = 5_000;

/** What a handler throws to have its error class known: transient, permanent, quota or invalid. */
export class HandlerError extends Error {
  constructor(message, { errorClass = 'permanent', code } = {}) {
    super(message);
    this.errorClass = errorClass;
    this.code = code;
  }
}

/** Run jobs until stop() is called, or until nothing is ready if `untilIdle` is set. */
export class Worker {
  #running = new Map();
  #stopped = false;
  #wake = () => {};

  /**
   * @param pool      a pg.Pool; its user needs the role jobqueue_worker
   * @param handlers  { job_type: async (job, signal) => result }
   */
  constructor(pool, handlers, { queues, concurrency = 10, untilIdle = false, beatMs = BEAT_MS } = {}) {
    this.pool = pool;
    this.handlers = handlers;
    this.queues = queues ?? Object.keys(handlers);
    this.concurrency = concurrency;
    this.untilIdle = untilIdle;
    this.beatMs = beatMs;
    this.id = randomUUID();
  }

  stop() {
    this.#stopped = true;
    this.#wake();
  }

  async run() {
    const beat = setInterval(() => this.#beat(), this.beatMs);
    try {
      while (!this.#stopped) {
        const jobs = await this.#claim();
        for (const job of jobs) this.#start(job);
        if (jobs.length === 0 && this.#running.size === 0 && this.untilIdle) break;
        // Go on when a slot is free; without work, look again after a while.
        if (jobs.length === 0 || this.#running.size >= this.concurrency) await this.#rest();
      }
      await Promise.all([...this.#running.values()].map((running) => running.done));
    } finally {
      clearInterval(beat);
    }
  }

  async #claim() {
    const free = this.concurrency - this.#running.size;
    if (free <= 0) return [];
    const { rows } = await this.pool.query('select * from jobqueue.claim($1::text[], $2::uuid, $3::int, $4::jsonb)', [
      this.queues, this.id, free, JSON.stringify({ job_types: Object.keys(this.handlers) }),
    ]);
    return rows;
  }

  #start(job) {
    const abort = new AbortController();
    const running = { job, abort };
    this.#running.set(job.id, running);
    running.done = this.#work(job, abort.signal).finally(() => {
      this.#running.delete(job.id);
      this.#wake();
    });
  }

  async #work(job, signal) {
    let call;
    try {
      const result = await this.handlers[job.job_type](job, signal);
      call = ['select jobqueue.complete($1, $2, $3::jsonb)', [job.id, job.claim_token, JSON.stringify(result ?? null)]];
    } catch (error) {
      call = signal.aborted && signal.reason !== 'lost'
        ? ['select jobqueue.acknowledge($1, $2)', [job.id, job.claim_token]]
        : ['select jobqueue.fail($1, $2, $3::jsonb)', [job.id, job.claim_token, JSON.stringify(describe(error))]];
    }
    try {
      await this.pool.query(...call);
    } catch (error) {
      // JQ409: the lease was lost, and another worker has the job. Anything else: the lease will run out, and it runs again.
      if (error.code !== 'JQ409') console.error(`job ${job.id}: its end was not written: ${error.message}`);
    }
  }

  async #beat() {
    const jobs = [...this.#running.values()].map(({ job }) => ({ id: job.id, token: job.claim_token, started: true }));
    try {
      const { rows } = await this.pool.query('select id, command from jobqueue.heartbeat($1::uuid, $2::jsonb)', [
        this.id, JSON.stringify(jobs),
      ]);
      for (const { id, command } of rows) {
        if (id === null) this.stop();
        else this.#running.get(id)?.abort.abort(command);
      }
    } catch (error) {
      console.error(`no heartbeat: ${error.message}`);
    }
  }

  #rest() {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, POLL_MS);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}

function describe(error) {
  return {
    class: error.errorClass ?? 'transient',
    code: error.code ?? error.name,
    message: error.message,
    detail: error.stack,
  };
}
