"""Mixture of LoRA Experts: the gates in the layers weigh."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from ..errors import MoLEError
from ..experts import Projections, Run, Site
from ..experts.rules import Ruled
from ..gating import MoLEModel
from ..methods import GatesAlone
from .base import Composition


class MoLE(GatesAlone, Composition):
    """Trained gates choose the weights anew in every layer, step and sample.

    Eqs. 5-13 of "Mixture of LoRA Experts" (https://openreview.net/forum?id=uWvKBCYh4S). The gates live in
    `mole_diffusion.gating`; masking a LoRA renormalises the others in proportion.

    Args:
        gates: The gates; a pipeline hands over its own.

    Raises:
        MoLEError: `gates` were trained to correct masks.
    """

    name = "mole"
    source = "Mixture of LoRA Experts (ICLR 2024), eqs. 5-13"

    def __init__(self, gates: MoLEModel | None = None) -> None:
        self.gates = gates

    @property
    def gates(self) -> MoLEModel | None:
        """The gates."""
        return self._gates

    @gates.setter
    def gates(self, gates: MoLEModel | None) -> None:
        if gates is not None and gates.gate_config.residual:
            raise MoLEError(
                f"the gates for {', '.join(gates.lora_names)} were trained to correct masks, and do not weigh alone. "
                'Use `set_composition("masked_gates")`.'
            )
        self._gates = gates

    def reads_left_out(self, site: Site) -> bool:
        return self._gates is not None and self._gates.reads_left_out(site)

    @property
    def of_groups(self) -> Collection[str]:
        """As `MoLEModel.of_groups`."""
        return self._gates.of_groups if self._gates is not None and type(self).weigh is MoLE.weigh else ()

    @property
    def has_rules(self) -> bool:
        """Whether a compiled graph can weigh as the gates do, without asking them."""
        return type(self).weigh is MoLE.weigh and self._gates is not None and self._gates.has_rules

    def rules(self, parts: Mapping[Site, str]) -> dict[str, Ruled]:
        """As `MoLEModel.rules`."""
        assert self._gates is not None
        return self._gates.rules(parts)

    def rules_now(self, run: Run) -> None:
        """As `MoLEModel.rules_now`."""
        assert self._gates is not None
        self._gates.rules_now(run)

    def weigh(self, site: Site, projections: Projections, run: Run) -> Tensor | None:
        if self._gates is None:
            raise MoLEError('composition "mole" has no gates. Load some with `pipe.load_gates`, or pass MoLE(gates).')
        return self._gates.weigh(site, projections, run)
