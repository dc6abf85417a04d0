"""Which module of a model a LoRA file means, however the file spells it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from mole_diffusion.families import Original, known_architecture
from mole_diffusion.families.names import COMPILED, TEXT_MODEL
from mole_diffusion.families.norms import is_norm, is_of_heads


class ModuleIndex:
    """Modules of one model that LoRAs change, found by dotted or underscored name, diffusers' or the authors' own.

    They are Linears, convolutions and layers of normalisation. Those of queries and keys, which are given heads one
    by one, are left out where the model's family does not say where the tokens are among these.

    A leading `text_model.` may be there or not, in the model as in the file: transformers dropped it from
    `CLIPTextModel` (not from `CLIPTextModelWithProjection`), files keep it.

    Args:
        model: Any model; its modules are looked at, not kept.
    """

    def __init__(self, model: nn.Module) -> None:
        known = known_architecture(model)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.grouped: set[str] = set()
        self._names: dict[str, set[str]] = defaultdict(set)
        self._others: dict[str, str] = {}
        for name, module in model.named_modules():
            # Sizes come from the attributes: a quantised layer's weight has another shape.
            if isinstance(module, nn.Linear):
                self.shapes[name] = (module.out_features, module.in_features)
            elif isinstance(module, nn.Conv2d):
                self.shapes[name] = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
                if module.groups > 1:
                    self.grouped.add(name)
            elif is_norm(module) and (not is_of_heads(name) or (known is not None and known.heads is not None)):
                self.shapes[name] = tuple(module.weight.shape)
            else:
                if next(module.children(), None) is None and next(module.parameters(), None) is not None:
                    self._others[_normal(name)] = type(module).__name__
                continue
            self._names[_normal(name)].add(name)
        originals = known.original_names(model) if known else {}
        self._original = {
            _normal(name): parts
            for name, parts in originals.items()
            if all(part.module in self.shapes for part in parts)
        }

    def find(self, spelling: str) -> tuple[Original, ...]:
        """The module a file calls `spelling`, or the several that are one there; none if none or several answer."""
        if spelling in self.shapes:
            return (Original(spelling),)
        name = _normal(spelling)
        if name in self._names:
            names = self._names[name]
            return (Original(next(iter(names))),) if len(names) == 1 else ()
        return self._original.get(name, ())

    def other_kind(self, spelling: str) -> str | None:
        """The class of a module that has weights and takes no LoRA here: an embedding."""
        return self._others.get(_normal(spelling))

    def shape(self, targets: tuple[Original, ...]) -> tuple[int, ...]:
        """The weight's shape of what a file has as one module."""
        out = sum(self.shapes[target.module][0] for target in targets)
        return (out, *self.shapes[targets[0].module][1:])

    def widths(self) -> Iterator[tuple[str, int]]:
        """Names of Linears and convolutions, and their input widths."""
        return ((name, shape[1]) for name, shape in self.shapes.items() if len(shape) > 1)


def _normal(name: str) -> str:
    return name.replace(".", "_").replace(COMPILED.replace(".", "_"), "").removeprefix(TEXT_MODEL.replace(".", "_"))
