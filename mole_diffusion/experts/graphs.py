"""What experts add, as part of a compiled graph: plain operators, of which the compiler makes what it likes.

Where all that a method needs to know is which module it is, or which kind of place, a graph asks once for the weights
of all of them, and has the products itself. So no Python runs between kernels at each module, as in `compiled.add`,
which is right for any method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn import functional as F

from . import compiled
from .compiled import COMPONENTS, Callback, Factors
from .site import Site

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result
def make_factors(key: int) -> None:
    """While a graph is traced: have the factors made, of all modules, since blocks of one kind share that graph."""
    component = COMPONENTS.get(key)
    if component is not None:
        component.make()


def make_all(sites: Sequence[Site]) -> None:
    """Make `factors` at every site that can have them, where they are not there as they are to be."""
    shared: dict[Any, tuple[Tensor, Tensor]] = {}
    for row, site in enumerate(sites):
        callback, weight = site.callback, getattr(site.module, "weight", None)
        assert callback is not None
        if isinstance(weight, Tensor) and not _alike(callback.factors, weight):
            callback.factors = factors_of(site, row, shared)


def _alike(factors: Factors | None, weight: Tensor) -> bool:
    return factors is not None and (factors.up.dtype, factors.up.device) == (weight.dtype, weight.device)


def factors_of(site: Site, row: int, shared: dict[Any, tuple[Tensor, Tensor]]) -> Factors | None:
    """What a graph has of a module's LoRAs; `None` where only Python can tell what they add.

    Args:
        site: The module.
        row: Which of the modules it is.
        shared: What other modules have alike.
    """
    weight, stack = site.module.weight, site.stack
    assert isinstance(weight, Tensor)
    odd = site.beside is not None or site.heads is not None or site.lengths is not None
    if odd or weight.dtype not in _FLOATS or weight.is_meta or isinstance(getattr(site.module, "padding", 0), str):
        return None
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
    last, place = first + stack.rank, f"{site.reads} {site.halvings}"
    return Factors(down, up, first, last, *shared[key], which, place)


def add(callback: Callback, module: Any, hidden_states: Tensor, output: Tensor) -> Tensor:
    """In a graph: what a module gave plus what the experts add there."""
    component = callback.component
    if component.kinds.now != "any":
        make_factors(component.key)
        factors = callback.factors
        # A convolution's padding may be another one since: hooks refuse that.
        if factors is not None and getattr(module, "padding_mode", "zeros") == "zeros":
            convolution = [*module.stride, *module.padding, *module.dilation] if factors.down.ndim == 4 else []
            places = component.kinds.now == "places"
            composed: Tensor = _composed(
                *(output, hidden_states, factors.down, factors.up, factors.experts, factors.scalings, factors.row),
                *(component.order, callback.number if places else component.begin.number),
                *(factors.first, factors.last, component.kinds.num_loras, component.modules, convolution),
                factors.place if places else None,
            )
            return composed
    return compiled.add(callback, hidden_states, output)


@compiled.operator("weights(Tensor order, Tensor number, Device device, SymInt[] shape, SymInt[]? spatial) -> Tensor")
def _weights(
    order: Tensor, number: Tensor, device: torch.device, shape: Sequence[int], spatial: Sequence[int] | None
) -> Tensor:
    """`(rows, tokens, N)` at a place; without `spatial` `(modules, rows, N)` at all modules."""
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
    "SymInt[] convolution, str? place) -> Tensor",
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
        place: See `Factors`; `None` where tokens make no difference.
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

    if place is None:
        weights = _once(order, (batch, modules, loras), (), at_all_modules)
        weights = weights.index_select(0, row).transpose(0, 1)
    else:
        weights = _once(order, (place, batch, tokens, loras, *spatial), (), at_the_place)
    z = _once(order, (id(hidden_states), id(down)), (hidden_states, down), projected)
    z = (z[..., first:last] * (weights.index_select(-1, experts) * scalings)).to(z.dtype)
    added = torch.mm(z.reshape(-1, z.shape[-1]), up.t())
    if convolution:
        return output + added.view(batch, *spatial, -1).permute(0, 3, 1, 2)
    return output + added.view(output.shape)


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
