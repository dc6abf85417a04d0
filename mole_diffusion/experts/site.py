"""A place in the model where experts sit, and the places that read the same input."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole_diffusion.errors import MoLEError

from ..families import Architecture, Reads, Told
from ..families.norms import is_norm, is_of_heads
from .beside import Beside
from .compiled import Callback
from .stack import ExpertStack

CHOICES_KEPT = 4  # of the LoRAs left out, for which the others' rows lie ready; each may take as much memory as they do


class Site:
    """One adapted module of one component.

    Attributes:
        component: `"unet"`, `"text_encoder"` ...
        module_name: As in `component.named_modules()`.
        name: `component.module`, unique in the model.
        module: The module itself.
        stack: The LoRAs' factors here.
        beside: What some LoRAs add here that is no product of small rank, or `None`.
        group: The sites that read the same input tensor, this one included (`to_q, to_k, to_v` of a self-attention).
        reads: What it is given.
        halvings: How often a picture was halved on its way there.
        merged: What stands in for the module's forward where LoRAs are merged into its weight.
        lengths: Tells from what the model was told how many tokens each sample has, where the module is given those of
            all samples one after another; `None` where samples come first.
        heads: Axis of the heads where the module is given these one by one (norms of queries and keys); else `None`.
        seen: Shapes of the last input and output, samples first and heads together; `None` before the first call.
        callback: Where a compiled graph calls back.
        hand: What the products take, where nobody wants a gradient: an `AtHand`, or `None` before it is made.
        sum: Weights that are the same at all modules, the LoRAs that are chosen, the `hand` that has their rows, and
            what it makes of the weights; `None` before there are such.
    """

    def __init__(
        self, component: str, module_name: str, module: nn.Module, stack: ExpertStack, beside: Beside | None = None
    ) -> None:
        self.component = component
        self.module_name = module_name
        self.name = f"{component}.{module_name}"
        self.module = module
        self.stack = stack
        self.beside = beside
        self.group = SiteGroup([self])
        self.reads: Reads = "pixels"
        self.halvings = 0
        self.merged: Any = None
        self.lengths: Callable[[Told], tuple[int, ...] | None] | None = None
        self.heads: int | None = None
        self.seen: tuple[torch.Size, torch.Size] | None = None
        self.hand: Any = None
        self.sum: tuple[Tensor, tuple[int, ...] | None, Any, Tensor | float] | None = None
        self.callback: Callback | None = None
        _check_fit(self)

    def move_to(self, module: nn.Module) -> None:
        """Sit beside another module from now on.

        Raises:
            MoLEError, TypeError: The factors do not fit it.
        """
        self.module = module
        if self.beside is not None:
            self.beside.module = module
        _check_fit(self)
        self.group.start_again()
        if self.callback is not None:
            self.callback.let_go()
        if self.merged is not None:
            self.merged.hang()

    def only(self, kept: tuple[int, ...] | None, orthonormal: bool = False) -> Site:
        """This place with the rows of the `kept` LoRAs alone, made once for each such choice and kept for the next.

        Args:
            kept: Indices of LoRAs, rising; `None`: all.
            orthonormal: Whether `down x` is to tell how large outputs are: `ExpertStack.with_orthonormal_columns`. Not
                where products are made with the factors themselves, of which there would then be others in memory.
        """
        orthonormal = orthonormal and self.group.copied
        found = self.group.chosen.get((kept, orthonormal))  # here and not in a call: so it is in every pass
        return (self.group.only(kept, orthonormal) if found is None else found)[self.name]

    @cached_property
    def place(self) -> str:
        """What weights follow from where they differ from token to token, beside how many of these there are."""
        return f"{self.reads} {self.halvings}"

    @property
    def input_tokens(self) -> int | None:
        """How many positions the last input had; `None` before the first call."""
        return None if self.seen is None else self._tokens(self.seen[0])

    @property
    def tokens(self) -> int | None:
        """The same of the last output."""
        return None if self.seen is None else self._tokens(self.seen[1])

    def _tokens(self, shape: torch.Size) -> int:
        return shape[2:].numel() if self.stack.is_convolution else shape[1:-1].numel()

    def project(self, hidden_states: Tensor, down: Tensor) -> Tensor:
        """`down x` as its product gives it: `(batch * tokens, rows)`; `(batch, rows, tokens)` of a convolution.

        Args:
            hidden_states: x.
            down: `(rows, c_in, kh, kw)` of a convolution, else `(d_in, rows)`.
        """
        x = hidden_states if hidden_states.dtype == down.dtype else hidden_states.to(down.dtype)
        if not self.stack.is_convolution:
            return torch.mm(x.reshape(-1, x.shape[-1]), down)
        conv: Any = self.module
        if conv.padding_mode != "zeros":  # also if it was another when the experts were attached
            raise MoLEError(
                f"{self.name} pads with padding_mode={conv.padding_mode!r} now; experts run beside convolutions with "
                "zero padding only. Set it back to 'zeros', or unload the LoRAs that adapt it."
            )
        return F.conv2d(x, down, None, conv.stride, conv.padding, conv.dilation).flatten(2)

    def positions(self, hidden_states: Tensor) -> Tensor:
        """The module's input as `(batch, positions, features)`, whatever its own layout is."""
        if self.stack.is_convolution:
            return hidden_states.flatten(2).transpose(1, 2)
        if self.heads is not None:  # for all of them alike, so what is read is their mean
            hidden_states = hidden_states.unflatten(-1, (-1, *self.stack.input_shape)).mean(dim=-2)
        return hidden_states[:, None] if hidden_states.ndim == 2 else hidden_states.flatten(1, -2)


