"""`MoLEAttnProcessor` without experts is the stock processor, in every kind of attention layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from mole_diffusion.experts import MoLEAttnProcessor


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "call"),
    [
        ({}, {}),
        ({"cross_attention_dim": 12}, {"encoder_hidden_states": torch.randn(2, 5, 12)}),
        ({}, {"attention_mask": torch.tensor([[0.0, -1e4] * 4] * 2)[:, None]}),
        ({"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0}, {"image": True}),
        (
            {"spatial_norm_dim": 6, "_from_deprecated_attn_block": True},
            {"image": True, "temb": torch.randn(2, 6, 2, 4)},
        ),
        (
            {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
            {"encoder_hidden_states": torch.randn(2, 5, 12)},
        ),
        ({"qk_norm": "layer_norm"}, {}),
    ],
)
def test_parity_with_the_stock_processor(layer: dict[str, Any], call: dict[str, Any]) -> None:
    call = dict(call)
    attention = Attention(query_dim=32, heads=2, dim_head=16, **layer)
    for parameter in attention.parameters():
        parameter.copy_(torch.randn_like(parameter) / 4)
    x = torch.randn(2, 32, 2, 4) if call.pop("image", False) else torch.randn(2, 8, 32)
    attention.set_processor(AttnProcessor2_0())
    expected = attention(x, **call)
    attention.set_processor(MoLEAttnProcessor())
    assert torch.equal(attention(x, **call), expected)
