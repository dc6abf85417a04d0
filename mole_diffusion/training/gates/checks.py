"""What a gate training refuses before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mole_diffusion.errors import MoLEError
from mole_diffusion.training.gates.concepts import Concept
from mole_diffusion.training.gates.config import GateTrainingConfig
from mole_diffusion.training.gates.guidance import needs_references


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Raises MoLEError for no prompt, or one that comes twice."""
    if isinstance(prompts, str) or not prompts:
        raise MoLEError(f"`prompts` must be a list of at least one prompt, got {prompts!r}.")
    if len(set(prompts)) < len(prompts):
        raise MoLEError("`prompts` has one prompt twice; each is drawn with the same frequency, so give it once.")
    return list(prompts)


def check_concepts(pipe: Any, config: GateTrainingConfig, concepts: Mapping[str, Concept]) -> dict[str, Concept]:
    """Raises MoLEError where concepts are missing, unknown, or share a token, or the floor is out of reach."""
    names = pipe.experts.names
    unknown = [name for name in concepts if name not in names]
    if unknown:
        raise MoLEError(f"`concepts` has {unknown[0]!r}, which is no loaded LoRA. Loaded are: {', '.join(names)}.")
    tokens = [concept.token for concept in concepts.values()]
    if len(set(tokens)) < len(tokens):
        raise MoLEError(f"`concepts` must have tokens of their own, got {tokens}.")
    if needs_references(config) and not concepts:
        raise MoLEError(
            "`local_weight` and `identity_weight` compare with concepts, and `concepts` has none. Give "
            "{lora name: Concept(token=..., class_name=...)}, or set both weights to 0."
        )
    if config.balance == "floor" and config.balance_floor * len(names) > 1:
        raise MoLEError(
            f"`balance_floor` is {config.balance_floor}, and {len(names)} LoRAs cannot all have that share. "
            f"Use at most {1 / len(names):.3f}."
        )
    return dict(concepts)


def check_pipeline(pipe: Any) -> None:
    """Raises MoLEError for a pipeline without at least two LoRAs, or of another shape than Stable Diffusion."""
    name = type(pipe).__name__
    if not hasattr(pipe, "init_gates"):
        raise MoLEError(
            f"{name} composes no LoRAs. Make a MoLE pipeline of it: MoLEStableDiffusionPipeline.from_pipe(pipe)."
        )
    loaded = pipe.experts.names if pipe.experts is not None else ()
    if len(loaded) < 2:
        raise MoLEError(
            f"Gates weigh LoRAs against each other, so at least two must be loaded; loaded are {list(loaded)}. "
            "Call `load_loras({name: file, ...})` first."
        )
