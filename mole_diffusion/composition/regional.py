"""LoRAs that act where their subject is: on its pixels and on its words."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import MoLEError
from ..experts import Projections, Run, Site
from ..families import Joint
from ..gating.tokens import token_grid
from ..methods import Modulation
from .apart import kept_apart
from .base import Composition
from .call import Call
from .prompt import PromptWords
from .regions import RegionMap
from .roles import roles
from .step import refuse_untold


class RegionalComposition(Composition):
    """A method that says which pixels are whose; this class turns that into weights for every module.

    A subject's LoRA has weight 1 on its own pixels and on its own words, in the text encoder as in the keys and values
    of cross-attention, and 0 on those of others. On neutral words, and in modules that have no tokens (projections of
    the time), N subjects have 1/N each. A style acts in full everywhere but on subjects' words; a utility everywhere.
    A LoRA that is the only one in a call, and was given no region, is that LoRA plainly.

    Unit strength where a LoRA belongs, instead of a share of one unit, is the rule of FreeFuse
    (https://arxiv.org/abs/2510.23515); words by owner are TARA's (AAAI 2026).

    Attributes:
        neutral_words: Weight of a subject's LoRA on words that are nobody's; `None` is 1/N.
        modulation: What subjects' LoRAs do to the one vector of a sample that tells the blocks of a transformer, or the
            residual blocks of a UNet, how noisy it is. No mask can act there. `"share"`: 1/N each; `"first"`: the
            first one in full; `"off"`: nothing.
    """

    neutral_words: float | None = None
    modulation: Modulation = "share"

    @property
    def of_places(self) -> bool:
        return type(self).weigh is RegionalComposition.weigh

    @abstractmethod
    def regions(self, run: Run) -> RegionMap | None:
        """Whose pixels are whose in this forward pass of the denoiser; `None` while LoRAs are to be left out.

        As long as nothing changes it is the same object, so that weights are worked out once.
        """

    def joins(self, total: int) -> int:
        """The first of `total` steps, from 0, in which LoRAs act; before it they are left out."""
        return 0

    def weigh(self, site: Site, projections: Projections, run: Run) -> Tensor | None:
        """`(batch | 1, tokens | 1, num_experts)`; the same tensor for all modules that see the same tokens."""
        call = self.call(run)
        if is_alone(call, run):
            return self._kept(run, "alone", (), lambda: (run.keep * run.scale)[:, None])
        if run.timestep is None:
            refuse_untold(run, self.name)
            ids = run.input_ids
            assert ids is not None
            return self._kept(run, "text", (ids,), lambda: self._words(self.words(call).of_tokens(ids), run))
        if "regions" not in run.notes:
            run.notes["regions"] = self.regions(run)
        region_map: RegionMap | None = run.notes["regions"]
        if region_map is None:
            return None
        rows, tokens = projections.batch, projections.tokens
        if site.reads == "vector":
            return self._kept(run, "vector", (), lambda: self._vector(run)[:, None])
        text, joint, size = run.encoder_hidden_states, run.told.joint, run.sample_size
        if site.reads == "text":
            return self._kept(run, ("words", tokens), (text,), lambda: self._of_words(tokens, run))
        if rows > run.told.rows:
            raise MoLEError(
                f"composition {self.name!r} says pixel by pixel whose they are, and something cuts the picture into "
                f"tiles at {site.name}: {rows} rows of {run.told.rows}. Take that off the model, or call "
                '`set_composition("norm_router")`, which need not know where a pixel is.'
            )
        if joint is None:  # a UNet's layers have fewer pixels than its sample, or as many
            size = projections.spatial or token_grid(tokens, size, site)
        if size is None or (site.reads == "both" and joint is None):
            raise MoLEError(
                f"composition {self.name!r} cannot tell words from pixels at {site.name}, in a sequence of {tokens} "
                'tokens. Call `set_composition("norm_router")`, which need not know.'
            )
        key = (site.reads, *size, rows, tokens)
        if site.reads == "both":
            return self._kept(run, key, (region_map, text), lambda: self._of_both(region_map, size, tokens, run))
        return self._kept(run, key, (region_map,), lambda: self._of_pixels(region_map, size, rows, tokens, run))

    def keeps_apart(self, run: Run) -> bool:
        call = run.call
        return isinstance(call, Call) and run.told.joint is not None and bool(call.region_prompts)

    def apart(self, joint: Joint, tokens: int, run: Run) -> Tensor:
        call, text = self.call(run), run.encoder_hidden_states
        assert text is not None
        assert run.sample_size is not None
        assert call.regions is not None
        regions, size = call.regions, run.sample_size
        there = joint.pixels.stop > joint.pixels.start

        def keep_apart() -> Tensor:
            columns = [regions.names.index(name) for name in call.region_prompts]
            shares = regions.at(*size, device=text.device)[..., columns]
            return kept_apart(self.words(call).whose(text), shares if there else shares[:, :0], joint, tokens)

        return self._kept(run, ("apart", *size, tokens, there), (text,), keep_apart)

    def call(self, run: Run) -> Call:
        """The call a forward pass belongs to.

        Raises:
            MoLEError: It belongs to none, so that nobody knows the prompt.
        """
        if not isinstance(run.call, Call):
            raise MoLEError(
                f"composition {self.name!r} needs to know the prompt, and the model was called outside of a pipeline's "
                "call. Draw with `pipe(...)`, inside `with pipe.composing():`, or after "
                '`set_composition("normalized")`.'
            )
        return run.call

    def words(self, call: Call) -> PromptWords:
        """Which tokens of a call's prompts call which LoRA.

        Raises:
            MoLEError: Nobody read the prompts.
        """
        if call.words is None:
            raise MoLEError(
                f"composition {self.name!r} needs to know where each LoRA's words stand, and got prompt embeddings or "
                "a pipeline of plain diffusers, which do not tell. Pass the prompt to a composing pipeline, give "
                '`spans={"cat": [4, 5]}` beside `prompt_embeds`, or use `set_composition("normalized")`.'
            )
        return call.words

    def _kept(self, run: Run, key: object, made_of: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, kept until the call ends or what it is made of changes."""
        kept: dict[Any, tuple[tuple[Any, ...], Tensor]] = run.call.state.setdefault((self, "weights"), {})
        made_of = (*made_of, run.keep, run.scale)
        found = kept.get(key)
        if found is None or any(a is not b for a, b in zip(found[0], made_of, strict=True)):
            kept[key] = found = made_of, make()
        return found[1]

    def _shares(self, run: Run) -> Tensor:
        """`(rows, N)`: subjects share one unit, styles and utilities have one each."""
        subject = roles(run, "subject")
        kept = run.keep * subject
        share = kept / kept.sum(dim=-1, keepdim=True).clamp(min=1)
        return (share + run.keep * (1 - subject)) * run.scale

    def _vector(self, run: Run) -> Tensor:
        """`(rows, N)`, where a sample has one vector and no mask can act."""
        if self.modulation == "share":
            return self._shares(run)
        subject = roles(run, "subject")
        kept = run.keep * subject
        first = kept * (kept.cumsum(dim=-1) == 1) * (self.modulation == "first")
        return (first + run.keep * (1 - subject)) * run.scale

    def _of_words(self, tokens: int, run: Run) -> Tensor:
        """`(rows, tokens, N)` for the prompt, of which a module may be given each word several times over."""
        text = run.encoder_hidden_states
        assert text is not None
        weights = self._words(self.words(self.call(run)).of_embeddings(text), run)
        return weights.repeat_interleave(tokens // weights.shape[1], dim=1)

    def _of_pixels(self, region_map: RegionMap, size: tuple[int, int], rows: int, tokens: int, run: Run) -> Tensor:
        """`(rows | 1, tokens, N)` for the picture; what comes behind it (pictures to look at) is shared."""
        weights = self._pixels(region_map, *size, rows, run)
        behind = tokens - weights.shape[1]
        if not behind:
            return weights
        return torch.cat([weights, self._shares(run)[:, None].expand(len(weights), behind, -1)], dim=1)

    def _of_both(self, region_map: RegionMap, size: tuple[int, int], tokens: int, run: Run) -> Tensor:
        """`(rows, tokens, N)` for words and pixels in one sequence; what is neither is shared."""
        joint = run.told.joint
        assert joint is not None
        words = self._of_words(joint.text.stop - joint.text.start, run)
        rows = len(words)
        weights = self._shares(run)[:, None].expand(rows, tokens, -1).clone()
        weights[:, joint.text] = words
        weights[:, joint.pixels] = self._pixels(region_map, *size, rows, run)
        return weights

    def _words(self, owned: Tensor, run: Run) -> Tensor:
        """`(rows, tokens, N)` from whose words they are, `(rows, N, tokens)`."""
        own = owned.transpose(1, 2).to(run.keep.dtype)  # (rows, tokens, N)
        subject, style = roles(run, "subject"), roles(run, "style")
        by_subject = (own * subject).amax(dim=-1, keepdim=True)  # also of one that is masked out
        taken = own.amax(dim=-1, keepdim=True)
        kept = (run.keep * subject)[:, None]
        share = kept / kept.sum(dim=-1, keepdim=True).clamp(min=1) if self.neutral_words is None else self.neutral_words
        subjects = own + (1 - taken) * share
        styles = 1 - by_subject * (1 - own)
        utility = 1 - subject - style
        weights = subjects * subject + styles * style + utility
        return weights * (run.keep * run.scale)[:, None]

    def _pixels(self, region_map: RegionMap, height: int, width: int, rows: int, run: Run) -> Tensor:
        """`(rows | 1, pixels, N)`: a region map has a row for each picture, a denoiser several for one."""
        shares = region_map.at(height, width, device=run.keep.device)
        subject = roles(run, "subject")
        weights = shares * subject + (1 - subject)
        if len(weights) > 1:
            weights = weights.repeat(rows // len(weights), 1, 1)
        return weights * (run.keep * run.scale)[:, None]


def is_alone(call: Call, run: Run) -> bool:
    """Whether at most one LoRA that is no utility takes part, and has the whole picture."""
    known: dict[Any, tuple[Tensor, bool]] = call.state.setdefault("alone", {})
    if run.component not in known or known[run.component][0] is not run.keep:
        taking_part = run.keep * (1 - roles(run, "utility"))
        one = bool((taking_part.sum(dim=-1) <= 1).all())
        known[run.component] = run.keep, one and call.regions is None
    return known[run.component][1]
