"""A relay between a client and the server that can fall silent, or swallow notifications as poolers do."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Iterator

from psycopg.conninfo import conninfo_to_dict, make_conninfo

NOTIFICATION = b"A"


class Relay:
    """Listens on a free loopback port and forwards to a server's Unix socket, each connection in two threads."""

    def __init__(self, dsn: str, *, drop_notifications: bool = False) -> None:
        target = conninfo_to_dict(dsn)
        self._target = f"{target['host']}/.s.PGSQL.{target.get('port', 5432)}"
        self._drop = drop_notifications
        self.flowing = threading.Event()
        self.flowing.set()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.dsn = make_conninfo(dsn, host="127.0.0.1", port=port, sslmode="disable", gssencmode="disable")
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Cut everything."""
        self.flowing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target)
                self._sockets += [client, server]
                threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
                threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while select.select([source], [], []) and (data := source.recv(65536)):
                self.flowing.wait()
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def _answer(self, source: socket.socket, target: socket.socket) -> None:
        pending = b""
        with contextlib.suppress(OSError, ValueError):
            while select.select([source], [], []) and (data := source.recv(65536)):
                self.flowing.wait()
                pending = self._send_messages(pending + data, target)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def _send_messages(self, data: bytes, target: socket.socket) -> bytes:
        while len(data) >= 5 and len(data) > (length := int.from_bytes(data[1:5], "big")):
            message, data = data[: length + 1], data[length + 1 :]
            if not (self._drop and message[:1] == NOTIFICATION):
                target.sendall(message)
        return data


@contextlib.contextmanager
def relay(dsn: str, *, drop_notifications: bool = False) -> Iterator[Relay]:
    """A relay in front of `dsn`, until the end of the block."""
    opened = Relay(dsn, drop_notifications=drop_notifications)
    try:
        yield opened
    finally:
        opened.close()
