"""The table of gates: what each gate weighs and what it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mole_diffusion.errors import MoLEError

from ..experts import Experts, Site
from ..families import Architecture, Reads, architecture_of, canonical_name
from .config import GateConfig
from .scopes import gate_name


def canonical_place(component: str, place: str) -> str:
    """Name of a gate, `component.module` or only the component, whatever the version of transformers."""
    module = place.removeprefix(component).removeprefix(".")
    return ".".join(part for part in (component, canonical_name(module)) if part)


@dataclass(frozen=True)
class Entry:
    """A module through which a scope is entered.

    Attributes:
        module: The module's name in the component.
        ranks: Rank of every LoRA there, 0 where it has no factors.
        features: Size of its output, d.
    """

    module: str
    ranks: tuple[int, ...]
    features: int


@dataclass(frozen=True)
class GateSpec:
    """One gate. With the table of all, gates are rebuilt without any LoRA at hand.

    Attributes:
        name: Its place, `component.module` of what it covers.
        component: Name of the model it lies in.
        indices: Those of the LoRAs that touch its scope; the others take no share of its softmax.
        modules: The adapted modules it weighs.
        entries: Where it reads: the first of them to run, with those that read the same tensor.
        block: Name of the block it re-runs under each LoRA, or `None` where experts are those of modules.
        spatial: Whether its tokens are the pixels of a picture (else a text, or one vector).
        positions: Length of the token axis the gate sees.
        hidden_features: Size of the hidden state it reads there; 0 if it reads nothing, `None` if it reads what the
            experts add there.
    """

    name: str
    component: str
    indices: tuple[int, ...]
    modules: tuple[str, ...]
    entries: tuple[Entry, ...]
    block: str | None
    spatial: bool
    positions: int = 1
    hidden_features: int | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GateSpec:
        """Reads plain values, as JSON gives them back; a name may be that of another version of transformers."""
        entries = tuple(Entry(e["module"], tuple(e["ranks"]), e["features"]) for e in values["entries"])
        plain = {**values, "indices": tuple(values["indices"]), "modules": tuple(values["modules"])}
        name = canonical_place(values["component"], values["name"])
        return cls(**{**plain, "name": name, "entries": entries})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, with names of modules that do not depend on the version of transformers."""
        plain = dataclasses.asdict(self)
        entries = [{**entry, "module": canonical_name(entry["module"])} for entry in plain["entries"]]
        modules = [canonical_name(module) for module in self.modules]
        block = None if self.block is None else canonical_name(self.block)
        return {**plain, "entries": entries, "modules": modules, "block": block}

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """The modules it weighs, as `component.module`."""
        return tuple(f"{self.component}.{module}" for module in self.modules)

    @cached_property
    def entry_sites(self) -> tuple[str, ...]:
        """The modules it reads, as `component.module`."""
        return tuple(f"{self.component}.{entry.module}" for entry in self.entries)

    @property
    def width(self) -> int:
        """Numbers per position the gate reads: ranks in rank space, features of all experts for a block.

        A gate that reads nothing is given a constant 1.
        """
        if self.hidden_features is not None:
            return max(self.hidden_features, 1)
        if self.block is not None:
            return len(self.indices) * self.entries[0].features
        return sum(sum(entry.ranks) for entry in self.entries)

    @property
    def num_features(self) -> int:
        """Size of what is normalised: of the concatenated expert outputs, N * L * d where all LoRAs are present."""
        if self.block is not None or self.hidden_features is not None:
            return self.positions * self.width
        return self.positions * sum(e.features * sum(r > 0 for r in e.ranks) for e in self.entries)


def plan_gates(experts: Experts, config: GateConfig) -> list[GateSpec]:
    """The gates that a configuration asks for on attached experts, in the order of a forward pass.

    Positions are left at 1; they depend on the token axis, see `with_positions`.
    """
    specs = []
    for component in experts.components:
        sites = [site for site in experts.sites.values() if site.component == component]
        scopes: dict[str, list[Site]] = {}
        architecture = architecture_of(experts.component(component))
        for site in sorted(sites, key=lambda site: architecture.firing_order(canonical_name(site.module_name))):
            scopes.setdefault(_scope(site, config, architecture), []).append(site)
        specs += [_plan(name, members, config, architecture) for name, members in scopes.items()]
    return specs


def with_positions(spec: GateSpec, config: GateConfig, experts: Experts) -> GateSpec:
    """A planned gate with the length of its token axis.

    Raises:
        MoLEError: `token_axis="flatten"` is asked of a model that was not run yet, so that nobody knows how many tokens
            there will be.
    """
    axis = config.token_axis
    if axis in ("pooled", "token"):
        positions = 1
    elif axis == "flatten":
        entry = experts.sites[spec.entry_sites[0]]
        tokens = entry.tokens if spec.hidden_features is None else entry.input_tokens
        if tokens is None:
            raise MoLEError(
                f"Gates with token_axis='flatten' fit one resolution only, and {spec.component} has not seen any yet. "
                "Run it once at the resolution you want, then make the gates; or use token_axis='pooled'."
            )
        positions = tokens
    else:
        positions = int(axis) ** 2 if spec.spatial else int(axis)
    return dataclasses.replace(spec, positions=positions)


_APART: dict[Reads, str] = {"text": "text", "vector": "time"}


def _scope(site: Site, config: GateConfig, architecture: Architecture) -> str:
    """Name of the gate that weighs a module. One weight per token cannot serve modules with other tokens."""
    name = gate_name(config.scope, site.component, canonical_name(site.module_name), architecture)
    apart = config.token_axis == "token" and config.scope != "matrix" and site.reads != architecture.tokens
    return f"{name}.{_APART[site.reads]}" if apart and site.reads in _APART else name


def _plan(name: str, members: Sequence[Site], config: GateConfig, architecture: Architecture) -> GateSpec:
    first = members[0]
    if config.input == "experts" and config.experts != "block":
        _refuse_beside(name, members)
    entries = [site for site in first.group.sites if site in members]
    block = architecture.transformer_block(first.module_name) if config.experts == "block" else None
    hidden_features = {"experts": None, "hidden": first.stack.input_shape[0], "none": 0}[config.input]
    present = sorted({index for site in members for index in site.stack.indices})
    return GateSpec(
        name=name,
        component=first.component,
        indices=tuple(present),
        modules=tuple(site.module_name for site in members),
        entries=tuple(Entry(site.module_name, site.stack.ranks, site.stack.out_features) for site in entries),
        block=block,
        spatial=first.reads == "pixels",
        hidden_features=hidden_features,
    )


def _refuse_beside(name: str, members: Sequence[Site]) -> None:
    """Raises MoLEError where a gate would read coordinates of experts that have more than these."""
    for site in members:
        if site.beside is not None:
            raise MoLEError(
                f"The gate {name} with input='experts' would read what experts add at {site.name} by their ranks, and "
                f"LoRAs number {sorted(site.beside.terms)} add more there (DoRA, LoKr, a bias). Use input='hidden' or "
                "input='none'."
            )
