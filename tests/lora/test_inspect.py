"""What `inspect_lora`, `judge` and `fitting` say of files: kinds, program, base, energy, verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mole_diffusion.families import FAMILIES, family_of
from mole_diffusion.lora import LoRAError, fitting, inspect_lora, judge, load_lora
from mole_diffusion.lora.skeletons import SKELETONS, candidates, names_of
from mole_diffusion.lora.trainers import trainer_of
from tests.command import mole
from tests.lora_files import to_kohya
from tests.tiny import random_lora, tiny_components

QUERIES = r"mid_block.*attn1\.to_[qk]$"


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {"unet": tiny_components()["unet"]}


def pair(name: str, out: int, wide: int, r: int = 2) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.randn(r, wide), f"{name}.lora_B.weight": torch.randn(out, r)}


def test_kinds_and_programs(models: dict[str, Any], tmp_path: Path) -> None:
    state = to_kohya(random_lora(models, targets=QUERIES, alpha=2.0))
    first = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    state |= {
        f"{first}.dora_scale": torch.ones(64, 1),
        "lora_unet_conv_in.lokr_w1": torch.ones(2, 2),
        "lora_unet_conv_in.lokr_w2": torch.ones(16, 2, 3, 3),
        "lora_unet_conv_out.diff_b": torch.ones(4),
    }
    save_file(state, tmp_path / "it.safetensors", metadata={"ot_branch": "master"})
    report = inspect_lora(tmp_path / "it.safetensors")
    assert report.kinds == {"DoRA over LoRA": 1, "LoRA": 1, "LoKr": 1, "bias": 1}
    assert (report.trainer, report.ranks, report.alphas) == ("OneTrainer", {4: 2}, (2.0,))
    assert set(report.scalings) == {0.5, 1.0}


@pytest.mark.parametrize(
    ("key", "metadata", "program"),
    [
        ("lora_unet_x.alpha", {"ss_network_module": "networks.lora"}, "kohya's sd-scripts"),
        ("lora_unet_x.alpha", {"ss_network_module": "lycoris.kohya"}, "LyCORIS in kohya's sd-scripts"),
        ("lora_unet_x.alpha", {}, "kohya's sd-scripts or musubi-tuner"),
        ("lora_transformer_x.alpha", {}, "OneTrainer"),
        ("transformer.x.lora_down.weight", {}, "OneTrainer"),
        ("diffusion_model.x.lora_A.weight", {"software": '{"name": "ai-toolkit"}'}, "ai-toolkit"),
        ("diffusion_model.x.lora_A.weight", {}, "ai-toolkit or ComfyUI"),
        ("lycoris_x.lokr_w1", {}, "LyCORIS, as SimpleTuner uses it"),
        ("x.lora_A.default.weight", {}, "DiffSynth"),
        ("base_model.model.x.lora_A.weight", {}, "PEFT"),
        ("unet.x.lora_A.weight", {}, "diffusers"),
        ("x.lora_A.weight", {}, None),
    ],
)
def test_programs_are_told_by_header_and_keys(key: str, metadata: dict[str, str], program: str | None) -> None:
    assert trainer_of(metadata, [key]) == program


@torch.no_grad()
def test_energy_and_spikes_are_those_of_the_merged_change(models: dict[str, Any], tmp_path: Path) -> None:
    state = random_lora(models, targets=QUERIES, alpha=2.0)
    key = next(key for key in state if key.endswith("to_q.lora_A.weight"))
    state[key][1:] *= 1e-3  # one direction has nearly all
    save_file(state, tmp_path / "it.safetensors")
    verdict = judge(tmp_path / "it.safetensors", models, "tiny")
    deltas = {n: f.delta() for n, f in load_lora(state, models).factors["unet"].items()}
    weights = {name: models["unet"].get_submodule(name).weight for name in deltas}
    whole = sum(d.square().sum() for d in deltas.values()) / sum(w.square().sum() for w in weights.values())
    assert verdict.energy == pytest.approx(float(whole) ** 0.5, rel=1e-4)
    ratios = {f"unet.{name}": float(deltas[name].norm() / weights[name].norm()) for name in deltas}
    assert dict(verdict.loudest) == pytest.approx(ratios, rel=1e-4)
    assert [name for name, _ in verdict.spikes] == [key.removesuffix(".lora_A.weight")]
    values = torch.linalg.svdvals(deltas[verdict.spikes[0][0].removeprefix("unet.")]).square()
    assert verdict.spikes[0][1] == pytest.approx(float(values[0] / values.sum()), rel=1e-4)
    assert verdict.modules == {"unet": 2}


@torch.no_grad()
def test_spikes_of_kronecker_products_are_those_of_the_matrix(models: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    one = torch.randn(16, 1) @ torch.randn(1, 16)
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    state = {
        f"{stem}.to_q.lokr_w1": torch.eye(4)[:1].T @ torch.randn(1, 4),
        f"{stem}.to_q.lokr_w2": one + 0.02 * torch.randn(16, 16),
        f"{stem}.to_k.lokr_w1": torch.randn(4, 4),
        f"{stem}.to_k.lokr_w2": one,
        f"{stem}.to_v.diff": torch.randn(64, 64) + 30 * torch.randn(64, 1) @ torch.randn(1, 64) / 8,
    }
    save_file(state, tmp_path / "it.safetensors")
    factors = load_lora(state, models).factors["unet"]
    shares = {}
    for name, found in factors.items():
        values = torch.linalg.svdvals(found.delta().double()).square()
        shares[f"unet.{name}"] = float(values[0] / values.sum())
    spikes = dict(judge(tmp_path / "it.safetensors", models, "tiny").spikes)
    assert spikes == pytest.approx({name: share for name, share in shares.items() if share > 0.9}, rel=1e-4)
    assert {name.rsplit(".", 1)[1] for name in spikes} == {"to_q", "to_v"}


def test_a_verdict_says_why_not(models: dict[str, Any], tmp_path: Path) -> None:
    save_file(pair("unet.nowhere", 4, 4), tmp_path / "it.safetensors")
    verdict = judge(tmp_path / "it.safetensors", models, "tiny")
    assert (verdict.modules, verdict.energy) == ({}, None)
    assert "1 of 1 modules find no place in the model" in str(verdict.refusal)


FITTING = {
    "Krea 2": pair("diffusion_model.blocks.3.attn.wk", 1536, 6144),
    "Z-Image": pair("lora_unet_layers_7_attention_qkv", 3 * 3840, 3840),
    "FLUX.2 klein 4B": pair("transformer.single_transformer_blocks.19.attn.to_qkv_mlp_proj", 27648, 3072),
}


@pytest.mark.parametrize("title", FITTING)
def test_a_file_is_held_against_the_published_models(title: str, tmp_path: Path) -> None:
    save_file(FITTING[title], tmp_path / "it.safetensors")
    verdicts = fitting(tmp_path / "it.safetensors")
    assert [(verdict.base, verdict.modules) for verdict in verdicts] == [
        (title, {"transformer": 3 if "qkv" in next(iter(FITTING[title])) and title == "Z-Image" else 1})
    ]


def test_where_no_published_model_fits_the_nearest_says_why(tmp_path: Path) -> None:
    save_file(pair("diffusion_model.blocks.3.attn.wk", 1536, 6143), tmp_path / "it.safetensors")
    (verdict,) = fitting(tmp_path / "it.safetensors")
    assert verdict.base == "Krea 2"
    assert "do not fit transformer_blocks.3.attn.to_k with weight (1536, 6144)" in str(verdict.refusal)
    for nobodys in ("unet.a.attn2.to_k", "diffusion_model.blocks.0.self_attn.q"):
        save_file(pair(nobodys, 4, 7), tmp_path / "it.safetensors")
        assert fitting(tmp_path / "it.safetensors") == []


def test_a_stranger_reads_what_acts_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser by its own name, one module in the singular, several that are fused in the file, words it brings."""
    state = {**pair("diffusion_model.layers.3.attention.qkv", 3 * 3840, 3840)}
    save_file(state, tmp_path / "fused.safetensors")
    words = {**pair("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 1280, 768)}
    save_file({**words, "bundle_emb.<me>.emb_params": torch.ones(3, 768)}, tmp_path / "words.safetensors")
    save_file(pair("somewhere.else", 4, 4), tmp_path / "other.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("fused", "words", "other")]
    monkeypatch.setenv("COLUMNS", "200")
    done = mole("inspect", *files)
    said = [" ".join(line.strip("│ ").split()) for line in done.stdout.splitlines()]
    for line in (
        "made for │ Z-Image",
        "modules │ 1 in transformer",
        "kinds │ LoRA (1 module)",
        "verdict │ all of it acts on Z-Image: 3 modules of transformer, fused ones taken apart",
        "embeddings │ <me> (3 vectors), which `load_loras` loads as textual inversion",
        "verdict │ all of it acts on Stable Diffusion 1.x: 1 module of unet",
        "modules │ 1 in a component without a name",
        "verdict │ no published base model that is known here has these names and sizes; see --base",
    ):
        assert line in said, line


def test_names_tell_families() -> None:
    assert names_of(["double_blocks.0.img_attn.qkv"]) == "FLUX.1, FLUX.2 dev, FLUX.2 klein 9B or FLUX.2 klein 4B"
    assert names_of(["joint_blocks_0_x_block_attn_qkv"]) == "Stable Diffusion 3.5 medium or Stable Diffusion 3.5 large"
    encoders = ["text_model_encoder_layers_0_self_attn_q_proj", "encoder_block_0_layer_0_SelfAttention_q"]
    third = names_of(["joint_blocks_0_x_block_attn_qkv", *encoders])
    assert third == "Stable Diffusion 3.5 medium or Stable Diffusion 3.5 large"
    assert names_of(["blocks.0.attn.wq"]) == "Krea 2"
    assert names_of(["somewhere.else"]) is None
    assert candidates(["somewhere.else"]) == list(SKELETONS)


def test_a_file_for_another_family_says_which_and_who_wrote_it(models: dict[str, Any]) -> None:
    state = pair("diffusion_model.blocks.3.attn.wk", 1536, 6144)
    with pytest.raises(LoRAError, match=r"find no place in the model: .*written by ai-toolkit or ComfyUI.*of Krea 2\."):
        load_lora(state, models)


AUTHORS = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": "Stable Diffusion 1.x, Stable",
    "unet.output_blocks.5.1.transformer_blocks.1.attn1.to_q": "Stable Diffusion 1.x, Stable",
    "lora_unet_middle_block_9_in_layers_2": "Stable Diffusion 1.x, Stable",
    "unet.time_embed.4": "",
    "diffusion_model.double_blocks.3.img_attn.qkv": "FLUX.1, FLUX.2 dev",
    "lora_unet_single_blocks_37_linear1": "FLUX.1, FLUX.2 dev",
    "transformer.blocks.3.attn.wk": "Krea 2",
    "lora_unet_joint_blocks_3_x_block_attn_qkv": "Stable Diffusion 3.5",
}


@pytest.mark.parametrize("stem", AUTHORS)
def test_names_of_a_published_checkpoint_are_said_to_be_its_original_ones(stem: str, models: dict[str, Any]) -> None:
    state = {f"{stem}.{end}.weight": torch.ones(2, 2) for end in ("lora_down", "lora_up")}
    parts = {("transformer" if stem.startswith("transformer") else "unet"): models["unet"]}
    of = f" of {AUTHORS[stem]}" if AUTHORS[stem] else r"\."
    with pytest.raises(LoRAError, match=f"Its names are the original ones of the published checkpoint{of}"):
        load_lora(state, parts)


def test_names_of_diffusers_are_not_said_to_be_others(models: dict[str, Any]) -> None:
    for stem in ("unet.down_blocks.7.attentions.0.proj_in", "lora_unet_transformer_blocks_0_attn_to_q"):
        state = {f"{stem}.{end}.weight": torch.ones(2, 2) for end in ("lora_down", "lora_up")}
        with pytest.raises(LoRAError, match="Its names are those of"):
            load_lora(state, models)


def test_every_skeleton_is_of_the_family_that_names_it() -> None:
    for family in FAMILIES:
        assert family.skeletons
        for known in family.skeletons if family.denoiser == "transformer" else ():  # UNets are built in test_names
            assert family_of(known.build()) is family, known.title


def test_names_of_a_denoiser_outweigh_those_of_a_text_encoder() -> None:
    encoder = ["text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.1.mlp.fc1"]
    assert "FLUX.1" in str(names_of(encoder))
    unet = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert names_of([*encoder, unet]) == "Stable Diffusion 1.x, Stable Diffusion 2.x or Stable Diffusion XL"
    assert names_of([*encoder, "double_blocks.0.img_attn.qkv"]) == "FLUX.1"
