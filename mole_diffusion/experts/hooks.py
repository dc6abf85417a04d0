"""Forward hooks: on a module that LoRAs adapt, and around an attention layer with somebody else's processor."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from . import graphs
from .processor import AddExperts, AttentionSeam
from .site import Site


class SiteHook:
    """Adds the experts' share to what a module gives.

    The hook is under the same key in every module, where torch takes another for each: blocks of one kind that are
    compiled share a graph only where nothing in them differs.
    """

    KEY: Any = "mole_diffusion"

    def __init__(self, site: Site, add: AddExperts) -> None:
        self._module = site.module
        self._key = self.KEY
        while self._key in self._module._forward_hooks:  # other LoRAs of ours
            self._key += "'"
        self._module._forward_hooks[self._key] = functools.partial(_add, add, site)
        self._module._forward_hooks_with_kwargs[self._key] = True

    def remove(self) -> None:
        self._module._forward_hooks.pop(self._key, None)
        self._module._forward_hooks_with_kwargs.pop(self._key, None)


def _add(
    add: AddExperts, site: Site, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
) -> Tensor:
    hidden_states: Tensor = args[0] if args else next(iter(kwargs.values()))
    if site.callback is not None and torch.compiler.is_compiling():
        return graphs.add(site.callback, module, hidden_states, output)
    return add(site, hidden_states, output)


class Watch:
    """The seam of a layer with somebody else's processor, by hooks.

    Its own projections of the same input show what it attends to, and a bias goes in as the attention mask that every
    processor knows.
    """

    def __init__(self, layer: Attention, seam: AttentionSeam) -> None:
        self._seam = seam
        self._handles = [
            layer.register_forward_pre_hook(self._before, with_kwargs=True),
            layer.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, layer: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() or not self._seam.biased():
            return None
        bias = self._seam.bias(*self._projections(layer, args, kwargs))
        if bias is None:
            return None
        mask = kwargs.get("attention_mask")
        return args, {**kwargs, "attention_mask": bias[:, 0] if mask is None else mask + bias[:, 0]}

    def _after(self, layer: Attention, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if not torch.compiler.is_compiling() and self._seam.watched():
            self._seam.attended(*self._projections(layer, args, kwargs), output)

    def _projections(self, layer: Attention, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        context = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        context = context[0] if isinstance(context, tuple) else context  # an IP-Adapter's: the text, then its pictures
        query = layer.to_q(hidden_states)
        key = layer.to_k(hidden_states if context is None else context)
        query, key = (x.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x in (query, key))
        return query, key
