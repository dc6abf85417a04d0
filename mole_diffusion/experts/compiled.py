"""What a compiled graph calls in place of hooks: operators that the compiler takes as they are.

A graph can hold neither the books that experts keep nor whose call it runs in. So, for any method, it holds at every
adapted module one operator that does what the hook would do, when the graph runs: it reads masks, scales, the step, the
prompt and the method of the call it is in, as without compiling, and none of these makes another graph. Which module it
is at stands in a tensor, so that blocks of one kind share a graph. (`graphs` has what methods can have that need less.)

All operators say that they change one small tensor, which keeps them in the order in which they were written down.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..errors import MoLEError
from ..families import Joint, Told
from .rules import Ruled

_NUMBERS = itertools.count()
# What runs in Python is not in a recorded CUDA graph: inductor records around it. Older versions have no such tag.
_UNRECORDED = getattr(torch.Tag, "cudagraph_unsafe", None)


LIBRARY = torch.library.Library("mole_diffusion", "FRAGMENT")  # as `custom_op`, which takes 50 microseconds a call


def operator(schema: str, traced: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function an operator of torch; its schema says which arguments it changes.

    Args:
        schema: As torch writes them.
        traced: Whether a graph is to have what the function calls, and not the function. Else it lies below autograd.
    """

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        name = LIBRARY.define(schema, tags=() if traced or _UNRECORDED is None else (_UNRECORDED,))
        LIBRARY.impl(name, function, "CompositeImplicitAutograd" if traced else "CompositeExplicitAutograd")
        if schema.endswith("()"):
            torch.library.register_fake(f"mole_diffusion::{name}", lambda *args: None, lib=LIBRARY)
        made: Callable[..., Any] = getattr(torch.ops.mole_diffusion, name).default
        return made

    return make


class Served(Protocol):
    """What a graph calls."""

    def __call__(self, *args: Any) -> Any: ...


class Wanted(Protocol):
    """Which kind of graph is wanted just now, whose rules it follows, and how many LoRAs are loaded; see `Kinds`."""

    num_loras: int
    now: Any
    weigher: Any
    followers: Any

    def shows(self, crossed: bool) -> bool: ...


class Factors(NamedTuple):
    """What a graph has of a module's LoRAs.

    Attributes:
        down: `(d_in, R)` of all modules that read the same, or `(R, c_in, kh, kw)`.
        up: `(d_out, R)`.
        first: Where the module's own rows begin in `down`.
        last: And end.
        experts: `(R,)`: whose each of them is.
        scalings: `(R,)`, of each of them.
        row: `(1,)`: which of the modules it is.
        place: What its weights follow from where they differ from token to token, beside these.
    """

    down: Tensor
    up: Tensor
    first: int
    last: int
    experts: Tensor
    scalings: Tensor
    row: Tensor
    place: str


class Component:
    """What all graphs of one component share.

    Args:
        kinds: Which kind of graph is wanted.
        modules: How many adapted modules there are.
        make: Makes what graphs have of the LoRAs at all of them, and `Callback.ruled` where a method with rules is
            given.
        tell: What is done where a pass begins.
        weigh: What gives weights at all modules.
        choose: What gives `keep`, `scale` and more, given the method whose rules a graph has.
        close: What is done where a pass ends, with `None` for what it gave.

    Attributes:
        order: The tensor that keeps operators in order.
        key: What a graph finds it by while it is traced.
        weigher: The method whose rules graphs have; `None` before there is one.
        begin: Where a graph calls back for `tell` and `weigh`.
        choice: Where it calls back for `choose`.
        end: Where it calls back for `close`.
    """

    def __init__(
        self,
        kinds: Wanted,
        modules: int,
        make: Callable[[Any], None],
        tell: Served,
        weigh: Served,
        choose: Served,
        close: Served,
    ) -> None:
        self.kinds = kinds
        self.modules = modules
        self.order = torch.zeros(1)
        self.key = next(_NUMBERS)
        self.weigher: Any = None
        self.begin = Callback(self, tell, weigh)
        self.choice = Callback(self, None, lambda *args: choose(self.weigher, *args))
        self.end = Callback(self, functools.partial(close, None))
        self._make = make
        kinds.followers.add(self)
        COMPONENTS[self.key] = self

    def make(self) -> None:
        """Make what graphs of the kind that is wanted have."""
        ruled = self.kinds.now == "rules"
        if ruled:
            self.weigher = self.kinds.weigher
        self._make(self.weigher if ruled else None)

    def follow(self, weigher: Any) -> None:
        """Graphs that have rules are to have those of this method; those that were made serve for its, too."""
        if self.weigher is not None and self.weigher is not weigher:
            self.make()

    def forget(self) -> None:
        """Graphs may go on, but no method is held."""
        self.weigher = None
        self.kinds.followers.discard(self)


COMPONENTS: WeakValueDictionary[int, Component] = WeakValueDictionary()


class Callback:
    """Where a graph calls back: a module, an attention layer, the beginning or end of a pass.

    Args:
        component: What it shares with all others of a component, such as the tensor that keeps operators in order.
        serve: What is done there. After `retire` nothing is, for a graph may outlive the LoRAs.
        weigh: What gives weights there, for a graph that has the products itself.

    Attributes:
        number: `(1,)`, what the graph finds it by.
        factors: What such a graph has of the LoRAs there, once one was wanted.
        turned: The same, where a rule wants them `orthonormal`.
        ruled: What it has of a rule there, in a graph that weighs itself.
        beside: Dtype and device of the module that these were made for; `None` where nothing is.
    """

    def __init__(self, component: Component, serve: Served | None, weigh: Served | None = None) -> None:
        number = next(_NUMBERS)
        self.number = torch.tensor([number])
        self.component = component
        self.serve = serve
        self.weigh = weigh
        self.ruled: Ruled | None = None
        self.let_go()
        _CALLBACKS[number] = self

    def let_go(self) -> None:
        """Forget the factors; they are made again when they are needed."""
        self.factors: Factors | None = None
        self.turned: Factors | None = None
        self.beside: tuple[torch.dtype, torch.device] | None = None

    def retire(self) -> None:
        self.let_go()
        self.serve = self.weigh = self.ruled = None


