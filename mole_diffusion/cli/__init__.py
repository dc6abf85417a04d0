"""The command line, `mole`: one file per command. Torch and diffusers are imported when a command runs."""

from __future__ import annotations

from ..extras import needs

with needs("cli", "the command line"):
    from .app import app, main

__all__ = ["app", "main"]
