"""The compiled plans of services and feature lists, kept for the next call that asks the same.

Any thread; two that ask at once may compile twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from penstock.errors import DefinitionError, InvalidArgumentError, NotFoundError, PenstockError
from penstock.features.compute import StoredView, ViewComputer
from penstock.features.definitions import FeatureService, RequestSource, ViewProjection, list_features
from penstock.features.plan import ServicePlan, compile_plan, newest_texts
from penstock.features.repo import Repo

_MAX_PLANS = 256


@dataclass(frozen=True, eq=False)
class AdHocList:
    """A feature list that no service declares."""

    features: Sequence[str]
    aliases: Mapping[str, ViewProjection]
    request: RequestSource | None
    name: str = "features"
    on_missing: str = "nan"
    full_feature_names: bool = False


class ServicePlans:
    """Plans over the newest readings of a repository's views."""

    def __init__(self, repo: Repo, computer: Callable[[str], ViewComputer]) -> None:
        self._repo, self._computer = repo, computer
        self._plans: dict[Any, ServicePlan] = {}

    def forget(self) -> None:
        """Compile again from now on: readings or distributions have changed."""
        self._plans = {}

    def get(
        self,
        features: str | FeatureService | Sequence[str],
        full_feature_names: bool = False,
        computer: Callable[[str], StoredView] | None = None,
    ) -> ServicePlan:
        """The plan of a service, by name or as an object, or of a list of "view:feature".

        With `computer` over the views that it gives; it is kept only where these hold their events.

        Raises:
            NotFoundError: an unknown service, view or feature.
            FeatureNameCollisionError: two features with one name.
        """
        if isinstance(features, str):
            if features not in self._repo.services:
                known = ", ".join(sorted(self._repo.services)) or "none"
                hint = "; give references as a list" if ":" in features else ""
                raise NotFoundError(f"service '{features}' is unknown; the services are {known}{hint}")
            features = self._repo.services[features]
        service: FeatureService | AdHocList
        if isinstance(features, FeatureService):
            service = features
            key: Any = (features.fingerprint(), full_feature_names)
        else:
            if not isinstance(features, Iterable):
                raise InvalidArgumentError(
                    f"features is {features!r}; expected a service or a list of 'view:feature'"
                )
            refs, aliases = list_features(features)
            service = AdHocList(refs, aliases, self._request_of(refs))
            described = json.dumps([alias.describe() for alias in aliases.values()])
            key = (tuple(refs), described, full_feature_names)
        plans = self._plans
        if key not in plans:
            owners = {ref.split(":")[0] for ref in service.features if isinstance(ref, str)}
            aliases = {**self._repo.projections, **service.aliases}
            used = {aliases[name].view.name if name in aliases else name for name in owners}
            of = computer or self._computer
            computers = {view: of(view) for view in used if view in self._repo.views}
            plan = self.compile(service, computers, full_feature_names)
            if not all(isinstance(each, ViewComputer) for each in computers.values()):
                return plan  # texts may be missing yet, so its fingerprint is none
            if len(plans) >= _MAX_PLANS:
                plans.clear()
            plans[key] = plan
            return plan
        plan = plans[key]
        if plan.texts:
            texts = newest_texts(plan.coded, [self._computer(view.name) for view in plan.views])
            if any(len(texts[name]) > len(known) for name, known in plan.texts.items()):
                plan = plans[key] = replace(plan, texts=texts)
        return plan

    def compile(
        self,
        service: FeatureService | AdHocList,
        computers: Mapping[str, StoredView],
        full_feature_names: bool = False,
    ) -> ServicePlan:
        """Compile over given computers, without keeping it."""
        aliases = {**self._repo.projections, **service.aliases}
        for alias in aliases.values():
            if self._repo.views.get(alias.view.name) is not alias.view:
                raise InvalidArgumentError(f"'{alias.name}' is of a view that is not the repository's")
        return compile_plan(
            service.name,
            service.features,
            self._repo.views,
            computers,
            service.request,
            aliases=aliases,
            full_feature_names=full_feature_names or service.full_feature_names,
            on_missing=service.on_missing,
        )

    def compile_each(
        self, services: Sequence[FeatureService], computers: Mapping[str, StoredView]
    ) -> tuple[dict[str, ServicePlan], dict[str, str]]:
        """Plans by service, compiled as by `compile`, and why others cannot be made."""
        found: dict[str, ServicePlan] = {}
        faults: dict[str, str] = {}
        for service in services:
            try:
                found[service.name] = self.compile(service, computers)
            except PenstockError as error:
                faults[service.name] = str(error)
        return found, faults

    def _request_of(self, refs: Any) -> RequestSource | None:
        owners = dict.fromkeys(ref.split(":")[0] for ref in refs if isinstance(ref, str))
        used = [self._repo.requests[owner] for owner in owners if owner in self._repo.requests]
        if len(used) > 1:
            raise InvalidArgumentError(
                f"features read the request sources '{used[0].name}' and '{used[1].name}'; expected one"
            )
        return used[0] if used else None


def view_dtypes(computer: ViewComputer) -> dict[str, str]:
    """The dtype of each feature of a view, request-time ones too; DefinitionError where one has none."""
    view = computer.view
    refs = [f"{view.name}:{name}" for name in view.features]
    try:
        plan = compile_plan(view.name, refs, {view.name: view}, {view.name: computer})
    except DefinitionError as error:
        raise DefinitionError(f"view '{view.name}': {error}") from error
    return dict(zip(view.features, plan.output_dtypes))
