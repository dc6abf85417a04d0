"""LoRAs in the weight of a module, made once for each set of weights that stay the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import MoLEError
from ..families.norms import is_norm, run_with
from .adding import ALIKE
from .run import Run
from .runs import Runs
from .site import Projections, Site
from .stack import numbers_of

PRECISE = (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class _Made:
    """A merged weight and bias, and what they were made of; `weights` are those of the latest pass."""

    weight: Tensor
    bias: Tensor | None
    base: Tensor
    version: int
    numbers: list[float]
    weights: Tensor | None


class Merged:
    """Stands in for the forward of a module, with `W + sum_i gamma_i s_i B_i A_i` for its weight.

    The module's own weight is not touched: it is saved, moved and counted as without LoRAs, and other threads may run
    with other choices of them. The merged one lies beside it, is as large, and is kept until other weights gamma are
    asked for. In a pass whose weights differ from place to place, or that has none, the module runs as it is.

    Args:
        site: The module and its LoRAs.
        runs: They know the present pass.

    Raises:
        MoLEError: The module's weight cannot take them, see `refuse_unmergeable`.
    """

    def __init__(self, site: Site, runs: Runs) -> None:
        self._site = site
        self._runs = runs
        self._made: _Made | None = None
        self._module: Any = None
        self._norm = False
        self.hang()

    def hang(self) -> None:
        """Stand in for the module that the site has now."""
        refuse_unmergeable(self._site)
        self.remove()
        self._module, self._made = self._site.module, None
        self._norm = is_norm(self._module)
        self._module.forward = self

    def remove(self) -> None:
        """Let the module run as it is; somebody who wrapped its forward meanwhile still calls this one."""
        if self._module is not None and self._module.__dict__.get("forward") is self:
            del self._module.forward
        self._made = None

    def __call__(self, hidden_states: Tensor) -> Tensor:
        module, site = self._module, self._site
        if torch.compiler.is_compiling() or site.merged is not self:
            output: Tensor = type(module).forward(module, hidden_states)
            return output
        run = self._runs.run(site.component)
        if not run.merged:
            output = type(module).forward(module, hidden_states)
            return output
        made = self._of(run, hidden_states)
        if self._norm:
            own = getattr(module, "bias", None) is not None
            output = run_with(module, {"weight": made.weight, "bias": made.bias if own else None}, hidden_states)
            return output if own or made.bias is None else output + made.bias
        if site.stack.is_convolution:
            output = module._conv_forward(hidden_states, made.weight, made.bias)
            return output
        return F.linear(hidden_states, made.weight, made.bias)

    def _of(self, run: Run, hidden_states: Tensor) -> _Made:
        site, weight, made = self._site, self._module.weight, self._made
        assert run.weigher is not None
        alike = run.notes.get(ALIKE)
        if alike is not None and made is not None and made.weights is alike and _of_this(weight, made):
            return made
        weights = run.weigher.weigh(site, Projections(hidden_states, {}, hidden_states.shape[0]), run)
        numbers = [0.0] * site.stack.num_experts if weights is None else numbers_of(weights)
        if weights is not None and weights.shape[0] == 1 and getattr(run.weigher, "alike", False):
            run.notes[ALIKE] = weights
        if made is None or made.numbers != numbers or not _of_this(weight, made):
            if len(numbers) != site.stack.num_experts:
                raise MoLEError(
                    f"composition {getattr(run.weigher, 'name', 'in use')!r} says that it is `constant`, and gave "
                    f"weights of shape {tuple(weights.shape if weights is not None else ())} at {site.name}, which one "
                    "weight of the module cannot hold. Call `unfuse_lora()`."
                )
            self._made = made = self._make(weight, numbers)
        if made.weights is not weights:
            self._made = made = replace(made, weights=weights)
        return made

    @torch.no_grad()
    def _make(self, weight: Tensor, numbers: list[float]) -> _Made:
        refuse_unmergeable(self._site)  # somebody may have cast the model
        site, bias = self._site, getattr(self._module, "bias", None)
        stack, shape = site.stack, weight.shape
        each = torch.tensor(numbers, dtype=weight.dtype)[stack.expert_of_rank].to(weight.device)
        up, down = (x.to(weight.device) for x in (stack.up_as(weight.dtype), stack.down_as(weight.dtype)))
        whole = weight.detach().flatten(1) if len(shape) > 1 else weight.detach().diag()  # that of a norm
        whole = torch.addmm(whole, up * each, down.flatten(1)).double()
        if site.beside is not None:
            for index, change in site.beside.changes(site.name).items():
                whole += numbers[index] * change
            for index, term in site.beside.terms.items():
                if term.bias is not None:
                    more = numbers[index] * term.bias.to(weight.device, weight.dtype)
                    bias = more if bias is None else bias.detach() + more
        whole = whole if len(shape) > 1 else whole.diagonal().contiguous()
        return _Made(whole.to(weight.dtype).view_as(weight), bias, weight, weight._version, numbers, None)


def _of_this(weight: Tensor, made: _Made) -> bool:
    """Whether a merged weight was made of the weight that the module has now, as it is now."""
    same = weight is made.base and weight._version == made.version
    return same and weight.device == made.weight.device and weight.dtype == made.weight.dtype


def refuse_unmergeable(site: Site) -> None:
    """Raises MoLEError where a module's weight cannot take LoRAs: it would lose them to rounding, or has no values."""
    module: Any = site.module
    weight = module.weight
    plain = isinstance(weight, nn.Parameter) and type(weight.data) is Tensor
    known = is_norm(module) or type(module).forward in (nn.Linear.forward, nn.Conv2d.forward)
    if not known or not plain:
        why, instead = f"is a {type(module).__name__} of numbers that are quantised or made as they are needed", ""
    elif weight.dtype not in PRECISE:
        why, instead = f"is in {weight.dtype}, whose rounding would swallow a part of the LoRAs", ", or cast to float32"
    elif weight.is_meta or not isinstance(module.__dict__.get("forward", None), Merged | None):
        why, instead = "has another forward in place of its own, as sequential offloading puts one there", ""
    else:
        return
    raise MoLEError(
        f"{site.name} {why}: LoRAs cannot be fused into it. Draw without `fuse_lora()`{instead}; beside the weights "
        "they draw the same."
    )
