"""The methods a benchmark compares, read strictly: compositions, with gates that lie there or are trained for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mole_diffusion.errors import MoLEError
from mole_diffusion.files import refuse_alike
from mole_diffusion.gating.config import GateConfig
from mole_diffusion.methods import METHODS, check_options
from mole_diffusion.training.gates.config import GateTrainingConfig

if TYPE_CHECKING:
    from mole_diffusion.composition import Composition

SOUP = GateConfig(input="none", scope="matrix")
TRAINED_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "soup": ("mole", {"gates": SOUP.to_dict()}),
    "masked_gates": ("masked_gates", {"preset": "masks"}),
}
"""Methods by name that are a composition with gates of a kind of their own: name of the composition, settings of the
training. "soup" is CAT of "LoRA Soups" (https://arxiv.org/abs/2410.13025): one learned number per LoRA and matrix."""


@dataclass(frozen=True)
class Method:
    """A way to compose, as a benchmark compares it.

    Attributes:
        name: Name of the composition, as in `METHODS`.
        label: Its name in tables, and the name of its folders.
        arguments: Arguments of the composition.
        training: How its gates are trained where there are none yet; `None` where it has no gates, or they lie where
            the benchmark says.
    """

    name: str
    label: str
    arguments: tuple[tuple[str, Any], ...] = ()
    training: GateTrainingConfig | None = None

    def build(self) -> Composition:
        from mole_diffusion.composition import COMPOSITIONS

        return COMPOSITIONS[self.name](**dict(self.arguments))


def read_methods(given: Any, *, has_gates: bool, can_train: bool, training: Mapping[str, Any]) -> list[Method]:
    """The methods of a benchmark.

    Args:
        given: "all", or a list of names, alone or with their arguments, `{merge: {scale: 1.0}}`; "all" may be one of
            them. `label` and, where there are gates, `training` may stand among these:
            `{mole: {label: "layer", training: {steps: 100}}}`.
        has_gates: Whether gates lie somewhere. They are used by every method that has no training of its own.
        can_train: Whether there are prompts to train on.
        training: Settings that all trainings share.

    Raises:
        MoLEError: A method is unknown, has an argument that is not allowed, or lacks gates; or a label comes twice.
    """
    every = [name for name in METHODS if name not in TRAINED_METHODS]
    every = [name for name in every if has_gates or can_train or "gates" not in METHODS[name]().needs]
    every += [name for name in TRAINED_METHODS if can_train]
    given = ["all"] if given == "all" else given
    if not isinstance(given, list) or not given:
        raise MoLEError(f'`methods` must be "all" or a list of names, got {given!r}.')
    # "all" takes in a method that is added later without a change.
    named = [method for entry in given for method in (every if entry == "all" else [entry])]
    methods = [_method(entry, has_gates=has_gates, can_train=can_train, training=training) for entry in named]
    remedy = "Give one a label of its own: {mole: {label: other}}."
    refuse_alike((method.label for method in methods), "methods", remedy)
    return methods


def _method(entry: Any, *, has_gates: bool, can_train: bool, training: Mapping[str, Any]) -> Method:
    given, arguments = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, {})
    known = dict.fromkeys((*METHODS, *TRAINED_METHODS))
    if not isinstance(given, str) or given not in known or not isinstance(arguments, dict):
        raise MoLEError(
            f"{entry!r} is no method. Write a name, one of {', '.join(known)}, or a name with its arguments "
            "such as {merge: {scale: 1.0}}."
        )
    name, preset = TRAINED_METHODS.get(given, (given, None))
    own = {key: value for key, value in arguments.items() if key not in ("label", "training")}
    label = arguments.get("label", _default_label(given, own))
    if not isinstance(label, str) or not label.strip(". ") or "/" in label or "\\" in label or not label.isprintable():
        raise MoLEError(f"method {entry!r}: a label names a folder too, so it cannot be {label!r}.")
    try:
        needs_gates = "gates" in check_options(name, own).needs
    except MoLEError as error:
        raise MoLEError(f"method {entry!r}: {error}") from None
    wishes = arguments.get("training")
    if wishes is not None and not (needs_gates and isinstance(wishes, dict)):
        raise MoLEError(f"method {entry!r}: `training` is a mapping of settings, of a method that has gates.")
    trains = needs_gates and (wishes is not None or preset is not None or not has_gates)
    if trains and not can_train:
        raise MoLEError(
            f"method {given!r} needs gates. Say what to train them on, `train_prompts: [...]`"
            + (", or where they lie: `gates: folder`, or `gates: toybox`." if name == given else ".")
        )
    settings = GateTrainingConfig.from_dict(_merged(training, preset or {}, wishes or {})) if trains else None
    return Method(name, label, tuple(own.items()), settings)


def _default_label(name: str, arguments: Mapping[str, Any]) -> str:
    inside = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return f"{name}({inside})" if inside else name


def _merged(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """The later goes before the earlier, in `gates` setting by setting."""
    merged: dict[str, Any] = {}
    for given in settings:
        both = (merged.get("gates"), given.get("gates"))
        merged |= given
        if all(isinstance(gates, Mapping) for gates in both):
            merged["gates"] = {**both[0], **both[1]}  # type: ignore[dict-item]
    return merged
