"""The README's code as it stands: each block marked `<!-- test -->` runs beside a real server.

The folder it runs in is the one that the README has built by then: `feature_repo`, `models/buy/1` and its
`inference-config.yaml`. Only the port is another.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_README = Path(__file__).parents[2] / "README.md"
_TEXT = _README.read_text(encoding="utf-8")
_MARKED = re.compile(r"^<!-- test -->\n```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CONFIG = re.compile(r"^```yaml\n(serving:.*?)^```$", re.MULTILINE | re.DOTALL)
_PORT = "7064"
_LATE = ("DEADLINE_EXCEEDED", "DeadlineExceeded", "RESOURCE_EXHAUSTED", "ResourceExhausted")
BLOCKS = list(_MARKED.finditer(_TEXT))


def where(block: re.Match[str]) -> str:
    return f"line {_TEXT.count(chr(10), 0, block.start(2)) + 1}"


def folder_of_the_readme(shop: Any, folder: Path) -> Path:
    """What the README has made before it serves; returns the configuration."""
    found = _CONFIG.search(_TEXT)
    assert found is not None, "the README shows no inference-config.yaml"
    shop.copy_repo(folder)
    shutil.copytree(shop.folder / "bundles/buy/1", folder / "models/buy/1")
    config = folder / "inference-config.yaml"
    config.write_text(found[1], encoding="utf-8")
    return config


@pytest.fixture(scope="module")
def port(shop, servers, tmp_path_factory) -> Iterator[str]:
    config = folder_of_the_readme(shop, tmp_path_factory.mktemp("readme"))
    with servers() as serve:
        yield serve(config).address.rsplit(":", 1)[1]


def run(language: str, text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = folder / "bin/penstock"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f"#!{sys.executable}\nfrom penstock.cli import main\nmain()\n", encoding="utf-8")
    command.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    shell = [sys.executable, "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    return subprocess.run(shell, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(not BLOCKS, reason="no block of the README is marked <!-- test -->")
@pytest.mark.parametrize("block", BLOCKS, ids=where)
def test_the_block_of_the_readme(shop, port, tmp_path, block):
    language, text = block.groups()
    folder_of_the_readme(shop, tmp_path)
    for _ in range(3):  # it has the README's deadlines, and this machine may be busy
        done = run(language, text.replace(_PORT, port), tmp_path)
        if not any(word in done.stdout + done.stderr for word in _LATE):
            break
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "'code'" not in done.stdout, done.stdout
