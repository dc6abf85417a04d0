"""Whether a LoRA does anything to its base: in the base's precision, by the product of its factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mole_diffusion.lora.factors import LoRAFactors

# Of numbers that cancel, rounding alone leaves about this share; such a product is meant to be zero.
CANCELLED = 1e-5
# A change this far below the last digit of the largest weight of its module leaves every output as it is.
BELOW_LAST_DIGIT = 1e-3
LARGEST_PRODUCT = 1e30
COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def changes_nothing(factors: Mapping[str, Mapping[str, LoRAFactors]], models: Mapping[str, nn.Module]) -> bool:
    """Whether no module's output would change at all: the LoRA is untrained, or its numbers vanish.

    Args:
        factors: Component to module name to factors.
        models: By component; the precision of their weights is that in which the factors will run.
    """
    return not any(
        _acts(pair, models[component].get_submodule(module))
        for component, modules in factors.items()
        for module, pair in modules.items()
    )


def overflows(factors: LoRAFactors, module: nn.Module) -> bool:
    """Whether a factor, or what it does to inputs of usual size, is beyond the numbers the module computes with."""
    down, up = _as_run(factors, module)
    if not (down.isfinite().all() and up.isfinite().all()):
        return True
    return factors.r * float(down.abs().max()) * float(up.abs().max()) > LARGEST_PRODUCT


@torch.no_grad()
def _acts(factors: LoRAFactors, module: nn.Module) -> bool:
    down, up = (tensor.float().flatten(1) for tensor in _as_run(factors, module))
    change = (up @ down).abs().max()
    least = CANCELLED * (up.abs() @ down.abs()).max()
    weight = getattr(module, "weight", None)
    # Weights that are quantised or not there tell nothing of their size.
    if isinstance(weight, Tensor) and weight.dtype in COMPUTED and not weight.is_meta and weight.numel():
        last_digit = torch.finfo(weight.dtype).eps * weight.detach().abs().max().float().cpu()
        least = torch.maximum(least, BELOW_LAST_DIGIT * last_digit)
    return bool(change > least)


def _as_run(factors: LoRAFactors, module: nn.Module) -> tuple[Tensor, Tensor]:
    dtype = _dtype(module)
    return factors.down.to(dtype), (factors.up * factors.scaling).to(dtype)


def _dtype(module: nn.Module) -> torch.dtype:
    dtype = getattr(getattr(module, "weight", None), "dtype", None)
    return dtype if dtype in COMPUTED else torch.float32
