"""What is measured: which model, how many LoRAs of which kind, and what stands beside one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import MoLEError

Side = Literal[
    "bare",
    "empty",
    "sum",
    "products",
    "joined",
    "budget",
    "norm_router",
    "routed",
    "masks",
    "gates",
    "gated",
    "fused",
    "peft",
    "merged",
]
SIDES: tuple[Side, ...] = get_args(Side)

MOST = {"loras": 1000, "rank": 4096, "rounds": 1_000_000, "batch": 4096, "threads": 1024}
LARGEST_LATENT = 2048  # a picture of 16384 pixels

_ATTENTION = (".attn.to_", ".attn1.to_", ".attn2.to_", ".attention.to_")
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "all": (*_ATTENTION, ".ff.net.", ".feed_forward.w", ".proj_mlp", "proj_in", "proj_out"),
    "conv": ("attn1.to_", "attn2.to_", ".ff.net.", "proj_in", "proj_out", ".conv1", ".conv2", "conv_shortcut"),
}
"""Parts of the names of modules that get factors; "all" is what kohya's trainer touches by default in a UNet."""


@dataclass(frozen=True)
class Size:
    """One model with random weights and real shapes: speed does not depend on what weights are.

    Attributes:
        kind: The class in diffusers.
        settings: What it is made with.
        channels: Of the latents.
        latent: Side of the latents unless another is asked for.
        tokens: Words of the prompt.
        width: Of their embeddings.
        dtype: What it is usually run in on a GPU.
        patch: Pixels of the latents to a side of what it takes as one token.
        rows: Of the latents for one picture: 2 where it is drawn with classifier-free guidance.
    """

    kind: Literal["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "ZImageTransformer2DModel"]
    settings: dict[str, Any]
    channels: int
    latent: int
    tokens: int
    width: int
    dtype: Literal["float32", "bfloat16"]
    patch: int = 1
    rows: int = 2


def _unet(
    channels: tuple[int, ...], heads: Any, width: int, layers: int, groups: int = 32, **more: Any
) -> dict[str, Any]:
    levels = len(channels)
    return {
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": layers,
        "block_out_channels": channels,
        "attention_head_dim": heads,
        "norm_num_groups": groups,
        "cross_attention_dim": width,
        "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        **more,
    }


_FROM_THE_SECOND: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
    "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
}
_SDXL: dict[str, Any] = {
    **_FROM_THE_SECOND,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SIZES: dict[str, Size] = {
    "tiny": Size(
        "UNet2DConditionModel", _unet((32, 64), 8, 32, 1), channels=4, latent=8, tokens=8, width=32, dtype="float32"
    ),
    "toybox": Size(
        "UNet2DConditionModel",
        _unet((64, 128, 160), 32, 128, 1, 16, **_FROM_THE_SECOND),
        channels=4,
        latent=16,
        tokens=32,
        width=128,
        dtype="float32",
    ),
    "142m": Size(
        "UNet2DConditionModel",
        _unet((128, 256, 512, 512), 8, 768, 2),
        channels=4,
        latent=32,
        tokens=77,
        width=768,
        dtype="float32",
    ),
    "sd15": Size(
        "UNet2DConditionModel",
        _unet((320, 640, 1280, 1280), 8, 768, 2),
        channels=4,
        latent=64,
        tokens=77,
        width=768,
        dtype="bfloat16",
    ),
    "sdxl": Size(
        "UNet2DConditionModel",
        _unet((320, 640, 1280), (5, 10, 20), 2048, 2, **_SDXL),
        channels=4,
        latent=128,
        tokens=77,
        width=2048,
        dtype="bfloat16",
    ),
    "sd3": Size(
        "SD3Transformer2DModel", _SD3, channels=16, latent=128, tokens=333, width=4096, dtype="bfloat16", patch=2
    ),
    "flux": Size(
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        channels=16,
        latent=128,
        tokens=512,
        width=4096,
        dtype="bfloat16",
        patch=2,
        rows=1,
    ),
    "z_image": Size(
        "ZImageTransformer2DModel",
        {},
        channels=16,
        latent=128,
        tokens=64,
        width=2560,
        dtype="bfloat16",
        patch=2,
        rows=1,
    ),
}
"""By name. "toybox" has the shapes of a Stable Diffusion in miniature, where nothing but overhead is seen; "142m" those
of a small one; "sd15", "sdxl" and "sd3" those of Stable Diffusion 1.5, XL and 3 medium, "flux" and "z_image" those of
FLUX.1 and Z-Image (diffusers' own defaults); "tiny" is for a try."""


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """One table.

    Attributes:
        size: A name in `SIZES`.
        loras: How many LoRAs, one row of the table for each.
        rank: Of every LoRA.
        targets: A name in `TARGETS`.
        sides: What stands beside one another. `"bare"`: the model without LoRAs, what all others are divided by.
            `"empty"`: LoRAs loaded, and none in the call. `"sum"`: all, summed. `"products"`: the same products with
            nothing around them; `"joined"`: also with the rows of a Linear and of `down` in one. `"gates"`: weighed by
            the gates that training makes by default; `"gated"`: their and the LoRAs' products with nothing around
            them. `"budget"`, `"norm_router"`: the methods of these names; `"routed"`: the operators of that router with
            nothing around them. `"masks"`: each on its stripe of the picture and on its words. `"fused"`: the sum after
            `fuse_lora`, in float32 only. `"peft"`: diffusers' own. `"merged"`: added to the weights beforehand.
        used: How many of the LoRAs a call of ours keeps; `None`: all.
        rounds: How often all sides are run, one after another.
        batch: Rows of the latents; 2 is one picture with guidance.
        latent: Side of the latents; `None` is the size's own.
        dtype: `"float32"`, `"bfloat16"`; `None` is the size's own, and float32 on a CPU, where less is seldom fast.
        device: Where.
        threads: Of the CPU.
        train: Also a step of gate training: forward, backward, what it saves for that.
        compiled: Compile the bare model and ours: `"whole"`, or `"blocks"` as `compile_repeated_blocks` does, which
            takes seconds where the whole takes minutes. `None`: neither.
        inside: Also what each call of ours spends on LoRAs, module by module; on a CPU, and where nothing is compiled.
        walks: Also whole steps of gate training by the preset `real`, with autoencoder and CLIP.
        pipeline: Also whole calls of the toybox's pipeline beside diffusers' own.

    Raises:
        MoLEError: A name or a number is not possible.
    """

    size: str = "142m"
    loras: tuple[int, ...] = (1, 3, 8, 32)
    rank: int = 16
    targets: str = "all"
    sides: tuple[Side, ...] = SIDES
    used: int | None = None
    rounds: int = 6
    batch: int = 2
    latent: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    device: str = "cpu"
    threads: int = 1
    train: bool = False
    compiled: Literal["whole", "blocks"] | None = None
    inside: bool = False
    walks: bool = False
    pipeline: bool = False

    @property
    def precision(self) -> Literal["float32", "bfloat16"]:
        """What is computed in."""
        if self.dtype is not None:
            return self.dtype
        return "float32" if self.device == "cpu" else SIZES[self.size].dtype

    def __post_init__(self) -> None:
        for name, value, known in (("size", self.size, SIZES), ("targets", self.targets, TARGETS)):
            if value not in known:
                raise MoLEError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        unknown = [side for side in self.sides if side not in SIDES]
        if unknown or not self.sides:
            raise MoLEError(f"`sides` must be some of {', '.join(SIDES)}, got {list(self.sides)}.")
        if not self.loras:
            raise MoLEError("`loras` is empty. Give numbers, such as 1,3,8.")
        for name, most in MOST.items():
            given = getattr(self, name)
            for number in given if isinstance(given, tuple) else (given,):
                if not 1 <= number <= most:
                    raise MoLEError(f"`{name}` must be at least 1, and at most {most:,}, got {number}.")
        if self.used is not None and not 1 <= self.used <= min(self.loras):
            raise MoLEError(
                f"`used` must be between 1 and the smallest number of LoRAs, {min(self.loras)}, got {self.used}."
            )
        if self.walks and self.size not in ("tiny", "sd15"):
            raise MoLEError(f"whole steps of training are measured at the sizes tiny and sd15, got {self.size!r}.")
        if self.inside and (self.compiled or self.device not in ("cpu", "meta")):
            raise MoLEError(
                "what a call spends inside on LoRAs is measured on a CPU, and not in compiled graphs. Leave out "
                "`inside`, or the device and `compiled`."
            )
        if self.latent is not None and self.latent not in range(8, LARGEST_LATENT + 1, 8):
            raise MoLEError(
                f"`latent` must be a multiple of 8, at most {LARGEST_LATENT}, got {self.latent}. "
                "64 is a picture of 512 pixels."
            )


_EVERY: tuple[Side, ...] = ("bare", "empty", "sum", "gates", "masks", "norm_router", "fused", "peft", "merged")
WHOLE = (
    SpeedConfig(
        size="142m",
        loras=(3,),
        rounds=15,
        sides=(*_EVERY, "products", "joined", "gated", "routed"),
        train=True,
        inside=True,
    ),
    SpeedConfig(
        size="142m",
        loras=(8,),
        rounds=6,
        sides=("bare", "sum", "products", "gates", "gated", "masks", "fused", "peft", "merged"),
    ),
    SpeedConfig(size="142m", loras=(3, 32), used=3, rounds=4, sides=("bare", "sum", "gates", "masks")),
    SpeedConfig(
        size="sd15",
        latent=64,
        loras=(3,),
        rounds=5,
        sides=("bare", "sum", "gates", "masks", "norm_router", "routed"),
        inside=True,
    ),
    SpeedConfig(size="toybox", loras=(3,), rounds=12, sides=_EVERY, train=True, pipeline=True),
    SpeedConfig(
        size="tiny",
        loras=(3,),
        rounds=12,
        sides=("bare", "empty", "sum", "products", "budget", "masks", "gates", "norm_router"),
        compiled="whole",
    ),
)
"""The tables of the documentation's page, half an hour on two cores: three and eight LoRAs; three of three and of
thirty-two; the real size of Stable Diffusion 1.5; small models; compiled."""
