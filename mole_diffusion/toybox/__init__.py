"""The embedded world: a Stable Diffusion in miniature with ground truth, subjects, their LoRAs and gates.

Everything lies inside the package: `base_dir()` opens with stock `diffusers.StableDiffusionPipeline.from_pretrained`,
the LoRA files with stock `load_lora_weights`, `clip_dir()` with open_clip.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mole_diffusion.errors import MoLEError

from .anonymous import AnonymousSubjectsError, anonymous_subjects
from .render import render
from .show import show
from .subjects import SUBJECTS, Subject, described_prompt, references, subject, subject_prompt
from .world import GROUNDS, Look, Scene, SceneObject, picture_side

if TYPE_CHECKING:
    from .concepts import concept
    from .oracle import Detection, Finding, Oracle

__all__ = [
    "GROUNDS",
    "AnonymousSubjectsError",
    "Detection",
    "Finding",
    "Look",
    "Oracle",
    "Scene",
    "SceneObject",
    "Subject",
    "anonymous_subjects",
    "base_dir",
    "class_name",
    "clip_dir",
    "concept",
    "demo_subjects",
    "described_prompt",
    "gates_dir",
    "lora_path",
    "picture_side",
    "references",
    "render",
    "show",
    "subject",
    "subject_prompt",
    "subjects",
    "token",
]

_ASSETS = Path(__file__).parent / "assets"
_DEMO = ("cat", "boot", "teapot")


def __getattr__(name: str) -> object:
    # The oracle and gate training need torch, which takes seconds to import; names, tokens and pictures do not.
    if name in ("Oracle", "Detection", "Finding"):
        from . import oracle

        return getattr(oracle, name)
    if name == "concept":
        from .concepts import concept

        return concept
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def base_dir() -> Path:
    """Folder of the base model, in diffusers' layout."""
    return _asset("base")


def clip_dir() -> Path:
    """Folder of the toybox's CLIP: `open_clip.create_model_and_transforms(f"local-dir:{clip_dir()}")` opens it."""
    return _asset("clip")


def subjects() -> list[str]:
    """Names of all subjects."""
    return list(SUBJECTS)


def demo_subjects() -> list[str]:
    """The three subjects of `mole demo`."""
    return list(_DEMO)


def token(name: str | Subject) -> str:
    """The subject's rare token, such as "<v1>"."""
    return subject(name).token


def class_name(name: str | Subject) -> str:
    """What the subject is, such as "cat"."""
    return subject(name).class_name


def lora_path(name: str, layout: Literal["diffusers", "kohya"] = "diffusers") -> Path:
    """The subject's LoRA file. Two subjects have one in kohya's layout too.

    Raises:
        MoLEError: There is no such subject, or it has no file in that layout.
    """
    subject(name)
    if layout not in ("diffusers", "kohya"):
        raise MoLEError(f'layout {layout!r} is not one of "diffusers", "kohya".')
    path = _ASSETS / ("loras" if layout == "diffusers" else "loras-kohya") / f"{name}.safetensors"
    if not path.exists():
        there = sorted(file.stem for file in path.parent.glob("*.safetensors"))
        raise MoLEError(f"subject {name!r} has no LoRA in {layout} layout; these have one: {there}.")
    return path


def gates_dir(names: str) -> Path:
    """Folder of the gates for several subjects, such as `"cat+boot+teapot"`; load the LoRAs in this order.

    Raises:
        MoLEError: No gates ship for these subjects.
    """
    path = _ASSETS / "gates" / names
    if not path.is_dir():
        there = sorted(folder.name for folder in path.parent.glob("*+*"))
        raise MoLEError(
            f"no gates for {names!r} ship with the toybox; there are {there}. Train some with train_gates()."
        )
    return path


def _asset(name: str) -> Path:
    path = _ASSETS / name
    if not path.is_dir():
        raise FileNotFoundError(
            f"the toybox's {name} is missing at {path}. Reinstall the package, or `mole toybox build`."
        )
    return path
