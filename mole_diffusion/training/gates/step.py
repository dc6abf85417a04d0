"""One step of gate training: walk from noise with the gates as they are, take the loss on the way, update the gates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mole_diffusion.families.base import Conditions
from mole_diffusion.gating import GateTable, MoLEModel, balance_loss, floor_loss, mean_usage
from mole_diffusion.gating.gate import Gate
from mole_diffusion.training.engine.history import gate_entropy
from mole_diffusion.training.engine.optimizer import learning_rate_factor
from mole_diffusion.training.engine.precision import Precision
from mole_diffusion.training.engine.processes import Processes
from mole_diffusion.training.engine.randomness import step_generator
from mole_diffusion.training.gates.config import GateTrainingConfig
from mole_diffusion.training.gates.masks import NoMasks, WalkMasks
from mole_diffusion.training.gates.objective import Drawn, Objective
from mole_diffusion.training.gates.walk import Walker, WalkPlan


@dataclass(frozen=True)
class TrainingStep:
    """One step of gate training: a walk, its losses and its updates.

    Attributes:
        config: How to train.
        prompts: All prompts of the training; a step draws some of them.
        parts: Rows of the batch that are computed together, one slice for each part.
        walker: Asks the models.
        objective: Judges what was drawn.
        gates: What is trained.
        optimizer: The optimiser of the gates.
        precision: The number format it computes in.
        processes: The processes that share the batch.
    """

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
        """The learning rate of a step, counted from 0."""
        config = self.config
        factor = learning_rate_factor(step, config.steps, config.warmup_steps, config.learning_rate_schedule)
        return config.learning_rate * factor

    def take(self, step: int) -> tuple[dict[str, float], GateTable]:
        """Walks once and updates the gates; returns mean numbers of the whole batch, and mean gates."""
        config, walker = self.config, self.walker
        generator = step_generator(config.seed, step)
        chosen = torch.randint(len(self.prompts), (config.batch_size,), generator=generator).tolist()
        plan = walker.plan(generator)
        choices = [chosen[rows] for rows in self.parts]
        latents = [plan.noise[rows].to(self.processes.device) for rows in self.parts]
        masks = [self._masks(plan, choice) for choice in choices]
        embeds = []
        for choice, rows, start, found in zip(choices, self.parts, latents, masks, strict=True):
            with found.known(), torch.no_grad(), self.precision.autocast():
                embeds.append(self._encode(choice, found))
                found.find(start, rows, embeds[-1])
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
        temperatures = [gate.temperature.detach() for gate in self.gates.gates.values() if isinstance(gate, Gate)]
        numbers["temperature"] = float(torch.stack(temperatures).mean())
        if self.config.mixed_precision != "fp16":  # there, an infinite gradient is the loss scale's business
            numbers["gradient_norm"] = sum(norms) / len(norms)
        table = seen[0][1]
        means = self.processes.average(torch.stack([one.values for _, one in seen]).mean(dim=0))
        return numbers, table._replace(values=means)

    def _masks(self, plan: WalkPlan, chosen: list[int]) -> WalkMasks | NoMasks:
        """What one part of the batch knows of its masks."""
        if not self.config.gates.residual:
            return NoMasks()
        return WalkMasks(self.walker, plan, [self.prompts[index] for index in chosen])

    def _encode(self, chosen: list[int], masks: WalkMasks | NoMasks) -> Conditions:
        conditions = self.walker.encode([self.prompts[index] for index in chosen])
        masks.encoded(conditions)
        return conditions
