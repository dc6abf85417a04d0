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
from .allowed_folders import AllowedFolders
from .form import whole
from .studio import Progress, Studio, Ticket

if TYPE_CHECKING:
    from ..training import Concept

CHECKPOINT_EVERY = 5  # steps: as many are done again after a stop
MOST_TRAINING_STEPS = 20_000
MOST_PICTURES_A_STEP = 64


@dataclass(frozen=True)
class StepDone:
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
    clip: str
    steps: int
    out: Path

    @property
    def work(self) -> Path:
        """Where checkpoints go."""
        return self.out.with_name(f"{self.out.name}.work")


def plan(
    settings: PictureSettings,
    templates: str,
    steps: float,
    batch_size: float,
    guidance_scale: float,
    clip: str,
    folder: str,
    allowed: AllowedFolders,
) -> tuple[Plan, Any]:
    """Checks everything that is quick to check, and returns it with the configuration of the training.

    Args:
        settings: The settings of a picture: its base and those of its LoRAs that are on.
        templates: A line each, with the place {concepts}.
        steps, batch_size, guidance_scale: Fields of `GateTrainingConfig`.
        clip: The CLIP that guides; empty is the toybox's own.
        folder: Where the gates go.
        allowed: What may be read and written.

    Raises:
        MoLEError: Something is missing or cannot be.
    """
    from ..training import GateTrainingConfig, prompts_from_templates

    on = tuple(lora for lora in settings.loras if lora.on)
    if len(on) < 2:
        raise MoLEError("gates weigh two LoRAs or more. Switch on those that they are for.")
    pictures = whole("the number of pictures a step", batch_size, 1, MOST_PICTURES_A_STEP)
    count = whole("the number of training steps", steps, 1, MOST_TRAINING_STEPS)
    guide = read_clip(clip, settings.base, allowed)
    concepts = {lora.name: concept(lora) for lora in on}
    prompts = prompts_from_templates([line.strip() for line in templates.splitlines() if line.strip()], concepts)
    if not prompts:
        raise MoLEError('there is no prompt. Write one a line, such as "a photo of {concepts} on grass".')
    if guidance_scale is None:
        raise MoLEError("the guidance scale of training is empty. Write a number, such as 3; 1 is none.")
    out = allowed.below(folder)  # its checkpoints lie beside it
    try_folder(out)
    # Models of real size have no room for more than one picture at a time on most GPUs.
    size = {} if settings.base == TOYBOX else {"preset": "real", "gradient_accumulation": pictures}
    config = GateTrainingConfig.from_dict(
        {
            **size,
            "steps": count,
            "batch_size": pictures,
            "guidance_scale": float(guidance_scale),
            "warmup_steps": min(50, count // 4),
            "checkpoint_every": CHECKPOINT_EVERY,
        }
    )
    plain = replace(settings, loras=on, gates=None, composition=None, composition_options={}, regions={})
    return Plan(plain, concepts, prompts, guide, count, out), config


def read_clip(given: str, base: str, allowed: AllowedFolders) -> str:
    """The CLIP that guides, as `metrics.load_clip` takes it.

    Args:
        given: "toybox", a folder, "architecture:weights"; empty on the toybox means its own.
        base: The base model.
        allowed: What may be read.

    Raises:
        MoLEError: None is named, there are no such weights, or the folder may not be read.
    """
    import open_clip

    given = given.strip() or (TOYBOX if base == TOYBOX else "")
    if not given:
        raise MoLEError(
            "the CLIP that guides is missing: only the toybox has its own. Write architecture:weights as open_clip "
            "knows them, such as ViT-B-32:laion2b_s34b_b79k, or a folder in its format."
        )
    if given == TOYBOX:
        return given
    architecture, colon, weights = given.partition(":")
    if not colon:
        return str(allowed.path(given))
    known = open_clip.list_pretrained_tags_by_model(architecture)
    if weights not in known:  # which might be a file of this computer
        there = f"it has {', '.join(known)}" if known else "there is no such architecture"
        raise MoLEError(f"open_clip has no weights {given}: {there}. Take one that it has: ViT-B-32:laion2b_s34b_b79k.")
    return given


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


def train(studio: Studio, plan: Plan, config: Any, ticket: Ticket) -> Iterator[Progress | StepDone | Path]:
    """Trains; tells every step, and last the folder of the gates. Cancelled and begun again, it goes on.

    Raises:
        MoLEError: As `train_gates`; or the studio computes in float16, whose gradients would be zeros.
        Cancelled: It was.
    """
    import torch

    if studio.dtype is torch.float16:
        raise MoLEError("gradients are too small for float16. Start `mole app` with --dtype bfloat16, or float32.")

    def job(tell: Callable[[Any], None]) -> None:
        from ..metrics import load_clip
        from ..training import train_gates

        curves: dict[str, list[float]] = {}
        trained = False

        def after_step(number: int, numbers: Mapping[str, float]) -> None:
            nonlocal trained
            trained = number == plan.steps
            for name, value in numbers.items():
                curves.setdefault(name, []).append(value)
            tell(StepDone(number, plan.steps, {name: list(values) for name, values in curves.items()}))

        tell(Progress(0.0, None, f"opening {plan.settings.base} and the CLIP that guides"))
        clip = load_clip(plan.clip)
        pipe = studio.pipe(plan.settings)
        denoiser = getattr(pipe, pipe.family.denoiser)
        # Asked before every evaluation, until nothing is lost any more by waiting for the report.
        handle = denoiser.register_forward_pre_hook(lambda *_: None if trained else ticket.check())
        tell(Progress(0.0, None, "drawing what each LoRA draws alone"))
        try:
            train_gates(
                pipe,
                config,
                prompts=plan.prompts,
                concepts=plan.concepts,
                clip=clip,
                out=plan.out,
                work=plan.work,
                progress=False,
                on_step_end=after_step,
            )
        finally:
            handle.remove()
            studio.forget()
        tell(plan.out)

    yield from studio.work(job, ticket)
