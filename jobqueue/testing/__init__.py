"""Testing applications: a real PostgreSQL, and what a test wants to do with its jobs.

```
fixtures (plugin.py)   jobqueue_app ─► jobqueue_dsn ─► jobqueue_template ─► jobqueue_server
what to do             drain (run all that is ready) · inline (run at once) · frozen (stop the clock) · travel (let time pass)
what to look at        assert_sent · assert_not_sent · sent_jobs
```
Nothing here pretends to be a database. docs/guide/testing.md begins with an example.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobqueue.testing.binding import bound as bound
    from jobqueue.testing.clock import travel as travel
    from jobqueue.testing.databases import Databases as Databases
    from jobqueue.testing.draining import Drained as Drained
    from jobqueue.testing.draining import drain as drain
    from jobqueue.testing.draining import drain_sync as drain_sync
    from jobqueue.testing.freezing import Clock as Clock
    from jobqueue.testing.freezing import frozen as frozen
    from jobqueue.testing.freezing import unfreeze as unfreeze
    from jobqueue.testing.inlining import inline as inline
    from jobqueue.testing.sent import assert_not_sent as assert_not_sent
    from jobqueue.testing.sent import assert_sent as assert_sent
    from jobqueue.testing.sent import sent_jobs as sent_jobs
    from jobqueue.testing.servers import temporary_server as temporary_server

# No module may have the name of what it holds: once imported, it would stand in its place here.
_HOME = {
    "Clock": "freezing",
    "Databases": "databases",
    "Drained": "draining",
    "assert_not_sent": "sent",
    "assert_sent": "sent",
    "bound": "binding",
    "drain": "draining",
    "drain_sync": "draining",
    "frozen": "freezing",
    "inline": "inlining",
    "sent_jobs": "sent",
    "temporary_server": "servers",
    "travel": "clock",
    "unfreeze": "freezing",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Imported when first used: pytest loads the plugin of every installed package."""
    if name not in _HOME:
        raise AttributeError(f"module 'jobqueue.testing' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jobqueue.testing.{_HOME[name]}"), name)
    globals()[name] = value
    return value
