"""What the examples of a page take for granted: helpers of the reader's own program, and jobs that are there.

A key is a page, or a page and the number of the block in front of which it runs. Every page has `app`, `dsn` and its own
`text`. `substitutes` replaces what a page abbreviates, such as ids.
"""

from __future__ import annotations

PRELUDES: dict[str, str] = {
    "README": """
import re, psycopg
from jobqueue import App
known = re.search("[0-9a-f-]{36}", text)[0]
with psycopg.connect(dsn, autocommit=True) as helper:
    helper.execute("select jobqueue.send('billing', '{}', jsonb_build_object('id', %s::text))", [known])
    helper.execute('''select jobqueue.fail(id, claim_token, '{"class": "permanent", "message": "no answer"}')
        from jobqueue.claim(array['billing'], gen_random_uuid(), 1)''')
""",
    "errors": "from jobqueue import App",
    "checkpoints": "from jobqueue import Job",
    "estimates": """
sent = await app.send("process_document", queue="process_document")
substitutes = {"0198…": str(sent.id)}
""",
    "flows": """
from jobqueue import Job
for job_type in ("scan", "parse", "report"):
    app.job(job_type)(lambda: None)
""",
    "flows 3": "from jobqueue import App; earlier = app; app = App(dsn)",
    "flows 4": "app = earlier",
    "statistics": "await app.create_queue('mail')",
    "tracking 2": """
from jobqueue import NullJob
job = NullJob()
""",
}

WAIVED: dict[str, str] = {
    "client 1": "needs a server; tests/api/test_client.py makes these calls to one",
    "client 2": "needs a server; tests/api/test_client.py makes these calls to one",
    "errors 1": "each line raises; tests/worker/test_worker.py::test_what_a_handler_raises_decides_how_its_attempt_ends",
}
"""Blocks that are not run, by page and number, and where the same is shown. A page says it in the block's info string."""
