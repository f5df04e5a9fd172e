"""procrastinate applications on this queue: `procrastinate.App(connector=JobqueueConnector("postgresql://…"))`.

Two ways, which can be mixed:

* the connector alone: everything of procrastinate goes on working, its worker and command line included; jobs live in
  `jobqueue.job`, are claimed ahead and settled in fenced batches;
* `jobqueue worker their.app`: our worker runs the application's tasks itself (`native.py`), with time-outs, processes,
  progress and results.

    procrastinate's App ── JobManager ── named query ──► queries.py: which one is it?
                                                           └► statements.py: our SQL for it, and its rows
                        stock Worker ── fetch_job, finish_job, retry_job … ──► backstage.py: claims ahead, fenced batches
"""

from jobqueue.procrastinate.connector import JobqueueConnector
from jobqueue.procrastinate.ids import job_id, job_uuid
from jobqueue.procrastinate.native import adopt
from jobqueue.procrastinate.outcomes import keep_results
from jobqueue.procrastinate.sync_connector import SyncJobqueueConnector
from jobqueue.procrastinate.task_options import options

__all__ = [
    "JobqueueConnector",
    "SyncJobqueueConnector",
    "adopt",
    "job_id",
    "job_uuid",
    "keep_results",
    "options",
]
