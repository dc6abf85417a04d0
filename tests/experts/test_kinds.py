"""Which kind of compiled graph suits all who draw, and to whom it shows attention."""

from __future__ import annotations

from typing import Any

import torch

from mole_diffusion.composition import COMPOSITIONS, MaskedGates, Masks
from mole_diffusion.experts.kinds import MOST_LORAS, Kinds
from tests.weighing import Numbers


def test_the_kind_suits_everybody_who_draws() -> None:
    linear, budget, masks = COMPOSITIONS["linear"](), COMPOSITIONS["budget"](), Masks()
    gates = Numbers(torch.ones(3))
    kinds = Kinds(3)
    assert kinds.now == "modules"  # the base alone
    kinds.settle(gates)
    assert kinds.now == "any"
    with kinds.drawing(budget, gates):
        assert kinds.now == "modules"
    with kinds.drawing(linear, gates):
        assert kinds.now == "modules"
        with kinds.drawing(masks, gates):
            assert kinds.now == "places"
            with kinds.drawing(gates, gates):
                assert kinds.now == "any"
            with kinds.drawing(budget, gates):  # of modules, where masks are of places
                assert kinds.now == "any"
            with kinds.drawing(None, gates):
                assert kinds.now == "any"
        assert kinds.now == "modules"
    assert kinds.now == "any"
    own, others = HasRules(), HasRules()
    with kinds.drawing(own, gates):
        assert kinds.now == "rules"
        assert kinds.weigher is own
        with kinds.drawing(own, gates), kinds.drawing(None, None):  # who draws the base needs nothing
            assert kinds.now == "rules"
        with kinds.drawing(others, gates):
            assert kinds.now == "any"
        with kinds.drawing(linear, gates):
            assert kinds.now == "any"
    with kinds.drawing(others, gates):
        assert kinds.weigher is others
    assert Kinds(MOST_LORAS).now == "modules"
    assert Kinds(MOST_LORAS + 1).now == "any"


def test_a_graph_shows_attention_to_whom_it_concerns() -> None:
    linear, masks, freefuse = (COMPOSITIONS[name]() for name in ("linear", "masks", "freefuse"))
    kinds = Kinds(3)

    def shown() -> tuple[bool, bool]:
        return kinds.shows(crossed=True), kinds.shows(crossed=False)

    assert shown() == (False, False)
    with kinds.drawing(masks, None):
        assert shown() == (True, False)
        with kinds.drawing(linear, None):
            assert shown() == (True, False)
        with kinds.drawing(freefuse, None):
            assert shown() == (True, True)
        with kinds.drawing(MaskedGates(masks), None):
            assert shown() == (True, False)
        with kinds.drawing(MasksOfModules(), None):
            assert shown() == (True, False)
    assert shown() == (False, False)


class HasRules(Numbers):
    has_rules = True

    def __init__(self) -> None:
        super().__init__(torch.ones(3))


class MasksOfModules(Masks):
    def weigh(self, site: Any, projections: Any, run: Any) -> Any:
        return super().weigh(site, projections, run)


def test_a_method_that_looks_at_modules_is_of_no_place() -> None:
    with Kinds(3).drawing(method := MasksOfModules(), None):
        assert not method.of_places
    assert Masks().of_places
