"""Which modules share a gate, and in what order they run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mole_diffusion.experts import Experts
from mole_diffusion.families import architecture_of
from mole_diffusion.families.clip import CLIPText
from mole_diffusion.families.flux import FluxTransformer
from mole_diffusion.families.unet import UNet
from mole_diffusion.gating import GateConfig
from mole_diffusion.gating.scopes import gate_name
from mole_diffusion.gating.spec import plan_gates
from tests.running import EVERYTHING, make_lora, models, run_text, run_unet
from tests.tiny import ATTENTION

BLOCK = "down_blocks.0.attentions.1.transformer_blocks.0"
ENCODER = "text_model.encoder.layers.3"
KNOWN = {"unet": UNet(), "text_encoder": CLIPText(), "transformer": FluxTransformer()}
TIME = r"\.time_emb_proj$"


@pytest.mark.parametrize(
    ("component", "module", "layer", "block"),
    [
        ("unet", f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.attn1", BLOCK),
        ("unet", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2", BLOCK),
        ("unet", f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff", BLOCK),
        ("unet", "mid_block.attentions.0.proj_in", "mid_block.attentions.0", "mid_block.attentions.0"),
        ("unet", "mid_block.resnets.1.conv2", "mid_block.resnets.1", "mid_block.resnets.1"),
        ("unet", "up_blocks.0.upsamplers.0.conv", "up_blocks.0.upsamplers.0", "up_blocks.0.upsamplers.0"),
        ("unet", "time_embedding.linear_1", "time_embedding", "time_embedding"),
        ("unet", "conv_in", "conv_in", "conv_in"),
        ("text_encoder", f"{ENCODER}.self_attn.q_proj", f"{ENCODER}.self_attn", ENCODER),
        ("text_encoder", f"{ENCODER}.mlp.fc2", f"{ENCODER}.mlp", ENCODER),
        ("transformer", "single_transformer_blocks.7.proj_mlp", *["single_transformer_blocks.7"] * 2),
    ],
)
def test_names(component: str, module: str, layer: str, block: str) -> None:
    known = KNOWN[component]
    assert gate_name("matrix", component, module, known) == f"{component}.{module}"
    assert gate_name("layer", component, module, known) == f"{component}.{layer}"
    assert gate_name("block", component, module, known) == f"{component}.{block}"
    assert gate_name("network", component, module, known) == component


def test_a_spatial_transformer_has_one_gate_for_its_blocks_and_projections() -> None:
    for module in ("proj_in", "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2"):
        name = gate_name("transformer", "unet", f"down_blocks.0.attentions.1.{module}", KNOWN["unet"])
        assert name == "unet.down_blocks.0.attentions.1"
    for component, module, block in (
        ("unet", "mid_block.resnets.1.conv2", "mid_block.resnets.1"),
        ("text_encoder", f"{ENCODER}.mlp.fc2", ENCODER),
    ):
        assert gate_name("transformer", component, module, KNOWN[component]) == f"{component}.{block}"


@torch.no_grad()
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_firing_order_is_the_order_of_a_forward_pass(components: dict[str, Any], component: str) -> None:
    fired: list[str] = []
    for name, module in components[component].named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: fired.append(name))
    run = run_unet if component == "unet" else run_text
    run(components)
    # Every residual block projects the same time embedding; where in the block does not matter to any gate.
    fired = [name for name in fired if "time_emb_proj" not in name]
    assert len(fired) > 10
    assert sorted(fired, key=architecture_of(components[component]).firing_order) == fired


def test_entries_are_the_first_modules_that_read_the_same_tensor(components: dict[str, Any]) -> None:
    experts = Experts([make_lora(components, "a", 1), make_lora(components, "b", 2, targets=ATTENTION)])
    experts.attach(models(components))

    def entries(scope: Any) -> dict[str, list[str]]:
        specs = plan_gates(experts, GateConfig(scope=scope))
        return {spec.name: [entry.module.rpartition(".")[2] for entry in spec.entries] for spec in specs}

    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    assert entries("block")[block] == ["to_q", "to_k", "to_v"]
    assert entries("layer")[f"{block}.attn2"] == ["to_q"]  # keys and values read the prompt
    assert entries("layer")[f"{block}.ff"] == ["proj"]
    assert entries("layer")["text_encoder.encoder.layers.1.self_attn"] == ["q_proj", "k_proj", "v_proj"]
    assert entries("matrix")[f"{block}.attn1.to_k"] == ["to_k"]
    assert entries("network") == {"unet": ["conv1"], "text_encoder": ["q_proj", "k_proj", "v_proj"]}
    present = {spec.name: spec.indices for spec in plan_gates(experts, GateConfig(scope="layer"))}
    assert present[f"{block}.attn1"] == (0, 1)
    assert present[f"{block}.ff"] == (0,)


def test_every_adapted_module_has_exactly_one_gate(components: dict[str, Any]) -> None:
    experts = Experts([make_lora(components, "a", 1)])
    experts.attach(models(components))
    for scope in ("matrix", "layer", "block", "transformer", "network"):
        sites = [site for spec in plan_gates(experts, GateConfig(scope=scope)) for site in spec.sites]
        assert sorted(sites) == sorted(experts.sites)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scope": "head"}, r"`scope` must be one of \['matrix', 'layer', 'block', 'trans.*', 'network'\], got 'head'"),
        ({"input": "text"}, r"`input` must be one of \['experts', 'hidden', 'none'\], got 'text'"),
        ({"input": "none", "token_axis": 4}, "input='none' has no tokens to read"),
        ({"experts": "block", "input": "hidden"}, "experts='block' needs input='experts', got input='hidden'"),
        ({"gate_sum": 0.0}, "`gate_sum` must be positive and finite, got 0.0"),
        ({"gate_sum": float("nan")}, "`gate_sum` must be positive and finite"),
        ({"normalization": "batch"}, "`normalization` must be one of"),
        ({"experts": "all"}, "`experts` must be one of"),
        ({"token_axis": 0}, "'token' or a grid size of at least 1, got 0"),
        ({"token_axis": True}, "got True"),
        ({"token_axis": "mean"}, "got 'mean'"),
        ({"temperature": 0.0}, "positive and finite, got 0.0"),
        ({"temperature": float("inf")}, "positive and finite"),
        ({"experts": "block", "scope": "layer"}, "needs scope='block'"),
        ({"experts": "block", "token_axis": 4}, "'pooled' or 'flatten', got 4"),
        ({"experts": "block", "token_axis": "token"}, "'pooled' or 'flatten', got 'token'"),
        ({"scope": "network", "token_axis": "token"}, "token_axis='token' needs a scope whose modules see the same"),
        ({"gate_summ": 2}, r"Unknown keys \['gate_summ'\]"),
    ],
)
def test_bad_configurations(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateConfig.from_dict(values)


def test_configuration_survives_a_dictionary() -> None:
    config = GateConfig(scope="layer", token_axis=4, normalization="l2", temperature=2.0, learn_temperature=False)
    assert GateConfig.from_dict(config.to_dict()) == config


def test_with_a_gate_per_token_words_and_pixels_are_weighed_apart(components: dict[str, Any]) -> None:
    """A block's keys and values read the prompt, a residual block's time projection one vector; the rest, pixels."""
    reach = (*EVERYTHING, TIME)
    experts = Experts([make_lora(components, name, i, targets=reach) for i, name in enumerate(("a", "b"))])
    experts.attach(models(components))
    specs = {spec.name: spec for spec in plan_gates(experts, GateConfig(token_axis="token"))}
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    prefix = block.removeprefix("unet.")
    assert set(specs[f"{block}.text"].modules) == {f"{prefix}.attn2.to_k", f"{prefix}.attn2.to_v"}
    assert not specs[f"{block}.text"].spatial
    assert {f"{prefix}.attn1.to_k", f"{prefix}.attn2.to_q", f"{prefix}.ff.net.2"} <= set(specs[block].modules)
    time = specs["unet.down_blocks.0.resnets.0.time"]
    assert time.modules == ("down_blocks.0.resnets.0.time_emb_proj",)
    pooled = {spec.name for spec in plan_gates(experts, GateConfig())}
    assert pooled < set(specs)
