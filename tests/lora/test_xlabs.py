"""XLabs' LoRAs for FLUX.1: factors at attention processors, which make parts of what are several Linears here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mole_diffusion.lora import LoRAError, convert_lora, inspect_lora, load_lora
from tests.lora.test_families import caller
from tests.running import summed
from tests.tiny import dits

R = 2


@pytest.fixture(scope="module")
def flux() -> Any:
    return dits.tiny_dit("flux").transformer


@pytest.fixture(scope="module")
def state(flux: Any) -> dict[str, Tensor]:
    """Every module of XLabs' trainer in the first block of each kind."""
    torch.manual_seed(0)
    d = flux.config.num_attention_heads * flux.config.attention_head_dim
    sides = {
        "double_blocks.0.processor.qkv_lora1": (3 * d, d), "double_blocks.0.processor.qkv_lora2": (3 * d, d),
        "double_blocks.0.processor.proj_lora1": (d, d), "double_blocks.0.processor.proj_lora2": (d, d),
        "single_blocks.0.processor.qkv_lora": (3 * d, d), "single_blocks.0.processor.proj_lora": (d, 5 * d),
    }  # fmt: skip
    made = {}
    for name, (out, wide) in sides.items():
        made[f"{name}.down.weight"], made[f"{name}.up.weight"] = torch.randn(R, wide) / 4, torch.randn(out, R) / 4
    return made


def added(state: dict[str, Tensor], name: str) -> Tensor:
    """What XLabs' code adds to a Linear's weight: `up(down(x))`, without alpha."""
    return state[f"{name}.up.weight"].double() @ state[f"{name}.down.weight"].double()


@torch.no_grad()
def test_a_file_acts_as_xlabs_code_says(flux: Any, state: dict[str, Tensor]) -> None:
    double, single = "transformer_blocks.0.attn", "single_transformer_blocks.0"
    changes = {f"{double}.to_out.0": added(state, "double_blocks.0.processor.proj_lora1"),
               f"{double}.to_add_out": added(state, "double_blocks.0.processor.proj_lora2"),
               f"{single}.proj_out": added(state, "single_blocks.0.processor.proj_lora")}  # fmt: skip
    for names, theirs in (
        ([f"{double}.to_{x}" for x in "qkv"], "double_blocks.0.processor.qkv_lora1"),
        ([f"{double}.add_{x}_proj" for x in "qkv"], "double_blocks.0.processor.qkv_lora2"),
        ([f"{single}.attn.to_{x}" for x in "qkv"], "single_blocks.0.processor.qkv_lora"),
    ):
        changes |= dict(zip(names, added(state, theirs).chunk(3), strict=True))
    lora = load_lora(state, {"transformer": flux})
    assert (lora.layout, set(lora.factors["transformer"])) == ("xlabs", set(changes))
    run = caller("flux", flux)
    base = run()
    with summed({"transformer": flux}, lora):
        ours = run()
    for name, change in changes.items():
        flux.get_submodule(name).weight.add_(change)
    wanted = run()
    for name, change in changes.items():
        flux.get_submodule(name).weight.sub_(change)
    assert (wanted - base).abs().max() > 1e-2
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-4)


def test_it_is_named_and_converted(flux: Any, state: dict[str, Tensor], tmp_path: Path) -> None:
    models = {"transformer": flux}
    save_file(state, tmp_path / "it.safetensors")
    report = inspect_lora(tmp_path / "it.safetensors")
    assert (report.trainer, report.layout, report.modules) == ("XLabs' trainer", "xlabs", {"transformer": 6})
    out = convert_lora(tmp_path / "it.safetensors", tmp_path / "out.safetensors", "diffusers", models)
    assert load_lora(out, models).fingerprint == load_lora(state, models).fingerprint
    with pytest.raises(LoRAError, match=r"factors of a part of `linear1`, which has no name in kohya's layout"):
        convert_lora(tmp_path / "it.safetensors", tmp_path / "k.safetensors", "kohya", models)
    single = {key: value for key, value in state.items() if "single" in key}  # whose keys look like diffusers' of 2023
    assert load_lora(single, models).layout == "xlabs"


def test_other_processors_are_refused(flux: Any, state: dict[str, Tensor]) -> None:
    key = "double_blocks.0.processor.qkv_lora3.down.weight"
    with pytest.raises(
        LoRAError, match=r"1 keys do not belong to this layout: 'double_blocks\.0\.processor\.qkv_lora3"
    ):
        load_lora({**state, key: torch.ones(2, 2)}, {"transformer": flux})
