"""Masks, corrected by trained gates."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import MoLEError
from ..experts import Projections, Run, Site
from ..gating import MoLEModel
from .masks import Masks
from .regional import RegionalComposition, is_alone
from .wrapper import Wrapper


class MaskedGates(Wrapper):
    """A method that finds masks, and gates that were trained to correct its weights.

    With `m_i` the weight that the method gives LoRA i at a place, 1 on its own pixels and words and 0 on others', a
    gate reads the hidden state and the masks there and adds to them::

        gamma_i = m_i + tanh(<Norm(h), e_i> / tau + <m, c_i> / tau)

    e and c start at zero, so untrained gates are the method itself, bit for bit; trained, they may take a LoRA off
    where its mask is and put it where it is not, and no further. Gates of this kind are made with
    `GateConfig(residual=True)`, trained with `train_gates` (preset "masks"), and belong to one set of LoRAs.

    A LoRA that is the only one in a call is that LoRA plainly, and where the method leaves all out, so do gates.

    Args:
        method: Whose masks; by default `Masks`.
        gates: The gates; a pipeline hands over its own.

    Raises:
        MoLEError: `method` gives LoRAs no masks, or `gates` are of another kind.
    """

    name = "masked_gates"
    source = "masks; what gates add reads the hidden state as in Mixture of LoRA Experts (ICLR 2024)"

    def __init__(self, method: RegionalComposition | None = None, gates: MoLEModel | None = None) -> None:
        method = Masks() if method is None else method
        super().__init__(method)
        if not isinstance(method, RegionalComposition):
            raise MoLEError(
                f"composition {method.name!r} gives LoRAs no masks that gates could correct. Pass one that does, such "
                "as MaskedGates(Masks()) or MaskedGates(FreeFuse())."
            )
        self.needs = method.needs | {"gates"}
        self.gates = gates

    @property
    def gates(self) -> MoLEModel | None:
        """The gates."""
        return self._gates

    @gates.setter
    def gates(self, gates: MoLEModel | None) -> None:
        if gates is not None and not gates.gate_config.residual:
            raise MoLEError(
                f"the gates for {', '.join(gates.lora_names)} weigh LoRAs alone and correct no masks. Use "
                '`set_composition("mole")`, or train gates for masks: preset "masks", GateConfig(residual=True).'
            )
        self._gates = gates

    def joins(self, total: int) -> int:
        """The first of `total` steps, from 0, in which LoRAs act."""
        return int(self.method.joins(total))

    def weigh(self, site: Site, projections: Projections, run: Run) -> Tensor | None:
        if self.gates is None:
            raise MoLEError(
                'composition "masked_gates" has no gates. Load some with `pipe.load_gates`, or use "masks".'
            )
        if is_alone(self.method.call(run), run):
            return self.method.weigh(site, projections, run)
        masks = self.method.weigh(site, projections, replace(run, scale=self._ones(run)))
        return None if masks is None else self.gates.weigh(site, projections, run, masks)

    def _ones(self, run: Run) -> Tensor:
        """Scales of 1, since gates read masks without the user's scales; the same tensor for the whole call."""
        kept: dict[str, tuple[Tensor, Tensor]] = run.call.state.setdefault((self, "ones"), {})
        if run.component not in kept or kept[run.component][0] is not run.scale:
            kept[run.component] = run.scale, torch.ones_like(run.scale)
        return kept[run.component][1]
