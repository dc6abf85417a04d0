"""Every layout, kind and family: files made from known factors load to these, and act as the merged weights.

What each kind means stands literally in `tests/reference.py`, which `test_kinds.py` holds the kinds against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mole_diffusion.lora import convert_lora, judge, load_lora
from tests.command import mole
from tests.running import summed
from tests.tiny import dits, families, tiny_components

R = 2
Parts = dict[str, Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape) / 2


def lora(out: int, wide: int) -> tuple[Parts, Tensor]:
    down, up = normal(R, wide), normal(out, R)
    return {"down": down, "up": up, "alpha": torch.tensor(3.0)}, up.double() @ down.double() * 3 / R


def loha(out: int, wide: int) -> tuple[Parts, Tensor]:
    a1, b1, a2, b2 = normal(out, R), normal(R, wide), normal(out, R), normal(R, wide)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    return parts, (a1.double() @ b1.double()) * (a2.double() @ b2.double())


def lokr(out: int, wide: int) -> tuple[Parts, Tensor]:
    w1, a, b = normal(4, 4), normal(out // 4, R), normal(R, wide // 4)
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(3.0)}
    return parts, torch.kron(w1.double(), a.double() @ b.double()) * 3 / R


def full(out: int, wide: int) -> tuple[Parts, Tensor]:
    diff = normal(out, wide)
    return {"diff": diff}, diff.double()


KINDS: dict[str, Callable[[int, int], tuple[Parts, Tensor]]] = {"LoRA": lora, "LoHa": loha, "LoKr": lokr, "full": full}
KINDS["DoRA"] = lambda out, wide: (lora(out, wide)[0], torch.empty(0))  # its change depends on the weight
DOWN_UP = {"down": "lora_down.weight", "up": "lora_up.weight"}
A_B = {"down": "lora_A.weight", "up": "lora_B.weight"}
A_B_DEFAULT = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}

# Name, whether it has the authors' names, prefix, whether dots become underscores, endings.
LAYOUTS: dict[str, tuple[bool, str, bool, dict[str, str]]] = {
    "diffusers": (False, "{component}.", False, A_B),
    "OneTrainer, dotted": (False, "{component}.", False, DOWN_UP),
    "PEFT": (False, "base_model.model.", False, A_B),
    "DiffSynth": (False, "", False, A_B_DEFAULT),
    "OneTrainer": (False, "lora_transformer_", True, DOWN_UP),
    "LyCORIS": (False, "lycoris_", True, DOWN_UP),
    "kohya, diffusers' names": (False, "lora_unet_", True, DOWN_UP),
    "kohya, musubi": (True, "lora_unet_", True, DOWN_UP),
    "ComfyUI, ai-toolkit": (True, "diffusion_model.", False, A_B),
    "ComfyUI, down and up": (True, "diffusion_model.", False, DOWN_UP),
    "bare names of the authors": (True, "", False, A_B),
}

Q, K, V = "to_q", "to_k", "to_v"
# The authors' names of some modules, and diffusers' names of what they are there.
FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "stable_diffusion": {
        "middle_block.1.transformer_blocks.0.attn1.to_q": ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q",),
        "time_embed.2": ("time_embedding.linear_2",),
    },
    "stable_diffusion_xl": {
        "middle_block.1.transformer_blocks.1.attn2.to_k": ("mid_block.attentions.0.transformer_blocks.1.attn2.to_k",),
        "input_blocks.3.1.transformer_blocks.0.ff.net.2": ("down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",),
    },
    "stable_diffusion_3": {
        "joint_blocks.0.context_block.attn.qkv": tuple(
            f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"
        ),
        "joint_blocks.0.x_block.mlp.fc2": ("transformer_blocks.0.ff.net.2",),
    },
    "flux": {
        "double_blocks.0.img_attn.qkv": tuple(f"transformer_blocks.0.attn.{x}" for x in (Q, K, V)),
        "single_blocks.0.linear1": tuple(
            f"single_transformer_blocks.0.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ),
    },
    "flux2": {
        "double_blocks.0.txt_attn.qkv": tuple(f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"),
        "single_blocks.0.linear1": ("single_transformer_blocks.0.attn.to_qkv_mlp_proj",),
    },
    "z_image": {
        "layers.0.attention.qkv": tuple(f"layers.0.attention.{x}" for x in (Q, K, V)),
        "layers.0.attention.out": ("layers.0.attention.to_out.0",),
    },
    "krea2": {
        "blocks.0.attn.wk": ("transformer_blocks.0.attn.to_k",),
        "blocks.0.mlp.gate": ("transformer_blocks.0.ff.gate",),
    },
    "qwen_image": {
        "transformer_blocks.0.attn.to_q": ("transformer_blocks.0.attn.to_q",),
        "transformer_blocks.0.img_mlp.net.0.proj": ("transformer_blocks.0.img_mlp.net.0.proj",),
    },
}  # fmt: skip


def denoiser(family: str) -> tuple[str, Any]:
    """Component and tiny model."""
    if family == "stable_diffusion":
        return "unet", tiny_components()["unet"]
    if family == "stable_diffusion_xl":
        return "unet", families.sdxl()["unet"]
    if family == "stable_diffusion_3":
        return "transformer", families.sd3()["transformer"]
    return "transformer", dits.tiny_dit(family).transformer


def weight_of(model: nn.Module, names: tuple[str, ...]) -> Tensor:
    """The weight of what is one module to the authors."""
    return torch.cat([model.get_submodule(name).weight.detach() for name in names])  # type: ignore[list-item]


def cases(
    model: nn.Module, family: str, kind: str, authors: bool
) -> Iterator[tuple[str, tuple[str, ...], Parts, Tensor]]:
    """Name in the file, the modules it means, its tensors, and the whole change of weight in float64."""
    for theirs, ours in FAMILIES[family].items():
        for name, meant in [(theirs, ours)] if authors else [(one, (one,)) for one in ours]:
            weight = weight_of(model, meant)
            parts, change = KINDS[kind](*weight.shape)
            if kind == "DoRA":
                magnitude = torch.rand(len(weight), 1) + 0.5
                changed = weight.double() + parts["up"].double() @ parts["down"].double() * 3 / R
                change = magnitude * changed / changed.norm(dim=1, keepdim=True) - weight
                parts = {**parts, "dora_scale": magnitude}
            yield name, meant, parts, change


def written(layout: str, component: str, name: str, parts: Parts) -> Parts:
    """The tensors of a module under the keys that a layout has for them."""
    _, prefix, underscored, endings = LAYOUTS[layout]
    stem = prefix.format(component=component) + (name.replace(".", "_") if underscored else name)
    return {f"{stem}.{endings.get(part, part)}": tensor for part, tensor in parts.items()}


def test_every_layout_and_kind_loads_to_its_factors(family: str, model: tuple[str, Any]) -> None:
    component, denoiser = model
    torch.manual_seed(1)
    for kind in KINDS:
        made = {authors: list(cases(denoiser, family, kind, authors)) for authors in (False, True)}
        for layout, (authors, *_) in LAYOUTS.items():
            state: Parts = {}
            for name, _, parts, _ in made[authors]:
                state |= written(layout, component, name, parts)
            found = load_lora(state, {component: denoiser}).factors[component]
            assert len(found) == sum(len(meant) for _, meant, _, _ in made[authors])
            for _, meant, _, change in made[authors]:
                deltas = [found[m].delta(denoiser.get_submodule(m).weight.detach()) for m in meant]
                torch.testing.assert_close(
                    torch.cat(deltas).double(), change, atol=1e-5, rtol=1e-4, msg=f"{layout}, {kind}, {meant}"
                )


def test_the_commands_say_that_a_file_acts_and_convert_it_to_its_factors(
    family: str, model: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the names of the authors, whose fused modules are several here."""
    component, denoiser = model
    monkeypatch.setattr("mole_diffusion.cli.inspect.read_models", lambda base: {component: denoiser})
    torch.manual_seed(1)
    made = list(cases(denoiser, family, "LoRA", True))
    state: Parts = {}
    for name, _, parts, _ in made:
        state |= written("kohya, musubi", component, name, parts)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file := tmp_path / "it.safetensors")
    told = mole("inspect", file, "--base", "some/base").output
    count = sum(len(meant) for _, meant, _, _ in made)
    assert f"all of it acts on some/base: {count} modules of {component}" in " ".join(told.split())
    for to in ("kohya", "diffusers", "peft"):
        out = tmp_path / ("peft" if to == "peft" else f"{to}.safetensors")
        result = mole("convert", file, "--to", to, "--out", out, "--base", "some/base")
        assert result.exit_code == 0, result.output
        found = load_lora(out, {component: denoiser}).factors[component]
        assert len(found) == count
        for _, meant, _, change in made:
            delta = torch.cat([found[name].delta() for name in meant])
            torch.testing.assert_close(delta.double(), change, atol=1e-5, rtol=1e-4, msg=f"{to}, {meant}")


