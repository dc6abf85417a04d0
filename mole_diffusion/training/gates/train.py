"""`train_gates`: gates for a set of LoRAs from prompts alone, everything else frozen."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mole_diffusion.choices import Tracker
from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.errors import MoLEError
from mole_diffusion.files import in_use, try_folder
from mole_diffusion.gating import MoLEModel
from mole_diffusion.training.engine.checkpoint import CheckpointFolder, content_hash, made_of, parts_of_base
from mole_diffusion.training.engine.history import History
from mole_diffusion.training.engine.loop import TrainingLoop, every
from mole_diffusion.training.engine.memory import peak_memory
from mole_diffusion.training.engine.models import evaluating, gradient_checkpointing, without_gradients
from mole_diffusion.training.engine.optimizer import make_optimizer
from mole_diffusion.training.engine.precision import Precision
from mole_diffusion.training.engine.processes import Processes
from mole_diffusion.training.engine.trackers import check_log_with, tracking
from mole_diffusion.training.gates.checks import check_concepts, check_pipeline, check_prompts
from mole_diffusion.training.gates.concepts import Concept
from mole_diffusion.training.gates.config import GateTrainingConfig
from mole_diffusion.training.gates.guidance import Guidance, needs_references
from mole_diffusion.training.gates.masks import check_triggers
from mole_diffusion.training.gates.objective import Objective
from mole_diffusion.training.gates.references import reference_features, reference_pictures
from mole_diffusion.training.gates.report import TrainingReport, check_out
from mole_diffusion.training.gates.step import TrainingStep
from mole_diffusion.training.gates.walk import Walker

logger = logging.getLogger(__name__)


def train_gates(
    pipe: Any,
    config: GateTrainingConfig,
    *,
    prompts: Sequence[str],
    clip: DifferentiableCLIP | None = None,
    objective: Objective | None = None,
    concepts: Mapping[str, Concept] | None = None,
    out: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    pictures: bool = True,
    progress: bool = True,
    log_with: Tracker = "none",
    on_step_end: Callable[[int, Mapping[str, float]], None] | None = None,
) -> MoLEModel:
    """Trains gates for the LoRAs loaded in `pipe`, from prompts alone: neither pictures nor LoRA training data.

    Eq. 16 of "Mixture of LoRA Experts" (https://openreview.net/forum?id=uWvKBCYh4S), `L = L_D + alpha L_balance`, where
    `L_D` is CLIP's guidance, see `Guidance`. Each training step walks from noise down the schedule with the gates as
    they are, takes the loss at some of its steps and the gradient through the UNet call of that step. Only gates are
    trained.

    Started by `accelerate launch` or `torchrun`, each process takes its part of every batch; the main one writes.

    Args:
        pipe: A MoLE pipeline with at least two LoRAs loaded. It is left with the new gates on it, also if training
            stops early.
        config: What to do; `GateTrainingConfig.from_dict({}, "paper")` and the like are presets.
        prompts: Prompts to draw, in the words of the LoRAs (rare tokens and all).
        clip: The CLIP that guides; moved to the pipeline's device. Give it or `objective`.
        objective: Another L_D than CLIP's. The config's weights of terms, and concepts, say nothing then.
        concepts: By the names of LoRAs, what each stands for: CLIP reads a concept's words where a prompt has its rare
            token. None: CLIP reads the prompts themselves. The local and identity terms need them.
        out: Folder for what the training leaves: the gates (`MoLEModel.save_pretrained`), `training.json`, a model card
            (README.md), curves.png, gates.png and samples.png.
        work: Folder for checkpoints and drawn references. If it has a checkpoint of this very training, that is
            resumed, however the last run ended; the numbers are those of an uninterrupted run.
        pictures: Put pictures into `out`; False leaves the gates, `training.json` and the model card.
        progress: Show a bar on standard error, and log the peak memory in the end.
        log_with: "tensorboard" (below `out`, else `work`, else here), "wandb" or "none".
        on_step_end: Called with the step's number (from 1) and its numbers: "loss", each term ("global", "local",
            "identity"), "balance", "entropy" of the gates, "weight/<lora>", "temperature", "gradient_norm".

    Returns:
        The trained gates, which are `pipe.gates` too.

    Raises:
        MoLEError: Prompts or concepts do not fit, `clip` and `objective` are both given or both missing, the pipeline
            has fewer than two LoRAs or cannot be trained here, or `work` has the checkpoint of another training.
            `TrainingDivergedError` at a NaN.
        MoLEError: `out` holds files of somebody else, or another process works in `work`. `NotWrittenError` where they
            cannot be written, which is tried before the first step.
    """
    check_pipeline(pipe)
    check_log_with(log_with)
    if (clip is None) == (objective is None):
        raise MoLEError("Give either `clip`, which guides as the config says, or an `objective` of your own.")
    if out is not None:
        check_out(out)
    prompts = check_prompts(prompts)
    concepts = {} if clip is None else check_concepts(pipe, config, concepts or {})
    if config.gates.residual:
        check_triggers(pipe, prompts)
    processes = Processes(getattr(pipe, pipe.family.denoiser).device)
    parts = processes.parts(config.batch_size, config.gradient_accumulation)
    if processes.num > 1:
        pipe.to(processes.device)
    precision = Precision(config.mixed_precision, processes.device)
    with ExitStack() as stack:
        if work is not None and processes.is_main:
            try_folder(work)
            stack.enter_context(in_use(work))
        if out is not None and processes.is_main:
            stack.enter_context(in_use(out, "-out"))  # `work` may be the same folder
        texts, pictures_of = prompts, {}  # as the objective reads them; by concept, what it compares with
        if clip is not None:
            clip, references = clip.to(processes.device), {}
            if needs_references(config):
                cache = Path(work) / "references" if work is not None and processes.is_main else None
                pictures_of = reference_pictures(pipe, config, concepts, cache)
                references = processes.from_main(reference_features(clip, pictures_of))
            objective = Guidance(clip, config, prompts, concepts, references)
            texts = objective.texts
        assert objective is not None
        walker = Walker(pipe, config)
        gates = _fresh_gates(pipe, walker, prompts)
        parameters = {name: value for name, value in gates.named_parameters() if value.requires_grad}
        optimizer = make_optimizer(list(parameters.values()), config.learning_rate, config.weight_decay)
        training = TrainingStep(config, prompts, parts, walker, objective, gates, optimizer, precision, processes)
        report = TrainingReport(pipe, config, prompts, concepts, texts) if out is not None else None

        checkpoints = None
        if work is not None:
            its = {"the prompts": prompts, **objective.made_of(), **parts_of_base(pipe)}
            its |= {f"the LoRA {lora.name!r}": [lora.fingerprint] for lora in pipe.experts.loras}
            # Each process drew its own, which may differ between kinds of GPU.
            hashes = processes.texts_from_main([content_hash(own) for own in pictures_of.values()])
            its |= {f"the pictures of {name!r}": [one] for name, one in zip(pictures_of, hashes, strict=True)}
            checkpoints = CheckpointFolder(work, made_of=made_of(config, its))
        history = History(config.steps)
        loop = TrainingLoop(
            config.steps, parameters, optimizer, checkpoints, {"history": history, "precision": precision}
        )
        processes.wait()  # nobody writes a checkpoint before all have read the last

        models = (*pipe.lora_components.values(), pipe.vae)
        shown = progress and processes.is_main
        with ExitStack() as while_training:
            enter = while_training.enter_context
            enter(without_gradients(*models))
            enter(evaluating(*models))
            enter(gradient_checkpointing(walker.denoiser, pipe.vae, enabled=config.gradient_checkpointing))
            enter(pipe.composing())
            log = enter(tracking(log_with, Path(out or work or "."), enabled=processes.is_main))

            def take_step(step: int) -> dict[str, float]:
                numbers, table = training.take(step)
                history.add(step + 1, numbers, table)
                return numbers

            def at_step_end(done: int, numbers: Mapping[str, float]) -> None:
                log(numbers, done)
                if on_step_end is not None:
                    on_step_end(done, numbers)

            loop.run(
                "train-gates",
                take_step,
                learning_rate=training.learning_rate,
                is_due=every(config.checkpoint_every),
                saves=processes.is_main,
                last_may_fail=out is not None,
                shown=_SHOWN,
                progress=shown,
                on_step_end=at_step_end,
            )
        if report is not None and out is not None and processes.is_main:
            report.write(Path(out), gates, history, pictures)
        memory = peak_memory(processes.device)
        if shown and memory is not None:
            logger.info("peak memory: %.2f GiB", memory)
        processes.wait()
    return gates


_SHOWN = ("loss", "global", "local", "identity", "balance", "entropy")


def _fresh_gates(pipe: Any, walker: Walker, prompts: list[str]) -> MoLEModel:
    """Untrained gates on `pipe`, at the resolution of the training."""
    if walker.config.gates.token_axis == "flatten":
        noise = torch.zeros(1, *walker.latent_shape, device=walker.denoiser.device)
        with torch.no_grad(), pipe.composing():  # gates with a parameter per token must see how many there are
            walker.predict(noise, walker.schedule.trailing_timesteps(1)[0], walker.encode(prompts[:1]))
    gates: MoLEModel = pipe.init_gates(walker.config.gates)
    return gates.to(walker.denoiser.device)
