"""However weights vary, what is added is the equation, `sum_i gamma_i s_i B_i A_i x`, also in half precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole_diffusion.experts import ExpertStack, Site
from mole_diffusion.lora import LoRAFactors
from mole_diffusion.speed import Counted

NUMBER, BATCH, HEIGHT, WIDTH = 3, 2, 3, 5
TOKENS = HEIGHT * WIDTH
D_IN, D_OUT = 24, 20
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def factors_at(ranks: Sequence[int], kernel: tuple[int, ...]) -> list[LoRAFactors]:
    ones = [1] * len(kernel)
    return [
        LoRAFactors(torch.randn(r, D_IN, *kernel), torch.randn(D_OUT, r, *ones), 0.5 + index)
        for index, r in enumerate(ranks)
    ]


def literally(factors: Sequence[LoRAFactors], x: Tensor, weights: Tensor) -> Tensor:
    """`(batch, tokens, d_out)` in float64."""
    result = torch.zeros(BATCH, TOKENS, D_OUT, dtype=torch.float64)
    for index, one in enumerate(factors):
        product = one.scaling * one.up.flatten(1).double() @ one.down.flatten(1).double()
        if x.ndim == 4:
            output = F.conv2d(x.double(), product.view(D_OUT, *one.down.shape[1:]), padding=1)
            output = output.flatten(2).transpose(1, 2)
        else:
            output = x.double() @ product.T
        result += weights[..., index, None].double() * output
    return result


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("ranks", [(4, 4, 4), (3, 1, 5)])
@pytest.mark.parametrize("kind", ["linear", "convolution", "channels last"])
def test_weights_alike_by_sample_by_token_and_by_both(kind: str, ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    """With and without gradients, of all LoRAs and of two of them."""
    torch.manual_seed(0)
    module: Any = nn.Linear(D_IN, D_OUT) if kind == "linear" else nn.Conv2d(D_IN, D_OUT, 3, padding=1)
    factors = factors_at(ranks, () if kind == "linear" else (3, 3))
    whole = Site("unet", "a", module, ExpertStack(factors, "a"))
    x = torch.randn((BATCH, TOKENS, D_IN) if kind == "linear" else (BATCH, D_IN, HEIGHT, WIDTH)).to(dtype)
    if kind == "channels last":
        x = x.to(memory_format=torch.channels_last)
    for rows, tokens in ((1, 1), (BATCH, 1), (1, TOKENS), (BATCH, TOKENS)):
        for kept in (None, (0, 2)):
            site = whole if kept is None else whole.only(kept)
            for learning in (False, True):
                weights = torch.rand(rows, tokens, NUMBER)
                if kept is not None:
                    weights[..., 1] = 0
                weights.requires_grad_(learning)
                output = torch.zeros_like(
                    F.conv2d(x, x.new_zeros(D_OUT, D_IN, 1, 1)) if x.ndim == 4 else x[..., :D_OUT]
                )
                projected = site.group.project(site, x, output).rows["unet.a"]
                added = site.stack.add_to(output, projected, weights)
                added = (added.flatten(2).transpose(1, 2) if x.ndim == 4 else added).double()
                expected = literally(factors, x, weights.detach())
                error = (added - expected).norm() / expected.norm()
                assert error < TOLERANCE[dtype], f"{rows} rows, {tokens} tokens, kept {kept}: {error:.2e}"
                if learning:
                    added.sum().backward()
                    assert weights.grad is not None
                    assert (weights.grad[..., [0, 2]] != 0).all()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kind", ["linear", "convolution", "channels last"])
def test_one_number_for_all_is_multiplied_within_the_product(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module: Any = nn.Linear(D_IN, D_OUT) if kind == "linear" else nn.Conv2d(D_IN, D_OUT, 3, padding=1)
    factors = [replace(one, scaling=0.75) for one in factors_at((3, 1, 5), () if kind == "linear" else (3, 3))]
    site = Site("unet", "a", module, ExpertStack(factors, "a"))
    x = torch.randn((BATCH, TOKENS, D_IN) if kind == "linear" else (BATCH, D_IN, HEIGHT, WIDTH)).to(dtype)
    if kind == "channels last":
        x = x.to(memory_format=torch.channels_last)
    weights = torch.full((1, 1, NUMBER), 0.4)
    assert site.stack.scaled(weights, dtype) == pytest.approx(0.3)
    output = x[..., :D_OUT].contiguous() if kind == "linear" else torch.zeros_like(x[:, :D_OUT])
    output.zero_()
    with Counted() as counted:
        added = site.stack.add_to(output, site.group.project(site, x, output).rows["unet.a"], weights)
    assert counted.count == 2
    added = (added.flatten(2).transpose(1, 2) if x.ndim == 4 else added).double()
    expected = literally(factors, x, weights)
    assert (added - expected).norm() < TOLERANCE[dtype] * expected.norm()


def test_what_is_worked_out_of_weights_goes_with_them() -> None:
    from mole_diffusion.experts import stack

    made = ExpertStack(factors_at((4, 4, 4), ()), "a")
    weights = torch.rand(1, TOKENS, NUMBER)
    before = len(stack._KEPT)
    scaled = made.scaled(weights, torch.float32)
    assert made.scaled(weights, torch.float32) is scaled
    assert len(stack._KEPT) == before + 1
    del weights
    assert len(stack._KEPT) == before
