"""How large the change by several LoRAs is at a module, and by how much to reduce it."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..experts import ExpertStack, Projections, Run, Site
from .base import Composition
from .linear import Linear
from .roles import roles
from .wrapper import Wrapper

ROUNDING = 1e-6  # one LoRA alone must keep its weight to the bit
_GRAMS: WeakKeyDictionary[ExpertStack, Tensor] = WeakKeyDictionary()
_WHOLE_GRAMS: WeakKeyDictionary[Site, Tensor] = WeakKeyDictionary()


class Budget(Wrapper):
    """The weights of another method, turned down at every module where the stack would be louder than its loudest LoRA.

    A plain sum of LoRAs burns, since changes add up; 1/N drowns every one of them, also where they do not add up. Here
    each module is asked: all weights are scaled by `stack_energy_scale`, which is 1 for LoRAs that cancel, 0.71
    for two equally loud ones in directions of their own, and 1/2 for two equal ones. Utilities are not counted.

    Args:
        method: Whose weights; by default `Linear`, every LoRA in full.

    Raises:
        MoLEError: `method` is no method.
    """

    name = "budget"
    source = "energy of the stack, exact from r x r products"

    def __init__(self, method: Composition | None = None) -> None:
        super().__init__(Linear() if method is None else method)
        self.constant = self.method.constant

    @property
    def gates(self) -> Any:
        """Those of the other method, where it needs some."""
        return self.method.gates

    @gates.setter
    def gates(self, gates: Any) -> None:
        self.method.gates = gates

    @property
    def of_modules(self) -> bool:
        return type(self).weigh is Budget.weigh and bool(getattr(self.method, "alike", False))

    def weigh(self, site: Site, projections: Projections, run: Run) -> Tensor | None:
        weights = self.method.weigh(site, projections, run)
        if weights is None:
            return None
        kept: dict[str, tuple[Tensor, Tensor]] = {} if run.call is None else run.call.state.setdefault(self, {})
        found = kept.get(site.name)
        if found is None or found[0] is not weights:
            counted = 1 - roles(run, "utility")
            scale = stack_energy_scale(site_gram(site), weights * counted)[..., None]
            kept[site.name] = found = weights, torch.where(counted.bool(), weights * scale.to(weights.dtype), weights)
        return found[1]


def site_gram(site: Site) -> Tensor:
    """`stack_gram` with what LoRAs change beside their products of small rank, whose whole changes are made once.

    Returns:
        float64 `(N, N)`. Do not change it.
    """
    if site.beside is None:
        return stack_gram(site.stack)
    if site not in _WHOLE_GRAMS:
        stack, weight = site.stack, site.module.weight
        assert isinstance(weight, torch.Tensor)
        device = weight.device
        up, down = (x.double().to(device).flatten(1) for x in (stack.up_as(torch.float64), stack.down))
        owner = stack.expert_of_rank.to(device)
        terms = site.beside.changes(site.name)
        changes = {i: up[:, owner == i] @ down[owner == i] + terms.get(i, 0) for i in stack.indices}
        gram = torch.zeros(stack.num_experts, stack.num_experts, dtype=torch.float64, device=device)
        for i, first in changes.items():
            for j, second in changes.items():
                gram[i, j] = (first * second).sum()
        _WHOLE_GRAMS[site] = gram
    return _WHOLE_GRAMS[site]


def stack_gram(stack: ExpertStack) -> Tensor:
    """Inner products of the LoRAs' weight changes at a module, `<dW_i, dW_j>`, worked out once.

    Exact, and the changes are never made: with `dW_i = B_i A_i`, `<dW_i, dW_j> = <B_i^T B_j, A_i A_j^T>`, which is
    products of rank by rank.

    Returns:
        float64 `(N, N)` on the stack's device; zero for a LoRA that does not touch the module. Do not change it.
    """
    if stack not in _GRAMS:
        up, down = stack.up_as(torch.float64), stack.down_as(torch.float64).flatten(1)  # (d_out, R), (R, d_in)
        by_rank = (up.T @ up) * (down @ down.T)
        owner = torch.nn.functional.one_hot(stack.expert_of_rank.to(by_rank.device), stack.num_experts).double()
        _GRAMS[stack] = owner.T @ by_rank @ owner
    return _GRAMS[stack]


def stack_energy_scale(gram: Tensor, weights: Tensor) -> Tensor:
    """The factor for all weights that makes the stack no louder than its loudest LoRA would be alone.

    `min(1, max_i |w_i| ||dW_i|| / E)` with `E^2 = sum_ij w_i w_j <dW_i, dW_j>`, the squared norm of the summed
    change. Two equal LoRAs get 1/2, two orthogonal ones of one norm 0.71; one alone, or two that cancel, exactly 1.

    Args:
        gram: `(N, N)`, from `stack_gram`.
        weights: `(..., N)`, e.g. one row for every token.

    Returns:
        `(...)`, in (0, 1], float32 or wider.
    """
    wide = torch.promote_types(weights.dtype, torch.float32)
    weights, gram = weights.to(wide), gram.to(weights.device, wide)
    energy = ((weights @ gram) * weights).sum(dim=-1)  # squared; of a sum that cancels, rounding may leave less than 0
    loudest = (weights.square() * gram.diagonal()).amax(dim=-1)
    louder = energy > loudest * (1 + ROUNDING)
    return torch.where(louder, loudest / energy, torch.ones_like(energy)).sqrt()
