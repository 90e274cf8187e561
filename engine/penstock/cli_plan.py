"""What `penstock apply` shows: the changes as lines, and the bundles that they are held against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.errors import PenstockError

if TYPE_CHECKING:
    from penstock.features.changes import BundleFacts


def bundles_of(data_dir: Path, config: Path | None) -> list[BundleFacts]:
    """What the bundles of a data folder and a configuration say of their features. Broken ones stay out."""
    from penstock.config import load_config
    from penstock.features.changes import BundleFacts
    from penstock.models.manifest import MANIFEST, read_manifest

    folders = [file.parent for file in sorted((data_dir / "models").glob(f"*/*/{MANIFEST}"))]
    if config is not None:
        folders += [model.path for model in load_config(config).models.values() if model.path is not None]
    made: dict[tuple[str, str], BundleFacts] = {}
    for folder in folders:
        try:
            manifest = read_manifest(folder)
        except PenstockError:
            continue
        facts = BundleFacts(
            manifest.name,
            manifest.version,
            manifest.service,
            manifest.fingerprint,
            str(folder),
            manifest.text_counts,
        )
        made.setdefault((facts.name, facts.version), facts)
    return list(made.values())


def change_lines(changes: Mapping[str, Any]) -> list[str]:
    """What `apply` changes, as lines: by view, feature, service and source, then what it breaks."""
    lines = []
    for kind, key, parts_key in (
        ("view", "views", "view_parts"),
        ("service", "services", "service_features"),
    ):
        for name, change in changes[key].items():
            lines.append(f"{change:>8}  {kind} {name}")
            parts = changes.get(parts_key, {}).get(name, {})
            lines += [f"{'':>10}  {part_change} {part}" for part, part_change in parts.items()]
    for key, columns in changes.get("sources", {}).items():
        lines.append(f" changed  source {key}")
        lines += [f"{'':>10}  column {column}: {change}" for column, change in columns.items()]
    lines += [f" retired  {name}" for name in changes.get("retired", [])]
    for found in changes.get("breaks", []):
        lines.append(f"  breaks  {found['kind']} {found['name']}: {found['reason']}")
    return lines
