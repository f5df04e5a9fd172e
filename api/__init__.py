"""The HTTP API of jobqueue: a Starlette application, made by `create_app`.

```
operation table (operations.py)  ─►  routes, checks of the request, OpenAPI document
request  ─►  endpoint.py: who asks, what is asked  ─►  jobs.py, probes.py  ─►  one SQL function (sql/functions/http.sql)
?wait=   ─►  hub.py: one LISTEN connection per process, no connection per waiting request
```
"""

from jobqueue.api.app import create_app

__all__ = ["create_app"]
