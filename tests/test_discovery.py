"""A new layout of files, kind of adapter or family of models is one file in its folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mole_diffusion.discovery import modules_in, one_of_each
from mole_diffusion.families import FAMILIES, Family
from mole_diffusion.lora.kinds import KINDS, Kind, KindError, kind_of
from mole_diffusion.lora.layouts import LAYOUTS

Put = Callable[[str, str], None]

NEW_LAYOUT = """
from mole_diffusion.lora.layouts.slot import Slot

def shouted(key):
    return Slot("unet", "mid", "down") if key.isupper() else None

LAYOUTS = {"shouted": shouted}
"""
NEW_KIND = """
from mole_diffusion.lora.kinds.base import Kind
from mole_diffusion.lora.kinds.lora import PlainLoRA  # of another file, and not found here

class Halved(PlainLoRA):
    name, marks, takes = "halved", frozenset({"half"}), frozenset({"half", "down", "up"})
"""
NEW_FAMILY = """
from mole_diffusion.families.stable_diffusion import StableDiffusion

class Closed(StableDiffusion):
    name = title = "closed"
"""


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Put]:
    """Puts a file into a package's folder, as far as Python can tell."""

    def into(package: str, text: str) -> None:
        (tmp_path / "a_new_one.py").write_text(text)
        monkeypatch.setattr(sys.modules[package], "__path__", [*sys.modules[package].__path__, str(tmp_path)])
        importlib.invalidate_caches()

    yield into
    for name in [name for name in sys.modules if name.endswith(".a_new_one")]:
        package = sys.modules[name.rpartition(".")[0]]
        vars(package).pop("a_new_one", None)
        del sys.modules[name]


def test_a_layout_is_one_file(put: Put) -> None:
    put("mole_diffusion.lora.layouts", NEW_LAYOUT)
    found = {name for module in modules_in("mole_diffusion.lora.layouts") for name in getattr(module, "LAYOUTS", {})}
    assert found == {*LAYOUTS, "shouted"}


def test_a_kind_is_one_file(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put("mole_diffusion.lora.kinds", NEW_KIND)
    found = one_of_each("mole_diffusion.lora.kinds", Kind)
    assert sorted(kind.name for kind in found) == sorted([*(kind.name for kind in KINDS), "halved"])
    # The lists hold whatever is found when the package is imported; which kind parts are of depends on no order.
    for order in (found, found[::-1]):
        monkeypatch.setattr("mole_diffusion.lora.kinds.KINDS", tuple(order))
        monkeypatch.setattr("mole_diffusion.lora.kinds._MARKS", frozenset(m for kind in order for m in kind.marks))
        named = [kind_of(parts) for parts in (["down", "up", "half"], ["down", "up"], ["down", "mid", "up"], ["alpha"])]
        assert [kind and kind.name for kind in named] == ["halved", "LoRA", "Tucker LoRA", None]
        with pytest.raises(KindError, match="together with"):
            kind_of(["down", "up", "half", "hada_w1_a"])


def test_a_family_is_one_file(put: Put) -> None:
    put("mole_diffusion.families", NEW_FAMILY)
    found = one_of_each("mole_diffusion.families", Family)
    assert sorted(family.name for family in found) == sorted([*(family.name for family in FAMILIES), "closed"])


def test_what_is_found_stands_in_an_order_of_its_own() -> None:
    assert list(LAYOUTS) == sorted(LAYOUTS)
    assert [type(f).__module__ for f in FAMILIES] == sorted(type(f).__module__ for f in FAMILIES)
