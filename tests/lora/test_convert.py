"""A file in another layout: the same numbers, alphas and effect, there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from mole_diffusion.cli.app import app
from mole_diffusion.errors import MoLEError
from mole_diffusion.lora import LoRAError, LoRAFactors, convert_lora, load_lora, save_lora
from tests.lora_files import same_factors, stock_deltas, to_kohya
from tests.tiny import TEXT_ENCODER, random_lora, tiny_components, tiny_pipeline

CROSS = r"attn2\.to_[kv]$"
FIRST = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    components = tiny_components()
    return {name: components[name] for name in ("unet", "text_encoder")}


@pytest.fixture(scope="module")
def kohya(models: dict[str, Any]) -> dict[str, Tensor]:
    """Two ranks, several alphas, one module without alpha, in bfloat16."""
    state = {
        **random_lora(models, rank=4, alpha=2.0, targets=CROSS),
        **random_lora(models, rank=2, alpha=7.0, targets=(r"mid_block.*attn1\.to_q$", TEXT_ENCODER)),
        **random_lora(models, rank=2, targets=r"conv_in$"),
    }
    return {key: value if key.endswith("alpha") else value.bfloat16() for key, value in to_kohya(state).items()}


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype, key
        assert torch.equal(value, other[key]), key


def test_there_and_back_is_the_same_file(kohya: dict[str, Tensor], models: Any, tmp_path: Path) -> None:
    kohya = {key: value for key, value in kohya.items() if "conv_in" not in key}
    save_file(kohya, tmp_path / "kohya.safetensors", metadata={"ss_output_name": "cat"})
    there = convert_lora(tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors", "diffusers", models)
    same_factors(load_lora(there, models), load_lora(kohya, models))
    back = convert_lora(there, tmp_path / "back.safetensors", "kohya")
    same_tensors(load_file(back), kohya)
    with safe_open(back, "pt") as file:
        assert file.metadata() == {"format": "pt", "ss_output_name": "cat"}


def test_a_module_without_alpha_keeps_its_scaling(kohya: dict[str, Tensor], models: Any, tmp_path: Path) -> None:
    save_file(kohya, tmp_path / "kohya.safetensors")
    there = convert_lora(tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors", "diffusers", models)
    back = convert_lora(there, tmp_path / "back.safetensors", "kohya")
    for path in (there, back):
        same_factors(load_lora(path, models), load_lora(kohya, models))
    assert load_file(back)["lora_unet_conv_in.alpha"] == 2  # of rank 2: what no alpha means


def test_stock_diffusers_reads_ranks_and_alphas_of_every_module(
    kohya: dict[str, Tensor], models: Any, tmp_path: Path
) -> None:
    save_file({key: value.float() for key, value in kohya.items()}, tmp_path / "kohya.safetensors")
    path = convert_lora(tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors", "diffusers", models)
    stock = tiny_pipeline()
    stock.load_lora_weights(tmp_path, weight_name=path.name)
    ours = load_lora(tmp_path / "kohya.safetensors", models)
    for component in ("unet", "text_encoder"):
        deltas = stock_deltas(getattr(stock, component))
        assert deltas.keys() == ours.factors[component].keys()
        for name, factors in ours.factors[component].items():
            torch.testing.assert_close(deltas[name], factors.delta(), atol=1e-6, rtol=1e-5, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("magnitudes", [False, True], ids=["LoRA", "DoRA"])
def test_peft_reads_an_adapter(magnitudes: bool, kohya: dict[str, Tensor], models: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    state = {key: value.float() for key, value in kohya.items() if "_te_" not in key}
    if magnitudes:
        torch.manual_seed(0)
        for key in [key for key in state if key.endswith("lora_up.weight")]:
            out, dims = len(state[key]), state[key].ndim
            state[key.replace("lora_up.weight", "dora_scale")] = torch.rand(out, *[1] * (dims - 1)) + 0.5
    save_file(state, tmp_path / "kohya.safetensors")
    folder = convert_lora(tmp_path / "kohya.safetensors", tmp_path / "adapter", "peft", models)
    ours = load_lora(folder, models).factors["unet"]
    theirs = PeftModel.from_pretrained(tiny_components()["unet"], folder).merge_and_unload()
    for name, factors in ours.items():
        weight = models["unet"].get_submodule(name).weight.detach()
        merged = theirs.get_submodule(name).weight
        torch.testing.assert_close(merged, weight + factors.delta(weight), atol=1e-5, rtol=1e-4, msg=name)
    back = load_file(convert_lora(folder, tmp_path / "back.safetensors", "kohya", models))
    back.pop("lora_unet_conv_in.alpha")
    same_tensors(back, state)


def test_rslora_becomes_the_alpha_that_scales_the_same(models: Any, tmp_path: Path) -> None:
    state = random_lora(models, rank=4, targets=CROSS)
    config = {"unet.r": 4, "unet.lora_alpha": 16, "unet.use_rslora": True}
    save_file(state, tmp_path / "it.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
    for to in ("kohya", "diffusers"):
        path = convert_lora(tmp_path / "it.safetensors", tmp_path / f"{to}.safetensors", to, models)  # type: ignore[arg-type]
        assert {f.scaling for f in load_lora(path, models).factors["unet"].values()} == {8.0}


def test_kohya_takes_every_kind_as_it_is(models: Any, tmp_path: Path) -> None:
    state = {
        "unet.conv_in.lokr_w1": torch.randn(2, 2),
        "unet.conv_in.lokr_w2": torch.randn(16, 2, 3, 3),
        "unet.conv_in.lora_magnitude_vector": torch.rand(32) + 0.5,
        "unet.conv_out.diff_b": torch.randn(4),
        **random_lora(models, targets=CROSS),
    }
    key = next(iter(k for k in state if k.endswith("lora_B.weight")))
    state[key.replace("lora_B.weight", "lora_B.bias")] = torch.randn(len(state[key]))
    save_file(state, tmp_path / "it.safetensors")
    before = load_lora(state, models)
    after = load_lora(convert_lora(tmp_path / "it.safetensors", tmp_path / "kohya.safetensors", "kohya"), models)
    assert after.fingerprint == before.fingerprint
    for to in ("diffusers", "peft"):
        with pytest.raises(LoRAError, match=rf"has no place in {to}'s layout.*Convert it to `kohya`"):
            convert_lora(tmp_path / "it.safetensors", tmp_path / f"{to}.safetensors", to, models)  # type: ignore[arg-type]
        assert not (tmp_path / f"{to}.safetensors").exists()


CONV = "lora_unet_mid_block_resnets_0_conv1"


def foldable() -> dict[str, dict[str, Tensor]]:
    """Kinds that become plain factors, at a convolution, and numbers with scales of their own."""
    torch.manual_seed(0)
    factors = {f"{CONV}.lora_down.weight": torch.randn(2, 64, 3, 3), f"{CONV}.lora_up.weight": torch.randn(64, 2, 1, 1)}
    eighths = {key: value.to(torch.float8_e4m3fn) for key, value in factors.items()}
    scales = {f"{CONV}.lora_down.scale_weight": torch.tensor(0.3), f"{CONV}.lora_up.scale_weight": torch.rand(64)}
    core = torch.randn(2, 2, 3, 3)
    hada = {f"{CONV}.hada_w{i}_{n}": torch.randn(*((64, 2) if n == "a" else (2, 576))) for i in (1, 2) for n in "ab"}
    return {
        "float8 with scales": {**eighths, **scales, f"{CONV}.alpha": torch.tensor(3.0)},
        "Tucker": {
            f"{CONV}.lora_down.weight": torch.randn(2, 64, 1, 1),
            f"{CONV}.lora_mid.weight": core,
            f"{CONV}.lora_up.weight": torch.randn(64, 2, 1, 1),
        },
        "LoHa": {**hada, f"{CONV}.alpha": torch.tensor(1.0)},
    }


@pytest.mark.parametrize("kind", foldable())
@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_a_convolution_of_any_kind_stays_what_it_does(kind: str, to: Any, models: Any, tmp_path: Path) -> None:
    state = foldable()[kind]
    save_file(state, tmp_path / "it.safetensors")
    out = convert_lora(
        tmp_path / "it.safetensors", tmp_path / ("it" if to == "peft" else "out.safetensors"), to, models
    )
    (before,), (after,) = (load_lora(source, models).factors["unet"].values() for source in (state, out))
    torch.testing.assert_close(after.delta(), before.delta(), atol=1e-5, rtol=1e-5)
    if to == "peft":
        from peft import PeftModel

        theirs = PeftModel.from_pretrained(tiny_components()["unet"], out).base_model.model
        layer: Any = theirs.get_submodule("mid_block.resnets.0.conv1")
        torch.testing.assert_close(layer.get_delta_weight("default"), before.delta(), atol=1e-4, rtol=1e-4)


def test_a_config_s_scaling_of_whole_kronecker_factors_is_kept(models: Any, tmp_path: Path) -> None:
    """PEFT scales them by alpha / r; other programs scale them by nothing, so w1 takes it up."""
    name = "base_model.model.conv_in"
    (tmp_path / "it").mkdir()
    save_file({f"{name}.lokr_w1": torch.randn(2, 2), f"{name}.lokr_w2": torch.randn(16, 2, 3, 3)},
              tmp_path / "it" / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "it" / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 4, "alpha": 8}))
    only = {"unet": models["unet"]}
    (before,) = load_lora(tmp_path / "it", only).factors["unet"].values()
    assert before.scaling == 2
    out = convert_lora(tmp_path / "it", tmp_path / "out.safetensors", "kohya", only)
    (after,) = load_lora(out, only).factors["unet"].values()
    torch.testing.assert_close(after.delta(), before.delta())


def test_a_loha_becomes_a_plain_lora(models: Any, tmp_path: Path) -> None:
    parts = {f"hada_w{i}_{n}": torch.randn(*((64, 2) if n == "a" else (2, 64))) for i in (1, 2) for n in "ab"}
    save_file({f"{FIRST}.{name}": v for name, v in parts.items()} | {f"{FIRST}.alpha": torch.tensor(1.0)},
              tmp_path / "it.safetensors")  # fmt: skip
    path = convert_lora(tmp_path / "it.safetensors", tmp_path / "diffusers.safetensors", "diffusers", models)
    (before,) = load_lora(tmp_path / "it.safetensors", models).factors["unet"].values()
    (after,) = load_lora(path, models).factors["unet"].values()
    assert after.r == 4
    torch.testing.assert_close(after.delta(), before.delta())


def test_names_of_authors_are_looked_up_and_fused_modules_taken_apart(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, guidance_embeds=True
        )
    name = "diffusion_model.single_blocks.0.linear1"
    state = {
        f"{name}.lora_A.weight": torch.randn(2, 32),
        f"{name}.lora_B.weight": torch.randn(224, 2),
        f"{name}.alpha": torch.tensor(1.0),
    }
    save_file(state, tmp_path / "it.safetensors")
    path = convert_lora(tmp_path / "it.safetensors", tmp_path / "d.safetensors", "diffusers", {"transformer": model})
    one, other = (load_lora(source, {"transformer": model}) for source in (state, path))
    same_factors(one, other)
    assert len(one.factors["transformer"]) == 4
    kept = convert_lora(tmp_path / "it.safetensors", tmp_path / "k.safetensors", "kohya")
    assert "lora_unet_single_blocks_0_linear1.lora_down.weight" in load_file(kept)
    same_factors(load_lora(kept, {"transformer": model}), one)


def test_wrong_calls(kohya: dict[str, Tensor], models: Any, tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    save_file(kohya, path)
    with pytest.raises(MoLEError, match="`to` is 'a1111'; choose one of diffusers, kohya, peft"):
        convert_lora(path, tmp_path / "x.safetensors", "a1111", models)  # type: ignore[arg-type]
    with pytest.raises(MoLEError, match=r"does not end in \.safetensors"):
        convert_lora(path, tmp_path / "x.bin", "kohya", models)
    with pytest.raises(MoLEError, match=r"is there already; name a folder that is not"):
        convert_lora(path, tmp_path, "peft", models)
    with pytest.raises(MoLEError, match=r"it\.safetensors is the file that is converted, and would be lost"):
        convert_lora(path, path, "kohya", models)
    with pytest.raises(LoRAError, match=r"modules of text_encoder, unet, and an adapter of PEFT is for one model"):
        convert_lora(path, tmp_path / "x", "peft", models)
    with pytest.raises(LoRAError, match=r"fits no published base model.*--base on the command line"):
        convert_lora(path, tmp_path / "x.safetensors", "diffusers")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["it.safetensors"]


def test_saving_more_than_plain_factors_is_refused(tmp_path: Path) -> None:
    factors = {"unet": {"it": LoRAFactors(torch.ones(1, 2), torch.ones(2, 1), bias=torch.ones(2))}}
    with pytest.raises(LoRAError, match=r"1 modules with more than plain factors .*unet\.it first.*mole convert"):
        save_lora(factors, tmp_path / "it.safetensors")


def test_the_commands_say_and_write(kohya: dict[str, Tensor], tmp_path: Path) -> None:
    path, out = tmp_path / "it.safetensors", tmp_path / "out.safetensors"
    save_file(kohya, path)
    tiny_pipeline().save_pretrained(tmp_path / "base")
    runner = CliRunner()
    done = runner.invoke(
        app, ["convert", str(path), "--to", "diffusers", "--out", str(out), "--base", f"{tmp_path}/base"]
    )
    assert (done.exit_code, done.stdout.strip()) == (0, str(out)), done.output
    done = runner.invoke(app, ["inspect", str(path), str(out), "--base", str(tmp_path / "base")])
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert said.count("all of it acts on") == 2
    assert said.count("|ΔW| / |W| =") == 2
    (tmp_path / "broken.safetensors").write_bytes(b"")
    done = runner.invoke(app, ["inspect", str(out), str(tmp_path / "broken.safetensors")])
    assert done.exit_code == 2
    assert "an empty file" in done.stderr
    assert "1 of 2 files cannot be read" in done.stderr
    assert "no published base model that is known here has these names" in " ".join(done.stdout.split())
