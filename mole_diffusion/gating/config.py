"""The configuration of gates: one frozen record, checked when it is made and when it is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mole_diffusion.errors import MoLEError

LARGEST_LOG_TEMPERATURE = 20.0  # a softmax with one beyond gives NaN or nothing; trained ones are between -5 and 5

Scope = Literal["matrix", "layer", "block", "transformer", "network"]
GateInput = Literal["experts", "hidden", "none"]
Normalization = Literal["l2", "rms", "layer_norm"]
TokenAxis = Literal["pooled", "flatten", "token"] | int
ExpertKind = Literal["module", "block"]


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Shape of the gating function of MoLE, eqs. 9-11 of https://openreview.net/forum?id=uWvKBCYh4S.

    Attributes:
        scope: How much of the model shares one gate. `"matrix"`: an adapted weight. `"layer"`: an attention or
            feed-forward layer. `"block"`: a transformer block. `"transformer"`: a UNet's spatial transformer,
            blocks and projections, as in the released code. `"network"`: a whole UNet or text encoder.
        input: What a gate reads. `"experts"`: the expert outputs, as the paper writes it. `"hidden"`: the hidden
            state its first module is given, as the released code does. `"none"`: nothing, so that a gate is one
            learned number per LoRA (CAT, with `scope="matrix"`). Comparing with it shows what a gate's input is worth.
        token_axis: What becomes of the positions of an expert output. `"pooled"`: their mean, any resolution. An
            integer k: means over a k x k grid (k stretches of a text), any resolution. `"flatten"`: every position
            has its own parameters, as the paper writes it, so the gate fits one resolution only. `"token"`: nothing;
            the same parameters, as many as pooled, are asked at every position, which gets weights of its own: two
            LoRAs at full strength need not meet. Keys and values of the prompt, and projections of the time, which see
            other tokens, then have gates of their own in a scope.
        normalization: The paper's "Normalization" over all entries of the concatenated expert outputs: divide by the
            L2 norm, by the root mean square, or centre first (layer norm without affine parameters).
        temperature: Start value of tau. Positive.
        learn_temperature: Whether tau is trained (as its logarithm, so it stays positive).
        experts: What an expert output is. `"module"`: what the LoRA adds at the modules through which a scope is
            entered; costs nothing extra. `"block"`: how the output of the transformer block changes under that
            LoRA alone; the block is run once more per LoRA. Needs `scope="block"`.
        gate_sum: What the weights of all N LoRAs add up to. 1 is the paper's softmax; N lets a LoRA weigh 1 on average,
            so that equal gates are the plain sum. Where only k LoRAs act, since the others are masked out or do not
            touch the place, the sum is `k ** (log(gate_sum) / log(N))`: one LoRA alone is always that LoRA.
        null_expert: One more logit in every softmax, for an expert that adds nothing. It takes its share of the sum,
            also from a LoRA that acts alone.
        residual: Whether a gate corrects the masks of a rule instead of weighing alone: it reads the masks beside the
            hidden state and answers what is to be added to them, zero at the start. The composition is then
            `"masked_gates"`. Needs `input="hidden"` and `token_axis="token"`, since masks have a value at every
            token, and neither a sum nor a null expert, since nothing is shared out.

    Raises:
        MoLEError: A setting has another value, or two settings contradict each other.
    """

    scope: Scope = "block"
    token_axis: TokenAxis = "pooled"
    normalization: Normalization = "rms"
    temperature: float = 1.0
    learn_temperature: bool = True
    experts: ExpertKind = "module"
    input: GateInput = "experts"
    gate_sum: float = 1.0
    null_expert: bool = False
    residual: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("scope", Scope),
            ("normalization", Normalization),
            ("experts", ExpertKind),
            ("input", GateInput),
        ):
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise MoLEError(f"`{name}` must be one of {list(get_args(allowed))}, got {value!r}.")
        axis = self.token_axis
        is_grid = isinstance(axis, int) and not isinstance(axis, bool)
        if axis not in ("pooled", "flatten", "token") and not (is_grid and int(axis) >= 1):
            raise MoLEError(
                f"`token_axis` must be 'pooled', 'flatten', 'token' or a grid size of at least 1, got {axis!r}."
            )
        if not _is_positive(self.temperature):
            raise MoLEError(
                f"`temperature` must be positive and finite, got {self.temperature!r}. Use 1.0 for a plain softmax."
            )
        if abs(math.log(self.temperature)) > LARGEST_LOG_TEMPERATURE:
            raise MoLEError(
                f"`temperature` must lie between {math.exp(-LARGEST_LOG_TEMPERATURE):.1g} and "
                f"{math.exp(LARGEST_LOG_TEMPERATURE):.1g}, got {self.temperature!r}: beyond, a softmax says nothing."
            )
        for name in ("learn_temperature", "null_expert", "residual"):
            if not isinstance(getattr(self, name), bool):
                raise MoLEError(f"`{name}` must be true or false, got {getattr(self, name)!r}.")
        if self.experts == "block" and self.scope != "block":
            raise MoLEError(f"experts='block' needs scope='block', got scope={self.scope!r}.")
        if self.experts == "block" and axis not in ("pooled", "flatten"):
            raise MoLEError(f"experts='block' needs token_axis='pooled' or 'flatten', got {axis!r}.")
        if self.scope == "network" and axis == "token":
            raise MoLEError("token_axis='token' needs a scope whose modules see the same tokens, not scope='network'.")
        if self.experts == "block" and self.input != "experts":
            raise MoLEError(f"experts='block' needs input='experts', got input={self.input!r}.")
        if self.input == "none" and axis != "pooled":
            raise MoLEError(f"input='none' has no tokens to read; leave token_axis at 'pooled', got {axis!r}.")
        if not _is_positive(self.gate_sum):
            raise MoLEError(f"`gate_sum` must be positive and finite, got {self.gate_sum!r}. The paper's is 1.")
        if self.residual:
            needed = {"input": "hidden", "token_axis": "token", "null_expert": False, "gate_sum": 1.0}
            for name, value in needed.items():
                if getattr(self, name) != value:
                    raise MoLEError(f"residual=True needs {name}={value!r}, got {name}={getattr(self, name)!r}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GateConfig:
        """Reads a saved configuration.

        Raises:
            MoLEError: A key is unknown, say because a newer version wrote it, or a value is not allowed.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise MoLEError(f"Unknown keys {unknown} in a gate configuration; known are {sorted(known)}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def _is_positive(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return value > 0 and math.isfinite(value)
    except OverflowError:  # a whole number with more digits than a float has
        return False
