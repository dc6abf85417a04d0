"""What one forward pass of a component was started with, and who says how much of each LoRA a module gets in it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..families import Told

if TYPE_CHECKING:
    from .site import Projections, Site


@dataclass(frozen=True, eq=False)
class Run:
    """One forward pass of one component: who weighs, what is kept, and what the model was told.

    Frozen when the pass begins, because gradient checkpointing runs parts of it again during the backward pass, when
    the surrounding `experts.using(...)` may long be left and other passes may have followed.

    Attributes:
        component: `"unet"`, `"text_encoder"` ...
        index: Counts the passes of this component.
        weigher: Who weighs, or `None`: the base model.
        keep: `(rows | 1, N)` of 0 and 1.
        scale: `(rows | 1, N)`.
        told: What the model was told: step, prompt, size of the picture.
        passes: How many times the batch runs at once, one block of rows after another; see `Weigher.passes`. The
            other attributes are those of one such pass.
        call: What was handed to `experts.using(call=...)`: the call of a pipeline this pass belongs to, for the
            weigher to read. `None` outside of one.
        kept: Indices of the LoRAs that any row of `keep` has a 1 for, `None` where that is all: of the others nothing
            is computed. None of them where all weights are zero.
        merged: Whether the modules have the LoRAs in their weights in this pass, so that nothing is to be added.
        notes: What a weigher wants to remember for the rest of this pass and for its recomputation.
    """

    component: str
    index: int
    weigher: Weigher | None
    keep: Tensor
    scale: Tensor
    told: Told
    passes: int = 1
    call: Any = None
    kept: tuple[int, ...] | None = None
    merged: bool = False
    notes: dict[Any, Any] = field(default_factory=dict)

    @cached_property  # asked at every module
    def active(self) -> bool:
        """Whether anything can be added in this pass: somebody weighs, and some LoRA is kept."""
        return self.weigher is not None and self.kept != ()

    @cached_property
    def rows_chosen(self) -> tuple[int, int]:
        """How many rows `keep` and `scale` have."""
        return len(self.keep), len(self.scale)

    @cached_property  # asked at every attention layer, as the next
    def attends(self) -> bool:
        """Whether the weigher wants to see what attention layers compute, or may add to their scores."""
        return self.watched or self.biased

    @cached_property
    def crossed_alone(self) -> bool:
        """Whether it needs no layers but those that attend to the prompt."""
        return bool(getattr(self.weigher, "crossed_alone", False))

    @cached_property
    def watched(self) -> bool:
        """Whether the weigher wants to see what attention layers compute."""
        watches = getattr(self.weigher, "watches", None)
        return self.active and looks_on(self.weigher) and watches is not None and bool(watches(self))

    @cached_property
    def biased(self) -> bool:
        """Whether the weigher may add to the scores of attention layers."""
        if not (self.active and looks_on(self.weigher) and hasattr(self.weigher, "attention_bias")):
            return False
        biases = getattr(self.weigher, "biases", None)
        return biases is None or bool(biases(self))

    @cached_property  # asked at every module, as the next
    def alike(self) -> bool:
        """Whether the weigher gives all modules the same tensor."""
        return bool(getattr(self.weigher, "alike", False))

    @cached_property
    def of_places(self) -> bool:
        """Whether it gives the same to all modules of a place."""
        return bool(getattr(self.weigher, "of_places", False))

    @cached_property
    def of_groups(self) -> Collection[str]:
        """Names of the modules that it gives the same as all others that read the same tensor."""
        return getattr(self.weigher, "of_groups", ())

    @cached_property
    def orthonormal(self) -> bool:
        """Whether it wants `down x` to tell how large outputs are."""
        return bool(getattr(self.weigher, "orthonormal", False))

    @cached_property
    def ungraded(self) -> bool:
        """Whether no gradient can be wanted of the pass."""
        return not torch.is_grad_enabled()

    @property
    def timestep(self) -> Tensor | float | None:
        """In the units of the scheduler's `timesteps`; `None` in a text encoder."""
        return self.told.timestep

    @property
    def encoder_hidden_states(self) -> Tensor | None:
        """The prompt embeddings the denoiser was given, `(rows, tokens, width)`; `None` in a text encoder."""
        return self.told.encoder_hidden_states

    @property
    def input_ids(self) -> Tensor | None:
        """The tokens a text encoder was given, `(rows, tokens)`; `None` in a denoiser."""
        return self.told.input_ids

    @property
    def sample_size(self) -> tuple[int, int] | None:
        """`(height, width)` of the picture in tokens, at the denoiser's finest level, where it has them."""
        return self.told.sample_size