PLACES = {"kohya": set(KINDS), "diffusers": {"LoRA", "LoHa"}, "peft": {"LoRA", "LoHa", "DoRA"}}


def test_what_convert_writes_acts_whole_and_is_the_same(family: str, model: tuple[str, Any], tmp_path: Path) -> None:
    """From every layout to every one that has a place for the kind; over the families each layout meets all kinds."""
    component, denoiser = model
    models = {component: denoiser}
    torch.manual_seed(3)
    for turn, (layout, (authors, *_)) in enumerate(LAYOUTS.items(), start=list(FAMILIES).index(family)):
        kind = list(KINDS)[turn % len(KINDS)]
        made = list(cases(denoiser, family, kind, authors))
        state: Parts = {}
        for name, _, parts, _ in made:
            state |= written(layout, component, name, parts)
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, file := tmp_path / f"{turn}.safetensors")
        for to in (to for to, kinds in PLACES.items() if kind in kinds):
            case = f"{layout}, {kind}, {to}"
            out = convert_lora(file, tmp_path / to / (f"{turn}" if to == "peft" else file.name), to, models)
            verdict = judge(out, models, "ours")
            assert verdict.refusal is None, case
            assert verdict.modules == {component: sum(len(meant) for _, meant, *_ in made)}, case
            found = load_lora(out, models).factors[component]
            for _, meant, _, change in made:
                deltas = [found[name].delta(denoiser.get_submodule(name).weight.detach()) for name in meant]
                torch.testing.assert_close(torch.cat(deltas).double(), change, atol=1e-5, rtol=1e-4, msg=case)


