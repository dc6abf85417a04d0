"""The energy of a stack of LoRAs from products of rank by rank, against the full matrices."""

from __future__ import annotations

import gc

import pytest
import torch

from mole_diffusion.composition import budget
from mole_diffusion.composition.budget import stack_energy_scale, stack_gram
from mole_diffusion.experts import ExpertStack
from mole_diffusion.lora import LoRAFactors
from tests import reference

RANKS, SCALINGS = (3, 1, 2), (0.5, 2.0, 1.25)


def factors(kernel: tuple[int, ...] = ()) -> list[LoRAFactors]:
    torch.manual_seed(0)
    ones = (1,) * len(kernel)
    return [
        LoRAFactors(torch.randn(r, 5, *kernel), torch.randn(4, r, *ones), scaling)
        for r, scaling in zip(RANKS, SCALINGS, strict=True)
    ]


def literal(loras: list[LoRAFactors]) -> list[reference.FACTORS]:
    return [(lora.down.flatten(1), lora.up.flatten(1), lora.scaling) for lora in loras]


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_the_gram_is_that_of_the_full_matrices(kernel: tuple[int, ...]) -> None:
    loras = factors(kernel)
    changes = torch.stack([reference.delta(lora).flatten() for lora in literal(loras)])
    gram = stack_gram(ExpertStack([loras[0], None, *loras[1:]], "a"))
    assert gram.dtype == torch.float64
    there = torch.tensor([0, 2, 3])
    torch.testing.assert_close(gram[there][:, there], changes @ changes.T, atol=1e-12, rtol=1e-12)
    assert not gram[1].any()
    assert not gram[:, 1].any()


def test_the_scale_is_that_of_the_full_matrices_at_every_token() -> None:
    loras = factors()
    gram = stack_gram(ExpertStack(loras, "a"))
    weights = torch.randn(2, 7, 3, dtype=torch.float64)
    weights[0, 0] = torch.tensor([0, 0.7, 0])
    scale = stack_energy_scale(gram, weights)
    assert scale.shape == (2, 7)
    expected = [reference.stack_energy_scale(literal(loras), row.tolist()) for row in weights.flatten(0, 1)]
    torch.testing.assert_close(scale.flatten(), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12)
    assert scale.min() < 1
    assert scale[0, 0] == 1
    alone = torch.rand(100, 1) * torch.tensor([0.0, 1.0, 0.0])
    assert torch.equal(stack_energy_scale(gram, alone), torch.ones(100))
    half = stack_energy_scale(gram, weights.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, stack_energy_scale(gram, weights.bfloat16().double()).float())


def test_equal_loras_share_one_and_orthogonal_ones_share_its_energy() -> None:
    first = LoRAFactors(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]))
    across = LoRAFactors(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [2.0]]))
    weights = torch.ones(2, dtype=torch.float64)
    for other, scale in ((first, 0.5), (across, 0.5**0.5)):
        gram = stack_gram(ExpertStack([first, other], "a"))
        assert stack_energy_scale(gram, weights).item() == pytest.approx(scale, abs=1e-12)
    gram = stack_gram(ExpertStack([first, first], "a"))
    for quiet in ([1.0, 0.0], [1.0, -1.0], [0.0, 0.0]):
        assert stack_energy_scale(gram, torch.tensor(quiet)).item() == 1


def test_the_gram_is_kept_as_long_as_its_stack() -> None:
    stack = ExpertStack(factors(), "a")
    gram, before = stack_gram(stack), len(budget._GRAMS)
    assert stack_gram(stack) is gram
    del stack
    gc.collect()
    assert len(budget._GRAMS) < before
