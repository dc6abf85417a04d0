"""The toybox's denoiser and text encoder, trained together on captioned scenes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from mole_diffusion.files import write_safetensors
from mole_diffusion.progress import tracked
from mole_diffusion.training.engine.checkpoint import content_hash

from ..render import render_array
from ..shapes import CLASSES, PATTERNS
from ..vocabulary import MAX_TOKENS, RARE_TOKENS
from ..world import COLORS, GRID, GROUNDS, IMAGE_SIZE, Scene, caption, random_scene
from .loop import AveragedWeights, decline, made_ahead, run_stage, step_rng, trapezoid
from .precision import fast_autocast
from .text_encoder import TEXT_WIDTH, make_text_encoder
from .vae import LATENT_CHANNELS

LATENT_SIZE = 16
_SHARPNESS = 3.0
_NULL_CAPTION_PROBABILITY = 0.1
_FULL_CAPTION_PROBABILITY = 0.5
_SCENES_AT_ONCE = 256
# What the layout heads must name in each cell, and how many answers there are; 0 is "no object here".
_LAYOUT_LABELS = {
    "class": len(CLASSES) + 1,
    "primary": len(COLORS) + 1,
    "secondary": len(COLORS) + 1,
    "pattern": len(PATTERNS) + 1,
    "row": 3 + 1,  # objects are three cells wide
    "column": 3 + 1,
    "ground": len(GROUNDS),
}


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """What a training of the base may do otherwise; the defaults are what `benchmarks/toybox_recipes.py` compares with.

    Args:
        learning_rate: The highest; `None` is 1e-3 from nothing and 7e-4 where a trained base is trained on, times
            the root of the batch in 32s, and 2e-3 at most.
        timestep_power: Timesteps are `1000 u ** timestep_power` with u uniform: below 1 they lie towards the noise,
            where it is decided what stands where, above 1 towards the picture, where fills and patterns are.
        layout_weight: Of the loss of the layout heads beside the denoising loss.
        fine_layout: A third layout head, at the resolution of the latents.
        average: Decay per step of the averaged weights, which are what is kept.
        make_optimizer: Parameters and learning rate in, optimiser out; `None` is AdamW. All of its parameter groups
            get the one learning rate that follows the schedule.
    """

    learning_rate: float | None = None
    timestep_power: float = 0.7
    layout_weight: float = 0.1
    fine_layout: bool = False
    average: float = 0.999
    make_optimizer: Callable[[list[nn.Parameter], float], torch.optim.Optimizer] | None = None


def make_scheduler() -> DDIMScheduler:
    """Zero terminal SNR, v-prediction and trailing timesteps.

    On 16×16 latents the usual schedule ends before the mean colour is gone, so a base trained on it can guess the
    ground from the noise and never learns to read.
    """
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def make_unet() -> UNet2DConditionModel:
    """An untrained denoiser of the toybox."""
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=32,
        norm_num_groups=16,
    )
    # As torch starts them, all heads look at all words alike and the one word that counts makes a fiftieth of what
    # they read; heads that start out looking at few words find it sooner.
    with torch.no_grad():
        for name, module in unet.named_modules():
            if name.endswith(("attn2.to_q", "attn2.to_k")):
                module.weight.mul_(_SHARPNESS)
    return unet


def load_base(folder: Path, tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Trained denoiser and text encoder, without the trace of their folder that `from_pretrained` leaves in them."""
    unet, text_encoder = make_unet(), make_text_encoder(tokenizer)
    unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet").state_dict())
    text_encoder.load_state_dict(CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict())
    return unet, text_encoder


