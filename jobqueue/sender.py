"""The ways in which an app's jobs are sent, in one place, so that `app.instrument` can put one that traces in its place."""

from __future__ import annotations

from jobqueue import client


class Sender:
    """Sends and nothing else: the verbs of `jobqueue.client` themselves, so that an app that is not traced pays nothing.

    `publish`, `upsert` and `send_flow` take the statement and its parameters, as `client.fetch` does.
    """

    __slots__ = ()

    send = staticmethod(client.send)
    send_many = staticmethod(client.send_many)
    publish = staticmethod(client.fetch)
    upsert = staticmethod(client.fetch)
    send_flow = staticmethod(client.fetch)
