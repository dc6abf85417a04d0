"""What the commands that train gates read from the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mole_diffusion.errors import MoLEError

from ..drawing.opening import find_base, pick_device, quiet_loading
from .inputs import read_pairs, read_pictures

if TYPE_CHECKING:
    from mole_diffusion.clip import DifferentiableCLIP
    from mole_diffusion.training import Concept, GateTrainingConfig

Lora = Annotated[
    list[str],
    typer.Option(metavar="NAME=FILE", help="A LoRA; once for each, two at least. A toybox subject needs only NAME."),
]
Token = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=TOKEN", help="Rare token of a LoRA, which CLIP must not read; once for each."),
]
ClassName = Annotated[
    list[str] | None,
    typer.Option("--class", metavar="NAME=CLASS", help="What kind of thing a LoRA draws; read in the token's place."),
]
Description = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=TEXT", help='What CLIP reads instead of the class: cat="orange striped cat".'),
]
References = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=FOLDER", help="Pictures of a concept for local and identity terms [default: drawn]."),
]
Prompt = Annotated[list[str] | None, typer.Option(help="A prompt to train on; once for each.")]
Prompts = Annotated[Path | None, typer.Option(help="Text file with a prompt in every line; # starts a comment line.")]
Template = Annotated[
    list[str] | None,
    typer.Option(help='A prompt with the place {concepts}, filled in every order: "a photo of {concepts} on grass".'),
]
Clip = Annotated[
    str | None,
    typer.Option(help="CLIP that guides: an open_clip folder or architecture [default with the toybox: its own]."),
]
ClipPretrained = Annotated[str | None, typer.Option(help="Weights of that architecture, such as laion2b_s34b_b79k.")]
Preset = Annotated[str | None, typer.Option(help="default, masks, paper or official.")]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML with settings, such as `gates: {scope: layer}`.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting: local_weight=0.5, gates.scope=layer …"),
]
Steps = Annotated[int | None, typer.Option(help="Training steps [default: the preset's].")]
BatchSize = Annotated[int | None, typer.Option(help="Pictures a step [default: the preset's].")]
LearningRate = Annotated[float | None, typer.Option(help="Peak of the learning rate [default: the preset's].")]
Seed = Annotated[int | None, typer.Option(help="Of everything random.")]


@dataclass(frozen=True)
class GateTrainingInputs:
    """Everything `train_gates` takes, read, checked and loaded."""

    pipe: Any
    config: GateTrainingConfig
    prompts: list[str]
    clip: DifferentiableCLIP
    concepts: dict[str, Concept]


def read_gate_training(
    *,
    base: str,
    lora: Sequence[str],
    token: Sequence[str] | None,
    class_name: Sequence[str] | None,
    description: Sequence[str] | None,
    references: Sequence[str] | None,
    prompt: Sequence[str] | None,
    prompts: Path | None,
    template: Sequence[str] | None,
    clip: str | None,
    clip_pretrained: str | None,
    device: str,
    config: GateTrainingConfig,
) -> GateTrainingInputs:
    """Loads the models, after everything that is quick to check.

    Raises:
        MoLEError: Something is missing or does not fit.
    """
    own, known = toybox_loras(lora) if base == "toybox" else (list(lora), {})
    files = read_pairs("--lora", own)
    concepts = known | read_concepts(files, token, class_name, description, references)
    texts = read_prompts(prompt, prompts, template, concepts)
    if clip is None and base != "toybox":
        raise MoLEError("--clip is missing. Give a folder, or --clip ViT-B-32 --clip-pretrained laion2b_s34b_b79k.")
    from mole_diffusion import toybox
    from mole_diffusion.clip import DifferentiableCLIP
    from mole_diffusion.pipelines import pipeline_class

    where = pick_device(device)
    guide = DifferentiableCLIP(toybox.clip_dir() if clip is None else clip, clip_pretrained)
    with quiet_loading():
        found = find_base(base)
        pipe = pipeline_class(found).from_pretrained(found).to(where)
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
        "--references": read_pairs("--references", references or [], "cat=./my-cat"),
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


def read_prompts(
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
        raise MoLEError('no prompts: give --prompt, --prompts FILE or --template "a photo of {concepts}".')
    return texts


def read_config(
    preset: str | None, file: Path | None, settings: Sequence[str] | None, options: Mapping[str, Any]
) -> GateTrainingConfig:
    """Preset, then YAML file, then --set, then options of their own; the later goes before the earlier.

    Raises:
        MoLEError: A setting is unknown or its value is not allowed; the file is missing or no YAML dictionary.
    """
    from mole_diffusion.training import GateTrainingConfig
    from mole_diffusion.yaml_files import parse_yaml, read_yaml

    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = read_yaml(file) or {}
        except MoLEError as error:
            raise MoLEError(f"--config {error}") from None
        if not isinstance(values, dict):
            raise MoLEError(f"--config {file} must be a dictionary of settings, got {type(values).__name__}.")
    for key, text in read_pairs("--set", settings or [], "gates.scope=layer").items():
        try:
            value = parse_yaml(text)
        except MoLEError as error:
            raise MoLEError(f"--set {key}={text}: {error}") from None
        if key.startswith("gates."):
            gates = values.get("gates") or {}
            if not isinstance(gates, dict):
                raise MoLEError(f"`gates` must be a dictionary of settings, got {gates!r}.")
            values["gates"] = {**gates, key.removeprefix("gates."): value}
        else:
            values[key] = value
    values |= {name: value for name, value in options.items() if value is not None}
    if preset is not None:
        values["preset"] = preset
    chosen = GateTrainingConfig.from_dict({**values, "warmup_steps": values.get("warmup_steps", 0)})
    if "warmup_steps" in values:
        return chosen
    # Few steps, say for a trial, should not ask for a shorter warm-up too.
    own = GateTrainingConfig.from_dict({"preset": values.get("preset", "default")}).warmup_steps
    return GateTrainingConfig.from_dict({**values, "warmup_steps": min(own, chosen.steps // 4)})
