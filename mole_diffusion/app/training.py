"""Training gates from the page: what the fields say, and what it tells while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import toybox
from ..drawing.settings import TOYBOX, LoRASettings, PictureSettings
from ..errors import MoLEError
from ..files import try_folder
from .studio import Studio, Ticket

if TYPE_CHECKING:
    from ..training import Concept

CHECKPOINT_EVERY = 5  # steps: as many are done again after a stop
MOST_STEPS = 20_000


@dataclass(frozen=True)
class Step:
    """A step of a training is done.

    Attributes:
        number, total: Of the step, and of all.
        curves: Every number so far, by name.
    """

    number: int
    total: int
    curves: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Plan:
    """What a training works on."""

    settings: PictureSettings
    concepts: Mapping[str, Concept]
    prompts: Sequence[str]
    steps: int
    batch_size: int
    out: Path


def plan(
    settings: PictureSettings, templates: str, steps: float, batch_size: float, guidance_scale: float, out: Path
) -> tuple[Plan, Any]:
    """Checks everything that is quick to check, and returns it with the configuration of the training.

    Args:
        settings: Of a picture; base and the LoRAs that are on count.
        templates: A line each, with the place {concepts}.
        steps, batch_size, guidance_scale: Of the training.
        out: Where the gates go.

    Raises:
        MoLEError: Something is missing or cannot be.
    """
    from ..training import GateTrainingConfig, prompts_from_templates

    on = tuple(lora for lora in settings.loras if lora.on)
    if len(on) < 2:
        raise MoLEError("gates weigh two LoRAs or more. Switch on those that they are for.")
    if settings.base != TOYBOX:
        raise MoLEError(
            "the page trains gates on the toybox, whose CLIP comes along. For another base use `mole train-gates`, "
            "which takes the CLIP that guides: --clip ViT-B-32 --clip-pretrained laion2b_s34b_b79k."
        )
    if steps != int(steps) or not 1 <= steps <= MOST_STEPS:
        raise MoLEError(f"the number of steps must be a whole number from 1 to {MOST_STEPS}, got {steps}.")
    concepts = {lora.name: concept(lora) for lora in on}
    prompts = prompts_from_templates([line.strip() for line in templates.splitlines() if line.strip()], concepts)
    if not prompts:
        raise MoLEError('there is no prompt. Write one a line, such as "a photo of {concepts} on grass".')
    try_folder(out)
    config = GateTrainingConfig.from_dict(
        {
            "steps": int(steps),
            "batch_size": int(batch_size),
            "guidance_scale": float(guidance_scale),
            "warmup_steps": min(50, int(steps) // 4),
            "checkpoint_every": CHECKPOINT_EVERY,
        }
    )
    plain = replace(settings, loras=on, gates=None, composition=None, composition_options={}, regions={})
    return Plan(plain, concepts, prompts, int(steps), int(batch_size), out), config


def concept(lora: LoRASettings) -> Concept:
    """What a LoRA stands for: a toybox subject's own, else its trigger, "<v1> cat": a rare token and a class.

    Raises:
        MoLEError: Its trigger is not of two words or more.
    """
    from ..training import Concept

    if lora.file.startswith(f"{TOYBOX}:"):
        return toybox.concept(lora.file.removeprefix(f"{TOYBOX}:"))
    token, _, kind = (lora.triggers[0] if lora.triggers else "").strip().partition(" ")
    if not kind:
        raise MoLEError(
            f'to train gates, the trigger of {lora.name} must be its token and its class, such as "<v1> cat": CLIP '
            "reads the class where the prompt has the token."
        )
    return Concept(token=token, class_name=kind)


def train(studio: Studio, plan: Plan, config: Any, ticket: Ticket) -> Iterator[Step | Path]:
    """Trains; tells every step, and last the folder of the gates. Cancelled and begun again, it goes on.

    Raises:
        MoLEError: As `train_gates`.
        Cancelled: It was.
    """

    def job(tell: Callable[[Any], None]) -> None:
        from ..clip import DifferentiableCLIP
        from ..training import train_gates

        curves: dict[str, list[float]] = {}

        def after_step(number: int, numbers: Mapping[str, float]) -> None:
            for name, value in numbers.items():
                curves.setdefault(name, []).append(value)
            tell(Step(number, plan.steps, {name: list(values) for name, values in curves.items()}))
            if number < plan.steps:
                ticket.check()

        pipe = studio.pipe(plan.settings)
        try:
            train_gates(
                pipe,
                config,
                prompts=plan.prompts,
                concepts=plan.concepts,
                clip=DifferentiableCLIP(toybox.clip_dir()),
                out=plan.out,
                work=plan.out.with_name(f"{plan.out.name}.work"),
                progress=False,
                on_step_end=after_step,
            )
        finally:
            studio.forget()
        tell(plan.out)

    yield from studio.work(job, ticket)
