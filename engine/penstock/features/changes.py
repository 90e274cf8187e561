"""What the definitions in force change against those that `apply` recorded, and what that would break.

Pure functions of the definitions, the registry's state and what is known of model bundles; the features know
bundles only as the facts that a caller gives.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.errors import PenstockError
from penstock.features.definitions import FeatureService, FeatureView
from penstock.features.expressions import digest
from penstock.features.fit import rank_arguments
from penstock.features.registry import RegistryState
from penstock.features.source_definitions import Source
from penstock.features.source_reading import raw_schema
from penstock.features.source_schema import check_declared, found_schema, schema_changes

if TYPE_CHECKING:
    from penstock.features.plan import ServicePlan


@dataclass(frozen=True)
class BundleFacts:
    """What a model bundle says of its features: the service and the fingerprint of its plan, None without.

    `text_counts`: see `ServicePlan.fits`.
    """

    name: str
    version: str
    service: str | None
    fingerprint: str | None
    path: str = ""
    text_counts: Mapping[tuple[str, str], int] | None = None

    @property
    def label(self) -> str:
        """NAME/VERSION."""
        return f"{self.name}/{self.version}"


@dataclass(frozen=True)
class Break:
    """Something that would not work any more: a "bundle", "service", "view" or "source", and why."""

    kind: str
    name: str
    reason: str


@dataclass(frozen=True)
class DefinitionChanges:
    """What `apply` changes, or has changed, in the registry.

    Attributes:
        views, services: "added", "changed" or "removed", by name.
        view_parts: what has changed in each changed view, by "feature NAME", "source", "ttl", "entities" or
            "fit_until".
        service_features: the features that each changed service gains ("added"), loses ("removed"), or has
            in another place ("moved").
        sources: what became of the columns of each source, by column: see `schema_changes`.
        breaks: what does not work with the definitions in force.
    """

    views: dict[str, str]
    services: dict[str, str]
    view_parts: dict[str, dict[str, str]] = field(default_factory=dict)
    service_features: dict[str, dict[str, str]] = field(default_factory=dict)
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    breaks: tuple[Break, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.views or self.services or self.sources)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "breaks": [asdict(found) for found in self.breaks]}


def declared(
    views: Mapping[str, FeatureView], services: Mapping[str, FeatureService], fit_until_us: int | None
) -> dict[str, dict[str, Any]]:
    """What `apply` records of the definitions, but for what only the sources tell."""
    made: dict[str, dict[str, Any]] = {"views": {}, "services": {}, "view_parts": {}, "service_features": {}}
    for name, view in views.items():
        ranks = bool(rank_arguments(view))
        parts = [view.fingerprint()] + [fit_until_us] * ranks
        made["views"][name] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        made["view_parts"][name] = {
            **{f"feature {feature}": value.fingerprint() for feature, value in view.features.items()},
            "source": digest(view.source.describe()),
            "ttl": str(view.ttl_us),
            "entities": digest([[e.name, list(e.join_keys)] for e in view.entities]),
            **({"fit_until": str(fit_until_us)} if ranks else {}),
        }
    for name, service in services.items():
        made["services"][name] = service.fingerprint()
        made["service_features"][name] = list(service.features)
    return made


def changes(
    state: RegistryState,
    now: Mapping[str, Mapping[str, Any]],
    schemas: Mapping[str, Mapping[str, str]],
    breaks: Iterable[Break] = (),
) -> DefinitionChanges:
    """Compare.

    Args:
        state: with what was recorded.
        now: the definitions in force, as `declared` gives them.
        schemas: of each source that can be read, by its key.
        breaks: what is known to break for other reasons.
    """
    views = _diff(state.recorded("views"), now["views"])
    services = _diff(state.recorded("services"), now["services"])
    before, after = state.recorded("view_parts"), now["view_parts"]
    view_parts = {
        name: _diff(before[name], after[name])
        for name, change in views.items()
        if change == "changed" and name in before
    }
    old, new = state.recorded("service_features"), now["service_features"]
    service_features = {
        name: _moves(old[name], new[name])
        for name, change in services.items()
        if change == "changed" and name in old
    }
    lost = [
        Break("service", name, f"loses the feature '{ref}'")
        for name, found in service_features.items()
        for ref, change in found.items()
        if change == "removed"
    ]
    recorded = state.recorded("sources")
    sources = {
        key: found
        for key, schema in sorted(schemas.items())
        if key in recorded and (found := schema_changes(recorded[key], schema))
    }
    return DefinitionChanges(views, services, view_parts, service_features, sources, (*lost, *breaks))


def service_breaks(services: Mapping[str, FeatureService], views: Mapping[str, FeatureView]) -> list[Break]:
    """Services that list a feature which no view has; `apply` refuses them."""
    found = []
    for name, service in services.items():
        request = service.request
        for ref, base in zip(service.features, service.base_refs):
            owner, short = base.split(":")
            if request is not None and owner == request.name:
                continue
            if owner not in views or short not in views[owner].features:
                found.append(Break("service", name, f"lists '{ref}', which no view has"))
    return found


def source_breaks(sources: Iterable[Source], base: Path) -> tuple[dict[str, dict[str, str]], list[Break]]:
    """The schemas that sources have now, by key, and those that cannot be read or are not as declared."""
    schemas: dict[str, dict[str, str]] = {}
    breaks = []
    for source in {source.key: source for source in sources}.values():
        try:
            schema = raw_schema(source, base)
            check_declared(source, schema)
            schemas[source.key] = found_schema(source, schema)
        except (PenstockError, OSError) as error:
            breaks.append(Break("source", source.name, str(error)))
    return schemas, breaks


def bundle_breaks(
    bundles: Sequence[BundleFacts],
    services: Iterable[str],
    plans: Mapping[str, ServicePlan],
    faults: Mapping[str, str],
) -> list[Break]:
    """Bundles that would not be served.

    Args:
        plans: of each service that compiles.
        faults: why each of the others does not.
    """
    known = set(services)
    found = []
    for bundle in bundles:
        service = bundle.service
        if service is None:
            continue
        if service not in known:
            found.append(Break("bundle", bundle.label, f"its service '{service}' is not defined"))
        elif service in faults:
            found.append(Break("bundle", bundle.label, f"its service '{service}': {faults[service]}"))
        elif not plans[service].fits(bundle.fingerprint, bundle.text_counts):
            reason = (
                f"was trained on service '{service}' with fingerprint {str(bundle.fingerprint)[:12]}; "
                f"it has {plans[service].fingerprint[:12]}: train it again"
            )
            found.append(Break("bundle", bundle.label, reason))
    return found


def _diff(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    found = {name: "removed" for name in before if name not in after}
    for name, fingerprint in after.items():
        if before.get(name) != fingerprint:
            found[name] = "changed" if name in before else "added"
    return dict(sorted(found.items()))


def _moves(before: Sequence[str], after: Sequence[str]) -> dict[str, str]:
    found = {ref: "removed" for ref in before if ref not in after}
    found |= {ref: "added" for ref in after if ref not in before}
    kept = [ref for ref in after if ref in before]
    was = [ref for ref in before if ref in after]
    found |= {ref: "moved" for ref, old in zip(kept, was) if ref != old}
    return found
