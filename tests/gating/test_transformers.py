"""Experts and gates on models that are no UNet, and on one that is no denoiser: nothing in the engine knows one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import Experts
from mole_diffusion.gating import GateConfig, MoLEModel
from mole_diffusion.gating.spec import plan_gates
from mole_diffusion.lora import LoRA, LoRAFactors
from tests.weighing import Numbers


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


@torch.no_grad()
def test_experts_of_whole_blocks_are_refused_where_blocks_have_two_outputs() -> None:
    model, inputs = sd3()
    experts = Experts([lora(model, "a"), lora(model, "b")])
    experts.attach({"transformer": model})
    experts.weigher = MoLEModel.from_experts(experts, GateConfig(experts="block"))
    with pytest.raises(MoLEError, match="blocks of one output, and JointTransformerBlock gives 2"):
        model(**inputs)
    experts.weigher = MoLEModel.from_experts(experts, GateConfig(experts="module"))
    assert model(**inputs).sample.isfinite().all()


@pytest.fixture(scope="module")
def t5() -> nn.Module:
    """Flan-T5's layers: gated feed-forward, an output of its own."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # not the embeddings', to merge into it
    return model.eval()


def t5_lora(model: nn.Module, name: str) -> LoRA:
    factors = {
        path: LoRAFactors(torch.randn(2, module.in_features) / 3, torch.randn(module.out_features, 2) / 3)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    return LoRA(name, "<test>", "peft", name * 64, {"model": factors})


@pytest.fixture
def t5_experts(t5: nn.Module) -> Iterator[Experts]:
    experts = Experts([t5_lora(t5, "a"), t5_lora(t5, "b")])
    experts.attach({"model": t5})
    yield experts
    experts.detach()


SAID = {
    "input_ids": torch.tensor([[3, 5, 8, 13, 1], [2, 7, 1, 8, 2]]),
    "decoder_input_ids": torch.tensor([[0, 4, 9]] * 2),
}


@torch.no_grad()
def test_constant_weights_on_a_text_to_text_model_are_its_weights_merged(t5: nn.Module, t5_experts: Experts) -> None:
    weights = torch.tensor([0.25, 0.75])
    t5_experts.weigher = Numbers(weights)
    logits, written = t5(**SAID).logits, t5.generate(SAID["input_ids"], max_new_tokens=4)
    t5_experts.detach()
    merged = copy.deepcopy(t5)
    for lora, weight in zip(t5_experts.loras, weights, strict=True):
        for name, factors in lora.factors["model"].items():
            merged.get_submodule(name).weight += weight * factors.delta()
    torch.testing.assert_close(logits, merged(**SAID).logits, atol=1e-5, rtol=1e-5)
    assert (logits - t5(**SAID).logits).abs().max() > 0.1
    assert torch.equal(written, merged.generate(SAID["input_ids"], max_new_tokens=4))


@torch.no_grad()
@pytest.mark.parametrize(
    ("scope", "axis"), [*itertools.product(["matrix", "layer", "block"], ["pooled", "token"]), ("network", "pooled")]
)
def test_encoder_and_decoder_have_gates_of_their_own(t5: nn.Module, t5_experts: Experts, scope: Any, axis: Any) -> None:
    config = GateConfig(scope=scope, token_axis=axis, input="hidden")
    places = [spec.name for spec in plan_gates(t5_experts, config)]
    # All of the encoder, then all of the decoder, then what makes words of it.
    parts = [place.split(".")[1] for place in places]
    assert parts == sorted(parts, key=["encoder", "decoder", "lm_head"].index)
    block = "model.decoder.block.1"
    expected = {
        "network": ["model.encoder", "model.decoder", "model.lm_head"],
        "block": [block],
        "layer": [f"{block}.layer.{index}.{layer}" for index, layer in enumerate(("SelfAttention", "EncDecAttention"))],
        "matrix": [f"{block}.layer.1.EncDecAttention.{leaf}" for leaf in "qkvo"],
    }[scope]
    assert [place for place in places if place in expected] == expected
    crossed = {spec.name: spec.modules for spec in plan_gates(t5_experts, config) if spec.name.endswith(".text")}
    if axis == "token" and scope != "matrix":
        # Keys and values of the cross-attention see the encoder's tokens.
        assert len(crossed) == 2
        for modules in crossed.values():
            assert [module.rpartition("EncDecAttention.")[2] for module in modules] == ["k", "v"]
    else:
        assert not crossed
    t5_experts.weigher = gates = MoLEModel.from_experts(t5_experts, config)
    with gates.record() as record:
        logits = t5(**SAID).logits
    assert list(record.names) == places
    if axis == "token":
        tokens = {name: weights.shape[1] for name, weights in record.tokens.items()}
        assert {count for name, count in tokens.items() if ".encoder." in name or name.endswith(".text")} == {5}
        assert {count for name, count in tokens.items() if ".decoder.block.0" in name and "text" not in name} <= {3, 5}
    t5_experts.weigher = Numbers(torch.tensor([0.5, 0.5]))  # what untrained gates are
    torch.testing.assert_close(logits, t5(**SAID).logits, atol=1e-5, rtol=1e-5)
