"""Names of the models' authors, at full size: every module is found, with its rows, whatever stands around the name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from mole_diffusion.experts.stack import ExpertStack
from mole_diffusion.lora import LoRAError, load_lora
from mole_diffusion.lora.modules import ModuleIndex
from mole_diffusion.lora.skeletons import SKELETONS

ATTENTIONS = [f"attn{i}.to_{n}" for i in (1, 2) for n in ("q", "k", "v", "out.0")] + ["ff.net.0.proj", "ff.net.2"]


def sgm_names() -> dict[str, tuple[int, ...]]:
    """Names in Stability's code of SDXL, written down from its architecture, and the sides of their weights."""
    names: dict[str, tuple[int, ...]] = {
        "time_embed.0": (1280, 320), "time_embed.2": (1280, 1280),
        "label_emb.0.0": (1280, 2816), "label_emb.0.2": (1280, 1280),
        "input_blocks.0.0": (320, 4, 3, 3), "out.2": (4, 320, 3, 3),
        "input_blocks.3.0.op": (320, 320, 3, 3), "input_blocks.6.0.op": (640, 640, 3, 3),
        "output_blocks.2.2.conv": (1280, 1280, 3, 3), "output_blocks.5.2.conv": (640, 640, 3, 3),
    }  # fmt: skip

    def residual(block: str, wide: int, out: int) -> None:
        names[f"{block}.in_layers.2"] = (out, wide, 3, 3)
        names[f"{block}.emb_layers.1"] = (out, 1280)
        names[f"{block}.out_layers.3"] = (out, out, 3, 3)
        if wide != out:
            names[f"{block}.skip_connection"] = (out, wide, 1, 1)

    def transformer(block: str, d: int, depth: int) -> None:
        names[f"{block}.proj_in"] = names[f"{block}.proj_out"] = (d, d)
        for layer in range(depth):
            for name in ATTENTIONS:
                wide = 2048 if name in ("attn2.to_k", "attn2.to_v") else d
                sides = {"ff.net.0.proj": (8 * d, d), "ff.net.2": (d, 4 * d)}.get(name, (d, wide))
                names[f"{block}.transformer_blocks.{layer}.{name}"] = sides

    inputs = {1: (320, 320), 2: (320, 320), 4: (320, 640), 5: (640, 640), 7: (640, 1280), 8: (1280, 1280)}
    for index, (wide, out) in inputs.items():
        residual(f"input_blocks.{index}.0", wide, out)
    for index, d, depth in ((4, 640, 2), (5, 640, 2), (7, 1280, 10), (8, 1280, 10)):
        transformer(f"input_blocks.{index}.1", d, depth)
    residual("middle_block.0", 1280, 1280)
    transformer("middle_block.1", 1280, 10)
    residual("middle_block.2", 1280, 1280)
    outputs = [(2560, 1280), (2560, 1280), (1920, 1280), (1920, 640), (1280, 640), (960, 640), (960, 320), (640, 320)]
    for index, (wide, out) in enumerate([*outputs, (640, 320)]):
        residual(f"output_blocks.{index}.0", wide, out)
        if index < 6:
            transformer(f"output_blocks.{index}.1", out, 10 if index < 3 else 2)
    return names