@torch.no_grad()
def test_every_kind_acts_as_the_merged_weights(family: str, model: tuple[str, Any]) -> None:
    component, denoiser = model
    run = caller(family, denoiser)
    base = run()
    torch.manual_seed(2)
    for kind in KINDS:
        made = list(cases(denoiser, family, kind, True))
        state: Parts = {}
        for name, _, parts, _ in made:
            state |= written("ComfyUI, down and up", component, name, parts)
        with summed({component: denoiser}, load_lora(state, {component: denoiser})):
            ours = run()
        kept = {}
        for _, meant, _, change in made:  # in float64, of the known factors
            modules = [denoiser.get_submodule(name) for name in meant]
            for module, part in zip(modules, change.split([len(module.weight) for module in modules]), strict=True):
                kept[module] = module.weight.clone()
                module.weight.copy_(module.weight.double() + part)
        merged = run()
        for module, weight in kept.items():
            module.weight.copy_(weight)
        assert (merged - base).abs().max() > 1e-3, kind
        torch.testing.assert_close(ours, merged, atol=2e-5, rtol=1e-4, msg=f"{family}, {kind}")
        assert torch.equal(run(), base)


def caller(family: str, denoiser: Any) -> Callable[[], Tensor]:
    """Runs the denoiser once on the same input."""
    generator = torch.Generator().manual_seed(3)
    if family == "stable_diffusion":
        sample, words = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 5, 32, generator=generator)
        return lambda: denoiser(sample, 500, words).sample
    if family == "stable_diffusion_xl":
        sample, words = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 5, 48, generator=generator)
        added = {"text_embeds": torch.randn(1, families.WIDTH, generator=generator), "time_ids": torch.zeros(1, 6)}
        return lambda: denoiser(sample, 500, words, added_cond_kwargs=added).sample
    if family == "stable_diffusion_3":
        sizes = denoiser.config
        sample = torch.randn(1, sizes.in_channels, 8, 8, generator=generator)
        words = torch.randn(1, 5, sizes.joint_attention_dim, generator=generator)
        pooled = torch.randn(1, sizes.pooled_projection_dim, generator=generator)
        return lambda: denoiser(sample, words, pooled, torch.tensor([500.0])).sample
    _, call = dits.denoiser_call(family)

    def run() -> Tensor:
        output = denoiser(**{**call, "return_dict": False})[0]
        return torch.stack(output) if isinstance(output, list | tuple) else output

    return run


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str) -> tuple[str, Any]:
    return denoiser(family)
