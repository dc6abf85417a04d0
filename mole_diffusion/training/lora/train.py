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
from torch import Tensor, nn

from mole_diffusion.errors import MoLEError
from mole_diffusion.families import Family, family_of
from mole_diffusion.families.base import Conditions
from mole_diffusion.families.clip import CLIPText
from mole_diffusion.files import in_use, try_file, try_folder, write_last
from mole_diffusion.lora import LoRAFactors, save_lora
from mole_diffusion.lora.triggers import write_triggers
from mole_diffusion.training.engine.checkpoint import CheckpointFolder, made_of, parts_of_base
from mole_diffusion.training.engine.loop import TrainingLoop, every
from mole_diffusion.training.engine.optimizer import learning_rate_factor, make_optimizer
from mole_diffusion.training.engine.precision import Precision
from mole_diffusion.training.engine.randomness import step_generator
from mole_diffusion.training.engine.schedule import Schedule, schedule_of
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
    that, and its prediction type; `eps - x_0` in flow matching (arXiv 2210.02747), at the noise levels of a call of the
    base's own size. Stable Diffusion XL is told that a picture has the size it is trained at. Runs where the denoiser
    is. Less memory: `pipe.unet.enable_gradient_checkpointing()`, or `pipe.transformer`.

    A base that was distilled to few steps (Turbo, schnell) unlearns these: train on the base that it was made of.

    Args:
        pipe: A text-to-image pipeline of any family that is known, without LoRAs loaded.
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
    family = family_of(pipe.components)
    denoiser: Any = getattr(pipe, family.denoiser)
    _check_pipeline(pipe, family, denoiser, config)
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
    schedule = schedule_of(pipe.scheduler, family.shift(pipe))
    targets = _targets(pipe, family, config)
    lora = TrainableLoRA(
        {name: getattr(pipe, name) for name in targets},
        targets,
        rank=config.rank,
        alpha=config.rank if config.alpha is None else config.alpha,
        seed=config.seed,
    )
    parameters = lora.parameters
    optimizer = make_optimizer(list(parameters.values()), config.learning_rate, config.weight_decay)
    precision = Precision(config.mixed_precision, denoiser.device)
    if isinstance(config.resolution, int):
        family.refuse_cut(pipe, config.resolution)
    groups = groups_by_size(images, config.resolution or family.side(pipe), family.patch * pipe.vae_scale_factor)
    checkpoints = None
    if work is not None:
        pictures = {"the pictures": [pixels for _, pixels in groups]}
        checkpoints = CheckpointFolder(work, made_of=made_of(config, pictures | parts_of_base(pipe)))
    with ExitStack() as stack:
        if out is not None:
            stack.enter_context(in_use(Path(out).parent, f"-{Path(out).stem}"))
        if checkpoints is not None:
            stack.enter_context(in_use(checkpoints.folder))
        loop = TrainingLoop(config.steps, parameters, optimizer, checkpoints, {"precision": precision})
        models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
        stack.enter_context(lora.attached(*models))
        data = TrainingData(pipe, family, groups, config, encode_once=set(targets) == {family.denoiser})

        def take_step(step: int) -> dict[str, float]:
            with precision.autocast():
                loss = _denoising_loss(pipe, family, schedule, data, step_generator(config.seed, step))
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


def _denoising_loss(
    pipe: Any, family: Family, schedule: Schedule, data: TrainingData, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the denoiser's prediction on one batch at timesteps drawn."""
    latents, told = data.sample(generator)
    timesteps = schedule.draw(len(latents), generator)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    noisy = schedule.add_noise(latents, noise, timesteps)
    dtype = getattr(pipe, family.denoiser).dtype
    told = Conditions(told.prompt_embeds.to(dtype), told.others)
    prediction = family.predict(pipe, noisy.to(dtype), timesteps.to(noisy.device), told)
    return F.mse_loss(prediction.float(), schedule.target(latents, noise, timesteps))


def _targets(pipe: Any, family: Family, config: LoRATrainingConfig) -> dict[str, Sequence[str]]:
    """Last parts of module names by component; components that are left alone are not in it.

    Raises:
        MoLEError: A text encoder is to be trained that no LoRA is for, or that the pipeline has not.
    """
    first, second = config.text_encoder_targets, config.text_encoder_2_targets
    if second is None:
        both = all(isinstance(family.architectures.get(name), CLIPText) for name in ("text_encoder", "text_encoder_2"))
        second = first if both else ()
    denoiser = config.denoiser_targets
    if denoiser is None:
        denoiser = family.architectures[family.denoiser].targets
    wanted = {family.denoiser: denoiser, "text_encoder": first, "text_encoder_2": second}
    found = {name: targets for name, targets in wanted.items() if targets}
    for name in found:
        if name not in family.architectures or getattr(pipe, name, None) is None:
            has = "is none that LoRAs are for" if name not in family.architectures else "is missing from the pipeline"
            raise MoLEError(f"`{name}_targets`: the {name} of {family.title} {has}. Leave it alone: give ().")
    return found


def _check_pipeline(pipe: Any, family: Family, denoiser: Any, config: LoRATrainingConfig) -> None:
    """Raises MoLEError for what would train something else than a LoRA on a bare base."""
    name = type(pipe).__name__
    shape, vae = family.latent_shape(pipe), pipe.vae.config
    given = shape[0] if len(shape) == 3 else shape[-1] // family.patch**2
    latent_channels = vae.latent_channels if "latent_channels" in vae else vae.z_dim  # of an autoencoder of videos
    if given != latent_channels:
        raise MoLEError(
            f"{name} has a denoiser with {given} input channels for {latent_channels} latent channels: an inpainting "
            "or editing model. Train on the text-to-image base model."
        )
    if config.resolution == "native" and len(shape) != 3:
        raise MoLEError(
            f'`resolution="native"`: {family.title} is given latents as a row of patches, of squares only here. Give a '
            "number of pixels, or None for the base's own."
        )
    if getattr(pipe, "experts", None) is not None:
        raise MoLEError(
            f"{name} has LoRAs loaded, and a LoRA is trained on the bare base. Call `unload_loras()` first."
        )
    if getattr(denoiser, "peft_config", None):
        raise MoLEError(
            f"{name} has PEFT adapters {sorted(denoiser.peft_config)} loaded, and a LoRA is trained on the bare base. "
            "Call `unload_lora_weights()` first."
        )
    if denoiser.dtype == torch.float16 and config.mixed_precision != "fp16":
        raise MoLEError(
            "The base is in float16, where small gradients become zero without loss scaling. "
            'Set `mixed_precision="fp16"`, or load the base in float32 or bfloat16.'
        )
