"""Masks from words and from how alike pixels are, as FreeFuse finds them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MoLEError
from ..experts import Run
from ..experts.seam import LayerSeam
from ..gating.tokens import token_grid
from ..methods import FreeFuseOptions
from .call import Call
from .masks import Masks
from .owners import z_scores
from .prompt import PromptWords

TOKENS_A_SIDE = 32  # of the level whose layers are read, or the nearest to it: things are whole and still have edges
CORE = 0.1
ITERATIONS = 5


class FreeFuse(FreeFuseOptions, Masks):
    """FreeFuse: pixels that attend to a subject's words most are its core, and what looks like the core is the subject.

    "FreeFuse: Multi-Subject LoRA Fusion via Auto Masking at Test Time" (https://arxiv.org/abs/2510.23515): one late
    step of a prior pass without LoRAs is read; see `freefuse_owners` for the rule. Its first phase is kept in
    what it claims, and left out is what ties it to one model: areas need not be equal; every score is a z-score, so
    that no temperature depends on width or resolution; words of the negative prompt are nobody's; nothing outlives the
    call; and a subject's words count in keys and values too.

    Args:
        stop: The last step of the prior pass, as a part of all steps; it alone is read.
        background: Factor on the map of the end of the text, which stands for the background.
        own_words: Added to the scores of a subject's pixels for its own words; the paper's gamma, 0 to 2.
        others_words: Taken from those for others' words; its beta, 0 to 4.
        modulation: As in `RegionalComposition`.

    Raises:
        MoLEError: A setting is out of its range.
    """

    name = "freefuse"
    source = "FreeFuse (arXiv 2510.23515)"

    def _window(self, call: Call, run: Run) -> tuple[int, int]:
        _, stop = super()._window(call, run)
        return stop - 1, stop

    def new_maps(self, call: Call) -> _Likeness:
        return _Likeness(self.words(call))

    def read(self, maps: Any, layer: LayerSeam, query: Tensor, key: Tensor, output: Tensor, run: Run) -> None:
        with torch.no_grad():
            maps.add(layer, query, key, output, run)

    def own(self, maps: Any, taking_part: Tensor) -> Tensor:
        scores, background, outputs, sample_size = maps.mean()
        part = taking_part.to(scores.device)
        values = freefuse_owners(scores, background, outputs, part, factor=self.background)
        return F.interpolate(values, size=sample_size, mode="nearest")


class _Likeness:
    """What was read at one level: scores of words, of the end of the text, and outputs of self-attention."""

    def __init__(self, words: PromptWords) -> None:
        self.words = words
        self._levels: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._outputs: dict[str, Tensor] = {}
        self._sample_size = (1, 1)

    @property
    def empty(self) -> bool:
        return not self._levels

    def add(self, layer: LayerSeam, query: Tensor, key: Tensor, output: Tensor, run: Run) -> None:
        """Takes in one layer; the self-attention of a block comes before its cross-attention."""
        text = run.encoder_hidden_states
        if text is None or run.sample_size is None or output.ndim != 3:
            return
        conditional = self.words.conditional(text).to(query.device)
        if not len(conditional):
            return
        block = layer.name.rpartition(".")[0]
        if not layer.crossed:
            self._outputs[block] = output[conditional].float()
            return
        if block not in self._outputs:
            return
        owned = self.words.of_embeddings(text).to(query.device)[conditional]
        ends = self.words.ends(text).to(query.device)[conditional]  # (rows, 1, words)
        scores = (query[conditional].float() @ key[conditional].float().transpose(-1, -2)) * layer.scale
        scores = scores.transpose(-1, -2)  # (rows, heads, words, pixels)
        size = token_grid(query.shape[2], run.sample_size, layer)
        both = torch.cat([owned, ends], dim=1).float()
        attention = scores.unflatten(-1, size)
        attention = z_scores(attention).flatten(-2).softmax(dim=-1).mean(dim=1)  # over pixels: (rows, words, pixels)
        maps = torch.einsum("rwp,rnw->rnp", attention, both) / both.sum(dim=-1).clamp(min=1)[..., None]
        self._levels.setdefault(size, []).append((maps[:, :-1], maps[:, -1:], self._outputs.pop(block)))
        self._sample_size = run.sample_size

    def mean(self) -> tuple[Tensor, Tensor | None, list[Tensor], tuple[int, int]]:
        """Of the level nearest to `TOKENS_A_SIDE`: word maps, the background's, outputs of each layer, sample size."""
        coarser = {size: read for size, read in self._levels.items() if size != self._sample_size} or self._levels
        size = min(coarser, key=lambda level: abs(level[0] - TOKENS_A_SIDE))
        maps, ends, outputs = zip(*coarser[size], strict=True)
        scores, background = torch.stack(maps).mean(dim=0), torch.stack(ends).mean(dim=0)
        known = background.any()  # where only embeddings are known, nobody knows where the text ends
        shown = background.unflatten(-1, size) if known else None
        return scores.unflatten(-1, size), shown, list(outputs), self._sample_size


def freefuse_owners(
    scores: Tensor, background: Tensor | None, outputs: list[Tensor], taking_part: Tensor, *, factor: float
) -> Tensor:
    """FreeFuse's rule, in z-scores.

    With `s_c` the attention of the pixels to concept c's words, softmax over pixels, N concepts::

        d_c = N s_c - sum_{o != c} s_o         K_c = the tenth of the pixels where d_c is largest
        m_c(p) = z_p( mean_{u in K_c} <h_u, h_p> ), mean over layers, h the outputs of self-attention
        foreground = pixels where max_c z(s_c) > factor * z(background), then opened and closed by 2x2
        owner = argmax_c m_c + share of the 3x3 neighbours that are c's - squared distance to c's soft centroid, 5 times

    Args:
        scores: s, `(rows, N, height, width)`.
        background: The map that stands for the background, `(rows, 1, height, width)`; `None`: there is none.
        outputs: h of each layer, `(rows, pixels, width)`.
        taking_part: `(rows | 1, N)` bool.
        factor: Factor on the background's map.

    Returns:
        `(rows, N, height, width)` of 0 and 1.

    Raises:
        MoLEError: No LoRA takes part.
    """
    if not taking_part.any():
        raise MoLEError("no LoRA takes part that masks could be found for. Name at least one in `loras=[...]`.")
    size = scores.shape[-2:]
    part = taking_part[..., None, None].to(scores.dtype)
    scores = scores * part
    number = part.sum(dim=1, keepdim=True)
    contrast = (number * scores - (scores.sum(dim=1, keepdim=True) - scores)).flatten(2)  # (rows, N, pixels)
    count = max(1, round(CORE * contrast.shape[-1]))
    core = torch.zeros_like(contrast).scatter(2, contrast.topk(count, dim=-1).indices, 1.0 / count)
    alike = [torch.einsum("rnu,rud,rpd->rnp", core, h, h).unflatten(-1, size) for h in outputs]
    likeness = torch.stack([z_scores(each) for each in alike]).mean(dim=0).masked_fill(part == 0, float("-inf"))
    foreground = torch.ones_like(scores[:, :1])
    if background is not None:
        best = z_scores(scores).masked_fill(part == 0, float("-inf")).amax(dim=1, keepdim=True)
        foreground = (best > factor * z_scores(background)).to(scores.dtype)
        foreground = _dilated(_eroded(foreground))
        foreground = _eroded(_dilated(foreground))
    height, width = size
    y = torch.linspace(0, 1, height, device=scores.device).view(1, 1, height, 1)
    x = torch.linspace(0, 1, width, device=scores.device).view(1, 1, 1, width)
    owned = torch.zeros_like(scores).scatter(1, likeness.argmax(dim=1, keepdim=True), 1.0)
    for _ in range(ITERATIONS):
        neighbours = F.avg_pool2d(owned, 3, stride=1, padding=1, count_include_pad=False)
        soft = (likeness.softmax(dim=1) * foreground).nan_to_num()
        mass = soft.sum(dim=(-2, -1), keepdim=True).clamp_min(1e-6)
        off_y = y - (soft * y).sum(dim=(-2, -1), keepdim=True) / mass
        off_x = x - (soft * x).sum(dim=(-2, -1), keepdim=True) / mass
        logits = likeness + neighbours - (off_y.square() + off_x.square())
        owned = torch.zeros_like(scores).scatter(1, logits.argmax(dim=1, keepdim=True), 1.0)
    return (owned * foreground * part).float()


def _dilated(mask: Tensor) -> Tensor:
    """Largest of 2×2 pixels."""
    return F.max_pool2d(F.pad(mask, (0, 1, 0, 1)), 2, stride=1)


def _eroded(mask: Tensor) -> Tensor:
    """Smallest of 2×2 pixels, counted from the other corner, so that an opening moves nothing."""
    return -F.max_pool2d(F.pad(-mask, (1, 0, 1, 0), value=-1.0), 2, stride=1)
