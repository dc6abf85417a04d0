"""`train_lora`: a handful of pictures and a rare token in, a LoRA out, as in DreamBooth with LoRA."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mole_diffusion.errors import MoLEError
from mole_diffusion.files import in_use, try_file, try_folder, write_last
from mole_diffusion.lora import LoRAFactors, save_lora
from mole_diffusion.lora.triggers import write_triggers
from mole_diffusion.training.engine.checkpoint import CheckpointFolder, base_tensors, base_texts, fingerprint
from mole_diffusion.training.engine.loop import TrainingLoop, every
from mole_diffusion.training.engine.noise import NoiseSchedule
from mole_diffusion.training.engine.optimizer import learning_rate_factor, make_optimizer
from mole_diffusion.training.engine.precision import Precision
from mole_diffusion.training.engine.randomness import step_generator
from mole_diffusion.training.lora.config import LoRATrainingConfig
from mole_diffusion.training.lora.data import TrainingData, groups_by_size
from mole_diffusion.training.lora.trainable import TrainableLoRA


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
    groups = groups_by_size(images, config.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor, pipe)
    checkpoints = None
    if work is not None:
        run = fingerprint(config, [*(pixels for _, pixels in groups), *base_tensors(pipe)], base_texts(pipe))
        checkpoints = CheckpointFolder(work, run)
    with ExitStack() as stack:
        if checkpoints is not None:
            stack.enter_context(in_use(checkpoints.folder))
        loop = TrainingLoop(config.steps, parameters, optimizer, checkpoints, {"precision": precision})
        stack.enter_context(lora.attached(pipe.unet, pipe.text_encoder, pipe.vae))
        data = TrainingData(pipe, groups, config)

        def take_step(step: int) -> dict[str, float]:
            with precision.autocast():
                loss = _denoising_loss(pipe.unet, schedule, data, step_generator(config.seed, step))
            precision.step(loss, optimizer, parameters.values(), config.max_grad_norm)
            return {"loss": loss.item()}

        loop.run(
            "train-lora",
            take_step,
            learning_rate=lambda step: (
                config.learning_rate * learning_rate_factor(step, config.steps, config.warmup_steps)
            ),
            is_due=every(config.checkpoint_every),
            last_may_fail=out is not None,
            progress=progress,
            on_step_end=None if on_step_end is None else lambda done, numbers: on_step_end(done, numbers["loss"]),
        )
        factors = lora.factors()
        if out is not None:
            training = {"mole_diffusion.training": json.dumps(dataclasses.asdict(config))}
            metadata = {**training, **write_triggers(config.triggers)}
            write_last(out, lambda path: save_lora(factors, path, metadata=metadata))
    return factors


def _denoising_loss(unet: Any, schedule: NoiseSchedule, data: TrainingData, generator: torch.Generator) -> Tensor:
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


def _check_pipeline(pipe: Any, config: LoRATrainingConfig) -> None:
    """Raises MoLEError for what would train something else than a LoRA on a bare Stable Diffusion."""
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
