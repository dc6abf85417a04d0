"""Tests of mole_diffusion, in folders as the source; a package so that they can share `tests.tiny` and the like."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
