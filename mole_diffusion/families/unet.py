"""The UNet of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .architecture import Architecture, Original, Reads, Told, spatial_size, unit
from .clip import NAMES as CLIP_NAMES
from .together import Together, behind, whose

# What the original code calls the parts of a residual block, and what stands outside of all blocks.
_RESIDUAL = {
    "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection", "norm1": "in_layers.0", "norm2": "out_layers.0",
}  # fmt: skip
_OUTSIDE = {
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
}  # fmt: skip
_BY_AUTHORS = re.compile(r"(in|out)put_blocks_\d|middle_block_\d|(time_embed|label_emb|out)_\d")
_TRANSFORMER = unit(r"attentions\.\d+")


NAMES = rf"(down|up)_blocks_\d|mid_block|(in|out)put_blocks_\d|middle_block|{CLIP_NAMES}"
"""Names of its modules, and of its CLIP's, with underscores for dots."""


class UNet(Architecture):
    """diffusers' `UNet2DConditionModel`: residual blocks and spatial transformers on several levels."""

    classes = ("UNet2DConditionModel",)
    denoiser = True
    tokens = "pixels"
    vectors = frozenset({"time_embedding", "add_embedding", "class_embedding", "time_emb_proj"})
    words = frozenset({"encoder_hid_proj"})
    # The outermost: a residual block or transformer block has none inside.
    blocks = re.compile(r"^(.*?\b(?:transformer_blocks|resnets)\.\d+)(?:\.|$)")
    layers = unit(r"attn\d*|ff")
    order = (
        "time_proj", "time_embedding", "add_embedding", "conv_in", "down_blocks", "mid_block", "up_blocks",
        "conv_norm_out", "conv_out",
        "norm", "proj_in", "transformer_blocks", "norm1", "attn1", "conv1", "time_emb_proj", "norm2", "attn2", "conv2",
        "norm3", "ff", "to_q", "to_k", "to_v", "to_out", "conv_shortcut", "proj_out", "downsamplers", "upsamplers",
    )  # fmt: skip
    siblings = (("to_q", "to_k", "to_v"),)
    targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def reads(self, model: nn.Module, module: str) -> Reads:
        parent, _, leaf = module.rpartition(".")
        # In a cross-attention, queries come from the picture, keys and values from the text.
        if leaf in ("to_k", "to_v") and getattr(model.get_submodule(parent), "is_cross_attention", False):
            return "text"
        return super().reads(model, module)

    def halvings(self, model: Any, module: str) -> int:
        part, index = (*module.split("."), "0")[:2]
        if part == "down_blocks":
            return sum(_changes_size(block) for block in model.down_blocks[: int(index)])
        if part in ("mid_block", "up_blocks"):
            above = model.up_blocks[: int(index) if part == "up_blocks" else 0]
            return sum(map(_changes_size, model.down_blocks)) - sum(map(_changes_size, above))
        return 0

    def told(self, model: nn.Module, given: Mapping[str, Any]) -> Told:
        sample = given["sample"]
        return Told(
            rows=sample.shape[0],
            timestep=given.get("timestep"),
            encoder_hidden_states=given.get("encoder_hidden_states"),
            sample_size=spatial_size(sample),
        )

    def by_authors(self, module: str) -> bool:
        return _BY_AUTHORS.match(module.replace(".", "_")) is not None

    def original_names(self, model: nn.Module) -> dict[str, tuple[Original, ...]]:
        """Those of CompVis' and Stability's code (`input_blocks.4.1.proj_in`), which counts blocks without levels."""
        names = [name for name, _ in model.named_modules()]
        found = {theirs: ours for theirs, ours in _OUTSIDE.items() if ours in names}
        for theirs, ours in _original_blocks(names).items():
            for name in names:
                inside = name.removeprefix(f"{ours}.")
                if inside != name:
                    smaller = inside == "conv" and theirs.startswith("input_blocks")
                    found[f"{theirs}.{'op' if smaller else _RESIDUAL.get(inside, inside)}"] = name
        return {theirs: (Original(ours),) for theirs, ours in found.items()}

    def transformer_block(self, module: str) -> str | None:
        block = self.block(module)
        return None if block is None or ".resnets." in f".{block}" else block

    def transformer(self, module: str) -> str | None:
        found = _TRANSFORMER.match(module)
        return found[1] if found else None

    def firing_order(self, module: str) -> tuple[int, ...]:
        """Residual blocks and transformers alternate: `resnets.0, attentions.0, resnets.1, attentions.1`."""
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


def _changes_size(block: Any) -> bool:
    return any(getattr(block, name, None) for name in ("downsamplers", "upsamplers"))


def _original_blocks(names: Sequence[str]) -> dict[str, str]:
    """The blocks of the original code, which are residual blocks, transformers and changes of size, to diffusers'."""

    def count(prefix: str) -> int:
        return 1 + max((int(n.split(".")[prefix.count(".")]) for n in names if n.startswith(prefix)), default=-1)

    found = {
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
    }
    index = 1
    for level in range(count("down_blocks.")):
        block = f"down_blocks.{level}"
        for layer in range(count(f"{block}.resnets.")):
            found[f"input_blocks.{index}.0"] = f"{block}.resnets.{layer}"
            found[f"input_blocks.{index}.1"] = f"{block}.attentions.{layer}"
            index += 1
        found[f"input_blocks.{index}.0"] = f"{block}.downsamplers.0"
        index += f"{block}.downsamplers.0.conv" in names
    index = 0
    for level in range(count("up_blocks.")):
        block = f"up_blocks.{level}"
        for layer in range(count(f"{block}.resnets.")):
            found[f"output_blocks.{index}.0"] = f"{block}.resnets.{layer}"
            found[f"output_blocks.{index}.1"] = f"{block}.attentions.{layer}"
            index += 1
        after = 2 if f"{block}.attentions.0" in names else 1  # the change of size comes last in its block
        found[f"output_blocks.{index - 1}.{after}"] = f"{block}.upsamplers.0"
    return found


def together(encoded: Any, others: Sequence[Any]) -> Together:
    """Prompts with others behind them, for attention of pixels to words alone.

    Negative embeddings, which must be as long, are repeated: attention over the same tokens several times is attention
    over them once.
    """
    embeds, negative, *rest = encoded
    further = [other[0] for other in others]
    if negative is not None:
        negative = negative.repeat(1, 1 + len(others), 1)
    return Together((behind(embeds, further), negative, *rest), whose(embeds, further))