def compvis_names() -> dict[str, tuple[int, ...]]:
    """The same of Stable Diffusion 1.5, in CompVis' code: four levels, the last without attention."""
    names: dict[str, tuple[int, ...]] = {
        "time_embed.0": (1280, 320), "time_embed.2": (1280, 1280),
        "input_blocks.0.0": (320, 4, 3, 3), "out.2": (4, 320, 3, 3),
        "input_blocks.3.0.op": (320, 320, 3, 3), "input_blocks.6.0.op": (640, 640, 3, 3),
        "input_blocks.9.0.op": (1280, 1280, 3, 3), "output_blocks.2.1.conv": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv": (1280, 1280, 3, 3), "output_blocks.8.2.conv": (640, 640, 3, 3),
    }  # fmt: skip
    blocks = {f"input_blocks.{i}": (wide, out, i < 10) for i, wide, out in (
        (1, 320, 320), (2, 320, 320), (4, 320, 640), (5, 640, 640), (7, 640, 1280), (8, 1280, 1280),
        (10, 1280, 1280), (11, 1280, 1280),
    )}  # fmt: skip
    outputs = [2560, 2560, 2560, 2560, 2560, 1920, 1920, 1280, 960, 960, 640, 640]
    blocks |= {f"output_blocks.{i}": (wide, 320 * min(2 ** (3 - i // 3), 4), i > 2) for i, wide in enumerate(outputs)}
    residuals = {f"{block}.0": (wide, out) for block, (wide, out, _) in blocks.items()}
    transformers = {f"{block}.1": out for block, (_, out, attends) in blocks.items() if attends}
    for block, (wide, out) in {**residuals, "middle_block.0": (1280, 1280), "middle_block.2": (1280, 1280)}.items():
        names |= {f"{block}.in_layers.2": (out, wide, 3, 3), f"{block}.emb_layers.1": (out, 1280)}
        names[f"{block}.out_layers.3"] = (out, out, 3, 3)
        if wide != out:
            names[f"{block}.skip_connection"] = (out, wide, 1, 1)
    for block, d in {**transformers, "middle_block.1": 1280}.items():
        names[f"{block}.proj_in"] = names[f"{block}.proj_out"] = (d, d, 1, 1)
        for name in ATTENTIONS:
            wide = 768 if name in ("attn2.to_k", "attn2.to_v") else d
            sides = {"ff.net.0.proj": (8 * d, d), "ff.net.2": (d, 4 * d)}.get(name, (d, wide))
            names[f"{block}.transformer_blocks.0.{name}"] = sides
    return names


def flux_names() -> dict[str, tuple[int, ...]]:
    """The same of FLUX.1."""
    d = 3072
    names = {
        "img_in": (d, 64), "txt_in": (d, 4096), "time_in.in_layer": (d, 256), "time_in.out_layer": (d, d),
        "vector_in.in_layer": (d, 768), "vector_in.out_layer": (d, d), "guidance_in.in_layer": (d, 256),
        "guidance_in.out_layer": (d, d), "final_layer.linear": (64, d), "final_layer.adaLN_modulation.1": (2 * d, d),
    }  # fmt: skip
    for block in range(19):
        for stream in ("img", "txt"):
            name = f"double_blocks.{block}.{stream}"
            names |= {f"{name}_attn.qkv": (3 * d, d), f"{name}_attn.proj": (d, d), f"{name}_mod.lin": (6 * d, d)}
            names |= {f"{name}_mlp.0": (4 * d, d), f"{name}_mlp.2": (d, 4 * d)}
    for block in range(38):
        name = f"single_blocks.{block}"
        names |= {f"{name}.linear1": (7 * d, d), f"{name}.linear2": (d, 5 * d), f"{name}.modulation.lin": (3 * d, d)}
    return names


def flux2_names(
    d: int = 6144, double: int = 8, single: int = 48, words: int = 15360, guided: bool = True
) -> dict[str, tuple[int, ...]]:
    """The same of FLUX.2; the default is dev."""
    names = {
        "img_in": (d, 128), "txt_in": (d, words), "time_in.in_layer": (d, 256), "time_in.out_layer": (d, d),
        "final_layer.linear": (128, d),
        "final_layer.adaLN_modulation.1": (2 * d, d), "single_stream_modulation.lin": (3 * d, d),
        "double_stream_modulation_img.lin": (6 * d, d), "double_stream_modulation_txt.lin": (6 * d, d),
    }  # fmt: skip
    if guided:
        names |= {"guidance_in.in_layer": (d, 256), "guidance_in.out_layer": (d, d)}
    for block in range(double):
        for stream in ("img", "txt"):
            name = f"double_blocks.{block}.{stream}"
            names |= {f"{name}_attn.qkv": (3 * d, d), f"{name}_attn.proj": (d, d)}
            names |= {f"{name}_mlp.0": (6 * d, d), f"{name}_mlp.2": (d, 3 * d)}
    for block in range(single):
        names |= {f"single_blocks.{block}.linear1": (9 * d, d), f"single_blocks.{block}.linear2": (d, 4 * d)}
    return names


def z_image_names() -> dict[str, tuple[int, ...]]:
    """The same of Z-Image; layers of the text's refiner have no modulation."""
    d, hidden = 3840, 10240
    names = {
        "x_embedder": (d, 64), "cap_embedder.1": (d, 2560), "t_embedder.mlp.0": (1024, 256),
        "t_embedder.mlp.2": (256, 1024), "final_layer.linear": (64, d), "final_layer.adaLN_modulation.1": (d, 256),
    }  # fmt: skip
    for part, depth in (("layers", 30), ("noise_refiner", 2), ("context_refiner", 2)):
        for block in range(depth):
            name = f"{part}.{block}"
            names |= {f"{name}.attention.qkv": (3 * d, d), f"{name}.attention.out": (d, d)}
            names |= {f"{name}.feed_forward.w{i}": (d, hidden) if i == 2 else (hidden, d) for i in (1, 2, 3)}
            if part != "context_refiner":
                names[f"{name}.adaLN_modulation.0"] = (4 * d, 256)
    return names


def krea2_names() -> dict[str, tuple[int, ...]]:
    """The same of Krea 2: keys and values of its blocks are a quarter as wide as queries."""
    d, text = 6144, 2560
    names = {
        "first": (d, 64), "last.linear": (64, d), "tmlp.0": (d, 256), "tmlp.2": (d, d), "tproj.1": (6 * d, d),
        "txtmlp.1": (d, text), "txtmlp.3": (d, d), "txtfusion.projector": (1, 12),
    }  # fmt: skip
    parts = [("blocks", 28, d, d // 4, 16384)]
    parts += [(f"txtfusion.{kind}_blocks", 2, text, text, 6912) for kind in ("layerwise", "refiner")]
    for part, depth, wide, narrow, hidden in parts:
        for block in range(depth):
            name = f"{part}.{block}"
            names |= {f"{name}.attn.w{i}": (narrow if i in "kv" else wide, wide) for i in "qkvo"}
            names |= {f"{name}.attn.gate": (wide, wide), f"{name}.mlp.gate": (hidden, wide)}
            names |= {f"{name}.mlp.up": (hidden, wide), f"{name}.mlp.down": (wide, hidden)}
    return names


def qwen_names() -> dict[str, tuple[int, ...]]:
    """The same of Qwen-Image, whose authors' code is diffusers' own."""
    d = 3072
    names: dict[str, tuple[int, ...]] = {
        "img_in": (d, 64), "txt_in": (d, 3584), "time_text_embed.timestep_embedder.linear_1": (d, 256),
        "time_text_embed.timestep_embedder.linear_2": (d, d), "norm_out.linear": (2 * d, d), "proj_out": (64, d),
    }  # fmt: skip
    for block in range(60):
        name = f"transformer_blocks.{block}"
        heads = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        names |= {f"{name}.attn.{head}": (d, d) for head in heads}
        for stream in ("img", "txt"):
            names |= {f"{name}.{stream}_mlp.net.0.proj": (4 * d, d), f"{name}.{stream}_mlp.net.2": (d, 4 * d)}
            names[f"{name}.{stream}_mod.1"] = (6 * d, d)
    return names


def sd3_names(d: int = 1536, blocks: int = 24, duals: int = 13) -> dict[str, tuple[int, ...]]:
    """The same of Stable Diffusion 3.5; the default is medium."""
    names: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (d, 16, 2, 2), "context_embedder": (d, 4096), "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d), "y_embedder.mlp.0": (d, 2048), "y_embedder.mlp.2": (d, d),
        "final_layer.linear": (64, d), "final_layer.adaLN_modulation.1": (2 * d, d),
    }  # fmt: skip
    for block in range(blocks):
        for stream in ("x_block", "context_block"):
            name, ends = f"joint_blocks.{block}.{stream}", stream == "context_block" and block == blocks - 1
            dual = stream == "x_block" and block < duals
            names |= {f"{name}.attn.qkv": (3 * d, d)}
            names |= {f"{name}.adaLN_modulation.1": ((2 if ends else 9 if dual else 6) * d, d)}
            if not ends:
                names |= {f"{name}.attn.proj": (d, d), f"{name}.mlp.fc1": (4 * d, d), f"{name}.mlp.fc2": (d, 4 * d)}
            if dual:
                names |= {f"{name}.attn2.qkv": (3 * d, d), f"{name}.attn2.proj": (d, d)}
    return names


# The published models without weights, and the authors' names of all their modules.
FAMILIES: dict[str, Callable[[], dict[str, tuple[int, ...]]]] = {
    "Stable Diffusion 1.x": compvis_names,
    "Stable Diffusion XL": sgm_names,
    "FLUX.1": flux_names,
    "Stable Diffusion 3.5 medium": sd3_names,
    "Stable Diffusion 3.5 large": lambda: sd3_names(2432, 38, 0),
    "FLUX.2 dev": flux2_names,
    "FLUX.2 klein 9B": lambda: flux2_names(4096, 8, 24, 12288, guided=False),
    "FLUX.2 klein 4B": lambda: flux2_names(3072, 5, 20, 7680, guided=False),
    "Z-Image": z_image_names,
    "Krea 2": krea2_names,
    "Qwen-Image": qwen_names,
}


def parts_of(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """A LoRA of rank 1 for a weight, with the number of every row in `up`, from 1."""
    up = torch.arange(1.0, 1 + shape[0]).reshape(-1, 1, *[1] * (len(shape) - 2))
    return {"lora_down.weight": torch.ones(1, *shape[1:]), "lora_up.weight": up, "alpha": torch.tensor(1.0)}


def spellings(name: str) -> Iterator[str]:
    """How programs that keep the authors' names spell a module."""
    yield f"diffusion_model.{name}"
    yield f"lora_unet_{name.replace('.', '_')}"
    yield f"lycoris_{name.replace('.', '_')}"
    yield name


@pytest.mark.parametrize("title", FAMILIES)
def test_all_modules_of_a_family_are_found_by_their_authors_names(title: str) -> None:
    components = next(known for known in SKELETONS if known.title == title).build()
    component, names = ("unet" if "unet" in components else "transformer"), FAMILIES[title]()
    index = ModuleIndex(components[component])
    taken: list[str] = []
    for name, shape in names.items():
        for spelling in (name, name.replace(".", "_")):
            targets = index.find(spelling)
            assert targets, spelling
            assert index.shape(targets) == shape, name
        parts = sorted((part.start, part.stop) for t in targets for part in t.rows or (slice(0, shape[0]),))
        assert [stop for _, stop in parts] == [start for start, _ in parts[1:]] + [shape[0]], name
        taken += [target.module for target in targets]
    wide = {module: shape for module, shape in index.shapes.items() if len(shape) > 1}
    assert sorted(taken) == sorted(wide), "every Linear and convolution once"
    # A file with all of them is placed as well, module by module.
    prefixes = {"diffusion_model.": False, "lora_unet_": True}
    prefix, underscored = list(prefixes.items())[len(title) % 2]
    state = {
        f"{prefix}{name.replace('.', '_') if underscored else name}.{part}": value
        for name, shape in names.items()
        for part, value in parts_of(shape).items()
    }
    factors = load_lora(state, components).factors
    assert list(factors) == [component]
    assert {name: one.up.shape[0] for name, one in factors[component].items()} == {
        name: shape[0] for name, shape in wide.items()
    }


def test_text_encoders_of_full_size_are_found_by_kohya_s_and_comfyui_s_names() -> None:
    """Stable Diffusion XL's CLIPs, of which only the second nests `text_model`, and FLUX.1's T5."""
    heads = {"self_attn.q_proj": 1, "self_attn.k_proj": 1, "self_attn.v_proj": 1, "self_attn.out_proj": 1}

    def clip(prefix: str, width: int, layers: int, underscored: bool) -> dict[str, Tensor]:
        found = {}
        for layer in range(layers):
            for name, (out, wide) in {**{h: (1, 1) for h in heads}, "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}.items():
                module = f"text_model.encoder.layers.{layer}.{name}"
                stem = prefix + (module.replace(".", "_") if underscored else module)
                found |= {f"{stem}.{p}": v for p, v in parts_of((out * width, wide * width)).items()}
        return found

    xl = next(known for known in SKELETONS if known.title == "Stable Diffusion XL").build()
    for first, second, underscored in (("lora_te1_", "lora_te2_", True), ("clip_l.", "clip_g.", False)):
        state = {**clip(first, 768, 12, underscored), **clip(second, 1280, 32, underscored)}
        factors = load_lora(state, xl).factors
        assert {name: len(found) for name, found in factors.items()} == {"text_encoder": 72, "text_encoder_2": 192}
    flux = next(known for known in SKELETONS if known.title == "FLUX.1").build()
    sides = {"SelfAttention.q": (4096, 4096), "SelfAttention.o": (4096, 4096), "DenseReluDense.wi_0": (10240, 4096),
             "DenseReluDense.wo": (4096, 10240)}  # fmt: skip
    state = {}
    for block in range(24):
        for name, shape in sides.items():
            module = f"encoder.block.{block}.layer.{int('Dense' in name)}.{name}"
            stem = f"lora_te3_{module.replace('.', '_')}" if block % 2 else f"text_encoders.t5xxl.transformer.{module}"
            state |= {f"{stem}.{part}": value for part, value in parts_of(shape).items()}
    assert {name: len(found) for name, found in load_lora(state, flux).factors.items()} == {"text_encoder_2": 96}


D = 96


@pytest.fixture(scope="module")
def flux() -> dict[str, nn.Module]:
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=D // 16, guidance_embeds=True
        )
    return {"transformer": model}


def rows(factors: Any) -> list[int]:
    """The rows of the authors' module that a factor's rows come from."""
    return [int(row) - 1 for row in factors.up.flatten()]


def test_a_fused_module_is_taken_apart_by_rows(flux: dict[str, nn.Module]) -> None:
    d = D
    for spelling in spellings("single_blocks.0.linear1"):
        state = {f"{spelling}.{part}": value for part, value in parts_of((7 * d, d)).items()}
        found = load_lora(state, flux).factors["transformer"]
        assert list(found) == [f"single_transformer_blocks.0.{name}" for name in
                               ("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v")]  # fmt: skip
        starts = {"to_q": 0, "to_k": d, "to_v": 2 * d, "proj_mlp": 3 * d}
        for name, factors in found.items():
            start = starts[name.rsplit(".", 1)[1]]
            assert rows(factors) == list(range(start, start + len(factors.up)))


def test_scale_and_shift_change_places(flux: dict[str, nn.Module]) -> None:
    """diffusers' last norm has the scale first, the authors' has the shift first."""
    d = D
    state = {f"lora_unet_final_layer_adaLN_modulation_1.{p}": v for p, v in parts_of((2 * d, d)).items()}
    (factors,) = load_lora(state, flux).factors["transformer"].values()
    assert rows(factors) == [*range(d, 2 * d), *range(d)]


def test_a_block_diagonal_factor_is_taken_apart_in_both(flux: dict[str, nn.Module]) -> None:
    """Some write three LoRAs of q, k, v as one of three times the rank: of its ranks each part needs its own."""
    d, r = D, 2
    up = torch.zeros(3 * d, 3 * r)
    for part in range(3):
        up[part * d : (part + 1) * d, part * r : (part + 1) * r] = torch.randn(d, r)
    down = torch.randn(3 * r, d)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    state = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(3.0)}
    found = load_lora(state, flux).factors["transformer"]
    for part, letter in enumerate("qkv"):
        factors = found[f"transformer_blocks.0.attn.to_{letter}"]
        assert torch.equal(factors.down, down[part * r : (part + 1) * r])
        assert factors.scaling == 3.0 / (3 * r)  # alpha is of the whole
    up[d : 2 * d] = 0  # no change of k at all
    found = load_lora({**state, f"{name}.lora_B.weight": up}, flux).factors["transformer"]
    assert sorted(found) == ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v"]


@pytest.mark.parametrize("first", [(3, 8), (1, 8), (32, 8)], ids=["thirds", "across", "within"])
def test_a_kronecker_product_over_a_fused_module_is_taken_apart_exactly(
    first: tuple[int, int], flux: dict[str, nn.Module]
) -> None:
    d = D
    w1, w2 = torch.randn(first), torch.randn(3 * d // first[0], d // first[1]) / 9
    magnitude = torch.rand(3 * d, 1)
    name = "lora_unet_double_blocks_0_txt_attn_qkv"
    state = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2, f"{name}.dora_scale": magnitude}
    found = load_lora(state, flux).factors["transformer"]
    x = torch.randn(2, d)
    whole = x @ torch.kron(w1, w2).T
    for part, letter in enumerate("qkv"):
        factors = found[f"transformer_blocks.0.attn.add_{letter}_proj"]
        assert factors.kronecker is not None
        assert factors.magnitude is not None
        torch.testing.assert_close(factors.kronecker(x), whole[:, part * d : (part + 1) * d], atol=1e-4, rtol=1e-4)
        assert torch.equal(factors.magnitude, magnitude[part * d : (part + 1) * d])
    assert ExpertStack([factors], "it").ranks == (0,)
    with pytest.raises(
        LoRAError, match=r"magnitudes of input channels of a module that lies in parts here, .*add_q_proj"
    ):
        load_lora({**state, f"{name}.dora_scale": torch.rand(1, d)}, flux)


def test_what_fits_no_fused_module_is_refused_by_name(flux: dict[str, nn.Module]) -> None:
    state = {f"diffusion_model.double_blocks.0.img_attn.qkv.{p}": v for p, v in parts_of((D, D)).items()}
    message = r"do not fit transformer_blocks\.0\.attn\.to_q and .*to_k and .*to_v with weight \(288, 96\)"
    with pytest.raises(LoRAError, match=message):
        load_lora(state, flux)
    state = {f"lora_unet_double_blocks_5_img_attn_qkv.{p}": v for p, v in parts_of((3 * D, D)).items()}
    with pytest.raises(LoRAError, match="1 of 1 modules find no place"):
        load_lora(state, flux)


def test_t5_of_flux_is_kohyas_third_text_encoder(flux: dict[str, nn.Module]) -> None:
    from transformers import T5Config, T5EncoderModel

    t5 = T5EncoderModel(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    state = {f"lora_te3_encoder_block_0_layer_0_SelfAttention_q.{p}": v for p, v in parts_of((8, 8)).items()}
    found = load_lora(state, {**flux, "text_encoder_2": t5}).factors
    assert list(found) == ["text_encoder_2"]
    comfy = {f"text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.{p}": v
             for p, v in parts_of((8, 8)).items()}  # fmt: skip
    both = {**comfy, **{f"diffusion_model.img_in.{p}": v for p, v in parts_of((D, 64)).items()}}
    lora = load_lora(both, {**flux, "text_encoder_2": t5})
    assert (lora.layout, sorted(lora.factors)) == ("original", ["text_encoder_2", "transformer"])