class Projections:
    """`down x` of every site in a group, for one input tensor.

    Attributes:
        hidden_states: The input tensor.
        rows: Site name to `(batch * tokens, R)`, or `(batch, R, tokens)` of a convolution: as products give it.
        whole: What the rows of several sites are parts of, side by side, `(batch * tokens, R of all)`; else `None`.
        batch: Samples.
        tokens: Positions to weigh in each sample.
        spatial: `(height, width)` of the output where it has them (convolutions), else `None`.
        base: What the base module gave that is being served.
        waiting: Names of the sites that have not been served.
        together: Who weighs, to weights that were worked out at once for all sites, `(batch, tokens, sites, N)`, and
            those of each by its name.
        weighed: What `whole` was multiplied by since, if by anything.
    """

    def __init__(
        self,
        hidden_states: Tensor,
        rows: dict[str, Tensor],
        batch: int,
        spatial: tuple[int, int] | None = None,
        whole: Tensor | None = None,
    ) -> None:
        self.hidden_states = hidden_states
        self.rows = rows
        self.whole = whole
        self.together: dict[Any, tuple[Tensor, dict[str, Tensor]]] = {}
        self.weighed: Tensor | None = None
        self.batch = batch
        self.spatial = spatial
        self.base: Tensor | None = None
        self.waiting = set(rows) if len(rows) > 1 else set()
        first = next(iter(rows.values()), None)
        if first is None:  # where LoRAs are merged
            self.tokens = 0
        else:
            self.tokens = first.shape[2] if spatial is not None else first.shape[0] // max(batch, 1)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Site name to `(batch, tokens, R)`."""
        if self.spatial is not None:
            return {name: rows.transpose(1, 2) for name, rows in self.rows.items()}
        return {name: rows.unflatten(0, (self.batch, self.tokens)) for name, rows in self.rows.items()}


