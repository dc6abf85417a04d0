"""How much each pixel of a picture attends to each LoRA's words, collected over layers and steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..experts import Run
from ..experts.seam import LayerSeam
from ..gating.tokens import token_grid
from .prompt import PromptWords


class WordMaps:
    """Cross-attention of the pixels to each LoRA's words: means over heads, layers and steps.

    Args:
        words: Which tokens of the prompts call which LoRA.
    """

    def __init__(self, words: PromptWords) -> None:
        self.words = words
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._size: tuple[int, int] | None = None

    @property
    def empty(self) -> bool:
        return not self._sums

    def add(self, layer: LayerSeam, query: Tensor, key: Tensor, run: Run) -> None:
        """Takes in one cross-attention layer in one pass; only the rows that are given the prompt count.

        The layers of the finest level, where a pixel is one of the sample's, are left out where there are coarser ones:
        their maps follow edges and noise more than things.

        Args:
            layer: The layer.
            query: `(batch, heads, pixels, d)`.
            key: `(batch, heads, words, d)`.
            run: The forward pass.
        """
        text = run.encoder_hidden_states
        if text is None or not layer.crossed or run.sample_size is None:
            return
        conditional = self.words.conditional(text).to(query.device)
        if not len(conditional):
            return
        owned = self.words.of_embeddings(text).to(query.device)[conditional].to(torch.float32)  # (rows, N, words)
        size = token_grid(query.shape[2], run.sample_size, layer)
        there = self.words.there(text, run.told.words)
        there = None if there is None else there[conditional]
        probabilities = attention_probabilities(query[conditional], key[conditional], layer.scale, there)
        # Mean over the words of a LoRA, so that one called by three words weighs no more than one called by one.
        maps = torch.einsum("rpw,rnw->rnp", probabilities, owned) / owned.sum(dim=-1).clamp(min=1)[..., None]
        maps = maps / maps.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        self._size = run.sample_size
        before = self._sums.get(size)
        self._sums[size] = maps if before is None else before + maps

    def mean(self) -> Tensor:
        """`(pictures, N, height, width)` in the sample's size, all levels alike; maps sum to about 1 over pixels."""
        assert self._size is not None
        coarser = {size: maps for size, maps in self._sums.items() if size != self._size} or self._sums
        enlarged = []
        for size, maps in coarser.items():
            grid = F.interpolate(maps.unflatten(-1, size), size=self._size, mode="bilinear", align_corners=False)
            enlarged.append(grid / grid.sum(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(grid.dtype).tiny))
        return torch.stack(enlarged).mean(dim=0)


def attention_probabilities(query: Tensor, key: Tensor, scale: float, there: Tensor | None = None) -> Tensor:
    """`softmax(q k^T s)` over the words, averaged over heads: `(batch, pixels, words)`, float32.

    Args:
        query: `(batch, heads, pixels, d)`.
        key: `(batch, heads, words, d)`.
        scale: s.
        there: `(batch, words)` bool: which words there are; the others get nothing. `None`: all.
    """
    scores = (query.float() @ key.float().transpose(-1, -2)) * scale
    if there is not None:
        scores = scores.masked_fill(~there[:, None, None].to(scores.device), float("-inf"))
    return scores.softmax(dim=-1).mean(dim=1)
