"""A Stable Diffusion as one file, under the names of its authors' code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
AROUND = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_single_file(pipe: Any, path: Path) -> Path:
    """Writes denoiser, autoencoder and text encoder of a pipeline into one file."""
    tensors = {f"cond_stage_model.transformer.{_clip(key)}": value for key, value in _state(pipe.text_encoder)}
    per_block, blocks = pipe.unet.config.layers_per_block + 1, len(pipe.unet.config.block_out_channels)
    tensors |= {f"model.diffusion_model.{_unet(key, per_block)}": value for key, value in _state(pipe.unet)}
    for key, value in _state(pipe.vae):
        is_matrix = "attentions" in key and value.ndim == 2
        tensors[f"first_stage_model.{_vae(key, blocks)}"] = value[..., None, None] if is_matrix else value
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def _state(model: Any) -> list[tuple[str, Tensor]]:
    return list(model.state_dict().items())


def _clip(key: str) -> str:
    return key if key.startswith("text_model.") else f"text_model.{key}"


def _unet(key: str, per_block: int) -> str:
    for name, theirs in AROUND.items():
        if key.startswith(f"{name}."):
            return key.replace(name, theirs, 1)
    found = re.fullmatch(r"(down|up|mid)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.*)", key)
    assert found is not None, key
    side, kind, index = found[1], found[3], int(found[4])
    block, rest = int(found[2] or 0), found[5]
    if kind == "resnets":
        name, _, leaf = rest.rpartition(".")
        rest = f"{RESNET[name]}.{leaf}"
    if side == "mid":
        return f"middle_block.{2 * index + (kind == 'attentions')}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * per_block}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{(block + 1) * per_block - 1}.2.{rest}"
    start = 1 + block * per_block if side == "down" else block * per_block
    return f"{'input' if side == 'down' else 'output'}_blocks.{start + index}.{int(kind == 'attentions')}.{rest}"


def _vae(key: str, blocks: int) -> str:
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = key.replace("mid_block.attentions.0", "mid.attn_1")
    if ".mid.attn_1." in key:
        stem, name, leaf = re.fullmatch(r"(.*attn_1)\.(.*)\.(\w+)", key).groups()  # type: ignore[union-attr]
        return f"{stem}.{ATTENTION[name]}.{leaf}"
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"down_blocks\.(\d)", r"down.\1", key)
    key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}", key)
    return re.sub(r"(down|up)samplers\.0", r"\1sample", key).replace("resnets", "block")
