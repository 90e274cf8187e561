"""Where features come from and who uses them: source -> view -> service -> bundle. Pure functions.

A bundle is known by what it says of itself (`BundleFacts`); the caller finds out whether it still fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.errors import NotFoundError
from penstock.features.changes import BundleFacts
from penstock.features.definitions import FeatureService, FeatureView

KINDS = ("source", "view", "service", "bundle")


@dataclass(frozen=True)
class Node:
    """A "source", "view", "service" or "bundle"; `note` says what there is to say of it."""

    kind: str
    name: str
    note: str = ""

    @property
    def key(self) -> str:
        """KIND:NAME, unique in a lineage."""
        return f"{self.kind}:{self.name}"


@dataclass(frozen=True)
class Lineage:
    """A graph without circles.

    Attributes:
        nodes: sources first, bundles last, each kind by name.
        edges: (key of what is used, key of who uses it).
    """

    nodes: tuple[Node, ...]
    edges: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        nodes = [{"key": n.key, "kind": n.kind, "name": n.name, "note": n.note} for n in self.nodes]
        return {"nodes": nodes, "edges": [list(edge) for edge in self.edges]}

    def below(self, key: str) -> list[Node]:
        """Who uses it directly, in the order of `nodes`."""
        users = {after for before, after in self.edges if before == key}
        return [node for node in self.nodes if node.key in users]

    def roots(self) -> list[Node]:
        """What nothing in the graph lies above."""
        used = {after for _, after in self.edges}
        return [node for node in self.nodes if node.key not in used]


def lineage(
    views: Mapping[str, FeatureView],
    services: Mapping[str, FeatureService],
    bundles: Sequence[BundleFacts] = (),
    notes: Mapping[str, str] | None = None,
) -> Lineage:
    """The whole graph. A service or view that is not defined but used appears with a note that says so.

    Args:
        notes: of bundles, by NAME/VERSION.
    """
    nodes: dict[str, Node] = {}
    edges: dict[tuple[str, str], None] = {}

    def add(kind: str, name: str, note: str = "") -> str:
        node = Node(kind, name, note)
        return nodes.setdefault(node.key, node).key

    for view in views.values():
        kind = type(view.source).__name__
        edges[add("source", view.source.name, kind), add("view", view.name)] = None
    for service in services.values():
        me = add("service", service.name)
        for ref in service.base_refs:
            owner = ref.split(":")[0]
            if service.request is not None and owner == service.request.name:
                edges[add("source", owner, "RequestSource"), me] = None
            else:
                edges[add("view", owner, "" if owner in views else "not defined"), me] = None
    for bundle in bundles:
        me = add("bundle", bundle.label, (notes or {}).get(bundle.label, ""))
        if bundle.service is not None:
            note = "" if bundle.service in services else "not defined"
            edges[add("service", bundle.service, note), me] = None
    ordered = sorted(nodes.values(), key=lambda node: (KINDS.index(node.kind), node.name))
    return Lineage(tuple(ordered), tuple(sorted(edges)))


def around(graph: Lineage, name: str, services: Mapping[str, FeatureService]) -> Lineage:
    """What lies above and below the nodes of a name; of a feature "view:feature", the services that list it.

    Raises:
        NotFoundError: there is nothing of that name.
    """
    starts = {node.key for node in graph.nodes if node.name == name}
    kept: set[str] = set()
    owner, _, short = name.partition(":")
    if not starts and short and f"view:{owner}" in {node.key for node in graph.nodes}:
        using = {f"service:{s.name}" for s in services.values() if name in s.base_refs}
        kept = {f"view:{owner}", *_reach(graph, {f"view:{owner}"}, up=True), *_reach(graph, using, up=False)}
    elif starts:
        kept = _reach(graph, starts, up=True) | _reach(graph, starts, up=False)
    if not kept:
        known = ", ".join(node.name for node in graph.nodes) or "none"
        raise NotFoundError(f"'{name}' is no source, view, service, bundle or feature; there are {known}")
    return Lineage(
        tuple(node for node in graph.nodes if node.key in kept),
        tuple(edge for edge in graph.edges if edge[0] in kept and edge[1] in kept),
    )


def _reach(graph: Lineage, starts: Iterable[str], *, up: bool) -> set[str]:
    found, waiting = set(starts), list(starts)
    while waiting:
        at = waiting.pop()
        for before, after in graph.edges:
            here, there = (after, before) if up else (before, after)
            if here == at and there not in found:
                found.add(there)
                waiting.append(there)
    return found
