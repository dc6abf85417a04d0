"""The gating function itself, equations (9)-(11)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .config import Normalization

TINY = 1e-20  # keeps an all-zero expert output from dividing by zero; far below what any output's square norm is


class Gate(nn.Module):
    """Gating function of MoLE: expert outputs in, one weight per expert out.

    Eqs. 9-11 of "Mixture of LoRA Experts" (https://openreview.net/forum?id=uWvKBCYh4S)::

        E = Norm(E_1 + ... + E_N concatenated)      epsilon = flatten(E)^T e      gates = softmax(epsilon / tau)

    The expert outputs E_i = B_i z_i never exist. With z the coordinates in rank space, `<E_i, e> = <z_i, B_i^T e>`
    and `|E_i|^2 = z_i^T (B_i^T B_i) z_i`; so the parameters are f = B^T e, which is the same set of functions of x,
    with r / d of the parameters. (An optimiser moves differently through f than through e.) As long as
    `set_up` is not called, the input is the expert outputs themselves and the parameters are e.

    Args:
        num_experts: N, the LoRAs that share the softmax.
        positions: Length of the token axis.
        width: Numbers per position in the input.
        num_features: Size of the concatenated expert outputs, N * L * d.
        normalization: As in `GateConfig`.
        temperature: Start value of tau.
        learn_temperature: Whether tau is trained.
        beside: How many numbers a position has beside the input that are read as they are, without a norm.

    Attributes:
        weight: f (or e), `(num_experts, positions, width + beside)`. Starts at zero: uniform gates.
        weight_sum: `(num_experts,)`, the sums of e that centring needs; only with `"layer_norm"`.
        log_temperature: Logarithm of tau.

    Shape:
        - Input: `(batch, positions, width)`, and `(batch, positions, beside)` where there is something beside it.
        - Output: `(batch, num_experts)` logits divided by tau; softmax them for the gates.
    """

    gram: Tensor | None
    column_sum: Tensor | None

    def __init__(
        self,
        num_experts: int,
        positions: int,
        width: int,
        num_features: int,
        normalization: Normalization = "rms",
        temperature: float = 1.0,
        learn_temperature: bool = True,
        beside: int = 0,
    ) -> None:
        super().__init__()
        self.normalization = normalization
        self.num_features = num_features
        self.weight = nn.Parameter(torch.zeros(num_experts, positions, width + beside))
        self.weight_sum = nn.Parameter(torch.zeros(num_experts)) if normalization == "layer_norm" else None
        log_temperature = torch.full((), math.log(temperature))
        self.log_temperature = nn.Parameter(log_temperature, requires_grad=learn_temperature)
        self.register_buffer("gram", None, persistent=False)
        self.register_buffer("column_sum", None, persistent=False)

    @property
    def temperature(self) -> Tensor:
        """tau."""
        return self.log_temperature.exp()

    def set_up(self, blocks: list[Tensor]) -> None:
        """Say how coordinates become expert outputs.

        Args:
            blocks: B_i of every expert and entry module in the order of the input's coordinates, `(d_out, r)` each,
                scaling folded in. Different experts do not mix, so only `B_i^T B_i` is kept of them.
        """
        blocks = [block.to(self.weight.device, self.weight.dtype) for block in blocks]
        self.gram = torch.block_diag(*[block.T @ block for block in blocks])
        self.column_sum = torch.cat([block.sum(dim=0) for block in blocks])

    def forward(self, features: Tensor, beside: Tensor | None = None, among: Tensor | None = None) -> Tensor:
        rows = features.to(self.weight.dtype)
        flat = rows.flatten(1)  # (batch, positions * width)
        # Experts first: with a position a row there are thousands of rows and a handful of experts, and whatever comes
        # after runs along the longer axis.
        scores = (
            self._weight(0, rows.shape[-1], among) @ flat.t()
        )  # <flatten(E), e> before the norm, (num_experts, batch)
        if self.gram is None:
            square_norm = torch.linalg.vector_norm(flat, dim=1).square()  # |E|^2, (batch,), without a copy of E
        else:
            square_norm = (rows * (rows @ self.gram)).sum(dim=(1, 2)).clamp_min(0)
        if self.normalization == "layer_norm":
            total = rows if self.column_sum is None else rows * self.column_sum
            mean = total.sum(dim=(1, 2)) / self.num_features
            variance = (square_norm / self.num_features - mean.square()).clamp_min(0)
            assert self.weight_sum is not None
            sums = self.weight_sum if among is None else self.weight_sum.index_select(0, among)
            logits = (scores - sums[:, None] * mean) / ((variance + TINY).sqrt() * self.temperature)
        else:
            logits = self._divided(scores, square_norm)
        if beside is not None:
            of_beside = self._weight(rows.shape[-1], None, among) @ beside.flatten(1).t()
            logits = logits + of_beside / self.temperature
        return logits.t()

    def at_every_token(self, features: Tensor, beside: Tensor | None = None, among: Tensor | None = None) -> Tensor:
        """Logits of every position as if it were a sample of its own.

        Args:
            features: `(batch, tokens, width)`.
            beside: `(batch, tokens, beside)`.
            among: Indices of the experts whose logits are asked for; `None`: all.

        Returns:
            `(batch, tokens, num_experts)`.
        """
        batch, tokens, width = features.shape
        if self.gram is not None or self.normalization == "layer_norm":
            given = None if beside is None else beside.flatten(0, 1)[:, None]
            return self(features.flatten(0, 1)[:, None], given, among).unflatten(0, (batch, tokens))
        rows = features.to(self.weight.dtype)
        # As a convolution is given it; to turn it round would take longer than all the rest.
        channels_first = not rows.is_contiguous() and rows.transpose(1, 2).is_contiguous()
        if channels_first:  # a norm across rows takes ten times as long as a sum
            columns = rows.transpose(1, 2)
            square_norm = columns.square().sum(dim=1, keepdim=True)
        else:
            columns = rows.flatten(0, 1).t()
            square_norm = torch.linalg.vector_norm(columns, dim=0).square()
        logits = self._divided(self._weight(0, width, among) @ columns, square_norm)  # experts before tokens
        if beside is not None:
            beside = beside.transpose(1, 2) if channels_first else beside.flatten(0, 1).t()
            logits = logits + self._weight(width, None, among) @ beside / self.temperature
        return logits.transpose(1, 2) if channels_first else logits.unflatten(1, (batch, tokens)).movedim(0, 2)

    def shares_at_every_token(
        self, features: Tensor, weight: Tensor, divisors: tuple[Tensor, Tensor], null_expert: bool
    ) -> Tensor:
        """`masked_softmax(at_every_token(features), None, null_expert)` where nobody wants a gradient.

        In half as many operators, since small models and GPUs take their time from these.

        Args:
            features: `(batch, tokens, width)`.
            weight: The gate's own, or the rows of the experts that are asked; to ask a module for it takes as long as
                a view.
            divisors: From `divisors`, two numbers.
            null_expert: As in `masked_softmax`.

        Returns:
            `(batch, tokens, N)`.
        """
        rows, weight = features.to(weight.dtype), weight.flatten(1)
        experts = weight.shape[0] - null_expert
        smallest, of_all = divisors
        if not rows.is_contiguous() and (columns := rows.transpose(1, 2)).is_contiguous():  # as in `at_every_token`
            norm = columns.square().sum(dim=1, keepdim=True).sqrt_()
            scores = torch.bmm(weight.expand(columns.shape[0], -1, -1), columns)
            scores.div_(torch.hypot(norm, smallest).mul_(of_all))
            return torch.softmax(scores, dim=1)[:, :experts].transpose(1, 2)
        flat = rows.reshape(-1, rows.shape[-1])
        norm = torch.linalg.vector_norm(flat, dim=1)
        scores = torch.mm(weight, flat.t()).div_(torch.hypot(norm, smallest).mul_(of_all))
        return torch.softmax(scores, dim=0)[:experts].t().view(*features.shape[:2], experts)

    def _weight(self, begin: int, end: int | None, among: Tensor | None) -> Tensor:
        """Of some of the numbers that a position has, `(num_experts, positions * numbers)`."""
        weight = self.weight if among is None else self.weight.index_select(0, among)
        whole = begin == 0 and end == weight.shape[-1]
        return (weight if whole else weight[..., begin:end]).flatten(1)

    def _divided(self, scores: Tensor, square_norm: Tensor) -> Tensor:
        """`<E, e> / (Norm tau)` for the two norms that do not centre."""
        features = self.num_features if self.normalization == "rms" else 1
        of_all = (math.log(features) / 2 - self.log_temperature).exp()  # all that is the same in every position
        return scores * (of_all * (square_norm + TINY * features).rsqrt())


@torch.no_grad()
def divisors(gates: Sequence[Gate], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """What gates that do not centre divide by, at all positions: once a pass for all of them.

    Logits are `<E, e>` over `hypot(|E|, smallest) * of_all`, which is `Norm(E)` times tau.

    Args:
        gates: They have no Gram matrix.
        device: Where they compute.

    Returns:
        For each gate, `smallest`, which keeps an all-zero `|E|` from dividing by zero, and `of_all`.
    """
    features = [gate.num_features if gate.normalization == "rms" else 1 for gate in gates]
    roots = torch.tensor(features, dtype=torch.float64).sqrt().float().to(device)
    temperatures = torch.stack([gate.log_temperature.to(device) for gate in gates]).exp()
    return list(zip((roots * TINY**0.5).unbind(), (temperatures / roots).unbind(), strict=True))


def masked_softmax(logits: Tensor, keep: Tensor | None, null_expert: bool = False) -> Tensor:
    """Softmax over the kept logits, which equals `g_i m_i / sum_j g_j m_j`.

    Args:
        logits: `(batch, tokens, N)`, or with `N + 1` and a null expert in the end.
        keep: `(batch | 1, 1, N)` of 0 and 1. A row that keeps none gives zeros. `None`: all are kept.
        null_expert: Whether the last logit is of an expert that adds nothing: always kept, and left out of the result.

    Returns:
        `(batch, tokens, N)`.
    """
    num_experts = logits.shape[-1] - null_expert
    if keep is not None:
        masked = keep == 0
        if null_expert:
            masked = torch.cat([masked, torch.zeros_like(masked[..., :1])], dim=-1)
        logits = logits.masked_fill(masked, torch.finfo(logits.dtype).min)
    # Over the first axis, where the gates come from: over a last one of three or four numbers it takes several times
    # as long.
    gates = torch.softmax(logits.movedim(-1, 0), dim=0).movedim(0, -1)[..., :num_experts]
    return gates if keep is None else gates * keep
