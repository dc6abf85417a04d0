"""What a gate reads: expert outputs in rank space, a hidden state, or nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..experts import Projections, Site
from .config import TokenAxis
from .spec import GateSpec


def read_features(spec: GateSpec, site: Site, projections: Projections, axis: TokenAxis) -> Tensor:
    """What a gate is given, `(batch, tokens, width)`: expert outputs in rank space, a hidden state, or a constant."""
    if spec.hidden_features is None:
        return torch.cat([projections.tensors[name] for name in spec.entry_sites], dim=-1)
    hidden_states = projections.hidden_states
    if spec.hidden_features == 0:
        return torch.ones(len(hidden_states), 1, 1, device=hidden_states.device)
    if axis == "token" and site.stack.is_convolution:  # a stride leaves fewer positions to weigh than there are to read
        if hidden_states.shape[2:] != projections.spatial:
            hidden_states = F.adaptive_avg_pool2d(hidden_states, projections.spatial)
    return site.positions(hidden_states)


def without_filling(features: Tensor, there: Tensor | None) -> Tensor:
    """`(batch, tokens, width)` whose mean over tokens is that over those which are there.

    A prompt must not look different in a batch with longer ones.
    """
    if there is None or len(there) != len(features):
        return features
    there = there.to(features.device, features.dtype)
    return features * (there * (there.shape[1] / there.sum(dim=1, keepdim=True)))[..., None]


def feature_grid(spec: GateSpec, site: Site, projections: Projections) -> tuple[int, int] | None:
    """Height and width of what a gate reads at a convolution; `None` elsewhere."""
    if spec.hidden_features is None or not site.stack.is_convolution:
        return projections.spatial
    height, width = projections.hidden_states.shape[-2:]
    return height, width
