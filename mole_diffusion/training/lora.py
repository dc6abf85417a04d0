"""`train_lora`: a handful of pictures and a rare token in, a LoRA out, as in DreamBooth with LoRA."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from mole_diffusion.errors import MoLEError
from mole_diffusion.files import NotWrittenError, in_use, try_file, try_folder, write_last
from mole_diffusion.lora import LoRAFactors, save_lora
from mole_diffusion.lora.triggers import write_triggers
from mole_diffusion.pictures import as_seen
from mole_diffusion.training.checkpoint import CheckpointFolder, base_tensors, base_texts, fingerprint
from mole_diffusion.training.loop import (
    MixedPrecision,
    Precision,
    check_finite,
    check_step_settings,
    learning_rate_factor,
    make_optimizer,
    set_learning_rate,
    step_generator,
)
from mole_diffusion.training.noise import NoiseSchedule
from mole_diffusion.training.progress import training_progress
from mole_diffusion.training.trainable import TrainableLoRA

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True, kw_only=True)
class LoRATrainingConfig:
    """What one LoRA training does; the same config, pictures and base give the same LoRA.

    Args:
        captions: One caption per picture, with the rare token in it. Give these or `prompts`.
        prompts: Captions that fit every picture; one is drawn for each sample.
        triggers: What calls the subject in them, e.g. ("<v1> cat",); the LoRA's file names it, for compositions that
            bind a LoRA to its words. Every caption or prompt must have one.
        rank: r of every factor pair.
        alpha: Scaling is `alpha / rank`; None is alpha = rank, scaling 1.
        unet_targets: Last parts of the names of the UNet's modules to train. Attention and feed-forward by default;
            add "proj_in" and "proj_out" for the projections around the transformer blocks. Empty leaves the UNet alone.
        text_encoder_targets: The same for the text encoder; empty (the default) leaves it alone, `TEXT_ENCODER_TARGETS`
            trains its attention and feed-forward.
        steps: Optimiser steps.
        batch_size: Samples a step, spread over the pictures.
        learning_rate: Peak of AdamW's, after `warmup_steps`, before a cosine decay to zero.
        warmup_steps: Steps of linear warm-up.
        weight_decay: AdamW's.
        max_grad_norm: Gradients are clipped to this norm, in all.
        horizontal_flip: Mirror half the samples. Off, since most looks are not symmetric.
        resolution: Side of the square training pictures in pixels; None is the base model's own; "native" leaves every
            picture the size and shape it has (cut to whole latents), and a batch holds pictures of one size.
        mixed_precision: "no", "bf16", or (on a GPU) "fp16".
        checkpoint_every: Steps between checkpoints when a work folder is given; 0 writes one at the end only.
        seed: Of the starting factors and of every sample.

    Raises:
        ValueError: A value is out of range, or captions and prompts are both given or both missing.
        TypeError: Captions, prompts or targets are one string and not a sequence of them.
    """

    captions: Sequence[str] = ()
    prompts: Sequence[str] = ()
    triggers: Sequence[str] = ()
    rank: int = 8
    alpha: float | None = None
    unet_targets: Sequence[str] = UNET_TARGETS
    text_encoder_targets: Sequence[str] = ()
    steps: int = 500
    batch_size: int = 4
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    horizontal_flip: bool = False
    resolution: int | Literal["native"] | None = None
    mixed_precision: MixedPrecision = "no"
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("captions", "prompts", "triggers", "unet_targets", "text_encoder_targets"):
            value = getattr(self, field)
            if isinstance(value, str):
                raise TypeError(f"`{field}` must be a sequence of strings, got the string {value!r}. Try ({value!r},).")
            object.__setattr__(self, field, tuple(value))
        if bool(self.captions) == bool(self.prompts):
            raise MoLEError(
                f"Give either `captions` (one per picture) or `prompts` (for every picture), got {len(self.captions)} "
                f"captions and {len(self.prompts)} prompts."
            )
        if not all(text.strip() for text in (*self.captions, *self.prompts)):
            raise MoLEError("One of `captions` or `prompts` is empty. Each must name the subject by its token.")
        for text in (*self.captions, *self.prompts) if self.triggers else ():
            if not any(trigger.strip() and trigger.lower() in text.lower() for trigger in self.triggers):
                raise MoLEError(
                    f"{text!r} has none of `triggers`, {', '.join(map(repr, self.triggers))}. Give the words that call "
                    "the subject in every caption or prompt, or no triggers."
                )
        if not self.unet_targets and not self.text_encoder_targets:
            raise MoLEError("`unet_targets` and `text_encoder_targets` are both empty: there is nothing to train.")
        if self.rank < 1:
            raise MoLEError(f"`rank` must be at least 1, got {self.rank}.")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise MoLEError(f"`alpha` must be positive and finite, or None for alpha = rank, got {self.alpha}.")
        if isinstance(self.resolution, str) and self.resolution != "native":
            raise MoLEError(f'`resolution` must be a number of pixels, None or "native", got {self.resolution!r}.')
        if isinstance(self.resolution, int) and self.resolution < 8:
            raise MoLEError(
                f"`resolution` must be at least 8 pixels, or None for the base's own, got {self.resolution}."
            )
        check_step_settings(self)


def train_lora(
    pipe: Any,
    images: Sequence[Image.Image],
    config: LoRATrainingConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    progress: bool = True,
    on_step_end: Callable[[int, float], None] | None = None,
) -> dict[str, dict[str, LoRAFactors]]:
    """Trains a LoRA on `pipe` from `images`; the base model is bit-identical afterwards.

    The loss is the denoising loss of the base model itself: its scheduler's noise, with zero terminal SNR where it has
    that, and its prediction type. Runs where `pipe.unet` is. Less memory: `pipe.unet.enable_gradient_checkpointing()`.

    Args:
        pipe: A `StableDiffusionPipeline` (1.x, 2.x or one of that shape) without LoRAs loaded.
        images: The pictures; cut to a square and resized to `config.resolution`, unless that is "native".
        config: What to do.
        out: Where to save the LoRA, diffusers layout, a path ending in `.safetensors`; None saves nothing.
        work: Folder for checkpoints. If it has one of this very training, that is resumed; the numbers are those of an
            uninterrupted run.
        progress: Show a bar on standard error.
        on_step_end: Called with the step's number (from 1) and its loss.

    Returns:
        Component -> module name -> factors.

    Raises:
        MoLEError: Pictures and captions do not fit, a target names nothing, the pipeline cannot be trained here, or
            `work` has the checkpoint of another training. `TrainingDivergedError` at a NaN. `NotWrittenError` where
            `out` or `work` cannot be written, which is tried before the first step.
    """
    _check_pipeline(pipe, config)
    if not images:
        raise MoLEError("`images` is empty. Give at least one picture; DreamBooth takes three to five.")
    if config.captions and len(config.captions) != len(images):
        raise MoLEError(f"{len(config.captions)} captions for {len(images)} images; give one caption per picture.")
    if out is not None:
        if Path(out).suffix != ".safetensors":
            raise MoLEError(f"`out` is {os.fspath(out)!r}; a LoRA is saved as safetensors, so let it end so.")
        try_file(out)
    if work is not None:
        try_folder(work)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    components = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    lora = TrainableLoRA(
        components,
        {"unet": config.unet_targets, "text_encoder": config.text_encoder_targets},
        rank=config.rank,
        alpha=config.rank if config.alpha is None else config.alpha,
        seed=config.seed,
    )
    parameters = lora.parameters
    optimizer = make_optimizer(list(parameters.values()), config.learning_rate, config.weight_decay)
    precision = Precision(config.mixed_precision, pipe.unet.device)
    groups = _groups(images, config.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor, pipe)
    checkpoints = None
    if work is not None:
        run = fingerprint(config, [*(pixels for _, pixels in groups), *base_tensors(pipe)], base_texts(pipe))
        checkpoints = CheckpointFolder(work, run)
    losses: list[float] = []
    start = 0
    with ExitStack() as stack:
        if checkpoints is not None:
            stack.enter_context(in_use(checkpoints.folder))
            saved = checkpoints.load(parameters, optimizer, ("losses", "precision"))
            if saved is not None:
                start, extra = saved
                losses = extra["losses"]
                precision.load_state_dict(extra["precision"])
        stack.enter_context(lora.attached(pipe.unet, pipe.text_encoder, pipe.vae))
        advance = stack.enter_context(training_progress("train-lora", config.steps, start, enabled=progress))
        data = _TrainingData(pipe, groups, config)
        for step in range(start, config.steps):
            set_learning_rate(
                optimizer, config.learning_rate * learning_rate_factor(step, config.steps, config.warmup_steps)
            )
            with precision.autocast():
                loss = _denoising_loss(pipe.unet, schedule, data, step_generator(config.seed, step))
            losses.append(loss.item())
            check_finite({"loss": losses[-1]}, step + 1, checkpoints.latest if checkpoints is not None else None)
            precision.step(loss, optimizer, parameters.values(), config.max_grad_norm)
            done = step + 1
            if checkpoints is not None and (
                done == config.steps or (config.checkpoint_every and done % config.checkpoint_every == 0)
            ):
                try:
                    extra = {"losses": losses, "precision": precision.state_dict()}
                    checkpoints.save(done, parameters, optimizer, extra)
                except NotWrittenError:
                    if done < config.steps or out is None:  # what is finished may still find its place
                        raise
            advance({"loss": losses[-1]})
            if on_step_end is not None:
                on_step_end(done, losses[-1])
        factors = lora.factors()
        if out is not None:
            training = {"mole_diffusion.training": json.dumps(dataclasses.asdict(config))}
            metadata = {**training, **write_triggers(config.triggers)}
            write_last(out, lambda path: save_lora(factors, path, metadata=metadata))
    return factors


class _TrainingData:
    """Latent distributions of the pictures, and text embeddings: encoded once, sampled every step."""

    def __init__(self, pipe: Any, groups: Sequence[tuple[Tensor, Tensor]], config: LoRATrainingConfig) -> None:
        self._pipe = pipe
        self._config = config
        self._prompts = list(config.captions or config.prompts)
        with torch.no_grad():
            self._groups = [(numbers, *self._distribution(pixels)) for numbers, pixels in groups]
            # Without a trained text encoder the embeddings never change: (prompts, tokens, width).
            self._embeds = None if config.text_encoder_targets else self._encode(self._prompts)

    def _distribution(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of pictures of one size, then of the mirrored ones."""
        vae = self._pipe.vae
        views = [pixels, pixels.flip(-1)] if self._config.horizontal_flip else [pixels]
        encoded = [vae.encode(view[None].to(vae.device, vae.dtype)).latent_dist for group in views for view in group]
        mean = torch.cat([distribution.mean for distribution in encoded]).float()
        return mean, torch.cat([distribution.std for distribution in encoded]).float()

    def _encode(self, prompts: list[str]) -> Tensor:
        return self._pipe.encode_prompt(prompts, self._pipe.unet.device, 1, False)[0]

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents (batch, c, h, w) in the UNet's scale, and prompt embeddings (batch, tokens, width), of one batch."""
        config, vae = self._config, self._pipe.vae
        group = 0
        if len(self._groups) > 1:  # as often as there are pictures of the size
            shares = torch.tensor([float(len(numbers)) for numbers, _, _ in self._groups])
            group = int(torch.multinomial(shares, 1, generator=generator))
        numbers, mean, std = self._groups[group]
        count = len(numbers)
        # Shuffled rounds: no picture comes twice in a batch before every picture came once.
        rounds = math.ceil(config.batch_size / count)
        pictures = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[: config.batch_size]
        if config.captions:
            texts = numbers[pictures]
        else:
            texts = torch.randint(len(self._prompts), (config.batch_size,), generator=generator)
        if config.horizontal_flip:
            pictures = pictures + count * torch.randint(2, (config.batch_size,), generator=generator)
        noise = torch.randn(config.batch_size, *mean.shape[1:], generator=generator)
        pictures = pictures.to(mean.device)
        latents = mean[pictures] + std[pictures] * noise.to(mean.device)
        latents = (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
        if self._embeds is not None:
            return latents, self._embeds[texts.to(self._embeds.device)]
        distinct, places = texts.unique(return_inverse=True)
        embeds = self._encode([self._prompts[index] for index in distinct.tolist()])
        return latents, embeds[places.to(embeds.device)]


def _denoising_loss(unet: Any, schedule: NoiseSchedule, data: _TrainingData, generator: torch.Generator) -> Tensor:
    """Mean squared error of the UNet's prediction on one batch at uniformly drawn timesteps."""
    latents, prompt_embeds = data.sample(generator)
    timesteps = torch.randint(schedule.num_timesteps, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    noisy = schedule.add_noise(latents, noise, timesteps)
    prediction = unet(
        noisy.to(unet.dtype),
        timesteps.to(noisy.device),
        encoder_hidden_states=prompt_embeds.to(unet.dtype),
        return_dict=False,
    )[0]
    return F.mse_loss(prediction.float(), schedule.target(latents, noise, timesteps))


def _groups(images: Sequence[Image.Image], size: int | Literal["native"], pipe: Any) -> list[tuple[Tensor, Tensor]]:
    """Numbers of the pictures of each size, and these as (n, 3, height, width) in [-1, 1], cut around the centre."""
    by_size: dict[tuple[int, int], list[int]] = {}
    upright = [as_seen(image) for image in images]
    for number, image in enumerate(upright):
        if size == "native":
            width, height = (side // pipe.vae_scale_factor * pipe.vae_scale_factor for side in image.size)
            if min(width, height) < 8:
                raise MoLEError(f"A picture of {image.width}×{image.height} pixels is too small to train on.")
        else:
            width = height = size
        by_size.setdefault((width, height), []).append(number)
    groups = []
    for (width, height), numbers in by_size.items():
        cut = [ImageOps.fit(upright[k], (width, height), Image.Resampling.LANCZOS) for k in numbers]
        stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in cut]))  # (n, height, width, 3)
        groups.append((torch.tensor(numbers), stacked.permute(0, 3, 1, 2).float() / 127.5 - 1))
    return groups


