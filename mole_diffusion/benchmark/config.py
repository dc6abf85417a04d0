"""What a benchmark compares: a YAML file, read strictly."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

from mole_diffusion.benchmark.cell import Cell
from mole_diffusion.benchmark.concepts import ConceptFiles, read_concept_files
from mole_diffusion.benchmark.methods import Method, read_methods
from mole_diffusion.errors import MoLEError
from mole_diffusion.yaml_files import read_yaml

MOST_SEEDS = 100_000
_DEFAULTS: dict[str, Any] = {
    "keep": "all",
    "gates": None,
    "train_prompts": [],
    "training": {},
    "seeds": 4,
    "batch": 1,
    "scale": 1.0,
    "steps": 25,
    "guidance_scale": 5.0,
    "resolution": None,
    "image_encoder": None,
    "reference": None,
    "paper": None,
}


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """A benchmark: every composition by every method, with the same prompts, seeds, scheduler and scale.

    Attributes:
        name: Its title in reports.
        base: "toybox", a folder or a Hub id.
        concepts: Each concept's files and words, by name.
        compositions: Names of concepts, in the order in which their LoRAs are loaded.
        methods: What is compared; see `read_methods`. Gates that are missing are trained as `training` says.
        keep: Which LoRAs of a composition draw: "all", or every choice of a number of them; the others are masked out.
        gates: "toybox", or a folder with a folder of gates per composition ("cat+boot"); `None`: gates are trained.
        train_prompts: Templates on which gates are trained, none of them among `prompts`.
        prompts: Templates; "{concepts}" becomes "a <v1> cat, a <v2> boot and a …".
        seeds: Seeds of the starting noise.
        batch: Seeds of one prompt that are drawn in one call. A picture does not depend on those beside it, but for
            the last digits of floating-point numbers; and it always has the same beside it, so that a benchmark
            comes out the same however often it is interrupted.
        scale: The scale of every LoRA.
        steps: Denoising steps.
        guidance_scale: Scale of classifier-free guidance.
        resolution: Side of the square pictures, in pixels; `None` is the base's own. Trainings have their own one.
        clip: The CLIP that measures and guides, as `load_clip` takes it.
        image_encoder: For image alignment, a vision model of transformers; `None`: CLIP.
        reference: Label of the method that the report compares the others with.
        paper: YAML file with a table of the paper, to stand beside this one in the report; see `read_paper`.
    """

    name: str
    base: str
    concepts: Mapping[str, ConceptFiles]
    compositions: Sequence[Sequence[str]]
    methods: Sequence[Method]
    keep: Sequence[str | int]
    gates: str | None
    train_prompts: Sequence[str]
    prompts: Sequence[str]
    seeds: Sequence[int]
    batch: int
    scale: float
    steps: int
    guidance_scale: float
    resolution: int | None
    clip: str
    image_encoder: str | None
    reference: str
    paper: str | None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> BenchmarkConfig:
        """Reads a YAML file. `paper` is looked for beside it.

        Raises:
            MoLEError: It is no YAML, has an unknown key, lacks one, or holds a value that is not allowed.
        """
        values = read_yaml(path)
        try:
            if isinstance(values, dict) and isinstance(values.get("paper"), str):
                values["paper"] = str(Path(path).parent / values["paper"])
            return cls.from_dict(values)
        except MoLEError as error:
            raise MoLEError(f"{os.fspath(path)}: {error}") from None

    @classmethod
    def from_dict(cls, given: Any) -> BenchmarkConfig:
        """Reads plain values, as YAML gives them.

        Raises:
            MoLEError: As `from_file`.
        """
        known = [*(field.name for field in fields(cls)), "training"]
        if not isinstance(given, dict):
            raise MoLEError(f"a benchmark is a mapping of {', '.join(known)}, got {type(given).__name__}.")
        values = {**_DEFAULTS, **given}
        unknown, missing = sorted(set(values) - set(known)), [key for key in known if key not in values]
        if unknown or missing:
            what = f"unknown key {unknown[0]!r}" if unknown else f"missing key {missing[0]!r}"
            raise MoLEError(f"{what}. A benchmark has {', '.join(known)}.")
        values["concepts"] = read_concept_files(values["concepts"])
        values["compositions"] = [_composition(entry, values["concepts"]) for entry in _list(values, "compositions")]
        _no_repeats("compositions", ["+".join(names) for names in values["compositions"]])
        values["keep"] = _keep(values["keep"], values["compositions"])
        for key in ("prompts", "train_prompts"):
            if key == "train_prompts" and values[key] is None:
                values[key] = []
            _check_prompts(key, [] if key == "train_prompts" and values[key] == [] else _list(values, key))
        both = [prompt for prompt in values["train_prompts"] if prompt in values["prompts"]]
        if both:
            raise MoLEError(f"`train_prompts` has {both[0]!r}, which is measured too. Train on other prompts.")
        training = values.pop("training")
        if not isinstance(training, dict):
            raise MoLEError(f"`training` must be a mapping of settings such as {{steps: 100}}, got {training!r}.")
        values["methods"] = read_methods(
            values["methods"],
            has_gates=values["gates"] is not None,
            can_train=bool(values["train_prompts"]),
            training=training,
        )
        labels = [method.label for method in values["methods"]]
        if values["reference"] is None:
            values["reference"] = "normalized" if "normalized" in labels else labels[0]
        if values["reference"] not in labels:
            raise MoLEError(f"`reference` must be one of {', '.join(labels)}, got {values['reference']!r}.")
        seeds = values["seeds"]
        if isinstance(seeds, int) and seeds > MOST_SEEDS:
            raise MoLEError(f"`seeds` is {seeds}; at most {MOST_SEEDS} are drawn.")
        values["seeds"] = list(range(seeds)) if isinstance(seeds, int) else seeds
        if not all(isinstance(seed, int) and 0 <= seed < 2**63 for seed in _list(values, "seeds")):
            raise MoLEError(f"`seeds` must be a number of seeds or a list of integers, got {seeds!r}.")
        _no_repeats("seeds", values["seeds"])
        for key, kind, least in (
            ("steps", int, 1),
            ("batch", int, 1),
            ("guidance_scale", int | float, 0),
            ("scale", int | float, None),
        ):
            value = values[key]
            if isinstance(value, bool) or not isinstance(value, kind) or (least is not None and value < least):
                raise MoLEError(
                    f"`{key}` must be a number{'' if least is None else f' of at least {least}'}, got {value!r}."
                )
        resolution = values["resolution"]
        if resolution is not None and (type(resolution) is not int or resolution < 8 or resolution % 8):
            raise MoLEError(f"`resolution` must be a multiple of 8 pixels, or left out, got {resolution!r}. Try 512.")
        return cls(**values)

    @property
    def used(self) -> list[str]:
        """Names of the concepts that a composition has."""
        return list(dict.fromkeys(name for names in self.compositions for name in names))

    @property
    def labels(self) -> list[str]:
        """Labels of the methods, in their order."""
        return [method.label for method in self.methods]

    def batches(self) -> list[list[Cell]]:
        """All pictures, those that are drawn together in one list; those of one composition and method in a row."""
        chunks = [self.seeds[k : k + self.batch] for k in range(0, len(self.seeds), self.batch)]
        return [
            [Cell("+".join(names), method, kept, prompt, seed) for seed in chunk]
            for names in self.compositions
            for method in self.methods
            for kept in self.kept(names)
            for prompt in range(len(self.prompts))
            for chunk in chunks
        ]

    def cells(self) -> list[Cell]:
        """All pictures, those of one composition together."""
        return [cell for batch in self.batches() for cell in batch]

    def kept(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Which LoRAs of a composition draw together: every choice that `keep` asks for, once."""
        counts = [len(names) if keep == "all" else int(keep) for keep in self.keep]
        return list(dict.fromkeys(kept for count in counts for kept in combinations(names, count)))

    def prompt(self, index: int, names: Sequence[str], *, described: bool = False) -> str:
        """The prompt for these concepts: with the words of the LoRAs, or described in those that CLIP knows."""
        return self.fill(self.prompts[index], names, described=described)

    def fill(self, template: str, names: Sequence[str], *, described: bool = False) -> str:
        """A template with these concepts in the place of "{concepts}"."""
        said = [self.concepts[name].description if described else self.concepts[name].phrase for name in names]
        phrases = [f"a {phrase}" for phrase in said]
        together = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + f" and {phrases[-1]}"
        return template.replace("{concepts}", together)


