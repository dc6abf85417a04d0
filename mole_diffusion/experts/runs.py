"""Which forward passes run, in which thread, and with which choice of LoRAs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import MoLEError
from ..families import Told
from .choice import CHOICES, Choice
from .kinds import Kinds
from .run import Run, Weigher, in_backward


class _Thread(threading.local):
    """The forward passes of one thread, by component.

    The latest, those that run now, those that are recomputed, and those of parts that are called alone.
    """

    def __init__(self) -> None:
        self.latest: dict[str, Run] = {}
        self.running: dict[str, Run] = {}
        self.resumed: dict[str, Run] = {}
        self.alone: dict[str, tuple[tuple[Any, ...], Run]] = {}


class Runs:
    """The forward passes of all components.

    Args:
        names: Of the LoRAs.

    Attributes:
        kinds: Which kind of compiled graph suits all that is drawn.
        merged: Whether modules run with the LoRAs in their weights where a weigher's weights are constant.
        thread: The passes of this thread.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.kinds = Kinds(len(self.names))
        self._weigher: Weigher | None = None
        self.merged = False
        self._everything = Choice(torch.ones(1, len(self.names)), torch.ones(1, len(self.names)))
        self.thread = _Thread()  # modules and layers look into it themselves, since a call takes as long as a view
        self._latest: dict[str, Run] = {}  # of any thread

    @property
    def weigher(self) -> Weigher | None:
        """Who weighs where no choice says otherwise; `None` is the base model."""
        return self._weigher

    @weigher.setter
    def weigher(self, weigher: Weigher | None) -> None:
        self._weigher = weigher
        self.kinds.settle(weigher)

    @property
    def choice(self) -> Choice:
        """What holds just now, in this thread."""
        return CHOICES.told(self) or self._everything

    @property
    def chosen(self) -> Weigher | None:
        """Who weighs just now, in this thread."""
        choice = self.choice
        return self.weigher if choice.weigher is None else choice.weigher

    @property
    def context(self) -> Run | None:
        """The latest pass of a denoiser in this thread."""
        denoisers = [run for run in self.thread.latest.values() if run.timestep is not None]
        return denoisers[-1] if denoisers else None

    def latest(self, component: str) -> Run | None:
        """The latest pass of a component in this thread."""
        return self.thread.latest.get(component)

    def run(self, component: str) -> Run:
        """The forward pass a component is in, or is being recomputed for.

        A part of the model that is called alone is in a pass of its own, with the present settings.
        """
        thread = self.thread
        running = thread.running.get(component)
        if running is not None:
            return running
        if in_backward() and component in self._latest:
            return thread.resumed.get(component, self._latest[component])  # a GPU's backward is a thread of its own
        settings = (self.weigher, self.choice)
        before, run = thread.alone.get(component, (None, None))
        if before is None or run is None or any(a is not b for a, b in zip(before, settings, strict=True)):
            run = self.new(component, None, Told(rows=1))
            thread.alone[component] = settings, run
        return run

    def attends(self, component: str, crossed: bool) -> bool | None:
        """Whether anybody may watch or change attention in the pass that a component is in.

        Args:
            component: Its name.
            crossed: Whether it is attention to the prompt.

        Returns:
            `None` where attention layers need not know of the pass at all: nothing is added either.
        """
        run = self.thread.running.get(component)
        if run is None:  # a part of the model that is called alone
            run = self.run(component)
        elif not run.active or (run.merged and not run.attends):
            return None
        return run.attends and (crossed or not run.crossed_alone)

    def new(self, component: str, device: torch.device | None, told: Told) -> Run:
        """A pass with the present choice, which has not begun."""
        choice, previous = self.choice, self.latest(component)
        keep, scale = choice.on(device)
        index = 0 if previous is None else previous.index + 1
        weigher = self.weigher if choice.weigher is None else choice.weigher
        return Run(component, index, weigher, keep, scale, told, call=choice.call, kept=choice.kept)

    def begin(self, run: Run) -> None:
        """The pass begins, in this thread."""
        thread = self.thread
        thread.resumed.pop(run.component, None)
        thread.alone.pop(run.component, None)
        thread.latest.pop(run.component, None)  # the latest stands last
        thread.latest[run.component] = thread.running[run.component] = self._latest[run.component] = run

    def end(self, component: str) -> Run | None:
        """The pass ends; the latest pass of the component, if there was any."""
        self.thread.running.pop(component, None)
        return self.latest(component)

    def resume(self, run: Run, gradient: Tensor) -> None:
        """A backward pass reaches the end of a forward pass, whose checkpoints are about to be recomputed."""
        self.thread.resumed[run.component] = run

    def forget(self) -> None:
        """There was no pass."""
        self._latest.clear()
        self.thread = _Thread()

    @contextmanager
    def using(
        self,
        keep: Tensor | None = None,
        scale: Tensor | None = None,
        weigher: Weigher | None = None,
        call: Any = None,
    ) -> Iterator[None]:
        """As `using`."""
        # What is given whole is right also where nobody can tell what holds around it.
        whole = not any(part is None for part in (keep, scale, weigher, call))
        before = self._everything if whole else self.choice
        kept, scales = before.keep, before.scale
        if keep is not None:
            kept = self._rows("keep", keep)
            if not ((kept == 0) | (kept == 1)).all():
                raise MoLEError(f"`keep` must hold 0 and 1 only, got {keep.tolist()}. Use `scale` for other weights.")
        if scale is not None:
            scales = self._rows("scale", scale)
        who = before.weigher if weigher is None else weigher
        what = before.call if call is None else call
        if keep is None and scale is None:
            choice = replace(before, weigher=who, call=what)
        else:
            choice = Choice(kept, scales, who, what, _kept(kept, scales))
        with CHOICES.open(choice, of=self), self.kinds.drawing(choice.weigher, self.weigher):
            yield

    def _rows(self, name: str, values: Tensor) -> Tensor:
        given = torch.as_tensor(values)
        rows = given.detach().to(torch.float32)
        rows = rows[None] if rows.ndim == 1 else rows
        if rows.ndim != 2 or rows.shape[1] != len(self.names) or not rows.isfinite().all():
            raise MoLEError(
                f"`{name}` must be finite, of shape ({len(self.names)},) or (rows, {len(self.names)}) for the LoRAs "
                f"{list(self.names)}, got shape {tuple(given.shape)}: {given.tolist()}."
            )
        return rows


def _kept(keep: Tensor, scale: Tensor) -> tuple[int, ...] | None:
    """Indices of the LoRAs that any row keeps, none where nothing acts; looked at once, in one transfer from a GPU.

    A LoRA of scale 0 is kept beside others: it takes its share of what gates give out.
    """
    both = torch.stack([keep.amax(dim=0), (keep * scale.to(keep.device)).abs().amax(dim=0)]).tolist()
    if not any(both[1]):
        return ()
    kept = tuple(index for index, any_row in enumerate(both[0]) if any_row)
    return None if len(kept) == len(both[0]) else kept
