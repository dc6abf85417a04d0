"""The masks that gates correct, found anew for every picture that a training walks to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.composition import Call
from mole_diffusion.composition.call import running
from mole_diffusion.families.base import Conditions
from mole_diffusion.pipelines.reading import prompt_words
from mole_diffusion.training.gates.walk import Walker, WalkPlan


class WalkMasks:
    """One part of a batch on one walk: a call of the pipeline's kind, in which the method finds its masks.

    As in a call, they are found once, by a pass without LoRAs where the method needs one, and hold for the whole walk.

    Args:
        walker: It has the pipeline, with gates on it that correct masks.
        plan: The walk.
        prompts: The prompts of this part.

    Raises:
        MoLEError: A prompt does not call every subject by its words.
    """

    def __init__(self, walker: Walker, plan: WalkPlan, prompts: Sequence[str]) -> None:
        self._walker = walker
        self._pipe = walker.pipe
        self._plan = plan
        roles = self._pipe.roles
        steps = SimpleNamespace(timesteps=plan.timesteps[:-1], order=1)
        self.call = Call(tuple(roles), tuple(roles.values()), steps)
        self.call.words = prompt_words(self._pipe, prompts, self._pipe._loaded, self.call)

    @contextmanager
    def known(self) -> Iterator[None]:
        """A `with` block in which models are called as a call of the pipeline calls them."""
        # Words were read above; the pipeline's own reading would look for them in empty prompts too.
        with running(None), self._pipe.experts.using(call=self.call):
            yield

    def encoded(self, conditions: Conditions) -> None:
        """Says what the prompts became, those of the empty prompt before them or not; anew where gates have changed."""
        assert self.call.words is not None
        self.call.words.encoded(conditions.prompt_embeds[-len(self.call.words.owned) :].detach())

    @torch.no_grad()
    def find(self, noise: Tensor, rows: slice, conditions: Conditions) -> None:
        """The pass without LoRAs from the same noise, for as long as the method wants to look.

        Args:
            noise: The noise of this part, (rows, c, h, w).
            rows: Where the part stands in the batch.
            conditions: The prompts as the denoiser is given them.
        """
        method, plan, config = self._pipe.composition, self._plan, self._walker.config
        if "prior" not in method.needs:
            return
        random = plan.generator.get_state()  # the walk draws the same noise again
        self.call.prior = True
        latents = noise
        for now, after in zip(plan.timesteps, plan.timesteps[1:], strict=False):
            prediction = self._walker.predict(latents, now, conditions)
            if method.prior_done(self._pipe.experts.context):
                break
            fresh = plan.fresh_noise(config.eta)
            latents = self._walker.advance(prediction, latents, now, after, None if fresh is None else fresh[rows])
        self.call.prior = False
        plan.generator.set_state(random)


class NoMasks:
    """Takes the place of `WalkMasks` for gates that weigh LoRAs without masks: every method does nothing."""

    def known(self) -> Any:
        """A `with` block that changes nothing."""
        return nullcontext()

    def encoded(self, conditions: Conditions) -> None:
        """Does nothing: these gates read no words."""

    def find(self, noise: Tensor, rows: slice, conditions: Conditions) -> None:
        """Does nothing: these gates have no masks."""


def check_triggers(pipe: Any, prompts: Sequence[str]) -> None:
    """Raises MoLEError for a prompt that lacks the words of a subject."""
    roles = pipe.roles
    prompt_words(pipe, prompts, pipe._loaded, Call(tuple(roles), tuple(roles.values())))