def _composition(entry: Any, concepts: Mapping[str, ConceptFiles]) -> list[str]:
    names = entry.split("+") if isinstance(entry, str) else entry
    if not isinstance(names, list) or not names:
        raise MoLEError(f'a composition is written "cat+boot", got {entry!r}.')
    for name in names:
        if not isinstance(name, str) or name not in concepts:
            raise MoLEError(
                f"composition {entry!r} has {name!r}, which is no concept. Known are {', '.join(concepts)}."
            )
    _no_repeats(f"composition {entry!r}", names)
    return names


def _keep(given: Any, compositions: Sequence[Sequence[str]]) -> list[str | int]:
    entries = given if isinstance(given, list) else [given]
    for entry in entries:
        number = isinstance(entry, int) and not isinstance(entry, bool) and entry >= 1
        if not (number or entry == "all"):
            raise MoLEError(f'`keep` is "all" or how many LoRAs to keep, alone or in a list, got {entry!r}.')
        few = [names for names in compositions if number and entry > len(names)]
        if few:
            raise MoLEError(f"`keep` has {entry}, and {'+'.join(few[0])} has only {len(few[0])} LoRAs.")
    if not entries:
        raise MoLEError('`keep` is an empty list. Write "all", or how many LoRAs to keep.')
    return entries


def _check_prompts(key: str, prompts: Sequence[Any]) -> None:
    for prompt in prompts:
        if not isinstance(prompt, str) or "{concepts}" not in prompt:
            raise MoLEError(f'a prompt needs "{{concepts}}" where the concepts go, got {prompt!r}.')
    _no_repeats(key, prompts)


def _list(values: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(values[key], list) or not values[key]:
        raise MoLEError(f"`{key}` must be a list with at least one entry, got {values[key]!r}.")
    return list(values[key])


def _no_repeats(what: str, values: Sequence[Any]) -> None:
    repeated = next((value for value in values if values.count(value) > 1), None)
    if repeated is not None:
        raise MoLEError(f"{what} has {repeated!r} twice.")