class _Trained(nn.Module):
    """Denoiser, text encoder, and heads that are thrown away after training.

    The heads read the features before and after the last block that sees the text, one per cell of the world's grid,
    and must say of each cell what stands there: class, colours, pattern, which part of the object, ground. The
    renderer knows that for free. Where an object stands and what it wears show through the noise at the same level, so
    the denoising loss alone hardly ever needs the words; the heads do, and features that know the words draw by them.
    """

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, fine_layout: bool) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        *_, wide, widest = unet.config["block_out_channels"]
        answers = sum(_LAYOUT_LABELS.values())
        sources = [(unet.up_blocks[0], widest), (unet.up_blocks[1].attentions[-1], wide)]
        if fine_layout:
            sources.append((unet.up_blocks[1], wide))
        self.heads = nn.ModuleList([nn.Conv2d(channels, answers, 1) for _, channels in sources])
        self._features: dict[int, Tensor] = {}
        for k, (source, _) in enumerate(sources):
            source.register_forward_hook(partial(self._keep_features, k))

    def _keep_features(self, k: int, module: nn.Module, args: object, output: Tensor | tuple[Tensor]) -> None:
        self._features[k] = output if isinstance(output, Tensor) else output[0]

    def forward(self, noisy: Tensor, timesteps: Tensor, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        text = self.text_encoder(input_ids)[0]
        velocity = self.unet(noisy, timesteps, text, return_dict=False)[0]
        return velocity, [head(self._features[k]) for k, head in enumerate(self.heads)]


def layout(scene: Scene) -> np.ndarray:
    """What stands in each cell of the grid, one plane per entry of `_LAYOUT_LABELS`.

    Returns:
        Shape `(7, side / 8, side / 8)`, uint8.
    """
    cells = np.zeros((len(_LAYOUT_LABELS), scene.side // GRID, scene.side // GRID), np.uint8)
    cells[-1] = GROUNDS.index(scene.ground)
    colors = list(COLORS)
    for item in scene.objects:
        left, top, right, bottom = (edge // GRID for edge in item.box)
        part = np.arange(1, right - left + 1)
        look = item.look
        cells[:4, top:bottom, left:right] = 1 + np.array(
            [
                CLASSES.index(item.class_name),
                colors.index(look.primary),
                colors.index(look.secondary),
                PATTERNS.index(look.pattern),
            ]
        ).reshape(4, 1, 1)
        cells[4, top:bottom, left:right] = part[:, None]
        cells[5, top:bottom, left:right] = part[None, :]
    return cells


def layout_loss(answers: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per cell, summed over the entries of `_LAYOUT_LABELS`.

    Args:
        answers: Logits, `(batch, all answers, side, side)`; `side` is a multiple of `cells`, and each cell is asked
            about at all its places.
        labels: `(batch, 7, cells, cells)`.
    """
    places = answers.shape[-1] // labels.shape[-1]
    labels = labels.repeat_interleave(places, dim=2).repeat_interleave(places, dim=3)
    parts = answers.float().split(list(_LAYOUT_LABELS.values()), dim=1)
    return torch.stack([F.cross_entropy(part, labels[:, k].long()) for k, part in enumerate(parts)]).sum()


class _Scenes:
    """Training scenes of one side, with their layouts and latents."""

    def __init__(
        self,
        vae: AutoencoderKL,
        scenes: list[Scene],
        layouts: list[np.ndarray],
        folder: Path,
        seed: int,
        device: torch.device,
    ) -> None:
        self.scenes = scenes
        self.layouts = torch.from_numpy(np.stack(layouts))
        path = folder / f"scenes-{scenes[0].side}.safetensors"
        self.latents = encode_scenes(vae, scenes, path, seed=seed, device=device)


@torch.no_grad()
def encode_scenes(
    vae: AutoencoderKL, scenes: Sequence[Scene], path: Path, *, seed: int, device: torch.device
) -> Tensor:
    """Scaled latents of scenes of one side, `(scenes, channels, side / 4, side / 4)`, fp16; kept in `path`."""
    side = scenes[0].side * LATENT_SIZE // IMAGE_SIZE
    weights = content_hash(tensor for _, tensor in sorted(vae.state_dict().items()))
    made_of = {"seed": str(seed), "num_scenes": str(len(scenes)), "vae": weights}
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() == made_of:
                return file.get_tensor("latents")
    except (FileNotFoundError, SafetensorError):  # not there, or damaged: encoded again
        pass
    latents = torch.empty(len(scenes), vae.config["latent_channels"], side, side, dtype=torch.float16)
    starts = range(0, len(scenes), _SCENES_AT_ONCE)

    def rendered(start: int) -> Tensor:
        some = scenes[start : start + _SCENES_AT_ONCE]
        return torch.stack([torch.from_numpy(render_array(scene)) for scene in some]).permute(0, 3, 1, 2) * 2 - 1

    for start, pictures in zip(tracked(starts, "scenes"), made_ahead(rendered, starts, device), strict=True):
        with fast_autocast(device):
            mean = vae.encode(pictures.to(device)).latent_dist.mean
        latents[start : start + len(pictures)] = (mean.float() * vae.config["scaling_factor"]).half().cpu()
    write_safetensors(path, {"latents": latents}, made_of)
    return latents


class _Batch(NamedTuple):
    """What the model is shown at a step: token ids, clean latents, noise, timesteps and what stands in each cell."""

    step: int
    input_ids: Tensor
    clean: Tensor
    noise: Tensor
    timesteps: Tensor
    labels: Tensor


def train_base(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    work_dir: Path,
    *,
    seed: int,
    device: torch.device,
    num_steps: int,
    batch_size: int,
    num_scenes: int,
    compile_model: bool = False,
    start: UNet2DConditionModel | None = None,
    settings: BaseSettings | None = None,
) -> UNet2DConditionModel:
    """Velocity loss on captioned scenes; one caption in ten is empty, for classifier-free guidance.

    A batch holds pictures of one side, fewer of the larger. The text encoder, which can read already, is trained along.

    Args:
        start: A trained denoiser to go on from, and `text_encoder` is the one that was trained with it. The learning
            rate then falls from the first step on, and the layout heads, which start from nothing, get a say slowly.
        settings: What to do otherwise than what ships was made.
    """
    settings = settings or BaseSettings()
    torch.manual_seed(seed + 1)
    # Channels last is a tenth faster in fp32 on a CPU, and what GPUs want in bfloat16.
    module = (
        _Trained(start or make_unet(), text_encoder, settings.fine_layout)
        .to(device)
        .to(memory_format=torch.channels_last)
        .train()
    )
    module.requires_grad_(True)
    if device.type == "cpu":  # the backward pass of fused attention takes more time there than all convolutions
        module.unet.set_attn_processor(AttnProcessor())
        module.text_encoder.set_attn_implementation("eager")

    def some_scenes(start: int) -> list[tuple[Scene, np.ndarray]]:
        numbers = range(start, min(start + _SCENES_AT_ONCE, num_scenes))
        scenes = [random_scene(step_rng(seed, "base-scene", k)) for k in numbers]
        return [(scene, layout(scene)) for scene in scenes]

    starts = range(0, num_scenes, _SCENES_AT_ONCE)
    drawn: dict[int, list[tuple[Scene, np.ndarray]]] = defaultdict(list)
    for some in made_ahead(some_scenes, starts, device):
        for scene, cells in some:
            drawn[scene.side].append((scene, cells))
    pools = [
        _Scenes(vae, [scene for scene, _ in drawn[side]], [cells for _, cells in drawn[side]], work_dir, seed, device)
        for side in sorted(drawn)
    ]
    shares = [len(pool.scenes) / num_scenes for pool in pools]
    alphas = make_scheduler().alphas_cumprod.to(device)
    learning_rate, schedule = (1e-3, trapezoid) if start is None else (7e-4, decline)
    # Adam's step should follow the noise of the gradient, as far as training is stable.
    learning_rate = min(2e-3, learning_rate * (batch_size / 32) ** 0.5)
    make_optimizer = settings.make_optimizer or _adamw
    optimizer = make_optimizer(list(module.parameters()), settings.learning_rate or learning_rate)
    average = AveragedWeights(module, settings.average)
    forward = torch.compile(module, dynamic=False) if compile_model else module

    def make_batch(k: int) -> _Batch:
        rng = step_rng(seed, "base", k)
        pool = pools[rng.choice(len(pools), p=shares)]
        count = max(1, batch_size * IMAGE_SIZE**2 // pool.scenes[0].side ** 2)
        chosen = rng.integers(len(pool.scenes), size=count)
        captions = [
            ""
            if rng.random() < _NULL_CAPTION_PROBABILITY
            else caption(pool.scenes[index], rng, odd_words=RARE_TOKENS, full_probability=_FULL_CAPTION_PROBABILITY)
            for index in chosen
        ]
        tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
        clean = pool.latents[chosen]
        noise = torch.from_numpy(rng.standard_normal(clean.shape, np.float32))
        # One timestep in each of as many equal strata as samples: the loss is less noisy than with independent draws.
        strata = (rng.permutation(count) + rng.random(count)) / count
        timesteps = torch.from_numpy((strata**settings.timestep_power * 1000).astype(np.int64))
        return _Batch(k, tokens.input_ids, clean, noise, timesteps, pool.layouts[chosen])

    def step(batch: _Batch) -> dict[str, Tensor]:
        k = batch.step
        tokens, clean, noise, timesteps, labels = (x.to(device) for x in batch[1:])
        clean = clean.float()
        signal, spread = (x.sqrt().view(-1, 1, 1, 1) for x in (alphas[timesteps], 1 - alphas[timesteps]))
        with fast_autocast(device):
            noisy = (signal * clean + spread * noise).contiguous(memory_format=torch.channels_last)
            velocity, answers = forward(noisy, timesteps, tokens)
        denoising = F.mse_loss(velocity.float(), signal * noise - spread * clean)
        placing = torch.stack([layout_loss(answer, labels) for answer in answers]).mean()
        say = 1.0 if start is None else min(1.0, k / 300) / 2
        return {
            "loss": denoising + say * settings.layout_weight * placing,
            "denoising": denoising.detach(),
            "placing": placing.detach(),
        }

    run_stage(
        "base",
        module,
        optimizer,
        make_batch,
        step,
        device=device,
        num_steps=num_steps,
        schedule=schedule,
        work_dir=work_dir,
        seed=seed,
        average=average,
    )
    text_encoder.eval()
    return module.unet.eval()


def _adamw(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
