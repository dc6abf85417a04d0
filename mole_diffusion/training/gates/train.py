"""`train_gates`: gates for a set of LoRAs from prompts alone, everything else frozen."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.errors import MoLEError
from mole_diffusion.families.base import Conditions
from mole_diffusion.files import in_use, try_folder
from mole_diffusion.gating import GateTable, MoLEModel, balance_loss, floor_loss, mean_usage
from mole_diffusion.training.engine.checkpoint import CheckpointFolder, base_tensors, base_texts, fingerprint
from mole_diffusion.training.engine.history import History, gate_entropy
from mole_diffusion.training.engine.loop import (
    TrainingLoop,
    every,
    learning_rate_factor,
    make_optimizer,
    peak_memory,
    step_generator,
)
from mole_diffusion.training.engine.models import evaluating, gradient_checkpointing, without_gradients
from mole_diffusion.training.engine.precision import Precision
from mole_diffusion.training.engine.processes import Processes
from mole_diffusion.training.engine.trackers import LogWith, check_log_with, tracking
from mole_diffusion.training.gates.checks import check_concepts, check_pipeline, check_prompts
from mole_diffusion.training.gates.concepts import Concept
from mole_diffusion.training.gates.config import GateTrainingConfig
from mole_diffusion.training.gates.guidance import Guidance, needs_references
from mole_diffusion.training.gates.masks import NoMasks, WalkMasks, check_triggers
from mole_diffusion.training.gates.objective import Drawn, Objective
from mole_diffusion.training.gates.references import reference_features
from mole_diffusion.training.gates.report import TrainingReport, check_out
from mole_diffusion.training.gates.walk import Plan, Walker

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
    log_with: LogWith = "none",
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
        ValueError: Prompts or concepts do not fit, `clip` and `objective` are both given or both missing, the pipeline
            has fewer than two LoRAs or cannot be trained here, or `work` has the checkpoint of another training.
            `TrainingDivergedError`, a ValueError, at a NaN.
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
        texts = prompts  # as the objective reads them
        if clip is not None:
            clip, references = clip.to(processes.device), {}
            if needs_references(config):
                cache = Path(work) / "references" if work is not None and processes.is_main else None
                references = processes.from_main(reference_features(pipe, clip, config, concepts, cache))
            objective = Guidance(clip, config, prompts, concepts, references)
            texts = objective.texts
        assert objective is not None
        walker = Walker(pipe, config)
        gates = _fresh_gates(pipe, walker, prompts)
        parameters = {name: value for name, value in gates.named_parameters() if value.requires_grad}
        optimizer = make_optimizer(list(parameters.values()), config.learning_rate, config.weight_decay)
        training = _Training(config, prompts, parts, walker, objective, gates, optimizer, precision, processes)
        report = TrainingReport(pipe, config, prompts, concepts, texts) if out is not None else None

        checkpoints = None
        if work is not None:
            lora_hashes = [lora.fingerprint for lora in pipe.experts.loras]
            its_tensors, its_texts = objective.made_of()
            tensors = [*its_tensors, *base_tensors(pipe)]
            run = fingerprint(config, tensors, [*prompts, *its_texts, *lora_hashes, *base_texts(pipe)])
            checkpoints = CheckpointFolder(work, run)
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
                numbers, table = training.step(step)
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


@dataclass(frozen=True)
class _Training:
    """Everything one step needs."""

    config: GateTrainingConfig
    prompts: list[str]
    parts: list[slice]
    walker: Walker
    objective: Objective
    gates: MoLEModel
    optimizer: torch.optim.Optimizer
    precision: Precision
    processes: Processes

    def learning_rate(self, step: int) -> float:
        """Of one step."""
        config = self.config
        factor = learning_rate_factor(step, config.steps, config.warmup_steps, config.learning_rate_schedule)
        return config.learning_rate * factor

    def step(self, step: int) -> tuple[dict[str, float], GateTable]:
        """One walk with its losses and updates: mean numbers of the whole batch, and mean gates."""
        config, walker = self.config, self.walker
        generator = step_generator(config.seed, step)
        chosen = torch.randint(len(self.prompts), (config.batch_size,), generator=generator).tolist()
        plan = walker.plan(generator)
        choices = [chosen[rows] for rows in self.parts]
        latents = [plan.noise[rows].to(self.processes.device) for rows in self.parts]
        masks = [self._masks(plan, choice) for choice in choices]
        embeds = []
        for choice, rows, noise, found in zip(choices, self.parts, latents, masks, strict=True):
            with found.known(), torch.no_grad(), self.precision.autocast():
                embeds.append(self._encode(choice, found))
                found.find(noise, rows, embeds[-1])
        seen: list[tuple[dict[str, Tensor], GateTable]] = []
        norms: list[float] = []
        for index in range(plan.gradient_at[-1] + 1):
            now, after = plan.timesteps[index : index + 2]
            fresh = plan.fresh_noise(config.eta)
            with_gradient = index in plan.gradient_at
            for k, rows in enumerate(self.parts):
                noise = None if fresh is None else fresh[rows]
                with masks[k].known():
                    if with_gradient:
                        loss, numbers, table, latents[k] = self._loss(
                            choices[k], masks[k], latents[k], now, after, noise
                        )
                        losses = plan.losses_in_update(index, config.update_every)
                        self.precision.backward(loss / (losses * len(self.parts)))
                        seen.append((numbers, table))
                    else:
                        masks[k].encoded(embeds[k])
                        with torch.no_grad(), self.precision.autocast():
                            prediction = walker.predict(latents[k], now, embeds[k])
                        latents[k] = walker.advance(prediction, latents[k], now, after, noise)
            if with_gradient and plan.ends_update(index, config.update_every):
                norms.append(self._update())
        return self._summary(seen, norms)

    def _loss(
        self,
        chosen: list[int],
        masks: WalkMasks | NoMasks,
        noisy: Tensor,
        now: float,
        after: float,
        noise: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor], GateTable, Tensor]:
        """Eq. 16 on one part of the batch at one step: loss with graph, numbers, mean gates, detached next latents."""
        config, walker = self.config, self.walker
        with self.precision.autocast():
            with self.gates.record() as record:
                prediction = walker.predict(noisy, now, self._encode(chosen, masks))
            latents = walker.advance(prediction, noisy, now, after, noise)
            seen = walker.picture_latents(prediction, noisy, now, latents)
            loss, said = self.objective.loss(Drawn(chosen, noisy, now, prediction, seen, walker.decode))
        weights, present = record.rows(), record.present()
        # Of what the LoRAs got: `gate_sum` and the null expert, which may have all of it, aside. What is added to masks
        # may leave less than nothing.
        weights = weights.clamp_min(0)
        shares = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        numbers = dict(said)
        if config.balance == "uniform":
            numbers["balance"] = balance_loss(shares, present)
        elif config.balance == "floor":
            numbers["balance"] = floor_loss(shares, config.balance_floor, present)
        if config.balance != "off":
            loss = loss + config.balance_weight * numbers["balance"]
        numbers = {"loss": loss, **numbers, "entropy": gate_entropy(shares, present)}
        usage = mean_usage(weights.mean(dim=0), present).tolist()
        numbers |= {f"weight/{name}": torch.tensor(q) for name, q in zip(self.gates.lora_names, usage, strict=True)}
        return loss, {name: value.detach() for name, value in numbers.items()}, record.table(), latents.detach()

    def _update(self) -> float:
        """One optimiser step on the mean gradient of all processes; returns its norm."""
        parameters = [parameter for parameter in self.gates.parameters() if parameter.requires_grad]
        self.processes.average_gradients(parameters)
        return self.precision.update(self.optimizer, parameters, self.config.max_grad_norm)

    def _summary(
        self, seen: list[tuple[dict[str, Tensor], GateTable]], norms: list[float]
    ) -> tuple[dict[str, float], GateTable]:
        """Means over the losses of one walk and over the processes."""
        names = list(seen[0][0])
        values = torch.tensor([[float(numbers[name]) for name in names] for numbers, _ in seen]).mean(dim=0)
        numbers = dict(zip(names, self.processes.average(values).tolist(), strict=True))
        temperatures = [gate.temperature.detach() for gate in self.gates.gates.values()]
        numbers["temperature"] = float(torch.stack(temperatures).mean())
        if self.config.mixed_precision != "fp16":  # there, an infinite gradient is the loss scale's business
            numbers["gradient_norm"] = sum(norms) / len(norms)
        table = seen[0][1]
        means = self.processes.average(torch.stack([one.values for _, one in seen]).mean(dim=0))
        return numbers, table._replace(values=means)

    def _masks(self, plan: Plan, chosen: list[int]) -> WalkMasks | NoMasks:
        """What one part of the batch knows of its masks."""
        if not self.config.gates.residual:
            return NoMasks()
        return WalkMasks(self.walker, plan, [self.prompts[index] for index in chosen])

    def _encode(self, chosen: list[int], masks: WalkMasks | NoMasks) -> Conditions:
        conditions = self.walker.encode([self.prompts[index] for index in chosen])
        masks.encoded(conditions)
        return conditions


def _fresh_gates(pipe: Any, walker: Walker, prompts: list[str]) -> MoLEModel:
    """Untrained gates on `pipe`, at the resolution of the training."""
    if walker.config.gates.token_axis == "flatten":
        noise = torch.zeros(1, *walker.latent_shape, device=walker.denoiser.device)
        with torch.no_grad(), pipe.composing():  # gates with a parameter per token must see how many there are
            walker.predict(noise, walker.schedule.trailing_timesteps(1)[0], walker.encode(prompts[:1]))
    gates: MoLEModel = pipe.init_gates(walker.config.gates)
    return gates.to(walker.denoiser.device)
