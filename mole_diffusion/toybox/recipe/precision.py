"""Where half the bits are twice the speed, and where they are not."""

from __future__ import annotations

import torch


def bfloat16_pays(device: torch.device) -> bool:
    """Whether the device computes in bfloat16; a CPU without instructions for it is some fifteen times slower then."""
    if device.type != "cpu":
        return True
    abilities: dict[str, bool] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # torch 2.8 does not tell, and goes without
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16") or abilities.get("bf16"))


def fast_autocast(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where that pays, else a context that changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_pays(device))
