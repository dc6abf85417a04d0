"""Our reader against stock diffusers with peft: the same outputs, module by module, and where stock is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mole_diffusion.lora import load_lora, save_lora
from tests.lora_files import stock_deltas, to_kohya, to_old
from tests.merging import merge
from tests.tiny import ATTENTION, CONVOLUTIONS, FEED_FORWARD, PROJECTIONS, TEXT_ENCODER, random_lora, tiny_pipeline

EVERYTHING = (ATTENTION, FEED_FORWARD, PROJECTIONS, CONVOLUTIONS, TEXT_ENCODER)


@torch.no_grad()
def outputs(pipe: Any) -> tuple[Tensor, Tensor]:
    """Prompt embeddings, and the UNet's prediction from them."""
    ids = pipe.tokenizer(["a red cat"], padding="max_length", return_tensors="pt").input_ids
    embeddings = pipe.text_encoder(ids)[0]
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return embeddings, pipe.unet(sample, 500, embeddings).sample


def assert_same_effect(path: Path, *, changed: tuple[bool, bool] = (True, True)) -> None:
    """Stock `load_lora_weights` and our factors added to the weights give the same outputs and the same deltas."""
    base, stock, ours = tiny_pipeline(), tiny_pipeline(), tiny_pipeline()
    stock.load_lora_weights(path.parent, weight_name=path.name)
    lora = load_lora(path, ours.components)
    for component, modules in lora.factors.items():
        deltas = stock_deltas(getattr(stock, component))
        assert deltas.keys() == modules.keys()
        for name, factors in modules.items():
            assert torch.allclose(deltas[name], factors.delta(), atol=1e-6), name
    merge(ours.components, lora)
    for plain, theirs, mine, should_change in zip(outputs(base), outputs(stock), outputs(ours), changed, strict=True):
        assert torch.allclose(theirs, mine, atol=1e-5)
        assert ((plain - mine).abs().max() > 1e-2) == should_change


def mixed(alpha: float | None, text_alpha: float | None) -> dict[str, Tensor]:
    """Rank 8 and 2 in the UNet, 4 in the text encoder; alphas of their own."""
    models = tiny_pipeline().components
    return {
        **random_lora(models, rank=8, alpha=alpha, targets=(ATTENTION, CONVOLUTIONS)),
        **random_lora(models, rank=2, alpha=alpha, targets=(FEED_FORWARD, PROJECTIONS)),
        **random_lora(models, rank=4, alpha=text_alpha, targets=TEXT_ENCODER),
    }


@pytest.mark.parametrize(
    ("convert", "alpha"),
    [(dict, None), (to_old, None), (to_kohya, None), (to_kohya, 4.0)],
    ids=["diffusers", "diffusers-old", "kohya", "kohya-alpha"],
)
def test_layouts_act_as_in_stock_diffusers(
    convert: Callable[..., dict[str, Tensor]], alpha: float, tmp_path: Path
) -> None:
    save_file(convert(mixed(alpha, alpha)), tmp_path / "lora.safetensors")
    assert_same_effect(tmp_path / "lora.safetensors")


def test_unet_alone(tmp_path: Path) -> None:
    save_file(random_lora(tiny_pipeline().components, targets=ATTENTION), tmp_path / "lora.safetensors")
    assert_same_effect(tmp_path / "lora.safetensors", changed=(False, True))


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_what_we_save_acts_the_same_in_stock_diffusers(layout: Any, tmp_path: Path) -> None:
    models = tiny_pipeline().components
    lora = load_lora(mixed(alpha=4.0, text_alpha=4.0), models)
    assert {f.scaling for f in lora.factors["unet"].values()} == {0.5, 2.0}
    path = save_lora(lora, tmp_path / "lora.safetensors", layout=layout)
    assert_same_effect(path)
    again = load_lora(path, models)
    for component, modules in lora.factors.items():
        assert modules.keys() == again.factors[component].keys()
        for name, factors in modules.items():
            assert torch.equal(factors.delta(), again.factors[component][name].delta()), name


def test_what_diffusers_saves_with_metadata(tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = tiny_pipeline()
    settings: dict[str, Any] = {}
    layers = {}
    for component, targets, alpha in (("unet", ["to_q", "ff.net.2"], 16), ("text_encoder", ["q_proj"], 1)):
        model = getattr(pipe, component)
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
        model.add_adapter(config)
        layers[component] = get_peft_model_state_dict(model)
        settings[f"{component}_lora_adapter_metadata"] = config.to_dict()
    pipe.save_lora_weights(
        tmp_path, unet_lora_layers=layers["unet"], text_encoder_lora_layers=layers["text_encoder"], **settings
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    factors = load_lora(path, tiny_pipeline().components).factors
    assert {f.scaling for f in factors["unet"].values()} == {4.0}
    assert {f.scaling for f in factors["text_encoder"].values()} == {0.25}
    assert_same_effect(path)


def test_text_encoder_alphas_of_each_module_count(tmp_path: Path) -> None:
    """Stock diffusers reads per-module text-encoder alphas into names that match no module, and drops them."""
    models = tiny_pipeline().components
    queries = random_lora(models, rank=4, alpha=4.0, targets="text_encoder.*q_proj$")
    others = random_lora(models, rank=4, alpha=2.0, targets="text_encoder.*(k_proj|v_proj|out_proj|fc1|fc2)$")
    path = tmp_path / "lora.safetensors"
    save_file(to_kohya({**queries, **others}), path)
    factors = load_lora(path, models).factors["text_encoder"]
    for name, pair in factors.items():
        assert pair.scaling == (1.0 if name.endswith("q_proj") else 0.5), name
    stock = tiny_pipeline()
    with pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match any targeted module"):
        stock.load_lora_weights(tmp_path, weight_name=path.name)
    deltas = stock_deltas(stock.text_encoder)
    wrong = [name for name, pair in factors.items() if not torch.allclose(deltas[name], pair.delta(), atol=1e-6)]
    assert wrong == [f"encoder.layers.{i}.self_attn.q_proj" for i in (0, 1)], "stock diffusers changed: compare anew"


def test_text_encoder_without_out_proj(tmp_path: Path) -> None:
    """Without `to_out_lora` stock diffusers guesses another key style, and the projections are lost."""
    models = tiny_pipeline().components
    state = random_lora(models, targets="text_encoder.*(q_proj|fc1)$")
    path = tmp_path / "lora.safetensors"
    save_file(to_old(state, old_text_encoder=True), path)
    factors = load_lora(path, models).factors["text_encoder"]
    assert {name.rsplit(".", 1)[1] for name in factors} == {"q_proj", "fc1"}
    for name, pair in factors.items():
        assert torch.equal(pair.up, state[f"text_encoder.{name}.lora_B.weight"])
    stock = tiny_pipeline()
    stock.load_lora_weights(tmp_path, weight_name=path.name)
    loaded = {name.rsplit(".", 1)[1] for name in stock_deltas(stock.text_encoder)}
    assert loaded == {"fc1"}, "stock diffusers changed: compare anew"
