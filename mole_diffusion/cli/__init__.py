"""The command line, `mole`: one file per command. Torch and diffusers are imported when a command runs."""

from __future__ import annotations

from .app import app, main

__all__ = ["app", "main"]
