"""Files that this process holds open."""

from __future__ import annotations

from pathlib import Path


def deleted_files(folder: Path) -> list[str]:
    """Files of a folder that this process still holds though they have no name."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(link.readlink()))
        except OSError:
            continue  # the folder's own
    return [link for link in links if link.startswith(str(folder))]
