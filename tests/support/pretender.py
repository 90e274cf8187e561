"""Peers that only pretend to be servers."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager

import msgpack


@contextmanager
def pretender(*replies):
    """A listener that handles one connection per entry of `replies`: reads a request, sends bytes, closes.

    Yields its address and the list of the requests it got.
    """
    got = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept():
            for reply in replies:
                try:
                    peer = listener.accept()[0]
                except OSError:
                    return
                with peer:
                    unpacker = msgpack.Unpacker()
                    while request := peer.recv(1 << 16):
                        unpacker.feed(request)
                        message = next(unpacker, None)
                        if message is not None:
                            got.append(message)
                            peer.sendall(reply)
                            break

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}", got
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(30)


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"
