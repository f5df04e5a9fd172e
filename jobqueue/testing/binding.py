"""An application's own `App`, for a while on another database."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jobqueue.app import App


@contextlib.contextmanager
def bound(app: App, dsn: str) -> Iterator[App]:
    """Let an app work on another database inside the block: `with bound(app, dsn):`.

    Its settings stay, but for those that lead to a database or narrow a worker: `JOBQUEUE_LISTEN_DSN`,
    `JOBQUEUE_POOLER` and `JOBQUEUE_QUEUES` do not count. Its connections are closed at the end. Not for two blocks at
    the same time.
    """
    before = (app._dsn, app._settings, app._connections, app._checked)
    changes = {"dsn": dsn, "listen_dsn": None, "pooler": False, "queues": None}
    app._dsn, app._connections, app._checked = dsn, None, False
    app._settings = app.settings.model_copy(update=changes)
    try:
        yield app
    finally:
        _close(app)
        app._dsn, app._settings, app._connections, app._checked = before


def _close(app: App) -> None:
    if app._connections is not None:
        app._connections.close_blocking()
        # The event loop of the test may be gone: nothing can be awaited here.
        app._connections._abandon()
