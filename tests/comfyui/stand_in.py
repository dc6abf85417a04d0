"""A stand-in for `comfy_api.latest`, which is in no package registry.

It has only what `comfyui/` uses of the published V3 schema (`comfy_api/latest/_io.py` of ComfyUI), as strict about
names of inputs as that is. It shows that schemas are made and nodes run, not that ComfyUI's server and front end take
them.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

_COMMON = {"display_name", "optional", "tooltip", "lazy", "extra_dict", "raw_link"}
_WIDGET = _COMMON | {"default", "socketless", "force_input"}


class _Slot:
    def __init__(self, io_type: str, id: str | None, options: dict[str, Any], allowed: set[str]) -> None:
        unknown = set(options) - allowed
        if unknown:
            raise TypeError(f"{io_type} has no {unknown}")
        self.io_type, self.id, self.options = io_type, id, options


def _type(io_type: str, allowed: set[str]) -> Any:
    return SimpleNamespace(
        Input=lambda id, **options: _Slot(io_type, id, options, allowed),
        Output=lambda id=None, **options: _Slot(io_type, id, options, {"display_name", "tooltip", "is_output_list"}),
    )


class Schema:
    """What a node says of itself."""

    def __init__(
        self,
        node_id: str,
        display_name: str | None = None,
        category: str = "sd",
        inputs: Any = None,
        outputs: Any = None,
        description: str = "",
    ) -> None:
        self.node_id, self.display_name, self.category = node_id, display_name, category
        self.inputs, self.outputs, self.description = inputs, outputs, description


class NodeOutput:
    """What a node gives."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def install() -> None:
    """Makes `from comfy_api.latest import …` find the stand-in."""
    package, latest = ModuleType("comfy_api"), ModuleType("comfy_api.latest")
    latest.io = SimpleNamespace(  # type: ignore[attr-defined]
        ComfyNode=type("ComfyNode", (), {}),
        Schema=Schema,
        NodeOutput=NodeOutput,
        Custom=lambda io_type: _type(io_type, _COMMON),
        String=_type("STRING", _WIDGET | {"multiline", "placeholder", "dynamic_prompts"}),
        Float=_type("FLOAT", _WIDGET | {"min", "max", "step", "round", "display_mode"}),
        Int=_type("INT", _WIDGET | {"min", "max", "step", "control_after_generate", "display_mode"}),
        Combo=_type("COMBO", _WIDGET | {"options", "control_after_generate", "upload", "image_folder", "remote"}),
        Mask=_type("MASK", _COMMON),
        Image=_type("IMAGE", _COMMON),
    )
    latest.ComfyExtension = type("ComfyExtension", (), {})  # type: ignore[attr-defined]
    sys.modules |= {"comfy_api": package, "comfy_api.latest": latest}
