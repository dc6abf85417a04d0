"""Final weights of the LoRAs from what a gate reads: softmax, LoRAs that are left out, and the user's scales."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..experts import Run
from ..experts.uncast import uncast
from .config import GateConfig
from .gate import Gate, masked_softmax
from .record import GateRecord
from .spec import GateSpec
from .tokens import reduce_tokens


class Routing:
    """Asks gates for weights: eqs. 9-11 of "Mixture of LoRA Experts" (https://openreview.net/forum?id=uWvKBCYh4S).

    LoRAs that are left out of a call get no weight, and the others share it in proportion.

    Args:
        config: The configuration of the gates.
        num_experts: N, the number of LoRAs.
    """

    def __init__(self, config: GateConfig, num_experts: int) -> None:
        self._config = config
        self._num_experts = num_experts
        many = num_experts > 1
        self._sum_exponent = math.log(config.gate_sum) / math.log(num_experts) if many else 0.0

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
        with uncast(features.device):
            features = features.to(gate.weight.dtype)
            if masks is not None:
                gates = masks.to(features.device, features.dtype).expand(*features.shape[:2], -1)
                return self._correct(gate, spec, features, gates, run, record)
            here, among = self._asked(spec, run)
            keep, shares, final, _ = self._factors(here, features.device, run)
            if self._config.token_axis == "token":
                logits = gate.at_every_token(features, among=among)  # (batch, tokens, experts here)
            else:
                reduced = reduce_tokens(features, self._config.token_axis, spec.positions, size, spec.name)
                logits = gate(reduced, among=among)[:, None]
            kept = masked_softmax(logits, keep, self._config.null_expert)
            # With a graph also where nobody records: a checkpoint's recomputation, which may come when the recording is
            # over, must keep as many tensors as the pass it repeats.
            if record is not None or torch.is_grad_enabled():
                shown = self._spread(kept * shares, here)
                if record is not None:
                    record.add(spec.name, run, shown)
            return self._spread(kept * final, here)

    def _lean(
        self,
        gate: Gate,
        weight: Tensor,
        spec: GateSpec,
        features: Tensor,
        run: Run,
        divisors: tuple[Tensor, Tensor],
    ) -> Tensor | None:
        """`weigh` in few operators; `None` where a LoRA of the scope is left out, of all rows or of one."""
        here, among = (spec.indices, None) if run.kept is None else self._asked(spec, run)
        keep, _, final, plain = self._factors(here, features.device, run)
        if among is not None or keep is not None:
            return None
        gates = gate.shares_at_every_token(features, weight, divisors, self._config.null_expert)
        return self._spread(gates if plain else gates * final, here)

    def _asked(self, spec: GateSpec, run: Run) -> tuple[tuple[int, ...], list[int] | None]:
        """The LoRAs of a scope that any row keeps, and the gate's rows for them; `None` for those of all."""
        if run.kept is None or set(spec.indices) <= set(run.kept):
            return spec.indices, None
        rows = [row for row, index in enumerate(spec.indices) if index in run.kept]
        null = [len(spec.indices)] if self._config.null_expert else []
        return tuple(spec.indices[row] for row in rows), [*rows, *null]

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

    def _factors(
        self, experts: tuple[int, ...], device: torch.device, run: Run
    ) -> tuple[Tensor | None, Tensor, Tensor, bool]:
        """What the softmax over these LoRAs is masked with, multiplied by, and multiplied by with the user's scale.

        The same in all scopes that the same LoRAs touch, as long as nothing else is chosen. `(rows | 1, 1, n)` each; no
        mask where every row keeps all; and whether the last is 1 throughout.
        """
        key = self, experts, device
        known = run.notes if run.call is None else run.call.state
        if key not in known or known[key][0] is not run.keep or known[key][1] is not run.scale:
            index = slice(None) if len(experts) == self._num_experts else list(experts)
            keep = run.keep.to(device)[:, None, index]
            shares = keep * keep.sum(dim=-1, keepdim=True).clamp_min(1) ** self._sum_exponent
            everybody = len(keep) == 1  # each of them is asked for since some row keeps it
            final = shares * run.scale.to(device)[:, None, index]
            plain = not final.is_meta and bool((final == 1).all())
            known[key] = run.keep, run.scale, (None if everybody else keep, shares, final, plain)
        factors: tuple[Tensor | None, Tensor, Tensor, bool] = known[key][2]
        return factors

    def _spread(self, gates: Tensor, experts: tuple[int, ...]) -> Tensor:
        """Gates of some LoRAs as those of all: one that does not touch a scope has no share there."""
        if len(experts) == self._num_experts:
            return gates
        spread = gates.new_zeros(*gates.shape[:2], self._num_experts)
        spread[..., list(experts)] = gates
        return spread
