"""Experts and gates on denoisers that are no UNet: nothing in the engine knows one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn

from mole_diffusion.experts import Experts
from mole_diffusion.gating import GateConfig, MoLEModel
from mole_diffusion.lora import LoRA, LoRAFactors


def flux() -> tuple[nn.Module, dict[str, Any]]:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    return model.eval(), inputs


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 64),
        "timestep": torch.tensor([500, 500]),
    }
    return model.eval(), inputs


def lora(model: nn.Module, name: str) -> LoRA:
    factors = {
        path: LoRAFactors(torch.randn(3, module.in_features) / 5, torch.randn(module.out_features, 3) / 5)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and "_blocks." in path and "norm" not in path
    }
    return LoRA(name, "<test>", "diffusers", name * 64, {"transformer": factors})


@torch.no_grad()
@pytest.mark.parametrize("make", [flux, sd3])
def test_every_scope_runs_and_detach_gives_the_model_back(make: Any) -> None:
    model, inputs = make()
    base = model(**inputs).sample
    experts = Experts([lora(model, "a"), lora(model, "b")])
    experts.attach({"transformer": model})
    counts = []
    for scope in ("matrix", "layer", "block", "network"):
        experts.weigher = gates = MoLEModel.from_experts(experts, GateConfig(scope=scope))  # type: ignore[arg-type]
        with gates.record() as record:
            output = model(**inputs).sample
        assert (output - base).abs().max() > 0.01
        counts.append(len(record.names))
        assert len(record.names) == gates.num_gates
    assert counts[0] > counts[1] > counts[2] == 2 > counts[3] == 1
    experts.detach()
    assert torch.equal(model(**inputs).sample, base)
