"""Attention in which words and pixels are one sequence: what its pixels attend to, and a bias on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mole_diffusion.errors import MoLEError

from ..families import Joint
from .seam import LayerSeam


class Meeting:
    """Stands at one attention layer of a transformer, whatever its processor is.

    Queries and keys are taken where all of diffusers' processors hand them over, rotated and normalised, to torch's
    `scaled_dot_product_attention`, and only while somebody wants to see or bias them.

    Args:
        layer: The attention layer.
        crossed: Asked as for a layer of pixels that attend to words.
        among: Shown as a layer of pixels that attend to each other.
        where: Says where words and pixels stand in the present pass.
        refining: Whether it is a layer of words alone, of which nobody is shown anything.
    """

    def __init__(
        self,
        layer: nn.Module,
        crossed: LayerSeam,
        among: LayerSeam,
        where: Callable[[], Joint | None],
        refining: bool = False,
    ) -> None:
        self._crossed = crossed
        self._among = among
        self._where = where
        self._refining = refining
        self._open = threading.local()  # several threads may run one layer
        self._handles = [
            layer.register_forward_pre_hook(self._before),
            layer.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, layer: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        watched, biased = (False, False) if self._refining else (self._crossed.watched(), self._crossed.biased())
        apart = self._crossed.keeps_apart()
        joint = self._where() if watched or biased or apart else None
        if joint is not None:
            if self._refining:
                joint = Joint(slice(0, joint.text.stop - joint.text.start), slice(0, 0))
            self._open.mode = mode = _WatchedAttention(self._crossed, self._among, joint, watched, biased, apart)
            mode.__enter__()

    def _after(self, layer: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        mode = self._open.__dict__.pop("mode", None)
        if mode is None:
            return
        mode.__exit__(None, None, None)
        if output is not None and not mode.fired:
            processor = type(getattr(layer, "processor", layer)).__name__
            raise MoLEError(
                f"the attention at {self._crossed.name} ({processor}) does not go through torch's "
                "scaled_dot_product_attention, so that nobody can see where pixels attend to the LoRAs' words. Call "
                '`set_attention_backend("native")` on the transformer, or use a method that needs no attention, such '
                'as `set_composition("norm_router")`.'
            )


class _WatchedAttention(TorchFunctionMode):
    """Inside of it, `scaled_dot_product_attention` is shown and biased."""

    def __init__(
        self, crossed: LayerSeam, among: LayerSeam, joint: Joint, watched: bool, biased: bool, apart: bool
    ) -> None:
        super().__init__()
        self._crossed = crossed
        self._among = among
        self._joint = joint
        self._watched = watched
        self._biased = biased
        self._apart = apart
        self.fired = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **given)
        self.fired = True
        return self._attend(*args, **given)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Any:
        text, pixels = self._joint
        seen = query[:, :, pixels]  # (batch, heads, pixels, d)
        words = key[:, :, text]
        words = words.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # heads may share keys
        if self._biased:
            bias = self._crossed.bias(seen, words)
            if bias is not None:
                attn_mask = _widened(bias, query, key, self._joint, attn_mask)
        if self._apart:
            added = self._crossed.apart(self._joint, query.shape[2])
            if added is not None:
                attn_mask = _both(added.to(query.dtype), attn_mask)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask, **kwargs)
        if self._watched:
            attended = output[:, :, pixels].transpose(1, 2).flatten(2)
            self._among.attended(seen, seen, attended)
            self._crossed.attended(seen, words, attended)
        return output


def _widened(bias: Tensor, query: Tensor, key: Tensor, joint: Joint, mask: Tensor | None) -> Tensor:
    """A bias of pixels on words `(batch, 1, pixels, words)` for the whole sequence, with the layer's own mask."""
    whole = query.new_zeros(len(bias), 1, query.shape[2], key.shape[2])
    whole[:, :, joint.pixels, joint.text] = bias
    return _both(whole, mask)


def _both(added: Tensor, mask: Tensor | None) -> Tensor:
    """What is added to scores, with a mask: `None`, bool, or what is added too."""
    if mask is None:
        return added
    if mask.dtype is torch.bool:
        return added.masked_fill(~mask, float("-inf"))
    return added + mask
