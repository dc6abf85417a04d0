"""The balance loss, equations (14) and (15)."""

from __future__ import annotations

import math

import pytest
import torch

from mole_diffusion.gating import balance_loss, floor_loss, mean_usage
from tests import reference


@pytest.mark.parametrize("num_experts", [1, 2, 3, 5])
def test_equals_the_equations(num_experts: int) -> None:
    gates = torch.softmax(torch.randn(7, num_experts, dtype=torch.float64), dim=-1)
    assert balance_loss(gates).item() == pytest.approx(reference.eq14_balance(gates.tolist()), abs=1e-12)
    batch = torch.softmax(torch.randn(2, 7, num_experts, dtype=torch.float64), dim=-1)
    expected = sum(reference.eq14_balance(row.tolist()) for row in batch) / 2
    assert balance_loss(batch).item() == pytest.approx(expected, abs=1e-12)


def test_gradient_equals_closed_form_and_finite_differences() -> None:
    temperature = 0.8
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return balance_loss(torch.softmax(values / temperature, dim=-1))

    loss(logits).backward()
    gates = torch.softmax(logits.detach() / temperature, dim=-1)
    expected = torch.tensor(reference.balance_gradient(gates.tolist(), temperature), dtype=torch.float64)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(logits.grad, expected, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(loss, logits)


def test_smallest_at_uniform_where_its_gradient_is_zero() -> None:
    logits = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    loss = balance_loss(torch.softmax(logits, dim=-1))
    loss.backward()
    assert loss.item() == pytest.approx(3 * math.log(3))
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-12
    for _ in range(20):
        assert balance_loss(torch.softmax(torch.randn(5, 3), dim=-1)) >= loss.item() - 1e-6


def test_only_the_mean_is_balanced() -> None:
    one_hot = torch.eye(3)
    assert balance_loss(one_hot).item() == pytest.approx(3 * math.log(3), rel=1e-6)
    assert balance_loss(one_hot[[0, 0, 0]]).isfinite()


def test_a_lora_is_judged_where_it_is_present() -> None:
    gates = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0]], requires_grad=True)
    present = torch.tensor([[True, True, True], [True, True, False]])
    expected = -(math.log(0.55) + math.log(0.35) + math.log(0.2))
    assert balance_loss(gates, present).item() == pytest.approx(expected, rel=1e-6)
    nowhere = present & torch.tensor([True, True, False])
    loss = balance_loss(gates, nowhere)
    assert loss.item() == pytest.approx(-(math.log(0.55) + math.log(0.35)), rel=1e-6)
    loss.backward()
    assert gates.grad is not None
    assert gates.grad.isfinite().all()


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(places, N\) or \(batch, places, N\), got \(3,\)"):
        balance_loss(torch.ones(3))
    with pytest.raises(ValueError, match=r"`present` must be \(2, 3\)"):
        balance_loss(torch.ones(2, 3), torch.ones(3, 2))


def test_the_floor_lifts_only_what_is_neglected() -> None:
    gates = torch.tensor([[0.7, 0.25, 0.05], [0.5, 0.35, 0.15]], dtype=torch.float64, requires_grad=True)
    assert mean_usage(gates).tolist() == pytest.approx([0.6, 0.3, 0.1])
    loss = floor_loss(gates, 0.2)
    assert loss.item() == pytest.approx(-math.log(0.1 / 0.2))
    (gradient,) = torch.autograd.grad(loss, gates)
    assert gradient[:, :2].abs().max() == 0
    torch.testing.assert_close(gradient[:, 2], torch.full((2,), -1 / (2 * 0.1), dtype=torch.float64))
    above = floor_loss(gates, 0.05)
    assert above.item() == 0
    assert torch.autograd.grad(above, gates)[0].abs().max() == 0
    assert floor_loss(torch.eye(3)[[0, 0]], 0.1).isfinite()
