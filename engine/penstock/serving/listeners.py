"""Listening sockets of the server: bound before anything is served, so that every fault is told at once.

A Unix socket's file that nobody listens on is replaced; one that somebody does is an error. At exit the file
is removed if it is still ours.

Several processes serve one TCP port by SO_REUSEPORT: one reserves it (`reserve_all`: bound, not listening),
and each listens on it with a socket of its own (`share_all`), so that the kernel spreads the connections
and takes a dead process's socket out. A Unix socket is one socket that all of them accept from.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from penstock.errors import FailedPreconditionError, InvalidArgumentError
from penstock.serving.protocol import Address, parse_address

_KEEPALIVE_IDLE = 60  # seconds without traffic before the kernel asks whether a peer is still there
_LONGEST_UNIX_PATH = 107
_BACKLOG = 1024


@dataclass
class Listener:
    """A listening socket. `address` has the real port."""

    address: Address
    socket: socket.socket
    inode: tuple[int, int] | None = None  # of the Unix socket's file, when it was made

    def close(self) -> None:
        """Close the socket and remove its file."""
        self.socket.close()
        if self.address.path is None:
            return
        path = Path(self.address.path)
        with contextlib.suppress(OSError):
            made = path.stat()
            if (made.st_dev, made.st_ino) == self.inode:
                path.unlink()


def bind_all(addresses: list[str]) -> list[Listener]:
    """Bind every address, or none. Raises InvalidArgumentError or FailedPreconditionError."""
    made: list[Listener] = []
    try:
        for text in addresses:
            address = parse_address(text)
            if address.path is not None:
                made.append(_bind_unix(address.path))
            else:
                made.extend(_bind_tcp(address))
    except BaseException:
        for listener in made:
            listener.close()
        raise
    return made


def reserve_all(addresses: list[str]) -> list[Listener]:
    """As `bind_all`, but TCP ports are only kept for the `share_all` of processes of this user."""
    made: list[Listener] = []
    try:
        for text in addresses:
            address = parse_address(text)
            if address.path is not None:
                made.append(_bind_unix(address.path))
                continue
            for listener in (probed := _bind_tcp(address)):
                listener.close()  # nobody listens there, also no other server that shares its port
            port = probed[0].address.port if probed else address.port
            made.extend(_bind_tcp(replace(address, port=port), share=True, listen=False))
    except BaseException:
        for listener in made:
            listener.close()
        raise
    return made


def share_all(addresses: list[str], inherited: dict[str, int]) -> list[Listener]:
    """Listen on reserved TCP ports, and on the Unix sockets whose descriptors were inherited, by address."""
    made: list[Listener] = []
    try:
        for text in addresses:
            address = parse_address(text)
            if address.path is None:
                made.extend(_bind_tcp(address, share=True))
            else:
                made.append(Listener(address, socket.socket(fileno=inherited[text])))
    except BaseException:
        for listener in made:
            listener.close()
        raise
    return made


def _bind_tcp(address: Address, *, share: bool = False, listen: bool = True) -> list[Listener]:
    host, port = address.host or "", address.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InvalidArgumentError(f"cannot listen on {address}: {error.strerror}") from error
    made: list[Listener] = []
    try:
        for family, kind, proto, _, where in dict.fromkeys(found):
            if family not in (socket.AF_INET, socket.AF_INET6):
                continue
            sock = socket.socket(family, kind, proto)
            made.append(Listener(address, sock))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if share:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # Accepted sockets inherit these.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE)
            sock.bind((where[0], port, *where[2:]))
            if listen:
                sock.listen(_BACKLOG)  # here, as two sockets that do not listen could bind one port
            port = sock.getsockname()[1]  # port 0: the same one for every family
            made[-1].address = replace(address, port=port)
    except OSError as error:
        for listener in made:
            listener.close()
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise FailedPreconditionError(f"cannot listen on {replace(address, port=port)}: {reason}") from error
    return made


def _bind_unix(path: str) -> Listener:
    if len(path.encode()) > _LONGEST_UNIX_PATH:
        raise InvalidArgumentError(
            f"cannot listen on unix://{path}: the path has {len(path.encode())} bytes; "
            f"expected at most {_LONGEST_UNIX_PATH}"
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(path)
        sock.listen(_BACKLOG)  # at once: a file that nobody listens on is taken for stale
        made = Path(path).stat()
    except OSError as error:
        sock.close()
        raise FailedPreconditionError(f"cannot listen on unix://{path}: {error.strerror}") from error
    except BaseException:
        sock.close()
        raise
    return Listener(Address(path=path), sock, (made.st_dev, made.st_ino))


def _remove_stale(path: str) -> None:
    """Remove the socket file that a dead server left; an error if it is anything else."""
    try:
        mode = Path(path).lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FailedPreconditionError(f"cannot listen on unix://{path}: the file exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        except BlockingIOError:  # its queue of connections is full: somebody does listen
            pass
    raise FailedPreconditionError(f"cannot listen on unix://{path}: another process is listening there")
