"""The stock attention of diffusers' UNets, with experts beside its projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from . import compiled, graphs
from .site import Site

AddExperts = Callable[[Site, Tensor, Tensor], Tensor]


STOCK = AttnProcessor2_0()


class AttentionSeam(Protocol):
    """What an attention layer asks while it attends; nothing of it costs anything where no weigher wants it."""

    def attends(self) -> bool | None:
        """Whether anybody may look on, or add to the scores, in this pass; `None`: nothing is added either."""
        ...

    def watched(self) -> bool:
        """Whether anybody wants to see this pass."""
        ...

    def biased(self) -> bool:
        """Whether anybody may add to the scores in this pass."""
        ...

    def bias(self, query: Tensor, key: Tensor) -> Tensor | None:
        """An additive bias `(batch, 1, pixels, words)`, or `None`. Query and key: `(batch, heads, tokens, d)`."""
        ...

    def attended(self, query: Tensor, key: Tensor, output: Tensor) -> None:
        """Shows what was computed; `output` `(batch, tokens, heads * d)` is that before `to_out`."""
        ...


class MoLEAttnProcessor:
    """Attention processor that adds the experts' share to the query, key, value and output projections.

    It holds no parameters: factors and weights stay with `Experts`, so saving, casting
    or copying a UNet never touches them. The attention itself is the one of `AttnProcessor2_0`.

    Args:
        sites: Sites of this attention layer by the name of the projection: `to_q`, `to_k`, `to_v`, `to_out.0`.
            Without any, as when diffusers makes a new processor of the same class, it is the stock processor.
        add: `(site, input, output) -> output with the experts' share`.
        seam: Asked for a bias, and shown queries, keys and outputs.
        attention: The layer it serves. On another, where somebody put it, it is the stock processor.

    Attributes:
        callback: Where a compiled graph calls back for `attend`, if there is a seam.
    """

    def __init__(
        self,
        sites: Mapping[str, Site] | None = None,
        add: AddExperts | None = None,
        seam: AttentionSeam | None = None,
        attention: Attention | None = None,
    ) -> None:
        self.sites = dict(sites or {})
        self._add = add
        self._seam = seam
        self._attention = attention
        self.callback: compiled.Callback | None = None
        # Of the latest inputs: those of its sites are then known, and may be asked for.
        self._shapes: tuple[torch.Size, torch.Size | None] | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """diffusers asks processors for their class before it exchanges them, and to it this is the stock one."""
        return AttnProcessor2_0

    def look_again(self) -> None:
        """Serve all sites in the next pass, whatever happens in that: one of them has another module."""
        self._shapes = None

    def retire(self) -> None:
        """Become the stock processor: somebody may have kept this one and put it back after the LoRAs are gone."""
        self.sites, self._add, self._seam, self._attention, self.callback = {}, None, None, None, None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attend.

        Args:
            hidden_states: `(batch, tokens, channels)` or `(batch, channels, height, width)`.
            encoder_hidden_states: `(batch, text tokens, channels)`; `None` for self-attention.
            attention_mask: Additive mask, as `Attention.prepare_attention_mask` takes it.
            temb: Time embedding, for layers with a spatial norm.

        Returns:
            A tensor of the shape of `hidden_states`.
        """
        if self._attention is not None and attn is not self._attention:
            return STOCK(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        compiling = torch.compiler.is_compiling()
        shapes = hidden_states.shape, None if encoder_hidden_states is None else encoder_hidden_states.shape
        attends = False if compiling or self._seam is None else self._seam.attends()
        if attends is None and self._shapes == shapes:
            return STOCK(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        is_image = hidden_states.ndim == 4
        if is_image:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (batch, height * width, channels)
        batch, length, _ = (hidden_states if encoder_hidden_states is None else encoder_hidden_states).shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            context = hidden_states
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(encoder_hidden_states)
        else:
            context = encoder_hidden_states

        query = self._project("to_q", attn.to_q, hidden_states, compiling)
        key = self._project("to_k", attn.to_k, context, compiling)
        value = self._project("to_v", attn.to_v, context, compiling)
        # (batch, tokens, width) -> (batch, heads, tokens, width / heads)
        heads, width = attn.heads, query.shape[-1] // attn.heads
        query = query.view(batch, -1, heads, width).transpose(1, 2)
        key = key.view(batch, -1, heads, width).transpose(1, 2)
        value = value.view(batch, -1, heads, width).transpose(1, 2)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        callback = self.callback if compiling else None
        if callback is None and not attends:
            attended = compiled.attention(query, key, value, attention_mask)
        elif callback is None:
            attended = self.attend(query, key, value, attention_mask)
        elif callback.component.kinds.shows(attn.is_cross_attention):
            attended = compiled.attend(callback, query, key, value, attention_mask)
        else:
            attended = compiled.attention(query, key, value, attention_mask)

        hidden_states = attn.to_out[1](self._project("to_out.0", attn.to_out[0], attended, compiling))
        if is_image:
            hidden_states = hidden_states.transpose(-1, -2).reshape(residual.shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        if not compiling:
            self._shapes = shapes
        return hidden_states / attn.rescale_output_factor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention as the seam has it: `(batch, heads, tokens, d)` each to `(batch, tokens, heads * d)`."""
        if self._seam is None or not self._seam.attends():
            return compiled.attention(query, key, value, mask)
        bias = self._seam.bias(query, key)
        if bias is not None:
            mask = bias if mask is None else mask + bias
        attended = compiled.attention(query, key, value, mask)
        self._seam.attended(query, key, attended)
        return attended

    def _project(self, name: str, layer: Any, hidden_states: Tensor, compiling: bool) -> Tensor:
        output = layer(hidden_states)
        site = self.sites.get(name)
        if site is None or self._add is None:
            return output
        if compiling and site.callback is not None:
            return graphs.add(site.callback, layer, hidden_states, output)
        return self._add(site, hidden_states, output)
