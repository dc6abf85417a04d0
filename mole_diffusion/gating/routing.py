"""Final weights of the LoRAs from what a gate reads: softmax, LoRAs that are left out, and the user's scales."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..experts import Run
from ..experts.uncast import uncast
from .config import GateConfig
from .gate import Gate, masked_softmax
from .record import GateRecord
from .spec import GateSpec
from .tokens import reduce_tokens


@dataclass(frozen=True, eq=False)
class _Asked:
    """What the gates over the same LoRAs are asked for, and what is made of it, as long as nothing else is chosen.

    Of n LoRAs: those of the gate that any row keeps.

    Attributes:
        made_of: `keep` and `scale` that it was worked out from.
        rows: Of the gates' weights; `None` for all.
        columns: Among all N LoRAs; `None` where they are all.
        keep: What the softmax is masked with, `(rows, 1, n)`; `None` where every row keeps all.
        shares: What it is multiplied by, `(rows | 1, 1, n)`.
        final: The same with the user's scale.
        plain: Whether that is 1 throughout.
    """

    made_of: tuple[Tensor, Tensor]
    rows: Tensor | None
    columns: Tensor | None
    keep: Tensor | None
    shares: Tensor
    final: Tensor
    plain: bool


class Routing:
    """Asks gates for weights: eqs. 9-11 of "Mixture of LoRA Experts" (https://openreview.net/forum?id=uWvKBCYh4S).

    LoRAs that are left out of a call get no weight, and the others share it in proportion.

    Args:
        config: The configuration of the gates.
        num_experts: N, the number of LoRAs.

    Attributes:
        sum_exponent: Of the number of LoRAs that are kept: that power of it is what their weights sum to.
    """

    def __init__(self, config: GateConfig, num_experts: int) -> None:
        self._config = config
        self._num_experts = num_experts
        many = num_experts > 1
        self.sum_exponent = math.log(config.gate_sum) / math.log(num_experts) if many else 0.0

    def weigh(
        self,
        gate: Gate,
        spec: GateSpec,
        features: Tensor,
        size: tuple[int, int] | None,
        run: Run,
        masks: Tensor | None,
        record: GateRecord | None,
        divisors: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Final weights of one scope, `(batch, tokens | 1, N)`.

        Args:
            gate: The gate; it is moved to where the features are.
            spec: Its entry in the table of gates.
            features: What it reads, `(batch, tokens, width)`.
            size: `(height, width)` of the tokens where they are the pixels of a picture.
            run: The forward pass.
            masks: What `residual` gates correct, as in `MoLEModel.weigh`.
            record: Where to note what the gate gives.
            divisors: As `Gate.shares_at_every_token` takes them, where the gate may be asked that way.
        """
        weight = gate.weight
        if weight.device != features.device:
            gate.to(features.device)
            weight = gate.weight
        if divisors is not None:
            lean = self._lean(gate, weight, spec, features, run, divisors)
            if lean is not None:
                return lean
        with uncast(features.device.type):
            features = features.to(gate.weight.dtype)
            if masks is not None:
                gates = masks.to(features.device, features.dtype).expand(*features.shape[:2], -1)
                return self._correct(gate, spec, features, gates, run, record)
            asked = self._asked(spec, features.device, run)
            if self._config.token_axis == "token":
                logits = gate.at_every_token(features, among=asked.rows)  # (batch, tokens, n)
            else:
                reduced = reduce_tokens(features, self._config.token_axis, spec.positions, size, spec.name)
                logits = gate(reduced, among=asked.rows)[:, None]
            kept = masked_softmax(logits, asked.keep, self._config.null_expert)
            # With a graph also where nobody records: a checkpoint's recomputation, which may come when the recording is
            # over, must keep as many tensors as the pass it repeats.
            if record is not None or torch.is_grad_enabled():
                shown = self._spread(kept * asked.shares, asked)
                if record is not None:
                    record.add(spec.name, run, shown)
            return self._spread(kept * asked.final, asked)

    def _lean(
        self,
        gate: Gate,
        weight: Tensor,
        spec: GateSpec,
        features: Tensor,
        run: Run,
        divisors: tuple[Tensor, Tensor],
    ) -> Tensor | None:
        """`weigh` in few operators; `None` where rows of the batch keep different LoRAs."""
        asked = self._asked(spec, features.device, run)
        if asked.keep is not None:
            return None
        if asked.rows is not None:
            weight = weight.index_select(0, asked.rows)
        gates = gate.shares_at_every_token(features, weight, divisors, self._config.null_expert)
        return self._spread(gates if asked.plain else gates * asked.final, asked)

    def _correct(
        self, gate: Gate, spec: GateSpec, features: Tensor, masks: Tensor, run: Run, record: GateRecord | None
    ) -> Tensor:
        """What a `residual` gate adds to masks, at most 1 either way, and nothing for LoRAs that are left out."""
        index = list(spec.indices)
        added = gate.at_every_token(features, masks[..., index]).tanh() * run.keep.to(masks.device)[:, None, index]
        gates = masks.index_add(-1, torch.tensor(index, device=masks.device), added)
        if record is not None:
            record.add(spec.name, run, gates)
        return gates * run.scale.to(gates.device)[:, None]

    def _asked(self, spec: GateSpec, device: torch.device, run: Run) -> _Asked:
        """The same in all scopes that the same LoRAs touch: worked out once a call."""
        key = self, spec.indices, device
        known = run.notes if run.call is None else run.call.state
        asked: _Asked | None = known.get(key)
        if asked is None or asked.made_of[0] is not run.keep or asked.made_of[1] is not run.scale:
            known[key] = asked = self._work_out(spec.indices, device, run)
        return asked

    def _work_out(self, indices: tuple[int, ...], device: torch.device, run: Run) -> _Asked:
        here, rows = indices, None
        if run.kept is not None and not set(indices) <= set(run.kept):
            kept = [row for row, index in enumerate(indices) if index in run.kept]
            here = tuple(indices[row] for row in kept)
            null = [len(indices)] if self._config.null_expert else []
            rows = torch.tensor([*kept, *null], dtype=torch.long, device=device)
        columns = None
        if len(here) < self._num_experts:
            columns = torch.tensor(here, dtype=torch.long, device=device)
        keep, scale = (x.to(device)[:, None, list(here)] for x in (run.keep, run.scale))
        shares = keep * keep.sum(dim=-1, keepdim=True).clamp_min(1) ** self.sum_exponent
        everybody = len(keep) == 1  # each of them is asked for since some row keeps it
        final = shares * scale
        plain = not final.is_meta and bool((final == 1).all())
        return _Asked((run.keep, run.scale), rows, columns, None if everybody else keep, shares, final, plain)

    def _spread(self, gates: Tensor, asked: _Asked) -> Tensor:
        """Gates of some LoRAs as those of all: one that does not touch a scope has no share there."""
        if asked.columns is None:
            return gates
        return gates.new_zeros(*gates.shape[:2], self._num_experts).index_copy_(-1, asked.columns, gates)
