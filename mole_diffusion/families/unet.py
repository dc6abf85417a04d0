"""The UNet of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from .architecture import Architecture, Reads, Told, spatial_size, unit

_TRANSFORMER = unit(r"attentions\.\d+")


class UNet(Architecture):
    """diffusers' ``UNet2DConditionModel``: residual blocks and spatial transformers on several levels."""

    classes = ("UNet2DConditionModel",)
    denoiser = True
    tokens = "pixels"
    vectors = frozenset({"time_embedding", "add_embedding", "class_embedding", "time_emb_proj"})
    words = frozenset({"encoder_hid_proj"})
    # The outermost: a residual block or transformer block has none inside.
    blocks = re.compile(r"^(.*?\b(?:transformer_blocks|resnets)\.\d+)(?:\.|$)")
    layers = unit(r"attn\d*|ff")
    order = (
        "time_proj", "time_embedding", "add_embedding", "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out",
        "proj_in", "transformer_blocks", "attn1", "attn2", "ff", "to_q", "to_k", "to_v", "to_out",
        "conv1", "time_emb_proj", "conv2", "conv_shortcut", "proj_out", "downsamplers", "upsamplers",
    )  # fmt: skip
    siblings = (("to_q", "to_k", "to_v"),)
    targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def reads(self, model: nn.Module, module: str) -> Reads:
        parent, _, leaf = module.rpartition(".")
        # In a cross-attention, queries come from the picture, keys and values from the text.
        if leaf in ("to_k", "to_v") and getattr(model.get_submodule(parent), "is_cross_attention", False):
            return "text"
        return super().reads(model, module)

    def told(self, model: nn.Module, given: Mapping[str, Any]) -> Told:
        sample = given["sample"]
        return Told(
            rows=len(sample),
            timestep=given.get("timestep"),
            encoder_hidden_states=given.get("encoder_hidden_states"),
            sample_size=spatial_size(sample),
        )

    def transformer_block(self, module: str) -> str | None:
        block = self.block(module)
        return None if block is None or ".resnets." in f".{block}" else block

    def transformer(self, module: str) -> str | None:
        found = _TRANSFORMER.match(module)
        return found[1] if found else None

    def firing_order(self, module: str) -> tuple[int, ...]:
        """Residual blocks and transformers alternate: ``resnets.0, attentions.0, resnets.1, attentions.1``."""
        rank = {name: index for index, name in enumerate(self.order)}
        key: list[int] = []
        parts = module.split(".")
        for before, part in zip(["", *parts], parts, strict=False):
            if before in ("resnets", "attentions"):
                key += [int(part), before == "attentions"]
            elif part in ("resnets", "attentions"):
                key.append(-1)
            else:
                key.append(int(part) if part.isdigit() else rank.get(part, len(rank)))
        return tuple(key)
