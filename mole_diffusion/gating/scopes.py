"""Which modules share a gate."""

from __future__ import annotations

from ..families import Architecture
from .config import Scope


def gate_name(scope: Scope, component: str, module: str, architecture: Architecture) -> str:
    """Name of the gate a module belongs to: a readable place, `unet.mid_block.attentions.0.transformer_blocks.0`.

    A module outside every transformer block, text encoder layer and residual block (a transformer's `proj_in` and
    `proj_out`, a sampling convolution) shares a gate with what has the same parent. Where there is no spatial
    transformer around a module, scope `"transformer"` is scope `"block"`. A model of several networks, an encoder
    and a decoder, has a gate for each in scope `"network"`.

    Args:
        scope: As in `GateConfig`.
        component: Name of the component.
        module: Name of the module in it, as `canonical_name` gives it.
        architecture: What is known of the component.
    """
    return ".".join(part for part in (component, _place(scope, module, architecture)) if part)


def _place(scope: Scope, module: str, architecture: Architecture) -> str:
    if scope == "matrix":
        return module
    if scope == "network":
        return architecture.network(module)
    unit = None
    if scope == "layer":
        unit = architecture.layer(module)
    elif scope == "transformer":
        unit = architecture.transformer(module)
    return unit or architecture.block(module) or module.rpartition(".")[0] or module
