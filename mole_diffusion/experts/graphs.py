"""What experts add, as part of a compiled graph: plain operators, of which the compiler makes what it likes.

Where all that a method needs to know is which module it is, or which kind of place, a graph asks once for the weights
of all of them, and has the products itself. So no Python runs between kernels at each module, as in `compiled.add`,
which is right for any method.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn import functional as F

from ..errors import MoLEError
from . import compiled
from .compiled import COMPONENTS, Callback, Factors
from .rules import RULES, Ruled
from .site import Site

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result
def make_factors(key: int) -> None:
    """While a graph is traced: have the factors made, of all modules, since blocks of one kind share that graph."""
    component = COMPONENTS.get(key)
    if component is not None:
        component.make()


class Maker:
    """Makes what graphs of a component have of its LoRAs: asked at every module while a graph is traced.

    Args:
        sites: The adapted modules.
        parts: Tells in which compiled part of the model each lies, by its name; the same mapping as long as they do.
    """

    def __init__(self, sites: Sequence[Site], parts: Callable[[], Mapping[str, str]]) -> None:
        self._sites = sites
        self._parts = parts
        self._made_of: tuple[Any, Any] = None, None

    def __call__(self, weigher: Any) -> None:
        """Makes `Callback.ruled`, and what factors graphs have, where they are not there as they are to be.

        Args:
            weigher: The method whose rules graphs have; `None` where none has.
        """
        found = {row: site for row, site in enumerate(self._sites) if _can_be_in_a_graph(site)}
        changed = [_begun_anew(site) for site in self._sites]
        if weigher is not None:
            parts = self._parts()
            if any(changed) or self._made_of[0] is not weigher or self._made_of[1] is not parts:
                self._made_of = weigher, parts
                ruled: Mapping[str, Ruled] = weigher.rules({site: parts[site.name] for site in found.values()})
                for site in self._sites:
                    if site.callback is not None:
                        site.callback.ruled = ruled.get(site.name)
        shared: dict[Any, tuple[Tensor, Tensor]] = {}
        for row, site in found.items():
            _make_factors(site, row, shared, weigher is not None)


def _can_be_in_a_graph(site: Site) -> bool:
    """Whether a graph can have what LoRAs add at a module; else only Python can tell what that is."""
    weight = getattr(site.module, "weight", None)
    if site.beside is not None or site.heads is not None or site.lengths is not None or not isinstance(weight, Tensor):
        return False
    return weight.dtype in _FLOATS and not weight.is_meta and not isinstance(getattr(site.module, "padding", 0), str)


def _begun_anew(site: Site) -> bool:
    """Whether nothing is made yet for a module as it is now; what was made for another is let go."""
    callback, weight = site.callback, getattr(site.module, "weight", None)
    assert callback is not None
    now = (weight.dtype, weight.device) if isinstance(weight, Tensor) else None
    if callback.beside == now:
        return False
    callback.let_go()
    callback.beside = now
    return True


def _make_factors(site: Site, row: int, shared: dict[Any, tuple[Tensor, Tensor]], by_rules: bool) -> None:
    """Makes those of `Callback.factors` and `turned` that a graph has, if any.

    Args:
        site: The module.
        row: Which of the modules it is.
        shared: What other modules have alike.
        by_rules: Whether the graph weighs by rules.
    """
    callback = site.callback
    assert callback is not None
    ruled = callback.ruled if by_rules else None
    if by_rules and ruled is None:  # served in Python
        return
    if ruled is not None and ruled.orthonormal:
        if callback.turned is None:
            callback.turned = factors_of(site.only(None, orthonormal=True), row, shared)
    elif callback.factors is None:
        callback.factors = factors_of(site, row, shared)


def factors_of(site: Site, row: int, shared: dict[Any, tuple[Tensor, Tensor]]) -> Factors:
    """What a graph has of a module's LoRAs.

    Args:
        site: The module.
        row: Which of the modules it is.
        shared: What other modules have alike.
    """
    weight, stack = site.module.weight, site.stack
    assert isinstance(weight, Tensor)
    key = stack.indices, stack.ranks, stack.scalings, weight.device
    with torch.inference_mode(False), torch.no_grad():
        if key not in shared:
            numbers = torch.tensor(stack.scalings, dtype=torch.float32)
            ranks = torch.tensor([stack.ranks[index] for index in stack.indices])
            shared[key] = stack.expert_of_rank.to(weight.device), numbers.repeat_interleave(ranks).to(weight.device)
        down, first = site.group.down_of(site, weight)
        up = stack.up_like(weight)
        which = torch.tensor([row], device=weight.device)
    for tensor in (down, up, which, *shared[key]):
        torch._dynamo.mark_static_address(tensor, guard=False)  # a recorded CUDA graph need not copy them
    return Factors(down, up, first, first + stack.rank, *shared[key], which, site.place)


def add(callback: Callback, module: Any, hidden_states: Tensor, output: Tensor) -> Tensor:
    """In a graph: what a module gave plus what the experts add there."""
    component = callback.component
    kind = component.kinds.now
    # Whoever wants a gradient wants gates to have one, too: where they are asked in Python, that is refused.
    if kind == "any" or (kind == "rules" and torch.is_grad_enabled()):
        return compiled.add(callback, hidden_states, output)
    make_factors(component.key)
    ruled = callback.ruled if kind == "rules" else None
    factors = callback.turned if ruled is not None and ruled.orthonormal else callback.factors
    # A convolution's padding may be another one since: hooks refuse that.
    refused = getattr(module, "padding_mode", "zeros") != "zeros"
    if factors is None or refused or (kind == "rules" and ruled is None):
        return compiled.add(callback, hidden_states, output)
    convolution = [*module.stride, *module.padding, *module.dilation] if factors.down.ndim == 4 else []
    asked = component.begin
    if kind == "places":
        asked = callback
    elif kind == "rules":
        asked = component.choice
    # One by one: torch 2.8 can compile no slice of a named tuple.
    by_rule: tuple[Any, ...] = None, "", [], [], False, False
    if ruled is not None:
        by_rule = ruled.rule, ruled.scope, ruled.tensors, ruled.numbers, ruled.reads, ruled.together
    composed: Tensor = _composed(
        *(output, hidden_states, factors.down, factors.up, factors.experts, factors.scalings, factors.row),
        *(component.order, asked.number, factors.first, factors.last, component.kinds.num_loras, component.modules),
        *(convolution, factors.place if kind == "places" else None),
        *by_rule,
    )
    return composed


@compiled.operator("weights(Tensor order, Tensor number, Device device, SymInt[] shape, SymInt[]? spatial) -> Tensor")
def _weights(
    order: Tensor, number: Tensor, device: torch.device, shape: Sequence[int], spatial: Sequence[int] | None
) -> Tensor:
    """Of a place, `(rows, tokens, N)`; without `spatial` of all modules, `(modules, rows, N)`.

    Or what rules are given, `(3, rows, N)`, where that is what a callback gives.
    """
    callback = compiled.callback_of(number)
    weigh = None if callback is None else callback.weigh
    if weigh is None:
        given = None
    elif spatial is None:
        given = weigh(shape[1], device)
    else:
        given = weigh(shape[0], shape[1], tuple(spatial) or None, device)
    if given is None:
        return torch.zeros(list(shape), device=device)
    # A graph may write into what it is given.
    return given.expand(list(shape)).to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _weights_fake(
    order: Tensor, number: Tensor, device: torch.device, shape: Sequence[int], spatial: Sequence[int] | None
) -> Tensor:
    return torch.empty(list(shape), device=device)


torch.library.register_fake("mole_diffusion::weights", _weights_fake, lib=compiled.LIBRARY)


@compiled.operator(
    "composed(Tensor output, Tensor hidden_states, Tensor down, Tensor up, Tensor experts, Tensor scalings, "
    "Tensor row, Tensor order, Tensor number, SymInt first, SymInt last, SymInt loras, SymInt modules, "
    "SymInt[] convolution, str? place, str? rule, str scope, Tensor[] of_rule, float[] numbers, bool reads, "
    "bool together) -> Tensor",
    traced=True,
)
def _composed(
    output: Tensor,
    hidden_states: Tensor,
    down: Tensor,
    up: Tensor,
    experts: Tensor,
    scalings: Tensor,
    row: Tensor,
    order: Tensor,
    number: Tensor,
    first: int,
    last: int,
    loras: int,
    modules: int,
    convolution: Sequence[int],
    place: str | None,
    rule: str | None,
    scope: str,
    of_rule: Sequence[Tensor],
    numbers: Sequence[float],
    reads: bool,
    together: bool,
) -> Tensor:
    """`output + up (gamma * s * down x)`, of which the compiler sees the parts.

    What several modules share is written down once in a graph: their weights, and the product of those that read the
    same.

    Args:
        output: What the module gave; not written to.
        hidden_states: x.
        down, up, experts, scalings, row, first, last: See `Factors`.
        order: See `Component`.
        number: Whom to ask for weights.
        loras: N.
        modules: How many there are.
        convolution: Stride, padding and dilation of a convolution, two numbers each.
        place: See `Factors`; `None` where tokens make no difference, or a rule makes it.
        rule, scope, of_rule, numbers, reads, together: See `Ruled`; no rule: `None`.
    """
    batch, spatial = output.shape[0], list(output.shape[2:]) if convolution else []
    tokens = output.shape[2:].numel() if convolution else output.shape[1:-1].numel()

    def projected() -> Tensor:
        x = hidden_states.to(down.dtype)
        if not convolution:
            return torch.mm(x.reshape(-1, x.shape[-1]), down).view(batch, tokens, -1)
        stride, padding, dilation = convolution[:2], convolution[2:4], convolution[4:]
        return F.conv2d(x, down, None, stride, padding, dilation).flatten(2).transpose(1, 2)

    def at_all_modules() -> Tensor:
        return _weights(order, number, output.device, [modules, batch, loras], None)

    def at_the_place() -> Tensor:
        return _weights(order, number, output.device, [batch, tokens, loras], spatial)

    def by_rule() -> Tensor:
        choice = _once(order, ("choice", batch, loras), (), chosen)
        rows = projections if together else z
        return RULES[str(rule)](_positions(hidden_states, spatial), rows, choice, of_rule, numbers)

    def chosen() -> Tensor:
        return _weights(order, number, output.device, [3, batch, loras], None)

    projections = _once(order, (id(hidden_states), id(down)), (hidden_states, down), projected)
    z = projections[..., first:last]
    if rule is not None and together:
        weights = _once(order, (rule, id(hidden_states), id(down)), (hidden_states, down), by_rule)
        weights = weights[:, :, first // (last - first)]
    elif rule is not None:
        weights = _in_common(order, scope, hidden_states if reads else None, by_rule)
    elif place is None:
        weights = _once(order, (batch, modules, loras), (), at_all_modules)
        weights = weights.index_select(0, row).transpose(0, 1)
    else:
        weights = _once(order, (place, batch, tokens, loras, *spatial), (), at_the_place)
    z = (z * (weights.index_select(-1, experts) * scalings)).to(z.dtype)
    added = torch.mm(z.reshape(-1, z.shape[-1]), up.t())
    if convolution:
        return output + added.view(batch, *spatial, -1).permute(0, 3, 1, 2)
    return output + added.view(output.shape)


def _positions(hidden_states: Tensor, spatial: Sequence[int]) -> Tensor:
    """What a module reads as `(batch, tokens, width)`, a token for each position that it gives."""
    if not spatial:
        return hidden_states[:, None] if hidden_states.ndim == 2 else hidden_states.flatten(1, -2)
    if list(hidden_states.shape[2:]) != list(spatial):
        hidden_states = F.adaptive_avg_pool2d(hidden_states, (spatial[0], spatial[1]))
    return hidden_states.flatten(2).transpose(1, 2)


class _Running(threading.local):
    """What modules have in common in a graph that runs in this thread as it was captured, operator by operator."""

    def __init__(self) -> None:
        self.given: dict[Any, Any] = {}


_RUNNING = _Running()


def _in_common(order: Tensor, scope: str, hidden_states: Tensor | None, make: Callable[[], Tensor]) -> Tensor:
    """The weights of a module that reads for others, or, of one of these, the weights that it has from the first.

    Args:
        order: See `_once`.
        scope: See `Ruled`.
        hidden_states: What the module is given; `None` where it reads nothing.
        make: Gives the weights.

    Raises:
        MoLEError: The module runs before the one that reads for it.
    """
    if not scope:
        return make()
    captured = type(order) is Tensor
    given = _RUNNING.given if captured else order.__dict__.setdefault("_mole_diffusion", {})
    key = id(order), scope
    weights, of = given.get(key, (None, None))
    if hidden_states is not None and (weights is None or captured or of is not hidden_states):
        weights = make()
        given[key] = weights, None if captured else hidden_states
    if weights is None:
        raise MoLEError(
            "the model runs its modules in an order that the gates do not expect. Draw without `torch.compile`, or "
            'train gates with `scope="matrix"`.'
        )
    return weights


def _once(order: Tensor, key: Any, of: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives, written down once in a graph.

    The tensor that stands for `order` while a graph is written down is that graph's own.
    """
    if type(order) is Tensor:  # the graph runs as it was captured
        return make()
    made: dict[Any, Any] = order.__dict__.setdefault("_mole_diffusion", {})
    if key not in made:
        made[key] = make(), of  # which live on, so that no other tensor has their numbers
    found: Tensor = made[key][0]
    return found