class SiteGroup:
    """Sites that read the same tensor share one down-projection, so q, k and v cost one product instead of three."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = tuple(sites)
        self.several = len(self.sites) > 1
        self.names = tuple(site.name for site in self.sites)
        self._down: Tensor | None = None
        self._ranks: list[int] = []  # of the sites, as they lie in it
        self._open: Projections | None = None
        self.holding: set[SiteGroup] = set()  # those of the component that keep an input just now
        self.chosen: dict[tuple[tuple[int, ...] | None, bool], dict[str, Site]] = {}

    def only(self, kept: tuple[int, ...] | None, orthonormal: bool = False) -> dict[str, Site]:
        """The sites of the group, by name, with the rows of the `kept` LoRAs alone; see `Site.only`."""
        sites = self.chosen.get((kept, orthonormal))
        if sites is None:
            everyone = kept is None or all(set(site.stack.indices) <= set(kept) for site in self.sites)
            if everyone and not orthonormal:
                members = self.sites
            elif everyone and kept is not None:
                members = tuple(self.only(None, orthonormal).values())
            else:
                members = tuple(copy.copy(site) for site in self.sites)
                group = SiteGroup(members)
                group.holding = self.holding
                for member in members:
                    stack = member.stack if kept is None else member.stack.only(kept)
                    member.hand = member.sum = None
                    member.stack, member.group = stack.with_orthonormal_columns() if orthonormal else stack, group
            while len(self.chosen) >= CHOICES_KEPT:
                self.chosen.pop(next(iter(list(self.chosen))), None)  # the oldest
                for site in self.sites:
                    site.sum = None  # which may have its rows
            self.chosen[kept, orthonormal] = sites = {member.name: member for member in members}
        return sites

    @cached_property
    def copied(self) -> bool:
        """Whether products are made with copies of the factors, since modules are of another dtype or device."""
        weights = (getattr(site.module, "weight", None) for site in self.sites)
        return not all(isinstance(w, Tensor) and s.stack.is_like(w) for w, s in zip(weights, self.sites, strict=True))

    def project(self, site: Site, hidden_states: Tensor, output: Tensor, down: Tensor | None = None) -> Projections:
        """Projections that contain `site`'s, on the device and in the dtype of `output`.

        The first site of the group to fire computes them for all; the others take theirs if they were indeed given the
        same tensor, and the memory is let go with the last.

        Args:
            site: The module.
            hidden_states: Its input.
            output: What it gave.
            down: What `down_of` gave, if that is known to fit both.
        """
        if not self.several:
            return self._computed(site, hidden_states, output, down)
        shared = self._open
        if shared is None or shared.hidden_states is not hidden_states or site.name not in shared.waiting:
            shared = self._computed(site, hidden_states, output, down)
        shared.waiting.discard(site.name)
        if shared.waiting:
            self._open = shared
            self.holding.add(self)
        else:
            self.let_go()
        return shared

    def let_go(self) -> None:
        """Forget the input that is kept for sites that have not fired."""
        self._open = None
        self.holding.discard(self)

    def weighed(self, site: Site, projections: Projections, output: Tensor, weights: Tensor) -> tuple[Tensor, bool]:
        """Rows of a site, and whether they are weighed already: those of all sites at once, where that can be.

        Args:
            site: The site.
            projections: What `project` gave.
            output: As in `project`.
            weights: `(batch | 1, tokens | 1, N)`, said to be those of all sites of the group; or of each,
                `(batch, tokens, sites, N)`. Where they turn out to be others, the rows are made anew.
        """
        if projections.weighed is None and projections.whole is not None and self.alike:
            if site.stack.weigh_all(projections.whole, weights, len(self.sites), projections.batch):
                projections.weighed = weights
        elif projections.weighed is not None and projections.weighed is not weights:  # and they are not
            projections = self._computed(site, projections.hidden_states, output)
        return projections.rows[site.name], projections.weighed is weights

    @cached_property
    def alike(self) -> bool:
        """Whether all sites have the same LoRAs, of the same ranks and scalings, and nothing else."""
        found = {(site.stack.indices, site.stack.ranks, site.stack.scalings) for site in self.sites}
        return len(found) == 1 and all(site.beside is None for site in self.sites)

    def _computed(self, site: Site, hidden_states: Tensor, output: Tensor, down: Tensor | None = None) -> Projections:
        if down is None:
            down = self._down  # looked at here, and not in a call of its own: so it is in every pass at every module
            if down is None or down.device != output.device or down.dtype != output.dtype:
                down = self._down_like(output)
        shape = output.shape
        spatial = (shape[-2], shape[-1]) if site.stack.is_convolution else None
        whole = None
        if down.numel():
            projected = site.project(hidden_states, down)
            if not self.several:
                return Projections(hidden_states, {site.name: projected}, shape[0], spatial)
            parts: Sequence[Tensor] = projected.split_with_sizes(self._ranks, 1)
            whole = None if spatial else projected
        else:  # nothing is left of the LoRAs that are kept, but a weigher may read the hidden states
            none = (shape[0], 0, shape[2:].numel()) if spatial else (shape[:-1].numel(), 0)
            parts = [output.new_empty(none)] * len(self.sites)
        rows = dict(zip(self.names, parts, strict=True))
        return Projections(hidden_states, rows, shape[0], spatial, whole)

    def down_of(self, site: Site, like: Tensor) -> tuple[Tensor, int]:
        """`down` of all sites as `Site.project` takes it, made for outputs like this one, and where `site`'s begins."""
        down = self._down_like(like)
        return down, sum(self._ranks[: self.names.index(site.name)])

    def make_ready(self, like: Tensor) -> None:
        """Make what the products need beside outputs like this one; else the first call does."""
        self._down_like(like)
        for site in self.sites:
            if site.stack.indices:
                site.stack.up_like(like)

    @property
    def ready(self) -> list[Tensor]:
        """What was made for the products."""
        made = [self._down, *(site.stack.up_ready for site in self.sites)]
        return [tensor for tensor in made if tensor is not None]

    def same(self, hidden_states: Tensor) -> Tensor:
        """The tensor that other sites of the group were given, if this one is the same memory.

        A compiled graph hands each of them a tensor object of its own. It changes no memory between them.
        """
        for group in self._with_chosen():
            held = None if group._open is None else group._open.hidden_states
            if held is not None and held.data_ptr() == hidden_states.data_ptr() and held.shape == hidden_states.shape:
                return held
        return hidden_states

    def start_again(self) -> None:
        """Let go of what was made for the products: a module was exchanged, or lies on another device now."""
        self._down = None
        self.__dict__.pop("copied", None)
        self.let_go()
        for site in self.sites:
            site.hand = site.sum = None
            site.stack.let_go()
        self.chosen.clear()

    def _with_chosen(self) -> list[SiteGroup]:
        return [self, *(next(iter(sites.values())).group for sites in list(self.chosen.values()))]

    def _down_like(self, output: Tensor) -> Tensor:
        """`down` of all sites below one another, as `Site.project` takes it; kept."""
        down = self._down
        if down is None or down.device != output.device or down.dtype != output.dtype:
            downs = [member.stack.down_as(output.dtype, output.device) for member in self.sites]
            self._ranks = [part.shape[0] for part in downs]
            together = torch.cat(downs) if len(downs) > 1 else downs[0]
            self._down = down = together if together.ndim == 4 else together.t()
            for member, part in zip(self.sites, together.split(self._ranks), strict=True):
                member.stack.lie_in(part)
        return down


