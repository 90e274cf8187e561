"""Models: bundles, the registry, and what scores them. Names load what they need when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.models.bundle import load_bundle, save_bundle, score
    from penstock.models.entry_point import EntryPoint

__all__ = ["EntryPoint", "load_bundle", "save_bundle", "score"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'penstock.models' has no attribute '{name}'")
    module = "penstock.models.entry_point" if name == "EntryPoint" else "penstock.models.bundle"
    value = globals()[name] = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
