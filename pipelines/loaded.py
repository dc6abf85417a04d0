"""What hangs on the models of a pipeline. It belongs to the models: every pipeline that has them finds it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..composition import Budget, Call, Composition, Role
from ..errors import MoLEError
from ..experts import Experts
from ..experts.blocks import Blocks
from ..experts.merged import refuse_unmergeable
from ..families.base import unwrapped
from ..gating import MoLEModel
from ..lora import LoRA
from ..lora.effect import refuse_precision


@dataclass(eq=False)
class Loaded:
    """LoRAs, and how they share a picture.

    Attributes:
        loras: The LoRAs by name, in the order of the experts.
        experts: The LoRAs as they hang on the models.
        gates: If any are loaded.
        composition: What was chosen; `None` leaves it to each call.
        triggers: The words that call each LoRA.
        called_by_name: The LoRAs whose triggers nobody told, so that their own name stands in for them.
        roles: The role of each LoRA.
        disabled: Whether diffusers' `disable_lora` was called.
        precisions: By component, that in which the LoRAs are known to act.
    """

    loras: dict[str, LoRA] = field(default_factory=dict)
    experts: Experts | None = None
    gates: MoLEModel | None = None
    composition: Composition | None = None
    triggers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    called_by_name: frozenset[str] = frozenset()
    roles: dict[str, Role] = field(default_factory=dict)
    disabled: bool = False
    precisions: dict[str, torch.dtype] = field(default_factory=dict)

    @property
    def fused(self) -> bool:
        """Whether the LoRAs are merged into weights."""
        return self.experts is not None and self.experts.merged

    def fuse(self) -> None:
        """Merges the LoRAs into weights; see `fuse_lora`."""
        method = self.composition
        if method is None or not method.constant:
            name = "none is chosen" if method is None else f"{method.name!r} weighs anew at every place or step"
            raise MoLEError(
                f"the LoRAs {', '.join(self.loras)} can be fused only with weights that stay the same, and of the "
                f'compositions {name}. Call `set_composition("linear")`, "merge", "normalized" or "budget" first.'
            )
        if self.experts is not None:
            self.experts.merge()

    def unfuse(self) -> None:
        """Undoes `fuse`."""
        if self.experts is not None:
            self.experts.unmerge()

    def refuse_fused(self, wish: str) -> None:
        """Raises MoLEError for a wish that merged weights would not follow."""
        if self.fused:
            raise MoLEError(
                f"cannot {wish} while the LoRAs {', '.join(self.loras)} are fused. Call `unfuse_lora()` first."
            )

    def check(self, components: Mapping[str, nn.Module]) -> None:
        """Makes sure that what is listed acts on these models, or says why not.

        Raises:
            MoLEError: A model was exchanged after loading, or carries the LoRAs of another pipeline; or a LoRA vanishes
                or overflows in the precision to which a model was cast.
        """
        for name, model in components.items():
            other = _RECORDS.get(unwrapped(model))
            if other is not None and other is not self and other.loras:
                raise MoLEError(
                    f"the {name} of this pipeline carries the LoRAs {', '.join(other.loras)} of another pipeline, "
                    "which has other models beside it. Call `unload_loras()` there first."
                )
        experts = self.experts
        if experts is None:
            return
        if not experts.attached:  # somebody called `experts.detach()`
            experts.attach(components)
        for name in experts.components:
            if name not in components or experts.component(name) is not unwrapped(components[name]):
                raise MoLEError(
                    f"the LoRAs {', '.join(self.loras)} were loaded into another {name} than this pipeline has now, "
                    "so they would do nothing there. Call `unload_loras()`, then `load_loras` again."
                )
        models = {name: experts.component(name) for name in experts.components}
        precisions = _precisions(models)
        if precisions != self.precisions:
            for lora in self.loras.values():
                refuse_precision(lora, {**components, **models})
            self.precisions = precisions

    def hang(self, components: Mapping[str, nn.Module], loras: dict[str, LoRA]) -> None:
        """Replaces the LoRAs on the models. Everything is checked first: if they are refused, nothing changes.

        Raises:
            MoLEError: They do not fit, or the models are compiled or fused.
        """
        experts = Experts(list(loras.values())) if loras else None
        if experts is not None:
            planned = experts.check(components)
            for name, lora in loras.items():
                if name not in self.loras:  # perhaps read for models of another precision
                    refuse_precision(lora, components)
            if self.fused:
                for site in (site for sites in planned.values() for site in sites):
                    refuse_unmergeable(site)
            for name in experts.components:
                other = _RECORDS.get(unwrapped(components[name]))
                if other is not None and other is not self and other.loras:
                    raise MoLEError(
                        f"the {name} carries the LoRAs {', '.join(other.loras)} of another pipeline. Load into that "
                        "pipeline, or call `unload_loras()` there first."
                    )
        fused = self.fused
        if self.experts is not None:
            self.experts.detach()
        if experts is not None:
            experts.attach(components)
            if fused:
                experts.merge()
            self.precisions = _precisions({name: components[name] for name in experts.components})
        self.loras, self.experts = loras, experts
        self.disabled = self.disabled and bool(loras)
        for model in [model for model, record in _RECORDS.items() if record is self]:
            del _RECORDS[model]
        if experts is not None:
            for name in experts.components:
                _RECORDS[unwrapped(components[name])] = self
        self.set_weigher()

    def drop_gates(self) -> None:
        """Forgets the gates, and a composition that needs them."""
        self.gates = None
        if self.composition is not None and "gates" in self.composition.needs:
            self.composition = None
        self.set_weigher()

    def set_weigher(self) -> None:
        """Who weighs outside of a pipeline's call: the chosen method, or the one that needs no words."""
        if self.experts is not None:
            self.experts.weigher = None if self.disabled else self.composition or Budget()

    def disable(self, disabled: bool) -> None:
        """Draws without the LoRAs, also in calls of other pipelines on these models, or with them again."""
        self.disabled = disabled and bool(self.loras)
        self.set_weigher()


