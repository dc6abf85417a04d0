"""`load_lora`: a LoRA file in, factors for the modules of a model out, or a `LoRAError` that says why not."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor, nn

from mole_diffusion.lora.adapter import read_settings, strength
from mole_diffusion.lora.effect import changes_nothing, overflows
from mole_diffusion.lora.errors import refusal
from mole_diffusion.lora.factors import LoRA, LoRAFactors
from mole_diffusion.lora.families import family_hint, text_width
from mole_diffusion.lora.modules import ModuleIndex
from mole_diffusion.lora.pairs import Pair, find_pairs, read_alpha, read_factors
from mole_diffusion.lora.sources import LoRAFile, read_source
from mole_diffusion.lora.triggers import read_triggers


def load_lora(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    components: Mapping[str, nn.Module],
    *,
    name: str | None = None,
) -> LoRA:
    """Read a LoRA in any known layout for the given models.

    Args:
        source: A `.safetensors` file, a folder that holds one, or a state dict.
        components: Models by component name, e.g. `{"unet": pipe.unet, "text_encoder": pipe.text_encoder}`;
            values that are no models (as in `pipe.components`) are passed over. Nothing in them is changed.
        name: What to call it. Default: the file's name without suffix.

    Returns:
        Factors in fp32 on the CPU for every module the file has, in the order of the models' modules.

    Raises:
        LoRAError: If the file cannot be read, is not plain LoRA on the whole base, has a key that finds no place, a
            shape that does not fit, a value that is not finite, or would change nothing in the base's precision.
    """
    return _Reader(read_source(source), components).lora(name)


class _Reader:
    """One file on its way into one set of models; holds what every message names."""

    def __init__(self, file: LoRAFile, components: Mapping[str, nn.Module]) -> None:
        self.file = file
        self.layout, self.pairs = find_pairs(file)
        self.models = {key: model for key, model in components.items() if isinstance(model, nn.Module)}
        self.indices = {key: ModuleIndex(model) for key, model in self.models.items()}
        self.settings = read_settings(file, self.layout)

    def lora(self, name: str | None) -> LoRA:
        homes = self._homes()
        self._check_modules(homes)
        places: dict[tuple[str, str], Pair] = {}
        for pair, component in zip(self.pairs, homes, strict=True):
            module = self.indices[component].find(pair.module)
            assert module is not None
            if (component, module) in places:
                self._refuse(f"two pairs for {module}", "Keep one adapter per file.", [pair], component)
            self._check_shapes(pair, component, module)
            places[component, module] = pair
        found: dict[str, dict[str, LoRAFactors]] = defaultdict(dict)
        for (component, module), pair in places.items():  # only now are values read
            found[component][module] = self._factors(pair, component, module)
        factors = {
            component: {module: found[component][module] for module in index.shapes if module in found[component]}
            for component, index in self.indices.items()
            if component in found
        }
        if changes_nothing(factors, self.models):
            self._refuse(
                "the products of its factors are zero, or too small for the base's precision, so it would change "
                "nothing",
                "Train it, use another checkpoint, or load the base in a higher precision.",
            )
        triggers = read_triggers(self.file.metadata)
        return LoRA(name or self.file.name, self.file.source, self.layout, self.file.sha256, factors, triggers)

    def _homes(self) -> list[str]:
        """The component of each pair; pairs that do not say all go to the one model that has modules for all."""
        stated = {pair.component for pair in self.pairs if pair.component is not None}
        if missing := sorted(stated - self.indices.keys()):
            pairs = [pair for pair in self.pairs if pair.component in missing]
            self._refuse(
                f"{len(pairs)} modules for {', '.join(missing)}, but the model has only {', '.join(self.indices)}",
                f"{self._hint()}Use a LoRA for this kind of model.",
                pairs,
                *missing,
            )
        silent = [pair for pair in self.pairs if pair.component is None]
        home = self._common_home(silent) if silent else ""
        return [pair.component or home for pair in self.pairs]

    def _common_home(self, pairs: list[Pair]) -> str:
        lost = {
            component: [pair for pair in pairs if index.find(pair.module) is None]
            for component, index in self.indices.items()
        }
        fitting = [component for component, rest in lost.items() if not rest]
        if len(fitting) == 1:
            return fitting[0]
        prefix = "Prefix the keys with the component, e.g. `unet.`, and without `base_model.model.`."
        if fitting:
            self._refuse(f"keys without a component, which would fit {' and '.join(fitting)}", prefix, pairs, *fitting)
        if not lost:
            self._refuse("no model to place it in", "Pass `components={'unet': …}`.", pairs)
        nearest = min(lost, key=lambda component: len(lost[component]))
        self._refuse(
            f"{len(lost[nearest])} of {len(pairs)} modules find no place even in the nearest model",
            f"{self._hint()}{prefix} Or use a LoRA for this kind of model.",
            lost[nearest],
            nearest,
        )

    def _check_modules(self, homes: list[str]) -> None:
        lost = [
            (pair, component)
            for pair, component in zip(self.pairs, homes, strict=True)
            if self.indices[component].find(pair.module) is None
        ]
        if lost:
            original = any("input_blocks" in pair.module or "output_blocks" in pair.module for pair, _ in lost)
            names = "Its names are those of the original (not diffusers') UNet, which are not read yet. " * original
            self._refuse(
                f"{len(lost)} of {len(self.pairs)} modules find no place in the model",
                f"{names}{self._hint()}Use a LoRA for this kind of model.",
                [pair for pair, _ in lost],
                *{component for _, component in lost},
            )

    def _check_shapes(self, pair: Pair, component: str, module: str) -> None:
        index = self.indices[component]
        out, *rest = shape = index.shapes[module]
        if module in index.grouped:
            self._refuse(f"{module} is a grouped convolution", "Train without it.", [pair], component)
        kernel = (*pair.down[2:], 1, 1)[:2]
        wanted = (rest[0], *(rest[1:] or (1, 1)))
        if pair.up[0] != out or (pair.down[1], *kernel) != wanted:
            self._refuse(
                f"down {pair.down} and up {pair.up} do not fit {module} with weight {shape}",
                f"{self._hint()}Use a LoRA for this kind of model.",
                [pair],
                component,
            )

    def _factors(self, pair: Pair, component: str, module: str) -> LoRAFactors:
        """The pair in the shape of the module; a 1x1 convolution and a Linear hold the same numbers."""
        out, *rest = self.indices[component].shapes[module]
        settings = self.settings.get(component, self.settings.get(None))
        own = read_alpha(self.file, self.layout, pair)
        _, scale = strength(self.file, self.layout, pair, own, settings)
        down, up = read_factors(self.file, self.layout, pair)
        ones = [1] * len(rest[1:])
        factors = LoRAFactors(down.reshape(pair.r, *rest), up.reshape(out, pair.r, *ones), scale)
        if overflows(factors, self.models[component].get_submodule(module)):
            self._refuse(
                "factors too large for the base's precision, so that pictures would be black",
                "Training diverged, or alpha is wrong; use another checkpoint.",
                [pair],
                component,
            )
        return factors

    def _hint(self) -> str:
        file_width = text_width((pair.module, pair.down[1]) for pair in self.pairs)
        model_width = text_width(width for index in self.indices.values() for width in index.widths())
        return family_hint(file_width, model_width)

    def _refuse(self, problem: str, remedy: str, pairs: list[Pair] | None = None, *components: str) -> NoReturn:
        keys = [pair.key for pair in pairs or []]
        raise refusal(self.file.source, problem, remedy, layout=self.layout, components=components, keys=keys)
