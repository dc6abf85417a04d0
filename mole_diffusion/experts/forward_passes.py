"""What happens in the forward passes of one component on which experts hang: how they begin, add and end."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import MoLEError
from ..families import Architecture, Told, arguments
from .adding import ALIKE, add_experts, check_rows, weights_at
from .attach import Attachment
from .compiled import refuse_learning
from .heads import apart, together
from .kinds import is_of_modules, is_of_places
from .packed import packed, unpacked
from .refusals import refuse_caches, refuse_method, refuse_unseen
from .run import Run
from .runs import Runs
from .site import Projections, Site, SiteGroup
from .uncast import is_cast
from .widening import narrow, tensors, widen

TABLE = "weights at all modules"  # the notes of a pass for compiled graphs
CHOICE = "keep and scale"


class ForwardPasses:
    """What hooks, attention processors and compiled graphs call in the forward passes of a component.

    Args:
        component: Its name.
        model: The component.
        architecture: What is known of it.
        sites: Its adapted modules.
        runs: The forward passes of all components.
        attachments: What hangs on all components, by name; this one's is there when the first pass begins.
    """

    def __init__(
        self,
        component: str,
        model: nn.Module,
        architecture: Architecture,
        sites: Sequence[Site],
        runs: Runs,
        attachments: Mapping[str, Attachment],
    ) -> None:
        self.component = component
        self.model = model
        self.architecture = architecture
        self._holding: set[SiteGroup] = set()
        for site in sites:
            site.group.holding = self._holding
        self._runs = runs
        self._attachments = attachments

    def begin(
        self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A pass begins; its arguments, where they are others than those given."""
        device = next((x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        told = self.architecture.told(root, arguments(root, args, kwargs))
        run = self._begin(device, told)
        if run.passes == 1:
            return None
        several = functools.partial(widen, batch=told.rows, passes=run.passes, lists=self.architecture.lists)
        return several(args), several(kwargs)

    def add(self, site: Site, hidden_states: Tensor, output: Tensor) -> Tensor:
        """`output` of a base module plus the weighed experts for the same input.

        Raises:
            MoLEError: The weigher's answer does not broadcast to the batch, tokens and experts of this module.
        """
        running = self._runs.thread.running.get(self.component)
        run = running or self._runs.run(self.component)
        if site.lengths is None or run.merged:  # looked at here, and not in a call of its own: so it is at every module
            site.seen = hidden_states.shape, output.shape
            if run.merged or not run.active:
                return output
            if site.sum is not None and running is not None and run.ungraded:
                weights, kept, hand, scaled = site.sum
                if weights is run.notes.get(ALIKE) and kept is run.kept:
                    try:
                        return hand.add(hidden_states, output, scaled)
                    except RuntimeError:  # nothing was written
                        site.sum = None
            return add_experts(site, hidden_states, output, run)
        return self._add(site, hidden_states, output, run)

    def end(self, output: Any) -> Any:
        """A pass ends, with an exception where there is no output; another output, where that is to be another."""
        run = self._runs.end(self.component)
        self._attachments[self.component].ran = True
        for group in list(self._holding):  # where something in the model was skipped
            group.let_go()
        if output is None or run is None:
            return None
        for tensor in tensors(output):
            if tensor.requires_grad:
                # The backward pass of several forward passes comes in reverse; each announces itself here, before
                # any of its checkpoints is recomputed.
                tensor.register_hook(functools.partial(self._runs.resume, run))
        if run.passes == 1:
            return None
        several: Any = run.weigher
        return narrow(output, run.passes, lambda predictions: several.combine(predictions, run))

    def tell(self, told: Told) -> None:
        """`begin`, as a compiled graph calls it, which cannot widen a batch."""
        device = None if told.encoder_hidden_states is None else told.encoder_hidden_states.device
        run = self._begin(device, told, compiled=True)
        try:
            refuse_method(self.component, run, self._attachments[self.component].meets)
        except MoLEError:
            self._runs.end(self.component)
            raise

    def serve(self, site: Site, hidden_states: Tensor, output: Tensor, learning: bool) -> Tensor:
        """`add`, as a compiled graph calls it, which has no gradients."""
        run = self._runs.thread.running.get(self.component) or self._runs.run(self.component)
        if site.group.several:
            hidden_states = site.group.same(hidden_states)
        # A graph has the module's own weight, also where LoRAs are merged elsewhere.
        if not learning:
            return self._add(site, hidden_states, output, run)
        refuse_learning(run.weigher, hidden_states, output)
        with torch.no_grad():
            return self._add(site, hidden_states, output, run)

    def weigh(
        self, site: Site, rows: int, tokens: int, spatial: tuple[int, int] | None, device: torch.device
    ) -> Tensor | None:
        """Weights at all modules of a place, for a compiled graph that has the products itself.

        Args:
            site: The first of them.
            rows: Samples.
            tokens: Positions in each.
            spatial: Height and width of what a convolution gives.
            device: Where they are wanted.

        Returns:
            `(rows | 1, tokens | 1, N)`, or `None` to add nothing.

        Raises:
            MoLEError: The pass is drawn with a method for which that graph was not made.
        """
        run = self._runs.thread.running.get(self.component) or self._runs.run(self.component)
        if not is_of_places(run.weigher):
            self._refuse_other(run)
        return self._weights(site, rows, tokens, spatial, device, run) if run.active else None

    def weigh_all(self, sites: Sequence[Site], rows: int, device: torch.device) -> Tensor | None:
        """Weights at all modules, for a compiled graph that has the products itself.

        Args:
            sites: The modules.
            rows: Samples.
            device: Where they are wanted.

        Returns:
            `(modules | 1, rows | 1, N)`, or `None` to add nothing.

        Raises:
            MoLEError: As `weigh`.
        """
        run = self._runs.thread.running.get(self.component) or self._runs.run(self.component)
        if not is_of_modules(run.weigher) or run.attends:
            self._refuse_other(run)
        if not run.active:
            return None
        if TABLE not in run.notes:
            run.notes[TABLE] = self._table(sites, rows, device, run)
        table: Tensor | None = run.notes[TABLE]
        return table

    def choose(self, weigher: Any, rows: int, device: torch.device) -> Tensor | None:
        """`keep`, `scale` and what a method tells beside, for a compiled graph that weighs by its rules.

        Args:
            weigher: The method.
            rows: Samples.
            device: Where they are wanted.

        Returns:
            `(3, rows, N)`, or `None` to add nothing.

        Raises:
            MoLEError: The pass is drawn with another method, or one that cannot go by its rules now.
        """
        run = self._runs.thread.running.get(self.component) or self._runs.run(self.component)
        method: Any = run.weigher
        if not run.active:
            return None
        if method is not weigher:
            self._refuse_other(run)
        if CHOICE not in run.notes:
            check_rows(run, rows)
            told = method.rules_now(run)
            given = run.keep, run.scale, torch.zeros_like(run.keep) if told is None else told
            run.notes[CHOICE] = torch.stack([one.to(device, torch.float32).expand(rows, -1) for one in given])
        choice: Tensor = run.notes[CHOICE]
        return choice

    def _table(self, sites: Sequence[Site], rows: int, device: torch.device, run: Run) -> Tensor | None:
        """`weigh_all`, that of the pass before where nothing changed."""
        first = self._weights(sites[0], rows, 1, None, device, run)
        if first is None or getattr(run.weigher, "alike", False):
            return None if first is None else first.transpose(0, 1)
        key, state = (TABLE, self.component), {} if run.call is None else run.call.state
        found: tuple[Tensor, Tensor] | None = state.get(key)
        if found is None or found[0] is not first:
            each = [self._weights(site, rows, 1, None, device, run) for site in sites]
            state[key] = found = first, torch.stack([one[:, 0] for one in each if one is not None])
        return found[1]

    def _weights(
        self, site: Site, rows: int, tokens: int, spatial: tuple[int, int] | None, device: torch.device, run: Run
    ) -> Tensor | None:
        projections = Projections(run.keep, {}, rows, spatial)
        projections.tokens = tokens
        with torch.no_grad():
            return weights_at(site, projections, run, device)

    def _refuse_other(self, run: Run) -> NoReturn:
        raise MoLEError(
            f"composition {getattr(run.weigher, 'name', 'in use')!r} was set in one thread while another ran the "
            f"compiled {self.component} without. Draw with `pipe(...)`, or inside `experts.using(weigher=...)`, "
            "in each of them."
        )

    def _add(self, site: Site, hidden_states: Tensor, output: Tensor, run: Run) -> Tensor:
        if site.heads is None:
            return self._in_samples(site, hidden_states, output, run)
        if output.ndim != 4:
            raise MoLEError(
                f"{site.name} was given queries or keys of shape {tuple(output.shape)}, which do not say where their "
                "heads are. Set the model's own attention processor again, or leave this module out of the LoRAs."
            )
        rows = together(output, site.heads)
        added = self._in_samples(site, together(hidden_states, site.heads), rows, run)
        return output if added is rows else apart(added, site.heads, output)

    def _in_samples(self, site: Site, hidden_states: Tensor, output: Tensor, run: Run) -> Tensor:
        lengths = None if site.lengths is None else site.lengths(run.told)
        if lengths is None:
            site.seen = hidden_states.shape, output.shape
            return add_experts(site, hidden_states, output, run) if run.active else output
        # What follows sees (samples, tokens, features), whatever the module is given.
        lengths *= run.passes
        rows = unpacked(output, lengths)
        given = unpacked(hidden_states, lengths)
        site.seen = given.shape, rows.shape
        added = add_experts(site, given, rows, run) if run.active else rows
        # Rows that lie in the output itself were added to in place.
        unchanged = added is rows and rows.data_ptr() == output.data_ptr()
        return output if unchanged else packed(added, lengths).reshape(output.shape)

    def _begin(self, device: torch.device | None, told: Told, compiled: bool = False) -> Run:
        component, attachment = self.component, self._attachments[self.component]
        for name, other in self._attachments.items():
            if name != component:
                other.follow()
        attachment.refit()
        previous, run = self._runs.latest(component), self._runs.new(component, device, told)
        refuse_caches(component, self.model, run, previous)
        several = getattr(run.weigher, "passes", None)
        if several is not None and run.active and run.timestep is not None:
            passes = several(run)
            if passes > 1:
                run = replace(run, passes=passes)
                attachment.refuse_widening()
        refuse_unseen(component, run, attachment.hides)
        if self._runs.merged and not compiled and run.passes == len(run.keep) == len(run.scale) == 1 and run.active:
            # Autocast would round merged weights, and with them what LoRAs change.
            run = replace(run, merged=getattr(run.weigher, "constant", False) and not is_cast(run.keep.device.type))
        self._runs.begin(run)
        return run
