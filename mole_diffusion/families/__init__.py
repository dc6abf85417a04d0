"""The families of models. A new one is one file here: an `Architecture` of each of its models, and a `Family`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..discovery import one_of_each
from ..errors import MoLEError
from .architecture import Architecture, Joint, Original, Reads, Told, arguments
from .base import Family, Listening, is_a, unwrapped
from .names import canonical_name

FAMILIES: tuple[Family, ...] = tuple(one_of_each(__name__, Family))

ARCHITECTURES: list[Architecture] = list(
    {type(known): known for family in FAMILIES for known in family.architectures.values()}.values()
)
"""Every kind of model that experts can be hung on. A model of your own is described by one more."""

COMPONENTS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *sorted({family.denoiser for family in FAMILIES}),
            *sorted({name for family in FAMILIES for name in family.architectures}),
        ]
    )
)
"""Names that the components with LoRAs have in pipelines, and in files of LoRAs: denoisers first."""

__all__ = [
    "ARCHITECTURES",
    "COMPONENTS",
    "FAMILIES",
    "Architecture",
    "Family",
    "Joint",
    "Listening",
    "Original",
    "Reads",
    "Told",
    "architecture_of",
    "arguments",
    "canonical_name",
    "family_of",
    "is_denoiser",
    "is_read",
    "known_architecture",
]


def known_architecture(model: Any) -> Architecture | None:
    """The architecture of a model, if it is described here."""
    return next((known for known in ARCHITECTURES if is_a(model, known)), None)


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture of a model.

    Raises:
        MoLEError: No architecture here describes the model.
    """
    known = known_architecture(model)
    if known is not None:
        return known
    classes = ", ".join(name for known in ARCHITECTURES for name in known.classes)
    raise MoLEError(
        f"{type(model).__name__} is a kind of model that is not known here, so nobody can say what its modules read "
        f"and in which order they run. Known are {classes}. To describe another, write an Architecture and add it: "
        "`mole_diffusion.families.ARCHITECTURES.append(YourModel())`."
    )


def is_denoiser(model: Any) -> bool:
    """Whether a component of a pipeline is a denoiser that is known here."""
    return isinstance(model, nn.Module) and any(is_a(model, known) for known in ARCHITECTURES if known.denoiser)


def is_read(components: Mapping[str, Any], component: str, module: str) -> bool:
    """Whether a picture depends on what a module computes, as far as is known of these models.

    Args:
        components: All models of a pipeline by name, or some.
        component: That of the module.
        module: Its name.
    """
    family = next((family for family in FAMILIES if family.fits(components)), None)
    if family is not None and component in family.architectures:
        return family.is_read(components, component, module)
    known = known_architecture(components[component])
    return known is None or known.is_read(unwrapped(components[component]), module)


def family_of(components: Mapping[str, Any]) -> Family:
    """The family that a pipeline is of.

    Args:
        components: The components of the pipeline, by name.

    Raises:
        MoLEError: The pipeline is of none that is known.
    """
    for family in FAMILIES:
        if family.fits(components):
            family.refuse(components)
            return family
    denoisers = {name: components.get(name) for name in ("unet", "transformer")}
    for name, model in denoisers.items():
        inside = next(filter(is_denoiser, model.modules()), None) if isinstance(model, nn.Module) else None
        if inside is not None and inside is not model:
            raise MoLEError(
                f"the {name} is a {type(inside).__name__} inside of a {type(model).__name__}, by which LoRAs would not "
                f"find its modules. Take it out, for PEFT's by `pipe.{name} = pipe.{name}.unload()`, and load an "
                "adapter's file with `load_loras`."
            )
    found = [f"{name} ({type(model).__name__})" for name, model in denoisers.items() if model is not None]
    raise MoLEError(
        f"a pipeline with {' and '.join(found) or 'neither unet nor transformer'} is of no family that is known here. "
        f"Known are {', '.join(family.title for family in FAMILIES)}."
    )