def _precisions(models: Mapping[str, nn.Module]) -> dict[str, torch.dtype]:
    return {name: next(model.parameters()).dtype for name, model in models.items()}


# Every call and `composing` that this thread is inside of, of what is loaded: its call, its stack and its scale.
OPEN: Blocks[tuple[Call, ExitStack, float]] = Blocks("mole_diffusion.open")
_RECORDS: WeakKeyDictionary[nn.Module, Loaded] = WeakKeyDictionary()
# How many calls draw with a model now, of whatever pipeline: one that has no LoRAs is disturbed by new ones too.
_DRAWING: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_LOCK = threading.RLock()


@contextmanager
def drawing(components: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the `with`, what hangs on these models does not change."""
    models = [unwrapped(model) for model in components.values()]
    with _LOCK:
        for model in models:
            _DRAWING[model] = _DRAWING.get(model, 0) + 1
    try:
        yield
    finally:
        with _LOCK:
            for model in models:
                _DRAWING[model] -= 1


@contextmanager
def changing(components: Mapping[str, nn.Module], wish: str) -> Iterator[None]:
    """Inside the `with`, what hangs on these models changes, and no call begins.

    Raises:
        MoLEError: A call draws with one of them.
    """
    with _LOCK:
        if any(_DRAWING.get(unwrapped(model)) for model in components.values()):
            names = ", ".join(loaded_into(components, None).loras) or "these models"
            raise MoLEError(
                f"cannot {wish} while a picture is being drawn with {names}. Do it after the call; to change which "
                "LoRAs draw from a step on, call `use_loras` in the callback."
            )
        yield


def loaded_into(components: Mapping[str, nn.Module], own: Loaded | None) -> Loaded:
    """What hangs on these models: a pipeline's own record if it has LoRAs, else what another pipeline hung there."""
    if own is not None and own.loras:
        return own
    for model in components.values():
        record = _RECORDS.get(unwrapped(model))
        if record is not None:
            return record
    return own if own is not None else Loaded()
