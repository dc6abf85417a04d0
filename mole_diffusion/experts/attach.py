"""Hanging experts on one component, and giving the component back as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import MoLEError
from .processor import AddExperts, AttentionSeam, MoLEAttnProcessor
from .site import Site

Engine = Literal["auto", "hooks", "processors"]
ENGINES: tuple[Engine, ...] = ("auto", "hooks", "processors")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class AttachError(MoLEError):
    """Experts cannot be hung on a model, or would silently do nothing there."""


class Attachment:
    """Hooks and attention processors of ours on one component.

    Args:
        model: The component.
        sites: Its adapted modules.
        engine: ``"hooks"``: a forward hook on every site. ``"processors"`` and ``"auto"``: attention layers that run
            the stock ``AttnProcessor2_0`` get a :class:`MoLEAttnProcessor`, everything else a hook. With
            ``"processors"`` a component without such a layer is an error.
        add: Adds the experts' share to a site's output.
        seam: What an attention layer of a denoiser asks, by its name; ``None`` in a text encoder.
        begin: Called with the root's arguments before every forward pass of the component; may return others.
        end: Called with its output after, or with ``None`` after an exception; may return another output.

    Raises:
        AttachError: If the engine finds nothing to do.
    """

    def __init__(
        self,
        component: str,
        model: nn.Module,
        sites: Sequence[Site],
        engine: Engine,
        add: AddExperts,
        seam: Callable[[str, Attention], AttentionSeam] | None,
        begin: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None],
        end: Callable[[Any], Any],
    ) -> None:
        self.component = component
        self.model = model
        self.sites = list(sites)
        self._add = add
        self._seam = seam
        self._handles: list[RemovableHandle] = []
        self._site_hooks: dict[str, RemovableHandle] = {}
        self._watch_hooks: dict[str, RemovableHandle] = {}
        # attention name -> (layer, its own processor, ours)
        self._swapped: dict[str, tuple[Attention, Any, MoLEAttnProcessor]] = {}
        self._fired: set[str] | None = set()

        self._attentions = _attentions(model, self.sites)
        self._layers = dict(_attention_layers(model)) if seam is not None else {}
        self._begin = begin
        self._end = end
        if engine != "hooks":
            self._swap_processors()
        if engine == "processors" and not self._swapped:
            raise AttachError(
                f"engine='processors' found no attention layer with the stock AttnProcessor2_0 among the adapted "
                f"modules of {component}. Use engine='auto' or 'hooks'."
            )
        self._place_hooks()
        self._handles.append(model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._after_forward, always_call=True))

    def remove(self) -> None:
        """Give the component back: processors that are still ours are replaced by the very objects that were there."""
        for attention, original, ours in self._swapped.values():
            if attention.processor is ours:
                attention.processor = original
        for handle in [*self._handles, *self._site_hooks.values(), *self._watch_hooks.values()]:
            handle.remove()
        self._swapped.clear()
        self._handles.clear()
        self._site_hooks.clear()
        self._watch_hooks.clear()

    def fired(self, site: Site) -> None:
        """Note that a site was reached; only the first forward pass is watched."""
        if self._fired is not None:
            self._fired.add(site.module_name)

    def _swap_processors(self) -> None:
        # Layers of a denoiser that no LoRA touches too: a method may want to see all attention maps.
        layers = {**self._layers, **{name: layer for name, (layer, _) in self._attentions.items()}}
        for name, attention in layers.items():
            original: Any = attention.processor
            # Only the plain processor is understood; IP-Adapter, sliced and other attention keep theirs and get hooks.
            if type(original) is AttnProcessor2_0:
                _, sites = self._attentions.get(name, (attention, {}))
                seam = None if self._seam is None else self._seam(name, attention)
                attention.processor = ours = MoLEAttnProcessor(sites, self._add, seam)
                self._swapped[name] = (attention, original, ours)

    def _place_hooks(self) -> None:
        """One hook on every site that no processor of ours serves now, and none on the others."""
        ours_now = {name for name, (attention, _, ours) in self._swapped.items() if attention.processor is ours}
        served = {
            site.module_name for name in ours_now & set(self._attentions) for site in self._attentions[name][1].values()
        }
        for name, layer in self._layers.items():
            if name in ours_now and name in self._watch_hooks:
                self._watch_hooks.pop(name).remove()
            elif name not in ours_now and name not in self._watch_hooks and self._seam is not None:
                watch = functools.partial(_watch_hook, self._seam(name, layer))
                self._watch_hooks[name] = layer.register_forward_hook(watch, with_kwargs=True)
        for site in self.sites:
            name = site.module_name
            if name in served and name in self._site_hooks:
                self._site_hooks.pop(name).remove()
            elif name not in served and name not in self._site_hooks:
                hook = functools.partial(_site_hook, self._add, site)
                self._site_hooks[name] = site.module.register_forward_hook(hook, with_kwargs=True)

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _refuse_fused(self.component, self._attentions)
        self._place_hooks()  # somebody may have replaced our processors since (IP-Adapter, attention slicing)
        return self._begin(model, args, kwargs)

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> Any:
        result = self._end(output)
        if output is None or self._fired is None:  # an exception is on its way, or the check was passed before
            return result
        missing = [site.module_name for site in self.sites if site.module_name not in self._fired]
        self._fired = set() if missing else None  # look again next time
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise AttachError(
                f"{len(missing)} of {len(self.sites)} adapted modules of {self.component} took no part in its forward "
                f"pass, so their LoRAs did nothing: {shown}. Something bypasses or replaced these modules (fused "
                "projections, skipped layers); undo that, or load LoRAs without them."
            )
        return result


def refuse_unfit(component: str, model: nn.Module, sites: Sequence[Site]) -> None:
    """Raises AttachError if a model is compiled or has fused projections, so that experts there would do nothing."""
    _refuse_compiled(component, model)
    _refuse_fused(component, _attentions(model, sites))


def _refuse_fused(component: str, attentions: Mapping[str, tuple[Any, dict[str, Site]]]) -> None:
    fused = [name for name, (layer, _) in attentions.items() if getattr(layer, "fused_projections", False)]
    if fused:
        raise AttachError(
            f"{component} has fused query, key and value projections ({fused[0]} and others), which bypass "
            "the modules the LoRAs adapt. Call `unfuse_qkv_projections()` first."
        )


def _site_hook(
    add: AddExperts, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
) -> Tensor:
    hidden_states: Tensor = args[0] if args else next(iter(kwargs.values()))
    return add(site, hidden_states, output)


def _watch_hook(
    seam: AttentionSeam, attention: Attention, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
) -> None:
    """Shows what a layer with somebody else's processor attended to, from its own projections of the same input."""
    if not seam.watched():
        return
    hidden_states = args[0] if args else kwargs["hidden_states"]
    context = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    context = context[0] if isinstance(context, tuple) else context  # an IP-Adapter's: the text, then its pictures
    query = attention.to_q(hidden_states)
    key = attention.to_k(hidden_states if context is None else context)
    query, key = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (query, key))
    seam.attended(query, key, output)


def _attention_layers(model: nn.Module) -> Iterator[tuple[str, Attention]]:
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            yield name, module


def _attentions(model: nn.Module, sites: Sequence[Site]) -> dict[str, tuple[Any, dict[str, Site]]]:
    """Attention layers among the parents of the sites: name -> (layer, projection name -> site)."""
    found: dict[str, tuple[Any, dict[str, Site]]] = {}
    for site in sites:
        for projection in PROJECTIONS:
            parent, dot, _ = site.module_name.rpartition(f".{projection}")
            if dot and site.module_name == f"{parent}.{projection}":
                layer = model.get_submodule(parent)
                if isinstance(layer, Attention):
                    found.setdefault(parent, (layer, {}))[1][projection] = site
    return found


def _refuse_compiled(component: str, model: nn.Module) -> None:
    for name, module in model.named_modules():
        compiled = module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        if compiled:
            raise AttachError(
                f"{component}{'.' + name if name else ''} is compiled; a compiled graph does not see hooks added "
                "later. Load the LoRAs before `torch.compile`."
            )