def made_beside(groups: Iterable[SiteGroup]) -> tuple[torch.device, nn.Module] | None:
    """Where the first of what was made for the products of these groups lies, and a module that it was made beside.

    `None` as long as nothing is made. Looked at in every pass of another component: so it calls nothing.
    """
    for group in groups:
        if group._down is not None:
            return group._down.device, group.sites[0].module
        for sites in list(group.chosen.values()):
            for site in sites.values():
                if site.group._down is not None:
                    return site.group._down.device, site.module
    return None


def group_sites(sites: Sequence[Site], model: nn.Module, architecture: Architecture) -> None:
    """Note what the sites of one component read, and find those that read the same tensor."""
    together: dict[tuple[str, tuple[str, ...], Reads], dict[str, Site]] = {}
    for site in sites:
        site.reads = architecture.reads(model, site.module_name)
        site.halvings = architecture.halvings(model, site.module_name)
        site.heads = architecture.heads if is_norm(site.module) and is_of_heads(site.module_name) else None
        # Whether what the module is given has another shape first.
        looked_at = architecture.packs(site.module_name) or site.heads is not None
        site.lengths = functools.partial(architecture.lengths, site.module_name) if looked_at else None
        for names in architecture.siblings:
            found = [(name, p) for name in names if (p := _prefix(site.module_name, name)) is not None]
            for name, prefix in found[:1]:
                together.setdefault((prefix, names, site.reads), {})[name] = site
    for (_, names, _), by_name in together.items():
        members = [by_name[name] for name in names if name in by_name]
        if len(members) > 1 and len({member.stack.input_shape for member in members}) == 1:
            group = SiteGroup(members)
            for member in members:
                member.group = group


def _prefix(module_name: str, name: str) -> str | None:
    """What stands before `name` at the end of a module's name; `None` where that does not end so."""
    whole = f".{module_name}"
    return whole.removesuffix(f".{name}") if whole.endswith(f".{name}") else None


def _check_fit(site: Site) -> None:
    """Raise MoLEError or TypeError if the stacked factors cannot run beside the module."""
    module: Any = site.module
    stack = site.stack
    if isinstance(module, nn.Conv2d):
        if module.groups != 1 or module.padding_mode != "zeros":
            raise MoLEError(
                f"{site.name} is a convolution with groups={module.groups} and padding_mode={module.padding_mode!r}; "
                "experts run beside convolutions with groups=1 and zero padding only. Leave it out of the LoRAs."
            )
        if len(stack.input_shape) == 1:
            stack.take_input((*stack.input_shape, 1, 1))  # a 1x1 convolution saved as a matrix
        expected = (module.out_channels, (module.in_channels, *module.kernel_size))
    elif is_norm(module):
        if isinstance(module, nn.GroupNorm):  # what it is given has its channels before its positions
            stack.take_input((stack.input_shape[0], 1, 1))
        width = module.weight.shape[0]
        expected = (width, (width, *stack.input_shape[1:]))
    elif hasattr(module, "in_features") and hasattr(module, "out_features"):
        if stack.input_shape[1:] == (1, 1):
            stack.take_input(stack.input_shape[:1])  # the other way round
        expected = (module.out_features, (module.in_features,))
    else:
        raise TypeError(f"{site.name} is a {type(module).__name__}; experts run beside Linear, Conv2d and norms only.")
    given = (stack.out_features, stack.input_shape)
    if given != expected:
        raise MoLEError(
            f"The LoRAs' factors at {site.name} map {given[1]} to {given[0]}, but the module maps {expected[1]} to "
            f"{expected[0]}. They were trained for another base model."
        )
