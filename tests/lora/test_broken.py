"""Tensors that are no LoRA of a model, each with the message it must give: layout, component, first keys, remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mole_diffusion.lora import LoRAError, load_lora
from tests.lora_files import CONV, KEY, QUERY, State, breakable, to_kohya, to_peft


@pytest.fixture
def state(models: dict[str, Any]) -> State:
    return breakable(models)


def changed(**values: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    """A breaker that replaces the down or up factor of the query."""
    names = {"down": f"{QUERY}.lora_A.weight", "up": f"{QUERY}.lora_B.weight"}
    return lambda state: state | {names[kind]: change(state[names[kind]]) for kind, change in values.items()}


def without(key: str) -> Callable[[State], State]:
    return lambda state: {k: v for k, v in state.items() if k != key}


def with_(extra: dict[str, Tensor]) -> Callable[[State], State]:
    return lambda state: state | extra


def poked(value: float) -> Callable[[Tensor], Tensor]:
    def poke(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return poke


def as_sdxl(state: State) -> State:
    key = f"{KEY}.lora_A.weight"
    return state | {key: torch.randn(4, 2048)}


ONE = torch.ones(1)
UNSUPPORTED = [
    ("lora_unet_mid_block_x.oft_blocks", "OFT or BOFT"),
    ("lora_unet_mid_block_x.set_weight", "weights that replace those of the base"),
    ("lora_unet_mid_block_x.bias_values", "a sparse difference beside the factors"),
    ("lora_unet_mid_block_x.a1.weight", "GLoRA"),
    ("lora_unet_mid_block_x.on_input", "(IA)³"),
    (f"{QUERY}.lora_E", "AdaLoRA"),
    (f"{QUERY}.lora_embedding_A", "LoRA of an embedding"),
    (f"{QUERY}.scale_weight", "LoRA in quantised numbers with a scale of their own"),
    ("string_to_param", "a textual-inversion embedding"),
    ("base_model.model.x.token_adapter.trainable_tokens_delta", "trainable tokens"),
]
A = ".lora_A.weight"
B = ".lora_B.weight"

STATES: list[tuple[str, Callable[[State], State], str]] = [
    (
        "key of another layout",
        with_({"lora_unet_x.lora_down.weight": ONE}),
        "(diffusers layout): 1 keys do not belong to this layout: 'lora_unet_x.lora_down.weight'. They may change",
    ),
    (
        "a pair without component among others",
        with_({f"conv_in{A}": ONE, f"conv_in{B}": ONE}),
        f"(diffusers layout): 2 keys do not belong to this layout: 'conv_in{A}', 'conv_in{B}'. They may change",
    ),
    (
        "most pairs without component",
        lambda state: to_peft(state, "unet") | {k: v for k, v in state.items() if k.startswith("text_encoder")},
        "(peft layout): 2 keys do not belong to this layout: 'text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight'",
    ),
    (
        "module the model has not",
        with_({f"unet.mid_block.nowhere{A}": torch.ones(1, 2), f"unet.mid_block.nowhere{B}": torch.ones(2, 1)}),
        "(diffusers layout, component unet): 1 of 5 modules find no place in the model: "
        f"'unet.mid_block.nowhere{A}'. It was written by diffusers. Its names are those of Stable Diffusion 1.x,",
    ),
    (
        "many modules the model has not",
        lambda state: {k.replace("unet.", "unet.blocks."): v for k, v in to_kohya_twins(state).items()},
        "component unet): 5 of 5 modules find no place in the model: 'unet.blocks.0.lora_A.weight', "
        "'unet.blocks.1.lora_A.weight', 'unet.blocks.2.lora_A.weight' and 2 more.",
    ),
    (
        "module that holds no weight",
        with_({f"unet.mid_block{A}": torch.ones(1, 2), f"unet.mid_block{B}": torch.ones(2, 1)}),
        f"1 of 5 modules find no place in the model: 'unet.mid_block{A}'",
    ),
    (
        "down without up",
        without(QUERY + B),
        "(diffusers layout, component unet): no lora_B.weight for mid_block.attentions.0.transformer_blocks.0.attn2."
        f"to_q, only: '{QUERY}{A}'. The file is incomplete",
    ),
    ("up without down", without(QUERY + A), f"to_q, only: '{QUERY}{B}'. The file is incomplete"),
    (
        "alpha alone",
        with_({"unet.conv_in.alpha": ONE}),
        "no lora_A.weight and no lora_B.weight for conv_in, only: 'unet.conv_in.alpha'",
    ),
    (
        "ranks disagree",
        changed(down=lambda t: t[:3]),
        "lora_A.weight (3, 64) and lora_B.weight (64, 4) are not factors of one module: "
        f"'{QUERY}{A}', '{QUERY}{B}'. Expected (r, d_in)",
    ),
    (
        "too wide",
        changed(down=lambda t: torch.ones(4, 65)),
        "(diffusers layout, component unet): lora_A.weight (4, 65) and lora_B.weight (64, 4) do not fit "
        f"mid_block.attentions.0.transformer_blocks.0.attn2.to_q with weight (64, 64): '{QUERY}{A}'. "
        "It was written by diffusers. ",
    ),
    ("too tall", changed(up=lambda t: torch.ones(32, 4)), "lora_A.weight (4, 64) and lora_B.weight (32, 4) do not fit"),
    (
        "another base model",
        as_sdxl,
        "The file looks like Stable Diffusion XL (its cross-attention expects text of width 2048); "
        "this model's expects 32. Use a LoRA for this kind of model.",
    ),
    (
        "linear factors for a 3x3 convolution",
        lambda state: state | {f"{CONV}{A}": torch.ones(4, 64), f"{CONV}{B}": torch.ones(64, 4)},
        "lora_A.weight (4, 64) and lora_B.weight (64, 4) do not fit mid_block.resnets.0.conv1 with weight (64,",
    ),
    (
        "a kernel in a linear factor",
        changed(down=lambda t: torch.ones(4, 64, 3, 3), up=lambda t: t[:, :, None, None]),
        "lora_A.weight (4, 64, 3, 3) and lora_B.weight (64, 4, 1, 1) do not fit",
    ),
    (
        "a vector",
        changed(down=lambda t: t[0]),
        "lora_A.weight (64,) and lora_B.weight (64, 4) are not factors of one module",
    ),
    ("rank 0", changed(down=lambda t: t[:0], up=lambda t: t[:, :0]), f"an empty tensor (0, 64): '{QUERY}{A}'"),
    (
        "NaN",
        changed(up=poked(float("nan"))),
        f"(diffusers layout, component unet): NaN or infinity: '{QUERY}{B}'. Training diverged",
    ),
    ("infinity", changed(down=poked(float("inf"))), f"NaN or infinity: '{QUERY}{A}'"),
    ("alpha NaN", with_({f"{QUERY}.alpha": ONE * float("nan")}), f"NaN or infinity: '{QUERY}.alpha'"),
    (
        "alpha a vector",
        with_({f"{QUERY}.alpha": torch.ones(4)}),
        f"alpha has shape (4,), expected one number: '{QUERY}.alpha'",
    ),
    (
        "quantised",
        changed(down=lambda t: t.to(torch.int8)),
        f"values of type torch.int8, not floating point: '{QUERY}{A}'",
    ),
    ("no tensors", lambda state: {}, "no tensors in it. Save the LoRA again"),
    (
        "a full model",
        lambda state: {"conv_in.weight": ONE, "conv_in.bias": ONE},
        "no LoRA keys in it: 'conv_in.bias', 'conv_in.weight'. Give a LoRA in one of the layouts "
        "diffusers, diffusers-old, kohya, original, peft, xlabs; a full model",
    ),
    (
        "never trained",
        lambda state: {k: v * 0 if B in k else v for k, v in state.items()},
        "(diffusers layout): the products of its factors are zero, or too small for the base's precision",
    ),
    (
        "alpha zero everywhere",
        lambda state: state | {k.replace(A, ".alpha"): torch.zeros(()) for k in state if A in k},
        "so it would change nothing. Train it",
    ),
    (
        "two adapters",
        lambda state: {k.replace(".weight", f".{name}.weight"): v for k, v in state.items() for name in ("a", "b")},
        "two keys for the lora_A.weight of one module: ",
    ),
    (
        "one module spelt twice",
        lambda state: state | {k.replace("text_encoder.", "text_encoder.text_model."): v for k, v in state.items()},
        "(diffusers layout, component text_encoder): two pairs for encoder.layers.0.mlp.fc1",
    ),
    (
        "a component the model has not",
        lambda state: {k.replace("text_encoder.", "text_encoder_2."): v for k, v in state.items()},
        "(diffusers layout, component text_encoder_2): 1 modules for text_encoder_2, but the model has only "
        "vae, text_encoder, unet: 'text_encoder_2.encoder.layers.0.mlp.fc1.lora_A.weight'",
    ),
    (
        "magnitudes of another module",
        with_({f"{QUERY}.dora_scale": torch.ones(63, 1)}),
        "(diffusers layout, component unet): magnitudes (63, 1) fit neither 64 outputs nor 64 inputs of mid_block",
    ),
    (
        "magnitudes alone",
        with_({"unet.conv_in.lora_magnitude_vector": torch.ones(32)}),
        "no lora_A.weight and no lora_B.weight for conv_in, only: 'unet.conv_in.lora_magnitude_vector'",
    ),
    (
        "half a LoHa",
        with_({"unet.conv_in.hada_w1_a": torch.ones(4, 2)}),
        "no hada_w1_b and no hada_w2_a and no hada_w2_b for conv_in, only",
    ),
    (
        "a LoHa of two modules",
        with_({f"unet.conv_in.hada_w{i}_{n}": torch.ones(4, 2 + i) for i in (1, 2) for n in "ab"}),
        "Hadamard factors (4, 3), (4, 3), (4, 4) and (4, 4) are not those of one module",
    ),
    (
        "a LoKr that does not fit",
        with_({"unet.conv_in.lokr_w1": torch.ones(4, 2), "unet.conv_in.lokr_w2": torch.ones(4, 2)}),
        "LoKr of (16, 4) does not fit conv_in with weight (32, 4, 3, 3)",
    ),
    (
        "a Tucker core of other ranks",
        with_(
            {
                "unet.conv_in.lora_down.weight": torch.ones(2, 4, 1, 1),
                "unet.conv_in.lora_mid.weight": torch.ones(3, 3, 3, 3),
                "unet.conv_in.lora_up.weight": torch.ones(32, 3, 1, 1),
            }
        ),
        "lora_down.weight (2, 4, 1, 1), lora_mid.weight (3, 3, 3, 3) and lora_up.weight (32, 3, 1, 1) are not",
    ),
    (
        "two kinds at one module",
        with_({f"{QUERY}.diff": torch.ones(64, 64)}),
        "factors of LoRA together with diff (full weight differences): ",
    ),
    (
        "a bias of another module",
        with_({f"{QUERY}.diff_b": torch.ones(63)}),
        f"the biases diff_b have shape (63,), expected (64,): '{QUERY}.diff_b'",
    ),
    (
        "a difference of no such module",
        with_({"unet.conv_in.diff": torch.ones(64, 3, 1)}),
        "diff (64, 3, 1) is the weight of neither a Linear, nor a Conv2d, nor a normalisation layer (full weight diff",
    ),
    (
        "a difference of another module",
        with_({"unet.conv_in.diff": torch.ones(64, 3, 3, 3)}),
        "full weight differences, shape (64, 3, 3, 3), do not fit conv_in with weight (32, 4, 3, 3): 'unet",
    ),
    (
        "a difference of the biases of another module",
        with_({"unet.conv_in.diff_b": torch.ones(7)}),
        "full differences of the biases, shape (7,), do not fit conv_in with weight (32, 4, 3, 3): 'unet",
    ),
    (
        "differences of no module",
        with_({"unet.nowhere.w_norm": ONE, "unet.nowhere.b_norm": ONE, "unet.else.diff_b": ONE}),
        "2 of 6 modules find no place in the model (among them full differences of the biases and full weight "
        "differences of normalisation layers): 'unet.else.diff_b', 'unet.nowhere.w_norm'",
    ),
    (
        "a difference of an embedding",
        with_({"text_encoder.embeddings.token_embedding.diff": torch.ones(9, 9)}),
        "1 of 5 modules are Embedding, of which no change is read (among them full weight differences): ",
    ),
    (
        "a whole weight of another module",
        lambda state: to_peft(state, "unet") | {"base_model.model.conv_in.weight": torch.ones(3)},
        "whole weights (PEFT's modules_to_save), shape (3,), do not fit conv_in with weight (32, 4, 3, 3)",
    ),
    (
        "a whole weight where factors are",
        lambda state: to_peft(state, "unet") | {f"{QUERY.replace('unet', 'base_model.model')}.weight": ONE},
        "factors of LoRA together with to_q.weight (whole weights (PEFT's modules_to_save)): ",
    ),
    (
        "a whole bias of another module",
        lambda state: to_peft(state, "unet") | {"base_model.model.conv_in.bias": torch.ones(3)},
        "whole biases (PEFT's `bias`), shape (3,), do not fit conv_in with weight (32, 4, 3, 3)",
    ),
    (
        "whole weights of no module, as another PEFT names them",
        lambda state: (
            to_peft(state, "unet") | {f"base_model.model.conv_in.modules_to_save.{n}": ONE for n in ("weight", "bias")}
        ),
        "modules find no place even in the nearest model (among them whole weights (PEFT's modules_to_save)): 'base_m",
    ),
    (
        "an embedding as if it were a Linear",
        with_(
            {
                f"text_encoder.embeddings.token_embedding{A}": torch.ones(1, 9),
                f"text_encoder.embeddings.token_embedding{B}": torch.ones(9, 1),
            }
        ),
        "component text_encoder): 1 of 5 modules are Embedding, of which no change is read",
    ),
    (
        "a bias of PEFT's of another module",
        with_({f"{QUERY}.lora_B.bias": torch.ones(63)}),
        f"the biases lora_B.bias have shape (63,), expected (64,): '{QUERY}.lora_B.bias'",
    ),
    (
        "half a pair as diffusers once wrote it",
        lambda state: {"unet.conv_in.lora.down.weight": torch.ones(2, 4, 3, 3)},
        "(diffusers-old layout, component unet): no up.weight for conv_in, only",
    ),
    (
        "half a pair of kohya's",
        lambda state: {"lora_unet_conv_in.lora_up.weight": torch.ones(32, 2, 1, 1)},
        "(kohya layout, component unet): no lora_down.weight for conv_in, only",
    ),
    (
        "half a pair with kohya's module and PEFT's ending",
        lambda state: {"lora_unet_conv_in.lora_B.weight": torch.ones(32, 2, 1, 1)},
        "(kohya layout, component unet): no lora_A.weight for conv_in, only",
    ),
    (
        "scales of another shape",
        with_({f"{QUERY}.lora_A.scale_weight": torch.ones(3)}),
        f"scales (3,) of lora_A.weight (4, 64): '{QUERY}.lora_A.scale_weight'",
    ),
    (
        "scales of nothing",
        with_({"unet.conv_in.lora_down.scale_weight": ONE}),
        "no lora_down.weight and no lora_up.weight for conv_in, only",
    ),
    (
        "float8 whose scales are missing",
        with_({"scaled_fp8": torch.ones(2)}),
        "float8 with scales of their own, and the scales are missing: 'scaled_fp8'",
    ),
    (
        "bare adapter for no model here",
        lambda state: {f"base_model.model.x.y{end}": torch.ones(2, 2) for end in (A, B)},
        "(peft layout, component vae): 1 of 1 modules find no place even in the nearest model: "
        "'base_model.model.x.y.lora_A.weight'. It was written by PEFT. Prefix the keys",
    ),
    *[(key, with_({key: ONE}), f"{kind}") for key, kind in UNSUPPORTED],
]


def to_kohya_twins(state: State) -> State:
    """Five pairs of numbered modules."""
    return {f"unet.{i}{end}": torch.ones(2, 2) for i in range(5) for end in (A, B)}


@pytest.mark.parametrize(("break_it", "message"), [row[1:] for row in STATES], ids=[row[0] for row in STATES])
def test_broken_tensors(break_it: Any, message: str, state: State, models: Any, tmp_path: Path) -> None:
    load_lora(state, models)  # good before it is broken
    path = tmp_path / "cat.safetensors"
    save_file({key: value.clone().contiguous() for key, value in break_it(state).items()}, path)
    with pytest.raises(LoRAError, match=re.escape(message)) as error:
        load_lora(path, models)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(("key", "kind"), UNSUPPORTED)
def test_kinds_not_supported_are_named_with_a_remedy(key: str, kind: str, state: State, models: Any) -> None:
    with pytest.raises(LoRAError, match=rf"^<state dict>: {re.escape(kind)}.* is not supported, 1 keys: .*\. \w+ "):
        load_lora(state | {key: ONE}, models)


def test_a_state_dict_of_something_else(models: Any) -> None:
    with pytest.raises(
        LoRAError, match=r"<state dict>: dict where a tensor is expected: 'unet'\. Pass a flat state dict"
    ):
        load_lora({"unet": {}}, models)  # type: ignore[dict-item]


def test_a_bare_adapter_that_fits_two_models() -> None:
    models = {"unet": nn.Sequential(nn.Linear(2, 2)), "transformer": nn.Sequential(nn.Linear(2, 2))}
    adapter = {f"0{end}": torch.ones(2, 2) for end in (A, B)}
    with pytest.raises(LoRAError, match=r"keys without a component, which would fit unet and transformer: '0\.lora_A"):
        load_lora(adapter, models)


def test_a_name_that_means_two_modules() -> None:
    twins = nn.ModuleDict({"a": nn.ModuleDict({"b_c": nn.Linear(2, 2)}), "a_b": nn.ModuleDict({"c": nn.Linear(2, 2)})})
    state = {f"unet.a.b_c{end}": torch.ones(2, 2) for end in (A, B)}
    assert list(load_lora(state, {"unet": twins}).factors["unet"]) == ["a.b_c"]
    with pytest.raises(LoRAError, match=r"1 of 1 modules find no place in the model: 'lora_unet_a_b_c\.lora_down"):
        load_lora(to_kohya(state), {"unet": twins})


def test_no_models_at_all(state: State, models: Any) -> None:
    with pytest.raises(LoRAError, match=r"no model to place it in"):
        load_lora(to_peft(state, "unet"), {})
    with pytest.raises(LoRAError, match=r"but the model has only"):
        load_lora(to_kohya(state), {"text_encoder": models["text_encoder"]})


def test_a_grouped_convolution() -> None:
    models = {"unet": nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))}
    state = {"unet.0.lora_A.weight": torch.ones(1, 2, 1, 1), "unet.0.lora_B.weight": torch.ones(4, 1, 1, 1)}
    with pytest.raises(LoRAError, match="0 is a grouped convolution"):
        load_lora(state, models)
