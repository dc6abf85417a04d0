"""The one seam of a composition method: how much of each LoRA every module gets, at every place of its input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor

from ..experts import Projections, Run, Site
from ..experts.seam import LayerSeam
from ..families import Joint
from ..methods import Need, Options
from .step import Step

__all__ = ["Composition", "Need", "Step"]


class Composition(Options, ABC):
    """How several LoRAs share one picture.

    A method says how much of each LoRA is added: it is asked at every module that LoRAs change, in every forward pass.
    One that gives a number per
    LoRA and step, alike in all modules, stands on `StepComposition` instead, and one
    that gives every LoRA its pixels and words on `RegionalComposition`. Batching,
    guidance, seeds and the choice of LoRAs are done once, outside of methods.

    Nothing of a call is kept on the method: what it wants to remember until the call ends goes into
    `run.call.state`, for the rest of a forward pass into `run.notes`.

    Attributes:
        name: The name in `COMPOSITIONS`.
        source: Where the method comes from.
        needs: What a pipeline must bring. `"gates"`: trained gates, handed over in `gates`. `"words"`: where
            in the prompt each LoRA's trigger words stand (`run.call.words`). `"attention"`: the attention of the
            denoiser (`watches`, `attended`). `"prior"`: the first steps are drawn once without LoRAs before the
            picture is begun, until `prior_done`.
        gates: The gates, where the method needs them.
        constant: Whether its weights are the same in every step and at every place, so that a cache of the denoiser
            keeps what it would keep of a model with the LoRAs merged into it.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    gates: Any = None
    constant: bool = False

    @abstractmethod
    def weigh(self, site: Site, projections: Projections, run: Run) -> Tensor | None:
        """Weights of all LoRAs for one module in one forward pass, times `run.keep` and `run.scale`.

        Args:
            site: The module, and the LoRAs' factors there.
            projections: `A x` of this module and of those that read the same tensor.
            run: The forward pass: component, keep, scale, timestep, prompt embeddings, and the call it belongs to.

        Returns:
            `(batch | 1, tokens | 1, num_experts)`, or `None`: nothing is added here.
        """

    def reads_left_out(self, site: Site) -> bool:
        """Whether the method needs in `projections` what LoRAs that are left out would add at a module.

        By default it does not, and they are not computed.
        """
        return False

    def passes(self, run: Run) -> int:
        """How many passes of the denoiser this step takes; they run as one widened batch. Asked once a step."""
        return 1

    @property
    def of_modules(self) -> bool:
        """Whether its weights in a pass are the same at all tokens of a module, if there are any.

        A compiled graph then asks once for those of all modules, with `projections` that have no rows, and not again in
        later passes as long as the tensor for the first module is the same.
        """
        return False

    @property
    def of_places(self) -> bool:
        """Whether its weights in a pass follow from what a module reads, how finely, and how many tokens that has.

        A compiled graph then asks once for all modules of a place, with `projections` that have no rows.
        """
        return False

    @property
    def of_groups(self) -> Collection[str]:
        """Names of modules to which it gives in a pass the tensor of all others that read the same, as q, k and v do.

        It may read `projections` of the first of them alone: their rows are weighed at once, where they lie.
        """
        return ()

    @property
    def orthonormal(self) -> bool:
        """Whether `projections` are to tell how large each LoRA's output is, but for a number of its own at a module.

        So they do where products are made with copies of the factors (`ExpertStack.orthonormal` tells): a second copy
        is not made for it. What is added stays the same: see `ExpertStack.with_orthonormal_columns`.
        """
        return False

    @property
    def in_attention(self) -> bool:
        """Whether the method has a `watches` or an `attention_bias` of its own; if not, no attention layer asks it."""
        kind = type(self)
        watches = kind.watches is not Composition.watches
        return watches or kind.attention_bias is not Composition.attention_bias

    @property
    def crossed_alone(self) -> bool:
        """Whether layers that do not attend to the prompt may be left out of what the method sees and changes.

        A compiled graph then has nothing in them.
        """
        return False

    def watches(self, run: Run) -> bool:
        """Whether the method wants to see what attention layers compute in this pass of the denoiser. Asked once."""
        return False

    def attended(self, layer: LayerSeam, query: Tensor, key: Tensor, output: Tensor, run: Run) -> None:
        """Shown what an attention layer of the denoiser computed, before its output projection.

        Args:
            layer: The layer: its name, and whether it attends to the prompt.
            query: `(batch, heads, pixels, d)`.
            key: `(batch, heads, pixels or words, d)`.
            output: `(batch, pixels, heads * d)`.
            run: The forward pass.
        """
        return None  # a method that watches overrides this

    def biases(self, run: Run) -> bool:
        """Whether the method may add to the scores of attention layers in this pass of the denoiser. Asked once.

        Where it may not, no layer asks for an `attention_bias`.
        """
        return type(self).attention_bias is not Composition.attention_bias

    def attention_bias(self, layer: LayerSeam, query: Tensor, key: Tensor, run: Run) -> Tensor | None:
        """Added to the scores of an attention layer of the denoiser, `(batch, 1, pixels, words)`; `None`: nothing.

        Arguments as in `attended`.
        """
        return None

    def keeps_apart(self, run: Run) -> bool:
        """Whether some words of this pass are not for all to see where words and pixels are one sequence."""
        return False

    def apart(self, joint: Joint, tokens: int, run: Run) -> Tensor | None:
        """Added to the scores of an attention of words and pixels, or of words, where `keeps_apart` says so.

        Args:
            joint: Where words and pixels stand.
            tokens: How many tokens there are.
            run: The forward pass.

        Returns:
            `(batch, 1, tokens, tokens)`, of queries and keys; `None`: nothing.
        """
        return None

    def combine(self, predictions: Tensor, run: Run) -> Tensor:
        """One prediction `(batch, ...)` from those of all passes `(passes, batch, ...)`; by default their mean."""
        return predictions.mean(dim=0)

    def evaluations(self, num_loras: int) -> float:
        """Denoiser evaluations per step of a picture with this many LoRAs kept, those of a prior pass spread over them.

        Guidance doubles the batch, not this.
        """
        return 1

    def prior_done(self, run: Run) -> bool:
        """Whether the pass without LoRAs that comes before the picture has shown enough with this forward pass."""
        return True
