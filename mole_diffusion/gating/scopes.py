"""Which modules share a gate, and in what order they run."""

from __future__ import annotations

import re

from .config import Scope

# Nearest enclosing unit that runs as a whole: a transformer block, a text encoder layer, a residual block.
BLOCK = re.compile(r"^(.*?\b(?:\w*transformer_blocks|layers|resnets)\.\d+)(?:\.|$)")
TRANSFORMER = re.compile(r"^(.*\battentions\.\d+)(?:\.|$)")
LAYER = re.compile(r"^(.*\b(?:attn\d*|ff|ff_context|self_attn|mlp))\.")

# Names in the order in which a forward pass reaches them, where the model registers them in another.
ORDER = (
    "time_proj", "time_embedding", "add_embedding", "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out",
    "x_embedder", "pos_embed", "time_text_embed", "context_embedder",
    "proj_in", "transformer_blocks", "single_transformer_blocks",
    "norm", "norm1", "norm1_context", "proj_mlp", "attn1", "attn2", "attn", "self_attn", "ff", "mlp",
    "to_q", "q_proj", "to_k", "k_proj", "to_v", "v_proj", "to_out", "out_proj", "fc1", "fc2",
    "conv1", "time_emb_proj", "conv2", "conv_shortcut",
    "proj_out", "downsamplers", "upsamplers", "text_projection",
)  # fmt: skip
RANK = {name: index for index, name in enumerate(ORDER)}


def gate_name(scope: Scope, component: str, module_name: str) -> str:
    """Name of the gate a module belongs to: a readable place, ``unet.mid_block.attentions.0.transformer_blocks.0``.

    A module outside every transformer block, text encoder layer and residual block (a transformer's ``proj_in`` and
    ``proj_out``, a sampling convolution) shares a gate with what has the same parent. Where there is no spatial
    transformer around a module, scope ``"transformer"`` is scope ``"block"``.
    """
    if scope == "network":
        return component
    if scope == "layer":
        layer = LAYER.match(module_name)
        if layer:
            return f"{component}.{layer[1]}"
    if scope == "transformer":
        transformer = TRANSFORMER.match(module_name)
        if transformer:
            return f"{component}.{transformer[1]}"
    if scope != "matrix":
        block = BLOCK.match(module_name)
        parent = block[1] if block else module_name.rpartition(".")[0]
        return f"{component}.{parent or module_name}"
    return f"{component}.{module_name}"


def block_module(module_name: str) -> str | None:
    """Name of the transformer block or text encoder layer that encloses a module, or ``None``."""
    block = BLOCK.match(module_name)
    return block[1] if block and ".resnets." not in f".{block[1]}" else None


def firing_order(module_name: str) -> tuple[int, ...]:
    """Sort key: names of one component sorted by it come in the order of a forward pass.

    Residual blocks and transformers alternate: ``resnets.0, attentions.0, resnets.1, attentions.1``.
    """
    key: list[int] = []
    parts = module_name.split(".")
    for index, part in enumerate(parts):
        if part in ("resnets", "attentions"):
            key += [-1, int(parts[index + 1]), part == "attentions"]
        elif part.isdigit():
            if parts[index - 1] not in ("resnets", "attentions"):
                key.append(int(part))
        else:
            key.append(RANK.get(part, len(ORDER)))
    return tuple(key)
