"""Files that LyCORIS itself writes act here as in LyCORIS."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mole_diffusion.lora import load_lora
from tests.running import run_unet, summed
from tests.tiny import tiny_components

SETTINGS: dict[str, dict[str, Any]] = {
    "LoCon": {"algo": "locon"},
    "Tucker": {"algo": "locon", "use_tucker": True},
    "DoRA, rows": {"algo": "locon", "dora_wd": True, "wd_on_output": True},
    "DoRA, channels": {"algo": "locon", "dora_wd": True, "wd_on_output": False},
    "LoHa": {"algo": "loha"},
    "LoHa, Tucker": {"algo": "loha", "use_tucker": True},
    "LoKr": {"algo": "lokr", "factor": 4},
    "LoKr, both factored": {"algo": "lokr", "factor": 8, "decompose_both": True, "linear_dim": 1, "conv_dim": 1},
    "LoKr, whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "LoKr, Tucker": {"algo": "lokr", "factor": 4, "use_tucker": True, "linear_dim": 1, "conv_dim": 1},
    "LoKr, DoRA": {"algo": "lokr", "factor": 4, "dora_wd": True},
    "full": {"algo": "full"},
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # LyCORIS warns of its optional kernels
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_lycoris_trains_acts_as_in_lycoris(settings: dict[str, Any]) -> None:
    from lycoris import LycorisNetwork, create_lycoris

    models = {"unet": tiny_components()["unet"]}
    theirs = tiny_components()["unet"]
    targets = ["mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", "mid_block.resnets.0.conv1"]
    torch.manual_seed(0)
    LycorisNetwork.apply_preset({"enable_conv": True, "target_module": [], "target_name": targets})
    sizes = {"linear_dim": 4, "linear_alpha": 2.0, "conv_dim": 4, "conv_alpha": 1.0}
    network = create_lycoris(theirs, 1.0, **{**sizes, **settings})
    network.apply_to()
    for name, parameter in network.named_parameters():
        if "dora_scale" in name:
            parameter *= 0.5 + torch.rand_like(parameter)
        elif settings["algo"] == "full":
            parameter += torch.randn_like(parameter) / 20
        else:
            parameter.copy_(torch.randn_like(parameter) / 3)
    state = {key: value.detach().clone() for key, value in network.state_dict().items()}
    lora = load_lora(state, models)
    assert set(lora.factors["unet"]) == set(targets)
    base, wanted = run_unet(models), run_unet({"unet": theirs})
    assert (wanted - base).abs().max() > 1e-3
    with summed(models, lora):
        torch.testing.assert_close(run_unet(models), wanted, atol=2e-5, rtol=1e-3)
