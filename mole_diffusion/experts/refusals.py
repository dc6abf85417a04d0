"""Models that experts cannot hang on or would silently do nothing on, and methods that need more than a pass has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from torch import nn

from ..errors import MoLEError
from ..families.base import is_compiled
from ..families.parts import every_module
from .run import Run

FUSED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


class AttachError(MoLEError):
    """Experts cannot be hung on a model, or would silently do nothing there."""


def refuse_adapters(component: str, model: nn.Module) -> None:
    """Raises AttachError if adapters of PEFT are on a model, as `load_lora_weights` leaves them."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and type(module).__module__.startswith("peft."):
            loaded = ", ".join(getattr(module, "lora_A", {})) or "an adapter"
            raise AttachError(
                f"{component} carries a PEFT adapter ({loaded}, at {name}), as `load_lora_weights` leaves it. Load "
                "that file with `load_loras` beside the others, or call `fuse_lora()`, then `unload_lora_weights()`."
            )


def refuse_compiled(component: str, model: nn.Module) -> None:
    """Raises AttachError if a model or a part of it is compiled already."""
    for name, module in model.named_modules():
        if is_compiled(module):
            raise AttachError(
                f"{component}{'.' + name if name else ''} is compiled; a compiled graph does not see hooks added "
                "later. Load the LoRAs before `torch.compile`."
            )


def refuse_fused(component: str, layers: Mapping[str, Any]) -> None:
    """Raises AttachError where attention layers of a UNet, by name, have one module for three projections."""
    fused = [
        name
        for name, layer in layers.items()
        if type(layer.processor).__name__.startswith("Fused") and type(layer.processor) is not FusedAttnProcessor2_0
    ]
    if fused:
        kind = type(layers[fused[0]].processor).__name__
        raise AttachError(
            f"{component} has fused query, key and value projections ({fused[0]}: {kind}), which bypass the modules "
            "the LoRAs adapt. Call `unfuse_qkv_projections()` first."
        )


def may_fuse(parents: Mapping[str, tuple[nn.Module, str]]) -> dict[str, tuple[nn.Module, str]]:
    """Those of `refuse_bypassed`'s parents that are attention of a transformer, which may fuse its projections."""
    return {
        name: (parent, leaf)
        for name, (parent, leaf) in parents.items()
        if leaf in FUSED and not isinstance(parent, Attention)
    }


def refuse_bypassed(component: str, parents: Mapping[str, tuple[nn.Module, str]]) -> None:
    """Raises AttachError where a transformer has fused its projections.

    Transformers say so on the attention layer, whose processor stays the same.

    Args:
        component: The model.
        parents: By the names of adapted modules, the modules that hold them and their names there.
    """
    for name, (parent, _) in may_fuse(parents).items():
        if getattr(parent, "fused_projections", False):
            raise AttachError(
                f"{component} has fused query, key and value projections ({name.rpartition('.')[0]}), which bypass the "
                "modules the LoRAs adapt. Call `unfuse_qkv_projections()` first."
            )


def refuse_caches(component: str, model: nn.Module, run: Run, previous: Run | None) -> None:
    """Raises AttachError where a cache would go on with other weights of the LoRAs than those of the present step.

    A weigher whose weights are the same in every step and everywhere says so by an attribute `constant`: then a cache
    keeps what it would keep of a model with the LoRAs merged into it.

    Args:
        component: Name of the model.
        model: The model.
        run: The pass that begins.
        previous: The one before. Where it belongs to the same call, the model's hooks were looked at then.
    """
    if not run.active or getattr(run.weigher, "constant", False):
        return
    method = getattr(run.weigher, "name", type(run.weigher).__name__)
    cache, remedy = run.told.cache, "Draw with a pipeline that keeps none"
    if cache is None and getattr(model, "is_cache_enabled", False):
        cache = f"{type(getattr(model, '_cache_config', None)).__name__}, which skips blocks or keeps what they gave"
        remedy = f"Call `{component}.disable_cache()`"
    looked = previous is not None and run.call is not None and previous.call is run.call and previous.active
    if cache is None and not looked and (hooks := _cache_hooks(model)):
        cache = f"the hooks {', '.join(hooks)} of diffusers, which skip blocks or keep what they gave"
        remedy = (
            f"Take them off: `for name in {hooks}: diffusers.hooks.HookRegistry.check_if_exists_or_initialize("
            f"pipe.{component}).remove_hook(name)`"
        )
    if cache is not None:
        raise AttachError(
            f"{component} has a cache ({cache}), and composition {method!r} weighs LoRAs anew in every step and at "
            f"every place, which the cache would not follow. {remedy}, or draw with weights that stay: "
            '`set_composition("linear")`.'
        )


def _cache_hooks(model: nn.Module) -> list[str]:
    """Names of the hooks that `apply_faster_cache` and its kin put on a model, also on one without `enable_cache`."""
    found: dict[str, None] = {}
    for module in every_module(model):
        registry = module.__dict__.get("_diffusers_hook")
        for name, hook in () if registry is None else registry.hooks.items():
            home = type(hook).__module__.rpartition(".")[2]
            if "cache" in home or home == "pyramid_attention_broadcast":
                found[name] = None
    return list(found)


def refuse_method(component: str, run: Run, reads_attention: bool) -> None:
    """Raises MoLEError where a method needs more of a pass than a compiled graph has.

    Args:
        component: The denoiser.
        run: The pass.
        reads_attention: Whether attention is read by hooks there, which a graph leaves out.
    """
    name = getattr(run.weigher, "name", "in use")
    if run.passes > 1:
        raise MoLEError(
            f"composition {name!r} runs the denoiser {run.passes} times at once, "
            f"and a compiled graph of {component} is for one. Draw with it before `torch.compile`, or choose a "
            "composition of one pass, such as masks or budget."
        )
    refuse_unseen(component, run, lambda: reads_attention)


def refuse_unseen(component: str, run: Run, hides: Callable[[], bool]) -> None:
    """Raises MoLEError for a method that reads attention, where that lies in a compiled graph and is read by hooks.

    Args:
        component: The denoiser.
        run: The pass.
        hides: Tells whether it lies there.
    """
    if run.active and "attention" in getattr(run.weigher, "needs", ()) and hides():
        raise MoLEError(
            f"composition {getattr(run.weigher, 'name', 'in use')!r} reads the attention of {component}, which a "
            "compiled graph does not show here. Draw with it before `torch.compile` and `compile_repeated_blocks`, or "
            "choose another, such as budget."
        )
