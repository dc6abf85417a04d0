"""Calls about adapters of PEFT that models inherit, while experts hang on them: refused where they would do nothing.

diffusers and transformers give their models such calls. None knows of experts: left alone, most would return in silence
while experts go on drawing, and the others would say that nothing is loaded.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from torch import nn

from ..errors import MoLEError

CHOOSE = 'choose and weigh them in each call: `pipe(prompt, loras={"cat": 0.8})`'
FUSE = "`pipe.fuse_lora()`, without names, merges those that a call draws with"
UNFUSE = "they are not fused; `unload_loras` takes them off"
UNLOAD = "`pipe.unload_loras(names)` takes them off"
HOTSWAP = "`unload_loras` and `load_loras` exchange them, of any rank, and need no preparation"

# Refused wherever experts are, for they would turn PEFT's off or on and not these, or prepare for PEFT's alone.
REFUSED = {
    "disable_lora": "`pipe.disable_lora()` turns both off, and `loras=[]` these for one call",
    "enable_lora": "`pipe.enable_lora()` turns both on",
    "enable_lora_hotswap": HOTSWAP,
}
REFUSED |= {"disable_adapters": REFUSED["disable_lora"], "enable_adapters": REFUSED["enable_lora"]}
REFUSED |= {"enable_peft_hotswap": HOTSWAP}
# Of PEFT's adapters: refused where there are none, and for the name of an expert.
THEIRS = {
    "set_adapters": CHOOSE,
    "set_adapter": CHOOSE,
    "fuse_lora": FUSE,
    "unfuse_lora": UNFUSE,
    "unload_lora": UNLOAD,
    "delete_adapters": UNLOAD,
    "delete_adapter": UNLOAD,
    "save_lora_adapter": "they lie in the files they came from",
    "get_adapter_state_dict": "they lie in the files they came from",
}
# Bring an adapter of PEFT, to draw beside: refused under the name of an expert.
ADDING = ("load_lora_adapter", "load_adapter", "add_adapter")
LISTING = "active_adapters"

# By model, the names of all experts on it: one entry for each of the `Experts` that hang there.
_NAMES: WeakKeyDictionary[nn.Module, list[Sequence[str]]] = WeakKeyDictionary()
_ANSWERED: ContextVar[bool] = ContextVar("mole_diffusion.experts.answered", default=False)


@contextmanager
def answered() -> Iterator[None]:
    """Inside, calls go through: whoever makes them has already done for the experts what they say."""
    token = _ANSWERED.set(True)
    try:
        yield
    finally:
        _ANSWERED.reset(token)


def guard(model: nn.Module, names: Sequence[str]) -> None:
    """Has the calls of a model answer for the experts of these names, until `release`."""
    _NAMES.setdefault(model, []).append(names)
    for call in (*REFUSED, *THEIRS, *ADDING, LISTING):
        if hasattr(type(model), call):
            model.__dict__[call] = functools.partial(_answer, model, call)


def release(model: nn.Module, names: Sequence[str]) -> None:
    """Undoes `guard`."""
    others = _NAMES[model]
    others.remove(names)
    if not others:
        del _NAMES[model]
        for call in (*REFUSED, *THEIRS, *ADDING, LISTING):
            model.__dict__.pop(call, None)


def refuse(call: str, names: Sequence[str], instead: str) -> NoReturn:
    """Raises MoLEError: the call is not about these LoRAs, and what is."""
    raise MoLEError(
        f"`{call}` is about adapters of `load_lora_weights`, and the LoRAs {', '.join(names)} were loaded by "
        f"`load_loras`: {instead}."
    )


def _answer(model: Any, call: str, /, *args: Any, **kwargs: Any) -> Any:
    inherited = getattr(type(model), call)
    if _ANSWERED.get():
        return inherited(model, *args, **kwargs)
    names = [name for several in _NAMES[model] for name in several]
    theirs = bool(getattr(model, "peft_config", None))
    if call == LISTING:
        return [*(inherited(model) if theirs else []), *names]
    if call in REFUSED:
        refuse(call, names, REFUSED[call])
    taken = [name for name in _named(inherited, model, args, kwargs) if name in names]
    if call in ADDING:
        if taken:
            refuse(call, taken, f"choose another name, or call `pipe.unload_loras({taken})` first")
    elif taken or not theirs:
        refuse(call, taken or names, THEIRS[call])
    return inherited(model, *args, **kwargs)


def _named(inherited: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The names of adapters in the arguments of a call."""
    bound = inspect.signature(inherited).bind_partial(model, *args, **kwargs)
    bound.apply_defaults()
    given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    names = given.get("adapter_names") or given.get("adapter_name") or []
    return [names] if isinstance(names, str) else list(names)
