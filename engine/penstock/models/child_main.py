"""The process that runs one Python entry point; `models/child.py` starts it.

It shares a block of memory with its parent (rows in, scores out) and has one socket: it says that it is
ready, then answers one packet per run (csrc/engine/child_channel.h has the layout of both). It ends when the
socket does, and the kernel ends it with the thread that started it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import socket
import struct
import sys
import traceback
from typing import Any

import numpy as np

from penstock.models.entry_point import MAX_ROWS, Model, make_model, scores_of, text_of, warm_up

CALL = struct.Struct("=II")  # sequence, rows
REPLY = struct.Struct("=III")  # sequence, failed, bytes of text
TEXT_BYTES = 1024
_PR_SET_PDEATHSIG = 1


def main() -> None:
    args = json.loads(sys.argv[1])
    _die_with_parent(args["parent"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, also for a terminal's Ctrl-C
    doorbell = socket.socket(fileno=args["socket"])
    doorbell.set_inheritable(False)
    doorbell.setblocking(True)
    try:
        model = make_model(args["entry_point"], args["folder"])
        width = warm_up(model, args["n_features"], args["width"])
    except BaseException as error:
        traceback.print_exc()
        _say(doorbell, {"error": text_of(error)[:TEXT_BYTES]})
        raise SystemExit(1) from None
    if args["memory"] is None:
        _say(doorbell, {"width": width})
        return
    memory = mmap.mmap(args["memory"], args["bytes"])
    os.close(args["memory"])
    _say(doorbell, {"width": width})
    _serve(doorbell, memory, model, args)


def _serve(doorbell: socket.socket, memory: mmap.mmap, model: Model, args: dict[str, Any]) -> None:
    n_features, width = args["n_features"], args["width"]
    rows = np.frombuffer(memory, np.float32, MAX_ROWS * n_features).reshape(MAX_ROWS, n_features)
    scores = np.frombuffer(memory, np.float64, MAX_ROWS * width, args["scores"]).reshape(MAX_ROWS, width)
    while packet := doorbell.recv(CALL.size):
        sequence, n = CALL.unpack(packet)
        text = b""
        try:
            scores[:n] = scores_of(model, rows[:n], width)
        except Exception as error:
            text = text_of(error).encode("ascii", "backslashreplace")[:TEXT_BYTES] or b"an error"
            memory[args["text"] : args["text"] + len(text)] = text
        try:
            doorbell.send(REPLY.pack(sequence, int(bool(text)), len(text)))
        except BrokenPipeError:
            return


def _say(doorbell: socket.socket, message: dict[str, Any]) -> None:
    doorbell.send(json.dumps(message).encode())


def _die_with_parent(parent: int) -> None:
    """The parent's kill -9 is this process's too."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        raise SystemExit(1)
