"""What real bases ask for, counted on models without values: no weights, no GPU, no time."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .config import SIZES, Side, SpeedConfig
from .counted import Counted
from .failed import Failed
from .models import make_inputs, make_loras, make_model
from .sides import make_sides

BASES = {"sd15": "Stable Diffusion 1.5", "sdxl": "Stable Diffusion XL", "flux": "FLUX.1", "z_image": "Z-Image"}
SIDES: tuple[Side, ...] = ("bare", "sum", "gates", "masks")


@dataclass(frozen=True)
class BaseCount:
    """One base with LoRAs, for a picture of its own size; the denoiser alone, attention fused as on a GPU.

    Attributes:
        name: What people call the base.
        pixels: Side of the picture.
        rows: Of a call for one picture: 2 with classifier-free guidance.
        parameters: Of the denoiser.
        weights: GiB of these in bfloat16.
        loras: MiB of the LoRAs in bfloat16.
        operations: Multiplications and additions of one call of the bare base.
        more: The same over the bare base's, by side.
        peak: MiB at the peak of a call beyond weights, LoRAs and inputs, by side.
    """

    name: str
    pixels: int
    rows: int
    parameters: int
    weights: float
    loras: float
    operations: int
    more: Mapping[Side, float]
    peak: Mapping[Side, float]


def count_base(size: str, *, loras: int = 3, rank: int = 16, targets: str = "all") -> BaseCount:
    """Counts one call of the denoiser, bare and with LoRAs.

    Args:
        size: A name in `BASES`, or another of `SIZES`.
        loras: How many LoRAs.
        rank: Of every LoRA.
        targets: A name in `TARGETS`.
    """
    shape = SIZES[size]
    config = SpeedConfig(
        size=size, loras=(loras,), rank=rank, targets=targets, sides=SIDES, batch=shape.rows, device="meta"
    )
    model = make_model(config)
    _given_no_values(model)
    inputs, given = make_inputs(replace(config, device="cpu"), model), make_loras(config, model, loras)
    failed: list[Failed] = []
    sides, experts = make_sides(config, model, inputs, given, failed)
    counts: dict[Side, Counted] = {}
    peaks: dict[Side, float] = {}
    try:
        with torch.no_grad():
            for side, call in sides.items():
                with FusedAttention():
                    call()  # makes what is made once
                    with Counted() as counts[side]:
                        call()
                    with Alive() as alive:
                        call()
                peaks[side] = alive.peak / 2**20
    finally:
        experts.detach()
    factors = [factors for one in given for modules in one.factors.values() for factors in modules.values()]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return BaseCount(
        name=BASES.get(size, size),
        pixels=8 * shape.latent,
        rows=shape.rows,
        parameters=parameters,
        weights=2 * parameters / 2**30,
        loras=2 * sum(one.down.numel() + one.up.numel() for one in factors) / 2**20,
        operations=counts["bare"].operations,
        more={side: counts[side].operations / counts["bare"].operations for side in sides},
        peak=peaks,
    )


def _given_no_values(model: Any) -> None:
    """Has a model on "meta" take inputs with values, which what hangs on it reads: the step, where a token stands."""
    kind = type(model)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return kind.forward(self, *args, **kwargs)

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward})


class FusedAttention(TorchFunctionMode):
    """Attention as one operator, which tensors without values would take apart: its scores are never in memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3] if args else (kwargs[name] for name in ("query", "key", "value"))
        return _attention(query, key, value)


@torch.library.custom_op("mole_diffusion::counted_scaled_dot_product", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


class Alive(TorchDispatchMode):
    """How many bytes of tensors that were made inside a `with` are there at once.

    Attributes:
        peak: The most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(part.untyped_storage()) for part in _tensors([*args, *(kwargs or {}).values()])}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in given and storage not in self._seen:
                self._seen.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self._now += size
        self.peak = max(self.peak, self._now)


def _tensors(value: Any) -> list[Tensor]:
    return [part for part in torch.utils._pytree.tree_leaves(value) if isinstance(part, Tensor)]
