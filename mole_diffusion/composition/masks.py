"""Masks found in the base model's own attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MoLEError
from ..experts import Run
from ..experts.seam import LayerSeam
from ..gating.tokens import token_grid
from ..methods import MaskOptions
from .attention import WordMaps
from .call import Call
from .owners import owners
from .regional import RegionalComposition, is_alone
from .regions import RegionMap
from .roles import roles
from .step import step_of


@dataclass(eq=False)
class _Found:
    """What was found in the present call so far."""

    first_step: int | None = None
    maps: Any = None
    region_map: RegionMap | None = None
    keep: Tensor | None = None


class Masks(MaskOptions, RegionalComposition):
    """Every LoRA acts on its own subject, at full strength; where that is, the base model tells without LoRAs.

    The first steps are drawn without LoRAs; in some of them, when things have found their places, the attention of the
    pixels to each subject's words is read, and every pixel goes to the subject it attends to most, or to the background
    (`owners`). Then the picture is begun again from the same noise, with LoRAs
    where they belong. No training, no pictures, LoRAs never seen before.

    The scheme of two phases is that of FreeFuse (https://arxiv.org/abs/2510.23515), whose masks come from another rule,
    see `FreeFuse`.

    Regions that a user gave also draw the words of their subject to them, since a thing that the base puts elsewhere
    would be drawn by no LoRA at all.

    Args:
        online: Do not begin again: LoRAs join in once masks are known. Costs no evaluation of the denoiser.
        start: Where reading begins, as a part of all steps: attention of the very first says little.
        stop: Where it ends. A picture that begins in the middle of the schedule (image to image) is read from its first
            step on, for as long.
        join: Where LoRAs join in when the picture is begun again. Until then the base lays the picture out as it did
            when masks were read; LoRAs in the first steps would move things away from their masks.
        background: A pixel is a subject's if its attention to the words lies this many standard deviations above the
            mean of the picture.
        smoothing: Side of the square, in pixels of the latent, over which maps are averaged; odd.
        neutral_words: Weight of a subject's LoRA on words that are nobody's; `None` is 1/N.
        own_words: Added to the scores of a subject's pixels for the subject's own words (FreeFuse's gamma).
        others_words: Taken from the scores of all other pixels for these words (FreeFuse's beta).
        given_own_words: The same as `own_words`, for regions that a user gave.
        given_others_words: The same as `others_words`, for regions that a user gave.
        modulation: What LoRAs do where no mask can act, as in `RegionalComposition`.

    Raises:
        MoLEError: A setting is out of its range.
    """

    name = "masks"
    source = "attention of the base; after FreeFuse (arXiv 2510.23515)"

    @property
    def crossed_alone(self) -> bool:
        asked = "read", "attended", "attention_bias"
        return all(getattr(type(self), name) is getattr(Masks, name) for name in asked)

    def evaluations(self, num_loras: int) -> float:
        return 1 if self.online or num_loras <= 1 else 1 + self.stop

    def prior_done(self, run: Run) -> bool:
        call = self.call(run)
        _, stop = self._window(call, run)
        return step_of(run).index + 1 >= stop

    def watches(self, run: Run) -> bool:
        if not isinstance(run.call, Call) or not (self.online or run.call.prior):
            return False
        found = self._found(run.call)
        if found.region_map is not None or self._all_given(run.call, run):
            return False
        start, stop = self._window(run.call, run)
        return start <= step_of(run).index < stop

    def attended(self, layer: LayerSeam, query: Tensor, key: Tensor, output: Tensor, run: Run) -> None:
        found = self._found(run.call)
        if found.maps is None:
            found.maps = self.new_maps(run.call)
        self.read(found.maps, layer, query, key, output, run)

    def new_maps(self, call: Call) -> Any:
        """An empty collection of attention maps."""
        return WordMaps(self.words(call))

    def read(self, maps: Any, layer: LayerSeam, query: Tensor, key: Tensor, output: Tensor, run: Run) -> None:
        """Takes in one layer."""
        with torch.no_grad():
            maps.add(layer, query, key, run)

    def own(self, maps: Any, taking_part: Tensor) -> Tensor:
        """The rule: `(pictures, N, height, width)` of shares from what was read."""
        mean = maps.mean()
        return owners(mean, taking_part.to(mean.device), background=self.background, smoothing=self.smoothing)

    def regions(self, run: Run) -> RegionMap | None:
        call = self.call(run)
        if call.prior:
            return None
        step = step_of(run)
        self._window(call, run)
        first = self._found(call).first_step or 0
        if step.index < min(first + round(self.join * step.total), step.total - 1):
            return None
        return self.find(run)

    def joins(self, total: int) -> int:
        joined = min(round(self.join * total), total - 1)
        return max(joined, self._reading(0, total)[1]) if self.online else joined

    def find(self, run: Run) -> RegionMap | None:
        """Whose pixels are whose, as soon as that is known."""
        call = self.call(run)
        found = self._found(call)
        if self._all_given(call, run):
            return call.regions
        if self.online and found.region_map is None and step_of(run).index < self._window(call, run)[1]:
            return None
        if found.region_map is None or found.keep is not run.keep:
            found.region_map, found.keep = self._decide(call, found, run), run.keep
            call.found = found.region_map
        return found.region_map

    def biases(self, run: Run) -> bool:
        return self._draws_words(run) or type(self).attention_bias is not Masks.attention_bias

    def attention_bias(self, layer: LayerSeam, query: Tensor, key: Tensor, run: Run) -> Tensor | None:
        text = run.encoder_hidden_states
        region_map = self.find(run) if layer.crossed and self._draws_words(run) else None
        if region_map is None or text is None or run.sample_size is None:
            return None
        size, rows = token_grid(query.shape[2], run.sample_size, layer), len(query)
        return self._kept(
            run,
            ("bias", *size, rows, query.dtype),
            (region_map, text),
            lambda: self._bias(region_map, size, rows, text, run).to(query.dtype),
        )

    def _draws_words(self, run: Run) -> bool:
        """Whether words of subjects are drawn to their pixels."""
        call = self.call(run)
        strengths = self.own_words, self.others_words, self.given_own_words, self.given_others_words
        some = any(strengths if call.regions is not None else strengths[:2])
        return some and not call.prior and not is_alone(call, run)

    def _bias(self, region_map: RegionMap, size: tuple[int, int], rows: int, text: Tensor, run: Run) -> Tensor:
        """`(rows, 1, pixels, words)`: for the words of each subject, more where it is and less where it is not."""
        call, device = self.call(run), text.device
        owned = self.words(call).of_embeddings(text).float()  # (rows, N, words)
        shares = region_map.at(*size, device=device)
        if len(shares) > 1:
            shares = shares.repeat(rows // len(shares), 1, 1)
        kept = run.keep * roles(run, "subject")  # (rows | 1, N)
        given = torch.tensor([float(name in region_map.fixed) for name in call.names], device=device)
        own = self.own_words + given * (self.given_own_words - self.own_words)
        others = self.others_words + given * (self.given_others_words - self.others_words)
        more = (shares * (own + others) - others) * kept[:, None]  # (rows, pixels, N)
        return (more @ owned)[:, None]

    def _decide(self, call: Call, found: _Found, run: Run) -> RegionMap:
        if found.maps is None or found.maps.empty:
            raise MoLEError(
                f"composition {self.name!r} saw no attention of the pixels to the prompt before LoRAs were to begin. "
                "Draw with more steps, or give the regions yourself: `pipe(..., regions={...})`."
            )
        given = call.regions
        fixed = set() if given is None else set(given.fixed)
        kept = (run.keep * roles(run, "subject")).bool().cpu()
        automatic = kept & torch.tensor([name not in fixed for name in call.names])
        maps = found.maps
        values = self.own(maps, automatic).cpu()
        if given is not None:
            drawn = given.values.cpu()
            if drawn.shape[-2:] != values.shape[-2:]:
                drawn = torch.nn.functional.interpolate(drawn, size=values.shape[-2:], mode="area")
            drawn = drawn * kept[..., None, None]
            values = drawn + values * (1 - drawn.sum(dim=1, keepdim=True)).clamp(
                0, 1
            )  # regions that were given go first
        return RegionMap(values.clamp(0, 1), call.names, sorted(fixed))

    def _all_given(self, call: Call, run: Run) -> bool:
        """Whether every subject that takes part has a region of the user's."""
        given = call.regions
        if given is None:
            return False
        known = call.state.setdefault((self, "all given"), [None, False])
        if known[0] is not run.keep:
            kept = (run.keep * roles(run, "subject")).amax(dim=0).tolist()
            known[:] = run.keep, all(name in given.fixed for name, k in zip(call.names, kept, strict=True) if k)
        return bool(known[1])

    def _found(self, call: Call) -> _Found:
        found: _Found = call.state.setdefault((self, "found"), _Found())
        return found

    def _window(self, call: Call, run: Run) -> tuple[int, int]:
        """First step that is read, and the one after the last."""
        step, found = step_of(run), self._found(call)
        if found.first_step is None:
            found.first_step = step.index
        return self._reading(found.first_step, step.total)

    def _reading(self, first_step: int, total: int) -> tuple[int, int]:
        start = math.floor(self.start * total)
        length = max(1, round(self.stop * total) - start)
        start = max(start, first_step)
        return min(start, total - 1), min(start + length, max(total - self.online, 1))
