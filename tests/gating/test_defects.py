"""What went wrong in the published code must not go wrong here. One test per defect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mole_diffusion.experts import Experts
from mole_diffusion.gating import MoLEModel, balance_loss
from tests.running import make_lora, models, run_text, run_unet, unet_inputs
from tests.tiny import ATTENTION, TEXT_ENCODER, tiny_components


def gated(components: dict[str, Any], num_experts: int = 3) -> tuple[Experts, MoLEModel]:
    targets = (ATTENTION, TEXT_ENCODER)
    experts = Experts([make_lora(components, f"lora{i}", i, targets=targets) for i in range(num_experts)])
    experts.attach(models(components))
    gates = MoLEModel.from_experts(experts)
    for parameter in gates.gate_parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    experts.weigher = gates
    return experts, gates


def test_balance_loss_has_a_gradient_at_every_gate(components: dict[str, Any]) -> None:
    _, gates = gated(components)
    with gates.record() as record:
        run_unet(components), run_text(components)
    balance_loss(record.places()).backward()
    gradients = [parameter.grad for parameter in gates.gate_parameters()]
    assert len(gradients) > 10
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_gates_act_alike_in_training_and_inference(components: dict[str, Any], tmp_path: Path) -> None:
    """Theirs acted only under gradient checkpointing; inference loaded them into a model that had none."""
    _, gates = gated(components)
    unet = components["unet"].train()
    unet.enable_gradient_checkpointing()
    trained = run_unet(components).detach()
    gates.save_pretrained(tmp_path)
    fresh = tiny_components()
    experts, _ = gated(fresh)
    experts.weigher = MoLEModel.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(run_unet(fresh), trained, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_temperature_is_read(components: dict[str, Any]) -> None:
    _, gates = gated(components)
    spread = []
    for temperature in (0.5, 1.0, 4.0):
        for gate in gates.gates.values():
            gate.log_temperature.fill_(torch.tensor(temperature).log())  # type: ignore[operator, union-attr]
        with gates.record() as record:
            run_unet(components)
        spread.append(record.places().std(dim=-1).mean().item())
    assert spread[0] > spread[1] > spread[2] > 0  # the hotter, the more alike


@torch.no_grad()
def test_gates_do_not_load_into_a_model_without_any(components: dict[str, Any], tmp_path: Path) -> None:
    """Theirs vanished in `load_state_dict(strict=False)` of a stock UNet."""
    _, gates = gated(components)
    gates.save_pretrained(tmp_path)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert set(state) == set(gates.state_dict())
    bare = Experts([make_lora(components, f"lora{i}", i, targets=ATTENTION) for i in range(3)])
    other = tiny_components()
    bare.attach({"unet": other["unet"]})
    with pytest.raises(ValueError, match="trained for other LoRAs"):
        bare.weigher = MoLEModel.from_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("num_experts", [1, 2, 5])
def test_any_number_of_loras(components: dict[str, Any], num_experts: int) -> None:
    _, gates = gated(components, num_experts)
    with gates.record() as record:
        run_unet(components), run_text(components)
    assert record.places().shape == (gates.num_gates, num_experts)
    torch.testing.assert_close(record.places().sum(dim=-1), torch.ones(gates.num_gates))


@torch.no_grad()
@pytest.mark.parametrize("size", [8, 16, 20])
def test_any_resolution(components: dict[str, Any], size: int) -> None:
    _, gates = gated(components)
    with gates.record() as record:
        output = run_unet(components, **unet_inputs(size=size))
    assert output.shape[-1] == size
    assert record.places().std() > 0.01
