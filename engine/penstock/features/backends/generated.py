"""Modules of generated text, kept as files: numba and Triton read their functions' source, and cache by it.

A module is named after the digest of its text, so equal programs share one file, now and in later processes.
The folder is $PENSTOCK_CODE_CACHE, else penstock/code in $XDG_CACHE_HOME or ~/.cache; where that cannot be
written or others can write, a temporary folder that ends with the process. Any thread may call.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType

_lock = threading.Lock()


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="penstock-code-")


def folder() -> Path:
    """Where generated modules lie; it is made if need be, for its owner alone."""
    home = os.environ.get("PENSTOCK_CODE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(home) if home else Path(base).expanduser() / "penstock" / "code"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
        if os.access(path, os.W_OK) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return path  # nobody else can put code there
    except OSError:
        pass
    return Path(_temporary().name)


def digest(text: str) -> str:
    """SHA-256 (hex) of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def load(prefix: str, text: str) -> ModuleType:
    """The module of that text; it is written when it is new and run when this process lacks it."""
    name = f"penstock_{prefix}_{digest(text)[:24]}"
    with _lock:
        if name in sys.modules:
            return sys.modules[name]
        path = folder() / f"{name}.py"
        if not path.exists() or path.read_text("utf-8") != text:
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(text, "utf-8")
            part.replace(path)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module
