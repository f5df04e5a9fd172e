"""A client of the HTTP API, blocking and asynchronous; needs the extra `client` (`pip install jobqueue[client]`).

```python
from jobqueue.http import Client

with Client("https://jobs.example.org", key="jq_…") as client:
    sent = client.send("indexing", {"path": "."})
    job = client.wait(sent.id, timeout=60)
```
"""

try:
    import httpx2  # noqa: F401
except ImportError as error:
    raise ImportError("jobqueue.http needs httpx2: pip install jobqueue[client]") from error

from jobqueue.http.aclient import AsyncClient
from jobqueue.http.client import Client
from jobqueue.http.models import Page, RemoteJob, SentJob
from jobqueue.http.problems import ServiceUnavailable, Unauthorized

__all__ = ["AsyncClient", "Client", "Page", "RemoteJob", "SentJob", "ServiceUnavailable", "Unauthorized"]
