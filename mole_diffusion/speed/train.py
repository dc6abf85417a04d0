"""A step of gate training: forward and backward through the frozen denoiser, and what is kept in between."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..benchmark.memory import call_memory
from ..experts import Experts
from ..gating import MoLEModel
from ..training import GateTrainingConfig
from .clocks import on_gpu, spent
from .config import SpeedConfig
from .counted import Counted
from .failed import Failed
from .models import component_of, make_inputs, make_loras, make_model, twin, with_gradient


@dataclass(frozen=True)
class TrainingCost:
    """One forward and backward pass.

    Attributes:
        name: "bare": the gradient of the latents through the bare model, what any training through it has to keep.
            "gates": the gradient of the gates of all LoRAs. Each also with gradient checkpointing.
        seconds: Processor time, the least of two; on a GPU by the clock.
        saved: MiB of tensors that autograd keeps from the forward pass for the backward pass, weights aside; with
            checkpointing, one block's own come to it for a moment.
        peak: MiB at the peak of the step beyond weights, on a GPU; `None` on a CPU.
    """

    name: str
    seconds: float
    saved: float
    peak: float | None = None


def training_costs(
    config: SpeedConfig, model: Any, inputs: dict[str, Any], number: int, failed: list[Failed]
) -> list[TrainingCost]:
    """Both sides, with and without gradient checkpointing.

    Time is taken on the model; what is kept is counted on one without values, of the same shapes.

    Args:
        config: What is measured.
        model: The denoiser.
        inputs: What it is called with.
        number: Of LoRAs.
        failed: Steps that raise, for want of memory say, are told here.
    """
    saved = saved_activations(config, number)
    component = component_of(config)
    with _ours(config, twin(model), component, number) as (ours, _):
        calls = {"bare": (model, with_gradient(inputs)), "gates": (ours, inputs)}
        steps = []
        for name, kept in saved.items():
            side, _, how = name.partition(", ")
            module, given = calls[side]
            step = functools.partial(_step, module, given)
            try:
                with _checkpointing(module, bool(how)):
                    seconds = min(spent(step, config.device) for _ in range(2))
                    peak = call_memory(step, torch.device(config.device)) if on_gpu(config.device) else None
            except Exception as error:  # the other steps' numbers are wanted all the same
                failed.append(Failed.of(f"training step, {name}", number, error))
            else:
                steps.append(TrainingCost(name, seconds, kept, peak))
    return steps


def saved_activations(config: SpeedConfig, number: int) -> dict[str, float]:
    """MiB that autograd keeps between forward and backward pass: counted in a moment, at any size.

    Args:
        config: What is measured; nothing is computed on its device.
        number: Of LoRAs.

    Returns:
        By the names of `TrainingCost`.
    """
    config = replace(config, device="meta")
    model = make_model(config)
    inputs = make_inputs(config, model)
    calls = {"bare": (model, with_gradient(inputs))}
    found = {}
    with _ours(config, twin(model), component_of(config), number) as (ours, experts):
        calls["gates"] = (ours, inputs)

        def weights() -> list[Tensor]:
            groups = [site.group for site in experts.sites.values()]
            return [*model.parameters(), *(tensor for group in groups for tensor in group.ready)]

        for checkpointed in (False, True):
            for name, (module, given) in calls.items():
                with _checkpointing(module, checkpointed):
                    kept = _saved(functools.partial(_loss, module, given), weights)
                found[f"{name}, checkpointed" if checkpointed else name] = kept
    return found


@dataclass(frozen=True)
class WalkOperations:
    """Multiplications and additions in a walk of gate training, in those of one pass of the bare denoiser.

    A walk has passes with a gradient at the steps at which the loss is taken, and passes without before these.
    Autoencoder and CLIP come to it, which composing does not change.

    Attributes:
        forward: Of a pass without a gradient.
        backward: Of a pass with its backward pass.
        before: How many passes without a gradient a walk has in the mean.
        losses: How many with one.
    """

    forward: float
    backward: float
    before: float
    losses: int

    @property
    def walk(self) -> float:
        """Of a walk."""
        return self.before * self.forward + self.losses * self.backward


def walk_operations(config: SpeedConfig, number: int) -> dict[str, WalkOperations]:
    """Counts what a walk by the default settings asks for, on tensors without values.

    Args:
        config: What is measured; nothing is computed on its device.
        number: Of LoRAs.

    Returns:
        "bare": through the model alone, as if LoRAs and gates cost nothing; and "gates".
    """
    config = replace(config, device="meta")
    training = GateTrainingConfig()
    steps, losses = training.rollout_steps, training.gradient_steps
    before = losses * (steps - losses) / (losses + 1)  # a walk ends with its last loss, at a step drawn anew
    model = make_model(config)
    inputs = make_inputs(config, model)
    counts = {}
    with _ours(config, twin(model), component_of(config), number) as (ours, _):
        for name, (module, given) in {"bare": (model, with_gradient(inputs)), "gates": (ours, inputs)}.items():
            with torch.no_grad(), Counted() as forward:
                module(**inputs)
            with Counted() as backward:
                _step(module, given)
            counts[name] = forward.operations, backward.operations
    one = counts["bare"][0]
    return {name: WalkOperations(forward / one, both / one, before, losses) for name, (forward, both) in counts.items()}


def _loss(model: Any, inputs: dict[str, Any]) -> Tensor:
    prediction = model(**inputs)[0]
    loss: Tensor = torch.stack([sample.float().square().mean() for sample in prediction]).mean()
    return loss


@contextmanager
def _ours(config: SpeedConfig, model: Any, component: str, number: int) -> Iterator[tuple[Any, Experts]]:
    """A model with LoRAs and gates."""
    experts = Experts(make_loras(config, model, number))
    experts.attach({component: model})
    experts.weigher = MoLEModel.from_experts(experts, GateTrainingConfig().gates).to(config.device)
    try:
        yield model, experts
    finally:
        experts.detach()


@contextmanager
def _checkpointing(module: Any, enabled: bool) -> Iterator[None]:
    if not enabled:
        yield
        return
    module.train()
    module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        module.disable_gradient_checkpointing()
        module.eval()


def _saved(loss: Callable[[], Tensor], weights: Callable[[], list[Tensor]]) -> float:
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage is taken for another that came to lie in its place

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss()
    del value
    for tensor in weights():
        kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(kept.values()) / 2**20


def _step(model: Any, inputs: dict[str, Any]) -> None:
    _loss(model, inputs).backward()
