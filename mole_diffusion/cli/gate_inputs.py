"""What the commands that train gates read from the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.choices import PRESETS
from mole_diffusion.errors import MoLEError

from ..drawing.opening import find_base, pick_device, quiet_loading
from .early import (
    refuse_missing,
    refuse_missing_clip,
    refuse_missing_loras,
    refuse_no_rate,
    refuse_other,
    refuse_unknown_clip,
)
from .inputs import check_base_dtype, read_pairs, read_paths, read_pictures

if TYPE_CHECKING:
    from mole_diffusion.clip import DifferentiableCLIP
    from mole_diffusion.training import Concept, GateTrainingConfig


NO_PROMPTS = 'no prompts: give --prompt, --prompts FILE or --template "a photo of {concepts}".'


@dataclass(frozen=True)
class GateTrainingInputs:
    """Everything `train_gates` takes, read, checked and loaded."""

    pipe: Any
    config: GateTrainingConfig
    prompts: list[str]
    clip: DifferentiableCLIP
    concepts: dict[str, Concept]


@dataclass(frozen=True, kw_only=True)
class GateArguments:
    """What these commands were given, as the command line has it; see `gate_options`."""

    base: str
    lora: Sequence[str]
    token: Sequence[str] | None
    class_name: Sequence[str] | None
    description: Sequence[str] | None
    references: Sequence[str] | None
    prompt: Sequence[str] | None
    prompts: Path | None
    template: Sequence[str] | None
    clip: str | None
    clip_pretrained: str | None
    preset: str | None
    learning_rate: float | None
    device: str
    dtype: str

    def look_first(self) -> None:
        """What is quick to check, before anything large is imported.

        Raises:
            MoLEError: Something is not there, or is none of what there is to choose from.
        """
        base, clip = self.base, self.clip
        refuse_missing_loras(read_paths("--lora", [entry for entry in self.lora if "=" in entry or base != "toybox"]))
        refuse_missing("--references", read_paths("--references", self.references or [], "cat=./my-cat").values())
        refuse_missing("--prompts", [] if self.prompts is None else [self.prompts])
        if self.preset is not None:
            refuse_other("--preset", self.preset, PRESETS)
        refuse_no_rate("--learning-rate", self.learning_rate)
        if not (self.prompt or self.prompts or self.template):
            raise MoLEError(NO_PROMPTS)
        if clip is None and base != "toybox":
            raise MoLEError("--clip is missing. Give a folder, or --clip ViT-B-32 --clip-pretrained laion2b_s34b_b79k.")
        find_base(base)
        if clip is not None:
            refuse_missing_clip(clip)
            refuse_unknown_clip(clip, self.clip_pretrained)
        if len(self.lora) < 2:
            raise MoLEError("gates weigh LoRAs against each other. Give --lora twice or more often.")
        check_base_dtype(self.dtype)

    def read(self, config: GateTrainingConfig) -> GateTrainingInputs:
        """Loads the models, after everything that is quick to check.

        Raises:
            MoLEError: Something is missing or does not fit.
        """
        own, known = toybox_loras(self.lora) if self.base == "toybox" else (list(self.lora), {})
        files = read_paths("--lora", own)
        concepts = known | read_concepts(files, self.token, self.class_name, self.description, self.references)
        texts = read_training_prompts(self.prompt, self.prompts, self.template, concepts)
        import torch

        from mole_diffusion import toybox
        from mole_diffusion.clip import DifferentiableCLIP
        from mole_diffusion.pipelines import pipeline_class

        precision, where = getattr(torch, self.dtype), pick_device(self.device)
        guide = DifferentiableCLIP(toybox.clip_dir() if self.clip is None else self.clip, self.clip_pretrained)
        with quiet_loading():
            found = find_base(self.base)
            pipe = pipeline_class(found).from_pretrained(found, dtype=precision).to(where)
        # What gates are trained on the masks of is found by these words.
        words = {name: (f"{item.token} {item.class_name}", item.token) for name, item in concepts.items()}
        pipe.load_loras(files, triggers=words)
        return GateTrainingInputs(pipe, config, texts, guide, concepts)


def toybox_loras(lora: Sequence[str]) -> tuple[list[str], dict[str, Concept]]:
    """The entries of --lora with the file of every toybox subject that stands there by its name alone, and what it is.

    Raises:
        MoLEError: There is no such subject.
    """
    from mole_diffusion import toybox

    names = [entry for entry in lora if "=" not in entry]
    entries = [f"{entry}={toybox.lora_path(entry)}" if entry in names else entry for entry in lora]
    return entries, {name: toybox.concept(name) for name in names}


def read_concepts(
    files: Mapping[str, str],
    token: Sequence[str] | None,
    class_name: Sequence[str] | None,
    description: Sequence[str] | None,
    references: Sequence[str] | None,
) -> dict[str, Concept]:
    """What each LoRA stands for, where it was said.

    Raises:
        MoLEError: An option names no LoRA, or a LoRA has a token and no class, or no token and something else.
    """
    from mole_diffusion.training import Concept

    given = {
        "--token": read_pairs("--token", token or [], "cat=<v1>"),
        "--class": read_pairs("--class", class_name or [], "cat=cat"),
        "--description": read_pairs("--description", description or [], "cat=orange cat"),
        "--references": read_paths("--references", references or [], "cat=./my-cat"),
    }
    for option, pairs in given.items():
        for name in pairs:
            if name not in files:
                raise MoLEError(f"{option} {name}=…: there is no --lora {name}=…; there are {', '.join(files)}.")
            missing = [needed for needed in ("--token", "--class") if name not in given[needed]]
            if missing:
                raise MoLEError(f"{option} {name}=… needs {' and '.join(missing)} for {name} too.")
    return {
        name: Concept(
            token=given["--token"][name],
            class_name=given["--class"][name],
            description=given["--description"].get(name),
            references=read_pictures("--references", Path(given["--references"][name]))
            if name in given["--references"]
            else (),
        )
        for name in files
        if name in given["--token"]
    }


def read_training_prompts(
    prompt: Sequence[str] | None, prompts: Path | None, template: Sequence[str] | None, concepts: Mapping[str, Concept]
) -> list[str]:
    """The prompts of all three options together.

    Raises:
        MoLEError: There is none, or the file is missing.
    """
    from mole_diffusion.training import prompts_from_templates

    texts = list(prompt or [])
    if prompts is not None:
        if not prompts.is_file():
            raise MoLEError(f"--prompts {prompts}: there is no such file.")
        from mole_diffusion.prompts import read_prompt_lines

        texts += [line for line in read_prompt_lines(prompts) if not line.startswith("#")]
    texts += prompts_from_templates(template or [], concepts)
    if not texts:
        raise MoLEError(NO_PROMPTS)
    return texts
