"""Gates as part of a compiled graph: plain operators, of which the compiler makes what it likes."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
import torch._dynamo
from torch import Tensor

from ..experts.rules import RULES, Ruled
from .gate import TINY, Gate
from .spec import GateSpec

RULE = "gate"


def rule_of(spec: GateSpec, gate: Gate, part: str, device: torch.device, null_expert: bool, exponent: float) -> Ruled:
    """What a graph has of a gate that reads hidden states at every token, at a module that it reads.

    Args:
        spec: Its entry in the table of gates.
        gate: The gate; it is moved to `device`.
        part: The compiled part of the model that all its modules lie in.
        device: Where it computes.
        null_expert: Whether the last of its weights is of an expert that adds nothing.
        exponent: As in `Routing`, of the number of LoRAs that are kept.
    """
    gate.to(device)
    features = gate.num_features if gate.normalization == "rms" else 1
    columns = torch.tensor(spec.indices, device=device)
    tensors = gate.weight.detach(), gate.log_temperature.detach(), columns
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor, guard=False)  # a recorded CUDA graph need not copy them
    place = spec.name.removeprefix(spec.component).removeprefix(f".{part}")
    return Ruled(RULE, f"{RULE}{place}", tensors, (float(features), float(null_expert), exponent), True)


def follow(gate: Gate, ruled: Ruled) -> None:
    """Have a graph's tensors be those of the gate again, where these are others since: moved, or loaded anew."""
    with torch.no_grad():
        for its, now in zip(ruled.tensors, (gate.weight, gate.log_temperature), strict=False):
            if its.data_ptr() != now.data_ptr():
                its.copy_(now)


def _weights(
    features: Tensor, projected: Tensor, choice: Tensor, tensors: Sequence[Tensor], numbers: Sequence[float]
) -> Tensor:
    """As `Gate.at_every_token` and `Routing.weigh`, LoRA by LoRA: so the compiler reads hidden states once for all.

    Args:
        features: What the gate reads, `(batch, tokens, width)`.
        projected: Not read.
        choice: `keep` and `scale`, and one more that is not read, `(3, batch, N)`.
        tensors, numbers: Of `rule_of`.

    Returns:
        `(batch, tokens, N)`.
    """
    weight, log_temperature, columns = tensors
    num_features, null_expert, exponent = numbers
    rows = features.to(weight.dtype)
    square_norm = rows.square().sum(dim=-1)
    divisor = (square_norm + TINY * num_features).sqrt() * (log_temperature.exp() / math.sqrt(num_features))
    logits = [(rows * its).sum(dim=-1) / divisor for its in weight.flatten(1).unbind()]
    keep, scale, _ = choice.index_select(-1, columns).unbind()
    kept = [one[:, None] for one in keep.unbind(dim=-1)]
    least = torch.finfo(rows.dtype).min
    masked = [torch.where(one > 0, its, least) for one, its in zip(kept, logits, strict=not null_expert)]
    masked += logits[len(kept) :]  # a null expert's: always kept
    most = functools.reduce(torch.maximum, masked)
    shares = [(its - most).exp() for its in masked]
    total = functools.reduce(torch.add, shares)
    final = keep * scale * keep.sum(dim=-1, keepdim=True).clamp_min(1) ** exponent
    gates = torch.stack([its / total for its in shares[: len(kept)]], dim=-1) * final[:, None]
    if len(kept) == choice.shape[-1]:
        return gates
    return gates.new_zeros(*gates.shape[:2], choice.shape[-1]).index_copy(-1, columns, gates)


RULES[RULE] = _weights


def together(spec: GateSpec, parts: Mapping[str, str]) -> bool:
    """Whether all modules of a gate lie in one compiled part of the model, so that one graph has all of them.

    Args:
        spec: The gate.
        parts: Of modules that can be in a graph, by name, the compiled part that each lies in.
    """
    found = {parts.get(site) for site in spec.sites}
    return len(found) == 1 and None not in found
