"""Children that are killed: forked from a process that has loaded everything, so that each starts at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

_BEFORE = """
import json as _json, os as _os, sys as _sys
def say(*words):
    # One write, which comes whole or not at all, whatever the interpreter buffers and whoever else writes.
    _os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""
_AFTER = """
for _line in _sys.stdin:
    _pid = _os.fork()
    if _pid == 0:
        try:
            child(*_json.loads(_line))
        finally:
            _os._exit(1)
    say("child", _pid)
    say("end", _os.waitpid(_pid, 0)[1])
"""


class Forked:
    """Runs `child(...)` of a script again and again."""

    def __init__(self, script: str) -> None:
        """The script imports all that is needed, starts no thread and defines `child`, which calls `say`."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BEFORE + script + _AFTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def killed(self, *arguments: Any, lines: int, seconds: float = 0.0) -> list[str]:
        """What a child with these arguments said until it was killed, `seconds` after so many lines."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(arguments) + "\n")
        process.stdin.flush()
        found: list[str] = []
        pid = None
        while True:
            line = process.stdout.readline().strip()
            assert line, "the process has ended"
            word, _, rest = line.partition(" ")
            if word == "child":
                pid = int(rest)
            elif word == "end":
                assert int(rest) == signal.SIGKILL, "it ended by itself"
                return found
            else:
                found.append(line)
            if pid is not None and len(found) >= lines:
                time.sleep(seconds)  # not to wait for something: to hit it anywhere
                os.kill(pid, signal.SIGKILL)
                pid = None

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
