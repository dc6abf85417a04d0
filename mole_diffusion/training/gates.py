"""`train_gates`, a first version: CLIP's global guidance and the balance loss, on one-step predictions."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.files import write_json
from mole_diffusion.gating import GateConfig, MoLEModel, balance_loss
from mole_diffusion.training.checkpoint import CheckpointFolder, fingerprint
from mole_diffusion.training.loop import (
    MixedPrecision,
    Precision,
    check_finite,
    check_step_settings,
    learning_rate_factor,
    make_optimizer,
    set_learning_rate,
    step_generator,
    without_gradients,
)
from mole_diffusion.training.noise import NoiseSchedule
from mole_diffusion.training.progress import training_progress

TRAINING_FILE = "training.json"


@dataclass(frozen=True, kw_only=True)
class GateTrainingConfig:
    """What one gate training does; the same config, prompts, LoRAs, base and CLIP give the same gates.

    Args:
        gates: Which gates: scope, token axis, normalisation, temperature.
        balance_weight: The paper's alpha in eq. 16, the weight of the balance loss.
        rollout_steps: Steps of the schedule that training walks on. Each training step goes from noise to a random one
            of these without gradients, and takes the gradient there.
        guidance_scale: Classifier-free guidance while walking and at the gradient; 1 is none, and twice as fast.
        steps: Optimiser steps.
        batch_size: Pictures a step.
        learning_rate: Peak of AdamW's, after `warmup_steps`, before a cosine decay to zero.
        warmup_steps: Steps of linear warm-up.
        weight_decay: AdamW's.
        max_grad_norm: Gradients are clipped to this norm, in all.
        mixed_precision: "no", "bf16", or (on a GPU) "fp16"; gates compute in fp32 always.
        checkpoint_every: Steps between checkpoints when a work folder is given; 0 writes one at the end only.
        seed: Of prompts, noise and places in the schedule.

    Raises:
        ValueError: A value is out of range.
    """

    gates: GateConfig = field(default_factory=GateConfig)
    balance_weight: float = 0.5
    rollout_steps: int = 8
    guidance_scale: float = 5.0
    steps: int = 200
    batch_size: int = 2
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mixed_precision: MixedPrecision = "no"
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.balance_weight) and self.balance_weight >= 0):
            raise ValueError(f"`balance_weight` must be 0 or more, got {self.balance_weight}. The paper takes 0.5.")
        if self.rollout_steps < 1:
            raise ValueError(f"`rollout_steps` must be at least 1, got {self.rollout_steps}.")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 1):
            raise ValueError(f"`guidance_scale` must be at least 1 (no guidance), got {self.guidance_scale}.")
        check_step_settings(self)


def train_gates(
    pipe: Any,
    config: GateTrainingConfig,
    *,
    prompts: Sequence[str],
    clip: DifferentiableCLIP,
    clip_prompts: Mapping[str, str] | None = None,
    out: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    progress: bool = True,
    on_step_end: Callable[[int, Mapping[str, float]], None] | None = None,
) -> MoLEModel:
    """Trains gates for the LoRAs loaded in `pipe`, from prompts alone: neither pictures nor LoRA training data.

    Eq. 16 of "Mixture of LoRA Experts" (https://openreview.net/forum?id=uWvKBCYh4S), `L = L_D + alpha L_balance`, where
    `L_D` here is CLIP's global guidance, `1 - cos(CLIP(picture), CLIP(prompt))`. The picture is the one-step
    prediction of the clean latents, decoded; the gradient goes through one UNet call. Only gates are trained.

    Args:
        pipe: A MoLE pipeline with at least two LoRAs loaded. It is left with the new gates on it, also if training
            stops early.
        config: What to do.
        prompts: Prompts to draw, in the words of the LoRAs (rare tokens and all).
        clip: The CLIP that guides; moved to the pipeline's device.
        clip_prompts: For every prompt what CLIP should read instead: rare tokens, which it cannot know, replaced by
            what they look like. None: the prompts themselves.
        out: Folder for the gates (`MoLEModel.save_pretrained`) and `training.json`: config, prompts and losses.
        work: Folder for checkpoints. If it has one of this very training, that is resumed; the numbers are those of an
            uninterrupted run.
        progress: Show a bar on standard error.
        on_step_end: Called with the step's number (from 1) and its losses: "clip", "balance" and their weighted "loss".

    Returns:
        The trained gates, which are `pipe.gates` too.

    Raises:
        ValueError: Prompts are missing, the pipeline has fewer than two LoRAs or cannot be trained here, or `work` has
            the checkpoint of another training. `TrainingDivergedError`, a ValueError, at a NaN.
    """
    _check_pipeline(pipe)
    clip_texts = _clip_texts(prompts, clip_prompts)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    precision = Precision(config.mixed_precision, pipe.unet.device)
    clip = clip.to(pipe.unet.device)
    text_features = clip.encode_text(clip_texts)  # (prompts, width)
    gates: MoLEModel = pipe.init_gates(config.gates)
    gates.to(pipe.unet.device)
    parameters = {name: value for name, value in gates.named_parameters() if value.requires_grad}
    optimizer = make_optimizer(list(parameters.values()), config.learning_rate, config.weight_decay)

    lora_hashes = [lora.sha256 for lora in pipe.experts.loras]
    run = fingerprint(config, [text_features, pipe.unet.conv_in.weight], [*prompts, *clip_texts, *lora_hashes])
    checkpoints = CheckpointFolder(work, run) if work is not None else None
    history: dict[str, list[float]] = {"loss": [], "clip": [], "balance": []}
    start = 0
    if checkpoints is not None and (saved := checkpoints.load(parameters, optimizer)) is not None:
        start, extra = saved
        history = extra["losses"]
        precision.load_state_dict(extra["precision"])

    with (
        without_gradients(pipe.unet, pipe.text_encoder, pipe.vae),
        pipe.composing(),
        training_progress("train-gates", config.steps, start, enabled=progress) as advance,
    ):
        for step in range(start, config.steps):
            set_learning_rate(
                optimizer, config.learning_rate * learning_rate_factor(step, config.steps, config.warmup_steps)
            )
            generator = step_generator(config.seed, step)
            chosen = torch.randint(len(prompts), (config.batch_size,), generator=generator).tolist()
            batch = [prompts[index] for index in chosen]
            with precision.autocast():
                noisy, timesteps = _walk(pipe, schedule, config, batch, generator)
                with gates.record() as record:
                    images = _predict_images(pipe, schedule, config, batch, noisy, timesteps)
                similarity = (clip.encode_image(images) * text_features[chosen]).sum(-1)  # (batch,)
            clip_loss = (1 - similarity.float()).mean()
            balance = balance_loss(record.places(), record.present())
            loss = clip_loss + config.balance_weight * balance
            losses = {"loss": loss.item(), "clip": clip_loss.item(), "balance": balance.item()}
            check_finite(losses, step + 1)
            precision.step(loss, optimizer, parameters.values(), config.max_grad_norm)
            for name, value in losses.items():
                history[name].append(value)
            done = step + 1
            if checkpoints is not None and (
                done == config.steps or (config.checkpoint_every and done % config.checkpoint_every == 0)
            ):
                checkpoints.save(done, parameters, optimizer, {"losses": history, "precision": precision.state_dict()})
            advance(losses)
            if on_step_end is not None:
                on_step_end(done, losses)

    if out is not None:
        gates.save_pretrained(out)
        report = {
            "config": dataclasses.asdict(config),
            "prompts": dict(zip(prompts, clip_texts, strict=True)),
            "losses": history,
        }
        write_json(Path(out) / TRAINING_FILE, report)
    return gates


@torch.no_grad()
def _walk(
    pipe: Any, schedule: NoiseSchedule, config: GateTrainingConfig, prompts: list[str], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """From noise to a random step of the schedule with the gates as they are: latents (batch, c, h, w), timesteps."""
    walk = schedule.trailing_timesteps(config.rollout_steps)
    end = int(torch.randint(len(walk), (), generator=generator))
    unet = pipe.unet
    shape = (len(prompts), unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noisy = torch.randn(shape, generator=generator).to(unet.device)
    prompt_embeds = _encode(pipe, config, prompts)
    for now, after in itertools.pairwise(walk[: end + 1]):
        timesteps = torch.full((len(prompts),), now)
        prediction = _predict(unet, config, noisy, timesteps, prompt_embeds)
        noisy = schedule.ddim_step(prediction, noisy, timesteps, torch.full_like(timesteps, after))
    return noisy, torch.full((len(prompts),), walk[end])


def _predict_images(
    pipe: Any,
    schedule: NoiseSchedule,
    config: GateTrainingConfig,
    prompts: list[str],
    noisy: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """One-step prediction of the pictures, (batch, 3, height, width) in [0, 1], with the graph of every model."""
    prediction = _predict(pipe.unet, config, noisy, timesteps, _encode(pipe, config, prompts))
    clean = schedule.predict_clean(prediction, noisy, timesteps)
    vae = pipe.vae
    latents = clean / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    return (vae.decode(latents.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


def _encode(pipe: Any, config: GateTrainingConfig, prompts: list[str]) -> Tensor:
    """Prompt embeddings (batch, tokens, width), after those of the empty prompt where there is guidance.

    Both in one pass of the text encoder, so that its gates are recorded for both.
    """
    empty = [""] * len(prompts) if config.guidance_scale > 1 else []
    return pipe.encode_prompt(empty + prompts, pipe.unet.device, 1, False)[0]


def _predict(unet: Any, config: GateTrainingConfig, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
    """The UNet's prediction under classifier-free guidance, fp32."""
    copies = len(prompt_embeds) // len(noisy)
    prediction = unet(
        torch.cat([noisy] * copies).to(unet.dtype),
        torch.cat([timesteps] * copies).to(noisy.device),
        encoder_hidden_states=prompt_embeds.to(unet.dtype),
        return_dict=False,
    )[0].float()
    if copies == 1:
        return prediction
    unconditional, conditional = prediction.chunk(2)
    return unconditional + config.guidance_scale * (conditional - unconditional)


def _clip_texts(prompts: Sequence[str], clip_prompts: Mapping[str, str] | None) -> list[str]:
    """What CLIP reads, one text per prompt."""
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"`prompts` must be a list of at least one prompt, got {prompts!r}.")
    if len(set(prompts)) < len(prompts):
        raise ValueError("`prompts` has one prompt twice; each is drawn with the same frequency, so give it once.")
    if clip_prompts is None:
        return list(prompts)
    missing = [prompt for prompt in prompts if prompt not in clip_prompts]
    if missing:
        raise ValueError(
            f"`clip_prompts` has no entry for {missing[0]!r} ({len(missing)} of {len(prompts)} are missing)."
        )
    return [clip_prompts[prompt] for prompt in prompts]


def _check_pipeline(pipe: Any) -> None:
    """Raises ValueError for a pipeline without at least two LoRAs, or of another shape than Stable Diffusion."""
    name = type(pipe).__name__
    if not hasattr(pipe, "init_gates"):
        raise ValueError(
            f"{name} composes no LoRAs. Make a MoLE pipeline of it: MoLEStableDiffusionPipeline.from_pipe(pipe)."
        )
    if getattr(pipe, "unet", None) is None or pipe.unet.config.addition_embed_type is not None:
        raise ValueError(f"{name} cannot be trained here yet: this version knows Stable Diffusion 1.x and 2.x.")
    loaded = pipe.experts.names if pipe.experts is not None else ()
    if len(loaded) < 2:
        raise ValueError(
            f"Gates weigh LoRAs against each other, so at least two must be loaded; loaded are {list(loaded)}. "
            "Call `load_loras({name: file, ...})` first."
        )
