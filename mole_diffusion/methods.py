"""The ways to compose as they are chosen: by name, with options. Known, and checked, before torch is imported."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

from .drawable import LARGEST_NUMBER, check_drawable
from .errors import MoLEError, printable

Need = Literal["gates", "attention", "words", "prior"]
Modulation = Literal["share", "first", "off"]
MOST_SMOOTHING = 1000
LEAST_TEMPERATURE = 1e-6


class Options:
    """What is known of a way to compose without torch: its needs and its options.

    The class in `composition/` that does it stands on this one, or on one of those below where it has options that are
    plain values; they say there what these mean.
    """

    needs: frozenset[Need] = frozenset()


class MergeOptions(Options):
    """Those of `Merge`."""

    def __init__(self, scale: float = 0.8) -> None:
        check_drawable("`scale`", scale, "The authors use 0.8.")
        self.scale = scale


class SwitchOptions(Options):
    """Those of `Switch`."""

    def __init__(self, every: int = 5) -> None:
        if not every >= 1:  # nor NaN
            raise MoLEError(f"`every` must be at least 1 step, got {every}. The authors use 5.")
        self.every = every


class MaskOptions(Options):
    """Those of `Masks`."""

    def __init__(
        self,
        *,
        online: bool = False,
        start: float = 0.12,
        stop: float = 0.36,
        join: float = 0.12,
        background: float = 0.0,
        smoothing: int = 3,
        neutral_words: float | None = None,
        own_words: float = 3.0,
        others_words: float = 6.0,
        given_own_words: float = 6.0,
        given_others_words: float = 12.0,
        modulation: Modulation = "share",
    ) -> None:
        if not 0 <= start < stop < 1:
            raise MoLEError(f"`start` and `stop` must be 0 <= start < stop < 1, got {start} and {stop}.")
        if smoothing not in range(1, MOST_SMOOTHING, 2):
            raise MoLEError(
                f"`smoothing` must be an odd number of pixels below {MOST_SMOOTHING}, got {smoothing}. "
                "1 leaves maps as they are."
            )
        if not 0 <= join < 1:
            raise MoLEError(f"`join` must be at least 0 and below 1, got {join}. 0: LoRAs act from the first step on.")
        numbers = {
            "background": background,
            "own_words": own_words,
            "others_words": others_words,
            "given_own_words": given_own_words,
            "given_others_words": given_others_words,
            "neutral_words": 0.0 if neutral_words is None else neutral_words,
        }
        for name, value in numbers.items():
            check_drawable(f"`{name}`", value)
        if modulation not in get_args(Modulation):
            raise MoLEError(f"`modulation` must be one of {list(get_args(Modulation))}, got {modulation!r}.")
        self.online = online
        self.start = start
        self.stop = stop
        self.join = join
        self.background = background
        self.smoothing = smoothing
        self.neutral_words = neutral_words
        self.own_words = own_words
        self.others_words = others_words
        self.given_own_words = given_own_words
        self.given_others_words = given_others_words
        self.modulation: Modulation = modulation
        self.needs: frozenset[Need] = frozenset({"words", "attention"})
        if not online:
            self.needs |= {"prior"}


class FreeFuseOptions(MaskOptions):
    """Those of `FreeFuse`."""

    def __init__(
        self,
        *,
        stop: float = 0.36,
        background: float = 0.95,
        own_words: float = 0.0,
        others_words: float = 0.0,
        modulation: Modulation = "share",
    ) -> None:
        super().__init__(
            start=0,
            stop=stop,
            background=background,
            own_words=own_words,
            others_words=others_words,
            smoothing=1,
            modulation=modulation,
        )


class RouterOptions(Options):
    """Those of `NormRouter`."""

    def __init__(self, temperature: float = 0.0) -> None:
        if not (temperature == 0 or LEAST_TEMPERATURE <= temperature <= LARGEST_NUMBER):
            raise MoLEError(
                f"`temperature` must be 0 (the largest takes all), or from {LEAST_TEMPERATURE:g} to "
                f"{LARGEST_NUMBER:g}, got {temperature}."
            )
        self.temperature = temperature


class GatesAlone(Options):
    """Of `MoLE`."""

    needs: frozenset[Need] = frozenset({"gates"})


class GatesOnMasks(Options):
    """Of `MaskedGates`."""

    def __init__(self) -> None:
        self.needs = MaskOptions().needs | {"gates"}


METHODS: dict[str, type[Options]] = {
    "linear": Options,
    "normalized": Options,
    "budget": Options,
    "merge": MergeOptions,
    "switch": SwitchOptions,
    "composite": Options,
    "masks": MaskOptions,
    "freefuse": FreeFuseOptions,
    "norm_router": RouterOptions,
    "mole": GatesAlone,
    "masked_gates": GatesOnMasks,
}
"""By name; each is a file of its name in `composition/`."""


def check_method(name: str, known: Collection[str] = METHODS) -> None:
    """Raises MoLEError unless there is a composition of this name among those that are known."""
    if name not in known:
        raise MoLEError(f"there is no composition {name!r}. Known are: {', '.join(known)}.")


def options(name: str) -> dict[str, Any]:
    """The options of a method, with their defaults: numbers, switches and words.

    Raises:
        MoLEError: There is no such method.
    """
    check_method(name)
    parameters = inspect.signature(METHODS[name].__init__).parameters.values()
    return {one.name: one.default for one in parameters if isinstance(one.default, bool | int | float | str | None)}


def check_options(name: str, given: Mapping[str, Any]) -> Options:
    """What is known of a method with these options.

    Raises:
        MoLEError: There is no such method or option, or its value is not allowed.
    """
    known = options(name)
    for key, value in given.items():
        if key not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise MoLEError(f"composition {name!r} has no option {key!r}; {there}.")
        kind, kinds = _kind(known[key])
        if isinstance(known[key], bool) != isinstance(value, bool) or not isinstance(value, kinds):
            raise MoLEError(f"the option {key} of {name!r} must be {kind}, got {printable(repr(value), 80)}.")
    return METHODS[name](**given)


def _kind(default: Any) -> tuple[str, tuple[type, ...]]:
    """What an option with this default may be, in words and as types."""
    if isinstance(default, bool):
        return "true or false", (bool,)
    if isinstance(default, int):
        return "a whole number", (int,)
    if isinstance(default, str):
        return "a word", (str,)
    return "a number", (int, float, type(None)) if default is None else (int, float)