@runtime_checkable
class Weigher(Protocol):
    """Gives the final weights gamma of `y = W x + up (gamma * down x)`.

    `weigh` is all a weigher needs. The others are asked for where it has them:

    `reads_left_out(site) -> bool`: whether it needs at this module what LoRAs would add that are left out, too; else
    they are not computed, and have no columns in `projections`.
    `constant`: that its weights are the same in every step and at every place. Where LoRAs are merged into the weights
    of modules, it is asked for them with `projections` that have no rows.
    `alike`: that in a pass it gives all modules the same tensor, `(rows, 1, N)`: then it may be asked once a pass.
    `of_modules`: that in a pass its weights are `(rows | 1, 1, N)` at every module, or `None` at all: then it may be
    asked for those of all modules at once, with `projections` that have no rows, and once for several passes as long as
    the tensor for the first module is the same.
    `of_places`: that in a pass its weights follow from what a module reads, how finely and how many tokens: then it may
    be asked once for all modules of a place, with `projections` that have no rows.
    `of_groups`: names of modules that it gives in a pass the tensor of all others that read the same, such as q, k and
    v; it reads `projections` of the first of them alone: then all are weighed at once, where their rows lie.
    `orthonormal`: that sites are to be with factors of which `down x` tells how large each LoRA's output is, where
    factors are copied for the products anyway: `ExpertStack.with_orthonormal_columns`.
    `has_rules`: that compiled graphs can weigh as it does by rules of its own, and `rules(parts) -> dict[str, Ruled]`:
    those, by name, of the modules that are given with the compiled part of the model that each lies in; modules that it
    leaves out are asked for one by one. `rules_now(run)`: what they are told beside `keep` and `scale`, once a pass,
    `(rows | 1, N)` or `None`; raises MoLEError where they do not hold now.
    `bind(experts)`: told which experts it weighs, when it is set.
    `passes(run) -> int`: the denoiser's batch runs this many times over in one forward pass, all its rows for the
    first pass, then all for the second; `weigh` then answers for the widened batch. Asked once, when the
    denoiser's forward pass begins; text encoders run once.
    `combine(predictions, run)`: predictions `(passes, batch, ...)` to what the caller of the denoiser gets,
    `(batch, ...)`.
    `attention_bias(layer, query, key, run)`: an additive bias `(batch, 1, pixels, words)` for a cross-attention, and
    `biases(run) -> bool`: whether there may be one in this pass; where it does not say, there may.
    `keeps_apart(run) -> bool`: whether some words are not for all to see where words and pixels are one sequence, and
    `apart(joint, tokens, run)`: what is then added to the scores of such a layer, `(batch, 1, tokens, tokens)`.
    `watches(run) -> bool`: whether it wants to see what attention layers compute in this pass of the denoiser, and
    `attended(layer, query, key, output, run)`: what one did. Layers are `LayerSeam`; query and key
    `(batch, heads, tokens, d)`; output `(batch, tokens, heads * d)`.
    `in_attention`: whether it does any of these two; where it says that it does not, no layer asks.
    `crossed_alone`: that layers which do not attend to the prompt may be left out of both.
    """

    def weigh(self, site: Site, projections: Projections, run: Run) -> Tensor | None:
        """Weights for one module in one pass, with `run.keep` and `run.scale` already worked in.

        Args:
            site: The module, with the experts that take part.
            projections: `down x` of this site and of those that read the same tensor, `(batch, tokens, R)` each.
            run: The forward pass: keep, scale, timestep, prompt embeddings.

        Returns:
            `(batch | 1, tokens | 1, N)`, or `None` to add nothing here. The same tensor, given again for another
            module or in a later pass, is not worked through again.
        """
        ...


def looks_on(weigher: Weigher | None) -> bool:
    """Whether a weigher may want to see what attention layers compute, or to add to their scores."""
    hears = hasattr(weigher, "watches") or hasattr(weigher, "attention_bias")
    return hears and bool(getattr(weigher, "in_attention", True))


def in_backward() -> bool:
    """Whether autograd is running, that is, whether a forward now is a checkpoint's recomputation."""
    return torch._C._current_graph_task_id() != -1
