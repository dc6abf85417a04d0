"""Nodes for ComfyUI, in its V3 schema. Put this folder into `custom_nodes`, beside `pip install mole-diffusion`."""

from __future__ import annotations

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