def _check_pipeline(pipe: Any, config: LoRATrainingConfig) -> None:
    """Raises ValueError for what would train something else than a LoRA on a bare Stable Diffusion."""
    name = type(pipe).__name__
    unet = getattr(pipe, "unet", None)
    if unet is None or unet.config.addition_embed_type is not None:
        raise MoLEError(
            f"{name} cannot be trained here: `train_lora` needs a Stable Diffusion pipeline (1.x, 2.x or of that "
            "shape), with one UNet that takes a prompt and nothing else."
        )
    if unet.config.in_channels != pipe.vae.config.latent_channels:
        raise MoLEError(
            f"{name} has a UNet with {unet.config.in_channels} input channels for {pipe.vae.config.latent_channels} "
            "latent channels: an inpainting or editing model. Train on the text-to-image base model."
        )
    if getattr(pipe, "experts", None) is not None:
        raise MoLEError(
            f"{name} has LoRAs loaded, and a LoRA is trained on the bare base. Call `unload_loras()` first."
        )
    if getattr(unet, "peft_config", None):
        raise MoLEError(
            f"{name} has PEFT adapters {sorted(unet.peft_config)} loaded, and a LoRA is trained on the bare base. "
            "Call `unload_lora_weights()` first."
        )
    if unet.dtype == torch.float16 and config.mixed_precision != "fp16":
        raise MoLEError(
            "The base is in float16, where small gradients become zero without loss scaling. "
            'Set `mixed_precision="fp16"`, or load the base in float32 or bfloat16.'
        )
