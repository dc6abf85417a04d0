"""What a benchmark compares: a YAML file, read strictly."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..composition import COMPOSITIONS, Composition


@dataclass(frozen=True)
class Concept:
    """One LoRA and what it stands for.

    Attributes:
        lora: Its file.
        phrase: What a prompt calls it, such as "<v1> cat".
        description: What CLIP, which does not know rare words, reads instead, such as "striped orange cat".
        references: Folder with its pictures, or "toybox".
    """

    lora: str
    phrase: str
    description: str
    references: str


@dataclass(frozen=True)
class Method:
    """A composition method with its arguments; `label` names it in tables."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        arguments = ", ".join(f"{key}={value}" for key, value in self.arguments)
        return f"{self.name}({arguments})" if arguments else self.name

    def build(self) -> Composition:
        return COMPOSITIONS[self.name](**dict(self.arguments))


@dataclass(frozen=True)
class Cell:
    """One picture of a benchmark: which LoRAs, composed how, for which prompt and seed."""

    composition: str
    method: Method
    prompt: int
    seed: int

    @property
    def path(self) -> Path:
        """Where its picture and its row lie, without suffix, below their folders."""
        return Path(self.composition) / self.method.label / f"p{self.prompt:02d}-s{self.seed:04d}"


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """A benchmark: every composition by every method, with the same prompts, seeds, scheduler and scale.

    Attributes:
        name: For titles.
        base: "toybox", a folder or a Hub id.
        concepts: By name.
        compositions: Names of concepts, in the order in which their LoRAs are loaded.
        methods: What is compared.
        gates: "toybox", or a folder with a folder of gates per composition ("cat+boot"); `None` without gates.
        prompts: Templates; "{concepts}" becomes "a <v1> cat, a <v2> boot and a …".
        seeds: Of the starting noise.
        scale: Of every LoRA.
        steps: Denoising steps.
        guidance_scale: Of classifier-free guidance.
        clip: As :func:`load_clip` takes it.
        image_encoder: For image alignment, a vision model of transformers; `None`: CLIP.
    """

    name: str
    base: str
    concepts: Mapping[str, Concept]
    compositions: Sequence[Sequence[str]]
    methods: Sequence[Method]
    gates: str | None
    prompts: Sequence[str]
    seeds: Sequence[int]
    scale: float
    steps: int
    guidance_scale: float
    clip: str
    image_encoder: str | None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> BenchmarkConfig:
        """Reads a YAML file.

        Raises:
            ValueError: It is no YAML, has an unknown key, lacks one, or holds a value that is not allowed.
        """
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            return cls.from_dict(values)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None

    @classmethod
    def from_dict(cls, given: Any) -> BenchmarkConfig:
        """Reads plain values, as YAML gives them.

        Raises:
            ValueError: As :meth:`from_file`.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(given, dict):
            raise ValueError(f"a benchmark is a mapping of {', '.join(known)}, got {type(given).__name__}.")
        defaults = {
            "gates": None, "seeds": 4, "scale": 1.0, "steps": 25, "guidance_scale": 5.0, "image_encoder": None,
        }  # fmt: skip
        values = {**defaults, **given}
        unknown, missing = sorted(set(values) - set(known)), [key for key in known if key not in values]
        if unknown or missing:
            what = f"unknown key {unknown[0]!r}" if unknown else f"missing key {missing[0]!r}"
            raise ValueError(f"{what}. A benchmark has {', '.join(known)}.")
        values["concepts"] = _concepts(values["concepts"])
        values["compositions"] = [_composition(entry, values["concepts"]) for entry in _list(values, "compositions")]
        _no_repeats("compositions", ["+".join(names) for names in values["compositions"]])
        values["methods"] = _methods(values["methods"], has_gates=values["gates"] is not None)
        for prompt in _list(values, "prompts"):
            if not isinstance(prompt, str) or "{concepts}" not in prompt:
                raise ValueError(f'a prompt needs "{{concepts}}" where the concepts go, got {prompt!r}.')
        _no_repeats("prompts", values["prompts"])
        seeds = values["seeds"]
        values["seeds"] = list(range(seeds)) if isinstance(seeds, int) else seeds
        if not all(isinstance(seed, int) and seed >= 0 for seed in _list(values, "seeds")):
            raise ValueError(f"`seeds` must be a number of seeds or a list of integers, got {seeds!r}.")
        _no_repeats("seeds", values["seeds"])
        for key, kind, least in (("steps", int, 1), ("guidance_scale", int | float, 0), ("scale", int | float, None)):
            value = values[key]
            if isinstance(value, bool) or not isinstance(value, kind) or (least is not None and value < least):
                raise ValueError(
                    f"`{key}` must be a number{'' if least is None else f' of at least {least}'}, got {value!r}."
                )
        return cls(**values)

    def cells(self) -> list[Cell]:
        """All pictures, those of one composition together."""
        return [
            Cell("+".join(names), method, prompt, seed)
            for names in self.compositions
            for method in self.methods
            for prompt in range(len(self.prompts))
            for seed in self.seeds
        ]

    def prompt(self, index: int, names: Sequence[str], *, described: bool = False) -> str:
        """The prompt for these concepts: with the words of the LoRAs, or described in those that CLIP knows."""
        said = [self.concepts[name].description if described else self.concepts[name].phrase for name in names]
        phrases = [f"a {phrase}" for phrase in said]
        together = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + f" and {phrases[-1]}"
        return self.prompts[index].replace("{concepts}", together)


def _concepts(given: Any) -> dict[str, Concept]:
    if given == "toybox":
        from .. import toybox

        return {
            name: Concept(
                lora=str(toybox.lora_path(name)),
                phrase=f"{toybox.token(name)} {toybox.class_name(name)}",
                description=f"{toybox.subject(name).look} {toybox.class_name(name)}",
                references="toybox",
            )
            for name in toybox.subjects()
        }
    keys = [field.name for field in fields(Concept)]
    if not isinstance(given, dict) or not given:
        raise ValueError(f'`concepts` must be "toybox" or a mapping of name to {", ".join(keys)}, got {given!r}.')
    for name, value in given.items():
        if not isinstance(value, dict) or set(value) != set(keys):
            raise ValueError(f"concept {name!r} must have exactly {', '.join(keys)}, got {value!r}.")
    return {str(name): Concept(**{key: str(value[key]) for key in keys}) for name, value in given.items()}


def _composition(entry: Any, concepts: Mapping[str, Concept]) -> list[str]:
    names = entry.split("+") if isinstance(entry, str) else entry
    if not isinstance(names, list) or not names:
        raise ValueError(f'a composition is written "cat+boot", got {entry!r}.')
    for name in names:
        if name not in concepts:
            raise ValueError(
                f"composition {entry!r} has {name!r}, which is no concept. Known are {', '.join(concepts)}."
            )
    _no_repeats(f"composition {entry!r}", names)
    return names


def _methods(given: Any, has_gates: bool) -> list[Method]:
    if given == "all":  # a method added later joins without a change
        given = [name for name, method in COMPOSITIONS.items() if has_gates or not method.needs_gates]
    if not isinstance(given, list) or not given:
        raise ValueError(f'`methods` must be "all" or a list of names, got {given!r}.')
    methods = []
    for entry in given:
        name, arguments = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, {})
        if not isinstance(name, str) or name not in COMPOSITIONS or not isinstance(arguments, dict):
            raise ValueError(
                f"{entry!r} is no method. Write a name, one of {', '.join(COMPOSITIONS)}, or a name with its arguments "
                "such as {merge: {scale: 1.0}}."
            )
        method = Method(name, tuple(arguments.items()))
        try:
            built = method.build()
        except TypeError as error:
            raise ValueError(f"method {entry!r}: {error}") from None
        if built.needs_gates and not has_gates:
            raise ValueError(f"method {name!r} needs gates. Say where they lie: `gates: folder`, or `gates: toybox`.")
        methods.append(method)
    _no_repeats("methods", [method.label for method in methods])
    return methods


def _list(values: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(values[key], list) or not values[key]:
        raise ValueError(f"`{key}` must be a list with at least one entry, got {values[key]!r}.")
    return list(values[key])


def _no_repeats(what: str, values: Sequence[Any]) -> None:
    repeated = next((value for value in values if values.count(value) > 1), None)
    if repeated is not None:
        raise ValueError(f"{what} has {repeated!r} twice.")