_CALLBACKS: WeakValueDictionary[int, Callback] = WeakValueDictionary()


def callback_of(number: Tensor) -> Callback | None:
    """The one of a number, if it is still there."""
    if _UNRECORDED is None and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise MoLEError(
            f"torch {torch.__version__} would record what the LoRAs do here into a CUDA graph, which then never asks "
            "again. Compile without mode='reduce-overhead' and 'max-autotune', or upgrade torch."
        )
    return _CALLBACKS.get(int(number))


def _served(number: Tensor) -> Served | None:
    callback = callback_of(number)
    return None if callback is None else callback.serve


@operator("begin(Tensor(a!) order, Tensor number, Tensor[] tensors, SymInt[] integers, str names) -> ()")
def _begin(order: Tensor, number: Tensor, tensors: Sequence[Tensor], integers: Sequence[int], names: str) -> None:
    serve = _served(number)
    if serve is not None:
        serve(_unpacked(tensors, integers, names))


@operator("add(Tensor(a!) output, Tensor(b!) order, Tensor number, Tensor hidden_states, bool learning) -> ()")
def _add(output: Tensor, order: Tensor, number: Tensor, hidden_states: Tensor, learning: bool) -> None:
    serve = _served(number)
    if serve is not None:
        added = serve(hidden_states, output, learning)
        if added is not output:
            output.copy_(added)


@operator("attend(Tensor(a!) order, Tensor number, Tensor query, Tensor key, Tensor value, Tensor? mask) -> Tensor")
def _attend(order: Tensor, number: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    serve = _served(number)
    attended: Tensor = attention(query, key, value, mask) if serve is None else serve(query, key, value, mask)
    return attended


@operator("end(Tensor(a!) order, Tensor number) -> ()")
def _end(order: Tensor, number: Tensor) -> None:
    serve = _served(number)
    if serve is not None:
        serve()


def _attend_fake(
    order: Tensor, number: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads * value.shape[-1])


torch.library.register_fake("mole_diffusion::attend", _attend_fake, lib=LIBRARY)


def begin(callback: Callback, told: Told) -> None:
    """In a graph: a pass of a component begins."""
    _begin(callback.component.order, callback.number, *_packed(told))


def add(callback: Callback, hidden_states: Tensor, output: Tensor) -> Tensor:
    """In a graph: what the experts add at a module goes into its output."""
    _add(output, callback.component.order, callback.number, hidden_states, torch.is_grad_enabled())
    return output


def attend(callback: Callback, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """In a graph: attention that somebody may watch or add a bias to. `(batch, tokens, heads * d)`."""
    attended: Tensor = _attend(callback.component.order, callback.number, query, key, value, mask)
    return attended


def end(callback: Callback) -> None:
    """In a graph: the pass ends."""
    _end(callback.component.order, callback.number)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`(batch, heads, tokens, d)` each, to `(batch, tokens, heads * d)`."""
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attended.transpose(1, 2).flatten(2).to(query.dtype)


def _packed(told: Told) -> tuple[list[Tensor], list[int], str]:
    tensors: list[Tensor] = []
    names: list[str] = []
    integers = [told.rows]
    if told.timestep is not None:
        names.append("timestep")
        tensors.append(torch.as_tensor(told.timestep))
    if told.encoder_hidden_states is not None:
        names.append("encoder_hidden_states")
        tensors.append(told.encoder_hidden_states)
    if told.input_ids is not None:
        names.append("input_ids")
        tensors.append(told.input_ids)
    if told.words is not None:
        names.append("words")
        tensors.append(told.words)
    if told.sample_size is not None:
        names.append("sample_size")
        integers += [told.sample_size[0], told.sample_size[1]]
    if told.joint is not None:
        names.append("joint")
        integers += [told.joint.text.start, told.joint.text.stop, told.joint.pixels.start, told.joint.pixels.stop]
    return tensors, integers, " ".join(names)


def _unpacked(tensors: Sequence[Tensor], integers: Sequence[int], names: str) -> Told:
    given: dict[str, Any] = {}
    tensor, number = iter(tensors), iter(integers)
    rows = next(number)
    for name in names.split():
        if name == "sample_size":
            given[name] = next(number), next(number)
        elif name == "joint":
            a, b, c, d = (next(number) for _ in range(4))
            given[name] = Joint(slice(a, b), slice(c, d))
        else:
            given[name] = next(tensor)
    if "timestep" in given:
        given["timestep"] = given["timestep"].clone()  # the graph may use its memory again
    return Told(rows=rows, **given)


def refuse_learning(weigher: Any, *tensors: Tensor) -> None:
    """Raises MoLEError where gates, or what the model was given, would get no gradient."""
    gates = weigher if isinstance(weigher, torch.nn.Module) else getattr(weigher, "gates", None)
    of_gates = gates.parameters() if isinstance(gates, torch.nn.Module) else ()
    if any(tensor.requires_grad for tensor in (*of_gates, *tensors)):
        raise MoLEError(
            "a compiled model with LoRAs gives no gradient, neither to gates nor to what it is given. Train on the "
            "model without `torch.compile`; to draw, call it inside `torch.no_grad()`."
        )
