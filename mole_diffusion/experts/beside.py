"""What LoRAs add to a module that is no product of small rank: magnitudes, Kronecker products, biases, gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MoLEError
from ..families.norms import is_norm, neutral, run_with
from ..lora import LoRAFactors
from ..lora.effect import COMPUTED
from ..lora.kinds import dora
from ..lora.kronecker import Kronecker


@dataclass(frozen=True, eq=False)
class Term:
    """What one LoRA adds beside its rows: `rows * s (w1 ⊗ w2) (columns * x) + (rows - 1) * W x + bias`.

    DoRA, eq. 5 of https://arxiv.org/abs/2402.09353, with its constants worked out: `c (W + s D) x - W x` is
    `c s D x` and, beside it, `(c - 1) W x`, of which the module has made `W x` already. Where magnitudes are
    those of columns, `W` is applied once more, to `(columns - 1) * x`.

    At a layer of normalisation it adds `gain * n + bias`: n is what the layer makes of x before it scales and shifts.
    That of queries or keys does the same with each of their heads, which lie behind one another in x.

    Attributes:
        kronecker: Of LoKr, s in its first factor.
        rows: c of every output, `(d_out,)`.
        columns: c of every input, `(d_in,)`.
        bias: Change of the module's bias, `(d_out,)`.
        gain: Change of a normalisation's weight, `(d,)`.
        rows_beyond, columns_beyond: c - 1, taken before it is rounded: c is near 1, and the rest would be lost.
    """

    kronecker: Kronecker | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    bias: Tensor | None = None
    gain: Tensor | None = None
    rows_beyond: Tensor | None = None
    columns_beyond: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Term:
        """On another device, in another dtype."""
        kronecker = None if self.kronecker is None else self.kronecker.to(device, dtype)
        beyond = (None if x is None else x - 1 for x in (self.rows, self.columns))
        given = (self.rows, self.columns, self.bias, self.gain, *beyond)
        return Term(kronecker, *(None if x is None else x.to(device, dtype) for x in given))


class Beside:
    """The terms of all LoRAs that have one at a module.

    Args:
        module: The module.
        terms: Index of the LoRA to its term.
    """

    def __init__(self, module: nn.Module, terms: dict[int, Term]) -> None:
        self.module: Any = module
        self.terms = terms
        bias = getattr(module, "bias", None)
        self._bias: Tensor | None = None if bias is None else bias.detach()
        self._moved: tuple[tuple[torch.device, torch.dtype], dict[int, Term], Tensor | None] | None = None

    @property
    def is_convolution(self) -> bool:
        return isinstance(self.module, nn.Conv2d)

    @property
    def _channels_first(self) -> bool:
        return isinstance(self.module, nn.Conv2d | nn.GroupNorm)

    def outputs(self, hidden_states: Tensor, output: Tensor, among: Sequence[int]) -> dict[int, Tensor]:
        """What each LoRA's term adds, `(batch, positions, d_out)`.

        Args:
            hidden_states: The module's input.
            output: What the base module gave.
            among: Indices of the LoRAs that take part.
        """
        terms, bias = self._moved_like(output)
        base = self._positions(output)
        base = base if bias is None else base - _each_head(bias, base)
        x = hidden_states.to(output.dtype)
        if any(term.gain is not None for term in terms.values()):  # the same for all LoRAs
            heads = hidden_states if self._channels_first else _heads(hidden_states, self.module.weight)
            normalised = run_with(self.module, neutral(self.module, hidden_states.device), heads)
            x = self._positions(normalised.reshape(hidden_states.shape).to(output.dtype))
        return {index: self._apply(terms[index], x, base) for index in among if index in terms}

    def add(self, hidden_states: Tensor, output: Tensor, weights: Tensor, among: Sequence[int]) -> Tensor | None:
        """The weighed terms in the shape of `output`, before anything was added to that; None if there are none.

        Args:
            hidden_states: The module's input.
            output: What the base module gave.
            weights: gamma, `(batch | 1, positions | 1, N)`.
            among: Indices of the LoRAs that take part.
        """
        found = self.outputs(hidden_states, output, among)
        if not found:
            return None
        added = sum(y * weights[..., index, None] for index, y in found.items())
        assert isinstance(added, Tensor)
        added = added.to(output.dtype)
        if self._channels_first:
            added = added.transpose(1, 2)
        return added.reshape(output.shape)

    def changes(self, place: str) -> dict[int, Tensor]:
        """The changes of weight that the terms amount to, `(d_out, d_in * kernel)` in float64.

        Args:
            place: Name of the module, for messages.
        """
        weight = self.module.weight.detach() if is_norm(self.module) else weight_of(self.module, place)
        found = {}
        for index, term in self.terms.items():
            if term.gain is not None:
                found[index] = term.gain.to(weight.device, torch.float64).diag()
                continue
            change = torch.zeros_like(weight, dtype=torch.float64)
            moved = term.to(weight.device, torch.float64)
            columns = None if moved.columns is None else moved.columns.reshape(1, -1, *[1] * (weight.ndim - 2))
            if moved.kronecker is not None:
                change = moved.kronecker.matrix() if columns is None else moved.kronecker.matrix() * columns
            if moved.rows is not None:
                rows = moved.rows.reshape(-1, *[1] * (weight.ndim - 1))
                change = change * rows + (rows - 1) * weight
            if columns is not None:
                change = change + (columns - 1) * weight
            found[index] = change.flatten(1)
        return found

    def _apply(self, term: Term, x: Tensor, base: Tensor) -> Tensor:
        added = torch.zeros_like(base)
        if term.gain is not None:
            added = x * _each_head(term.gain, x)
        if term.kronecker is not None:
            added = self._per_position(term.kronecker(self._scaled(x, term.columns), self._convolution))
        if term.rows is not None and term.rows_beyond is not None:
            added = added * term.rows + term.rows_beyond * base
        if term.columns is not None:
            again = self._positions(self.module.forward(self._scaled(x, term.columns_beyond)).to(base.dtype))
            bias = self._moved_like(base)[1]
            added = added + (again if bias is None else again - bias)
        return added if term.bias is None else added + _each_head(term.bias, added)

    @property
    def _convolution(self) -> Any:
        return self.module if self.is_convolution else None

    def _scaled(self, x: Tensor, columns: Tensor | None) -> Tensor:
        if columns is None:
            return x
        return x * (columns[:, None, None] if self.is_convolution else columns)

    def _positions(self, output: Tensor) -> Tensor:
        return output.flatten(2).transpose(1, 2) if self._channels_first else self._per_position(output)

    def _per_position(self, y: Tensor) -> Tensor:
        return y[:, None] if y.ndim == 2 else y.flatten(1, -2)

    def _moved_like(self, output: Tensor) -> tuple[dict[int, Term], Tensor | None]:
        key = output.device, output.dtype
        moved = self._moved
        if moved is None or moved[0] != key:
            bias = None if self._bias is None else self._bias.to(*key)
            self._moved = moved = key, {index: term.to(*key) for index, term in self.terms.items()}, bias
        return moved[1], moved[2]


def _heads(x: Tensor, weight: Tensor) -> Tensor:
    """Heads that lie behind one another, on an axis of their own: `(…, heads, d)`."""
    return x.unflatten(-1, (-1, len(weight)))


def _each_head(vector: Tensor, x: Tensor) -> Tensor:
    """`(d,)` for each head in the last axis of x; mostly there is one."""
    times = x.shape[-1] // len(vector)
    return vector if times == 1 else vector.repeat(times)


def settle(
    factors: Sequence[LoRAFactors | None], module: nn.Module, place: str
) -> tuple[list[LoRAFactors | None], Beside | None]:
    """Splits factors at a module into plain ones, rows of a stack, and what comes beside these.

    Magnitudes become factors of rows or columns, which `up` or `down` take up: c is worked out here, once, from the
    module's weight and this LoRA alone.

    Raises:
        MoLEError: A DoRA needs the module's weight, and that is not there.
    """
    rows: list[LoRAFactors | None] = []
    terms: dict[int, Term] = {}
    for index, one in enumerate(factors):
        if one is None or one.plain:
            rows.append(one)
            continue
        kronecker = one.kronecker
        if kronecker is not None:
            kronecker = replace(kronecker, w1=kronecker.w1 * one.scaling)
        plain, c = replace(one, kronecker=None, magnitude=None, bias=None, gain=None), None
        if one.magnitude is not None:
            c = _magnitude_scale(one, module, place)
            ones = [1] * (one.down.ndim - 2)
            if c.shape[1] == 1:
                plain = replace(plain, up=plain.up * c.reshape(-1, 1, *ones))
            else:
                plain = replace(plain, down=plain.down * c.reshape(1, -1, *ones))
        by_row = c is not None and c.shape[1] == 1
        flat = None if c is None else c.flatten()
        terms[index] = Term(kronecker, flat if by_row else None, None if by_row else flat, one.bias, one.gain)
        rows.append(plain)
    return rows, Beside(module, terms) if terms else None


@torch.no_grad()
def _magnitude_scale(one: LoRAFactors, module: nn.Module, place: str) -> Tensor:
    assert one.magnitude is not None
    weight = weight_of(module, place)
    change = replace(one, magnitude=None).delta().to(weight)
    return dora.scale(one.magnitude.to(weight), weight, change.reshape(weight.shape)).to(one.magnitude.device)


@torch.no_grad()
def weight_of(module: Any, place: str) -> Tensor:
    """A module's weight in fp32 on its device; of a quantised Linear, as it acts.

    Raises:
        MoLEError: It has no values.
    """
    weight = module.weight.detach()
    if weight.is_meta:
        raise MoLEError(
            f"{place} has no weights yet (they are on the meta device), and a DoRA's magnitudes are relative to them. "
            "Load the weights before the LoRAs, and LoRAs before `enable_sequential_cpu_offload()`."
        )
    as_is = type(weight) is Tensor and weight.dtype in COMPUTED
    if isinstance(module, nn.Conv2d) or (as_is and weight.shape == (module.out_features, module.in_features)):
        return weight.float()
    dtype = weight.dtype if weight.dtype in COMPUTED else torch.float32
    answer = module.forward(torch.eye(module.in_features, device=weight.device, dtype=dtype)).float()
    return (answer if module.bias is None else answer - module.bias.float()).T
