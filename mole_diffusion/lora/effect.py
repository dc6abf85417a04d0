"""Whether a LoRA does anything to its base: in the base's precision, by the product of its factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.errors import MoLEError
from mole_diffusion.families import is_read
from mole_diffusion.lora.factors import LoRA, LoRAFactors

# Of numbers that cancel, rounding alone leaves about this share; such a product is meant to be zero.
CANCELLED = 1e-5
# A change this far below the last digit of the largest weight of its module leaves every output as it is.
BELOW_LAST_DIGIT = 1e-3
LARGEST_PRODUCT = 1e30
COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Number formats in which torch multiplies matrices; weights in others are quantised."""


UNREAD = "no picture depends on the modules that it changes"
READ_REMEDY = (
    "These models are read before those come, as Stable Diffusion XL reads its first text encoder before the last "
    "layer. Use a LoRA that changes others too."
)


def refuse_precision(lora: LoRA, models: Mapping[str, nn.Module]) -> None:
    """Raises MoLEError where a LoRA that was read for other models, or before a cast, cannot act in these.

    Args:
        lora: The LoRA.
        models: Those of the pipeline by component, in the precision in which it is to act.
    """
    acting = [
        (models[part].get_submodule(name), one) for part in lora.factors for name, one in lora.factors[part].items()
    ]
    if never_read(lora.factors, models):
        raise MoLEError(f"the LoRA {lora.name!r} would do nothing: {UNREAD}. {READ_REMEDY}")
    if any(overflows(factors, module) for module, factors in acting):
        what = "has factors too large for the precision of the models, so that pictures would be black"
    elif changes_nothing(lora.factors, models):
        what = "is too small for the precision of the models, and would change nothing"
    else:
        return
    raise MoLEError(f"the LoRA {lora.name!r} {what}. Draw in a higher precision: `pipe.to(torch.float32)`.")


def changes_nothing(factors: Mapping[str, Mapping[str, LoRAFactors]], models: Mapping[str, nn.Module]) -> bool:
    """Whether no module's output would change at all: the LoRA is untrained, or its numbers vanish.

    Args:
        factors: Component to module name to factors.
        models: All by component; the precision of their weights is that in which the factors will run.
    """
    return not any(
        is_read(models, component, module) and _acts(pair, models[component].get_submodule(module))
        for component, modules in factors.items()
        for module, pair in modules.items()
    )


def never_read(factors: Mapping[str, Mapping[str, LoRAFactors]], models: Mapping[str, nn.Module]) -> bool:
    """Whether a LoRA changes only what no picture of these models depends on.

    Args:
        factors: Component to module name to factors.
        models: All by component.
    """
    return not any(is_read(models, component, module) for component, modules in factors.items() for module in modules)


def overflows(factors: LoRAFactors, module: nn.Module) -> bool:
    """Whether a factor, or what it does to inputs of usual size, is beyond the numbers the module computes with."""
    dtype = _dtype(module)
    beside = [factor for factor in (factors.magnitude, factors.bias, factors.gain) if factor is not None]
    kronecker = factors.kronecker
    if kronecker is not None:
        beside += [kronecker.w1 * factors.scaling, *kronecker.tensors]
    down, up = (_largest(factor) for factor in _as_run(factors, module))
    if not all(map(math.isfinite, (down, up, *(_largest(factor.to(dtype)) for factor in beside)))):
        return True
    product = factors.r * down * up
    if kronecker is not None:
        product += _largest(kronecker.w1) * abs(factors.scaling) * _largest(kronecker.w2)
    return product > LARGEST_PRODUCT


@torch.no_grad()
def _acts(factors: LoRAFactors, module: nn.Module) -> bool:
    down, up = (tensor.float().flatten(1) for tensor in _as_run(factors, module))
    change = _largest(up @ down)
    least = CANCELLED * _largest(up.abs() @ down.abs())
    if (kronecker := factors.kronecker) is not None:
        w1 = kronecker.w1 * factors.scaling
        change = max(change, _largest(w1) * _largest(kronecker.w2))
        size = (
            _largest(kronecker.down)
            if kronecker.up is None
            else _largest(kronecker.up.abs() @ kronecker.down.flatten(1).abs())
        )
        least = max(least, CANCELLED * _largest(w1) * size)
    for alone in (factors.bias, factors.gain):
        if alone is not None:
            change = max(change, _largest(alone))
    weight: Any = getattr(module, "weight", None)
    weight = None if weight is None else weight.detach()
    # Weights that are quantised (also those that give the type of their numbers as float32) or not there tell nothing
    # of their size.
    if type(weight) is Tensor and weight.dtype in COMPUTED and not weight.is_meta and weight.numel():
        if factors.magnitude is not None:
            change = _largest(factors.delta(weight.float().cpu()))
        last_digit = torch.finfo(weight.dtype).eps * _largest(weight.float())
        least = max(least, BELOW_LAST_DIGIT * last_digit)
    elif factors.magnitude is not None:
        return True
    return change > least


def _largest(tensor: Tensor) -> float:
    """The largest number without its sign; NaN where there is one."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _as_run(factors: LoRAFactors, module: nn.Module) -> tuple[Tensor, Tensor]:
    dtype = _dtype(module)
    return factors.down.to(dtype), (factors.up * factors.scaling).to(dtype)


def _dtype(module: nn.Module) -> torch.dtype:
    dtype = getattr(getattr(module, "weight", None), "dtype", None)
    return dtype if dtype in COMPUTED else torch.float32
