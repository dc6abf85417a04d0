"""Layers quantised by the libraries that people use: experts run beside them, and what needs their numbers has them.

None is a dependency, so each is tried where it is there: `pip install torchao optimum-quanto gguf bitsandbytes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mole_diffusion.errors import MoLEError
from mole_diffusion.lora.verdict import judge
from tests.composing import assert_close, composing_pipeline, draw
from tests.tiny import ATTENTION, FEED_FORWARD, random_lora


def with_quanto(model: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


def with_torchao(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def with_gguf(model: nn.Module) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            stored = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().numpy(), kind))
            has_bias = layer.bias is not None
            quantised = GGUFLinear(layer.in_features, layer.out_features, has_bias, compute_dtype=torch.float32)
            quantised.weight, quantised.bias = GGUFParameter(stored, quant_type=kind), layer.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, quantised)


def with_bitsandbytes(model: nn.Module) -> None:
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            quantised = library.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32
            )
            quantised.load_state_dict(layer.state_dict())
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, quantised.to("cpu"))


@pytest.fixture(params=[with_quanto, with_torchao, with_gguf, with_bitsandbytes])
def pipe(request: pytest.FixtureRequest) -> Any:
    """A pipeline whose transformer blocks' Linears are quantised."""
    quantise: Callable[[nn.Module], None] = request.param
    pipe = composing_pipeline()
    for block in pipe.unet.modules():
        if type(block).__name__ == "BasicTransformerBlock":
            quantise(block)
    return pipe


def states() -> list[dict[str, Tensor]]:
    parts = {"unet": composing_pipeline().unet}
    return [random_lora(parts, rank=2, targets=(ATTENTION, FEED_FORWARD), seed=seed) for seed in (1, 2)]


def beside_by_hand(model: nn.Module, state: dict[str, Tensor]) -> None:
    """`W x + B (A x)` at every layer of a LoRA, with the layer's own `W x`."""
    for key, down in state.items():
        if key.endswith("lora_A.weight"):
            layer = model.get_submodule(key.removeprefix("unet.").removesuffix(".lora_A.weight"))
            up = state[key.replace("lora_A", "lora_B")]
            layer.register_forward_hook(lambda _, args, y, up=up, down=down: y + args[0] @ down.T @ up.T)


def test_experts_run_beside_them(pipe: Any) -> None:
    cat, dog = states()
    assert judge(cat, {"unet": pipe.unet}, "quantised").refusal is None
    base = draw(pipe)
    pipe.load_loras({"cat": cat, "dog": dog})
    assert torch.equal(draw(pipe, loras=[]), base)
    alone = draw(pipe, loras=["cat"])
    with pytest.raises(MoLEError, match=r"numbers that are quantised .*cannot be fused into it"):
        pipe.experts.merge()
    assert torch.equal(draw(pipe, loras=["cat"]), alone)
    pipe.set_composition("masks")
    assert draw(pipe).isfinite().all()
    pipe.unload_loras()
    beside_by_hand(pipe.unet, cat)
    assert_close(alone, draw(pipe))
    assert not torch.allclose(alone, base, atol=0.05)


def weight_of(layer: Any) -> Tensor:
    """The numbers that a layer multiplies with."""
    with torch.no_grad():
        answer = layer(torch.eye(layer.in_features)[None])[0]
        return (answer if layer.bias is None else answer - layer.bias).T


def test_magnitudes_of_dora_are_of_the_numbers_as_they_act(pipe: Any) -> None:
    """Eq. 5 of DoRA, `m (W + BA) / |W + BA|`, row by row."""
    place = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    layer: Any = pipe.unet.get_submodule(place)
    stored = weight_of(layer)
    generator = torch.Generator().manual_seed(0)
    down, up = (
        torch.randn(2, layer.in_features, generator=generator),
        torch.randn(layer.out_features, 2, generator=generator),
    )
    magnitude = torch.rand(layer.out_features, generator=generator) + 0.5
    names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    state = {f"unet.{place}.{name}": one for name, one in zip(names, (down, up, magnitude), strict=True)}
    pipe.load_loras({"dora": state})
    changed = (stored + up @ down).double()
    expected = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
    torch.testing.assert_close(weight_of(layer).double(), expected, rtol=1e-4, atol=1e-4)
