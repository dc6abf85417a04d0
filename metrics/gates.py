"""What gates did: how evenly they share, by place and by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import MoLEError
from ..gating import GateRecord
from .averages import Averages


class GateStatistics(NamedTuple):
    """How evenly gates `(rows, num_loras)` share, row by row.

    Attributes:
        share: `(rows, num_loras)`, each LoRA's part of what all LoRAs got. Rows sum to one, but for a row of zeros.
        entropy: `(rows,)`, in nats: 0 where one LoRA has all, `log num_loras` where all have the same.
        effective: `(rows,)`, the effective number of LoRAs, `exp(entropy)`.
    """

    share: Tensor
    entropy: Tensor
    effective: Tensor


def gate_statistics(gates: Tensor) -> GateStatistics:
    """Entropy and effective number of LoRAs of each row of gates.

    Args:
        gates: `(rows, num_loras)`. They sum to less than one where a null expert took the rest.

    Raises:
        MoLEError: The shape is another, or a gate is negative.
    """
    gates = gates.detach().double().cpu()
    if gates.ndim != 2 or (gates < 0).any():
        raise MoLEError(f"gates must be (rows, num_loras), none below zero, got {tuple(gates.shape)}: {gates}.")
    share = gates / gates.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
    entropy = -torch.special.xlogy(share, share).sum(dim=-1)
    return GateStatistics(share, entropy, entropy.exp())


class GateReport(Averages):
    """Share of each LoRA, entropy and effective number of LoRAs, by place and by denoising step.

    Rows of a batch count alike, the unconditional ones of guidance included. Text encoders have places but no steps.

    Args:
        places: Names of the gates, as in `GateRecord.names`.
        loras: Names of the LoRAs.
        steps: Number of denoiser passes of a call.
        kwargs: What every `torchmetrics.Metric` takes.
    """

    def __init__(self, places: Sequence[str], loras: Sequence[str], steps: int, **kwargs: Any) -> None:
        lines = [*places, *(f"step {k}" for k in range(steps))]
        columns = [*(f"share of {name}" for name in loras), "entropy", "effective LoRAs"]
        super().__init__([f"{line}: {column}" for line in lines for column in columns], **kwargs)
        self.places, self.loras, self.steps = list(places), list(loras), steps

    def update(self, record: GateRecord) -> None:
        """Counts one call's record, taken with `gates.record(accumulate=True)`.

        Raises:
            MoLEError: The record is of other gates, LoRAs or another number of steps.
        """
        if list(record.lora_names) != self.loras or not set(record.names) <= set(self.places) or not record.names:
            raise MoLEError(
                f"the record has gates {list(record.names)[:3]}… for {list(record.lora_names)}; this report is for "
                f"{self.places[:3]}… and {self.loras}."
            )
        for place in record.names:
            by_step = record.by_pass[place]
            denoiser = not place.startswith("text_encoder")
            if denoiser and len(by_step) != self.steps:
                raise MoLEError(
                    f"the record has {len(by_step)} passes at {place}, and this report is for {self.steps} steps. "
                    "Record one whole call with `record(accumulate=True)`."
                )
            for step, gates in enumerate(by_step):
                share, entropy, effective = gate_statistics(gates)
                rows = torch.cat([share, entropy[:, None], effective[:, None]], dim=1)
                self._add_line(self.places.index(place), rows)
                if denoiser:
                    self._add_line(len(self.places) + step, rows)

    def _add_line(self, line: int, rows: Tensor) -> None:
        width = rows.shape[1]
        values = rows.new_full((len(rows), len(self.names)), float("nan"))
        values[:, line * width : (line + 1) * width] = rows
        self.add(values)
