"""Hanging experts on one component, and giving the component back as it was."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import MoLEError
from ..families import Architecture, Joint, Told
from . import compiled
from .compiled import Place
from .meeting import Meeting
from .processor import AddExperts, AttentionSeam, MoLEAttnProcessor
from .seam import LayerSeam
from .site import Site

Engine = Literal["auto", "hooks", "processors"]
ENGINES: tuple[Engine, ...] = ("auto", "hooks", "processors")
# Perturbed and self-attention guidance: their processors take the batch for two or three parts of equal size.
POSITIONAL = ("PAG", "CrossAttnStore", "SAG")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
FUSED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


class AttachError(MoLEError):
    """Experts cannot be hung on a model, or would silently do nothing there."""


class Attachment:
    """Hooks and attention processors of ours on one component.

    Args:
        model: The component.
        architecture: What is known of it.
        sites: Its adapted modules.
        engine: ``"hooks"``: a forward hook on every site. ``"processors"`` and ``"auto"``: attention layers that run
            the stock ``AttnProcessor2_0`` get a :class:`MoLEAttnProcessor`, everything else a hook. With
            ``"processors"`` a component without such a layer is an error.
        add: Adds the experts' share to a site's output.
        seam: What an attention layer of a denoiser asks, by its name, whether it attends to the prompt, and its scale;
            ``None`` in a text encoder.
        where: Says where words and pixels stand in the sequences of both, in the present pass.
        begin: Called with the root's arguments before every forward pass of the component; may return others.
        end: Called with its output after, or with ``None`` after an exception; may return another output.
        tell: The same as `begin` for a compiled graph, which cannot widen a batch.
        serve: The same as `add` for a compiled graph.

    Raises:
        AttachError: If the engine finds nothing to do.
    """

    def __init__(
        self,
        component: str,
        model: nn.Module,
        architecture: Architecture,
        sites: Sequence[Site],
        engine: Engine,
        add: AddExperts,
        seam: Callable[[str, bool, float], LayerSeam] | None,
        where: Callable[[], Joint | None],
        begin: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None],
        end: Callable[[Any], Any],
        tell: Callable[[Told], None],
        serve: Callable[[Site, Tensor, Tensor, bool], Tensor],
    ) -> None:
        self.component = component
        self.model = model
        self.architecture = architecture
        self.sites = list(sites)
        self._add = add
        self._seam = seam
        self._handles: list[RemovableHandle] = []
        self._site_hooks: dict[str, _SiteHook] = {}
        self._watch_hooks: dict[str, _Watch] = {}
        self._made: list[MoLEAttnProcessor] = []
        # attention name -> (layer, its own processor, ours)
        self._swapped: dict[str, tuple[Attention, Any, MoLEAttnProcessor]] = {}
        self._fired: set[str] | None = set()
        self._order = compiled.new_order()
        self._places = [Place(self._order, tell), Place(self._order, functools.partial(end, None))]
        self._argument_names = tuple(inspect.signature(model.forward).parameters)
        for site in self.sites:
            site.place = Place(self._order, functools.partial(serve, site))
            self._places.append(site.place)
        self._parents = {site.module_name: _parent(model, site.module_name) for site in self.sites}
        self._seen_modules: list[tuple[Any, str, nn.Module | None]] = []
        self._seen_processors: list[tuple[Attention, Any]] = []

        self._attentions = _attentions(model, self.sites)
        # A transformer of words and pixels shows the layers in which they meet, whatever attention processors it has.
        met = () if seam is None or architecture.meeting is None else _meeting_layers(model, architecture)
        self._meetings = [
            Meeting(layer, self._ask(name, True, layer), self._ask(name, False, layer), where) for name, layer in met
        ]
        self._layers = dict(_attention_layers(model)) if seam is not None and not met else {}
        self._begin = begin
        self._end = end
        self._engine = engine
        if engine != "hooks":
            self._swap_processors()
        if engine == "processors" and not self._swapped:
            raise AttachError(
                f"engine='processors' found no attention layer with the stock AttnProcessor2_0 among the adapted "
                f"modules of {component}. Use engine='auto' or 'hooks'."
            )
        self._place_hooks()
        self._look()
        self._handles.append(model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._after_forward, always_call=True))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise AttachError(
            f"A {self.component} with experts attached cannot be copied, pickled or saved as a whole. Call "
            "`pipe.unload_loras()`, or `detach()`, first; `save_pretrained` and `state_dict` need nothing undone."
        )

    def remove(self) -> None:
        """Give the component back: processors that are still ours are replaced by the very objects that were there."""
        for attention, original, ours in self._swapped.values():
            if attention.processor is ours:
                attention.processor = original
        for ours in self._made:
            ours.retire()
        for handle in [*self._handles, *self._site_hooks.values(), *self._watch_hooks.values(), *self._meetings]:
            handle.remove()
        for place in self._places:
            place.retire()  # a compiled graph may go on without
        self._swapped.clear()
        self._handles.clear()
        self._site_hooks.clear()
        self._watch_hooks.clear()

    def follow(self) -> None:
        """Keep nothing on a device that the component has left, as offloading has it leave a GPU."""
        weight = next(self.model.parameters(), None)
        for site in self.sites:
            ready = site.group.ready
            if weight is not None and ready and ready[0].device != weight.device:
                site.group.start_again()

    @property
    def meets(self) -> bool:
        """Whether attention is read by hooks, which a compiled graph passes by."""
        return bool(self._meetings or self._watch_hooks)

    def refuse_widening(self) -> None:
        """Raises AttachError where an attention processor tells rows of the batch apart by their position."""
        for name, layer in self._layers.items():
            kind = type(layer.processor).__name__
            if kind.startswith(POSITIONAL):
                raise AttachError(
                    f"{self.component} runs several passes at once as one wider batch, and {kind} (at {name}) splits "
                    "the batch by position. Use a composition of one pass (masks), or draw without that processor."
                )

    def fired(self, site: Site) -> None:
        """Note that a site was reached; only the first forward pass is watched."""
        fired = self._fired  # another thread may end its pass meanwhile
        if fired is not None:
            fired.add(site.module_name)

    def _swap_processors(self) -> None:
        """Our processor in every layer whose own is understood; also where no LoRA is, for methods that watch."""
        layers = {**self._layers, **{name: layer for name, (layer, _) in self._attentions.items()}}
        for name, attention in layers.items():
            original: Any = attention.processor
            # IP-Adapter, sliced and other attention keep theirs and get hooks. Fused projections are set aside: theirs
            # would bypass the modules that LoRAs adapt, and the layer still has the single ones.
            if type(original) in (AttnProcessor2_0, FusedAttnProcessor2_0):
                _, sites = self._attentions.get(name, (attention, {}))
                seam = None if self._seam is None else self._ask(name, attention.is_cross_attention, attention)
                if name in self._swapped:  # somebody exchanged ours, and may put it back (`unfuse_qkv_projections`)
                    self._swapped[name][2].retire()
                attention.processor = ours = MoLEAttnProcessor(sites, self._add, seam, attention)
                if seam is not None:
                    ours.place = Place(self._order, ours.attend)
                    self._places.append(ours.place)
                self._swapped[name] = (attention, original, ours)
                self._made.append(ours)

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
                self._watch_hooks[name] = _Watch(layer, self._ask(name, layer.is_cross_attention, layer))
        for site in self.sites:
            name = site.module_name
            if name in served and name in self._site_hooks:
                self._site_hooks.pop(name).remove()
            elif name not in served and name not in self._site_hooks:
                hook = functools.partial(_site_hook, self._add, site)
                self._site_hooks[name] = _SiteHook(site.module, hook)

    def _ask(self, name: str, crossed: bool, layer: Any) -> LayerSeam:
        assert self._seam is not None
        scale = getattr(layer, "scale", None)
        return self._seam(name, bool(crossed), float(layer.head_dim**-0.5 if scale is None else scale))

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Somebody may have changed the model since: replaced our processors (IP-Adapter, attention slicing) or fused
        # projections, or exchanged modules (PEFT, when its adapters are loaded and unloaded).
        if torch.compiler.is_compiling():
            given = {**dict(zip(self._argument_names, args, strict=False)), **kwargs}
            compiled.begin(self._places[0], self.architecture.told(model, given))
            return None
        if not self._unchanged():
            self._find_modules()
            if self._engine != "hooks":
                self._swap_processors()
            _refuse_fused(self.component, self._attentions)
            self._place_hooks()
            self._look()
        _refuse_bypassed(self.component, self._parents)
        return self._begin(model, args, kwargs)

    def _look(self) -> None:
        """Remember which modules and attention processors there are."""
        parents = self._parents.values()
        self._seen_modules = [(parent._modules, leaf, parent._modules.get(leaf)) for parent, leaf in parents]
        layers = {**self._layers, **{name: layer for name, (layer, _) in self._attentions.items()}}.values()
        self._seen_processors = [(layer, layer.processor) for layer in layers]

    def _unchanged(self) -> bool:
        """Whether they are all still there."""
        return all(modules.get(leaf) is module for modules, leaf, module in self._seen_modules) and all(
            layer.processor is processor for layer, processor in self._seen_processors
        )

    def _find_modules(self) -> None:
        """Follow a site whose module was exchanged for another with the same weights.

        Raises:
            AttachError: The module is gone, or cannot take the LoRAs.
        """
        for site in self.sites:
            parent, leaf = self._parents[site.module_name]
            module = getattr(parent, leaf, None)
            inner = getattr(module, "base_layer", module)  # an adapter of PEFT around it calls it
            if inner is not site.module:
                try:
                    found = self.model.get_submodule(site.module_name)
                except AttributeError:
                    raise AttachError(
                        f"{site.name}, which the LoRAs adapt, is gone from the model. Put it back, or call "
                        "`unload_loras()`."
                    ) from None
                found = getattr(found, "base_layer", found)
                site.move_to(found)
                self._parents[site.module_name] = _parent(self.model, site.module_name)
                if site.module_name in self._site_hooks:
                    self._site_hooks.pop(site.module_name).remove()
                self._fired = set() if self._fired is None else self._fired  # look again whether it is reached

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling():
            compiled.end(self._places[1])
            return None
        result = self._end(output)
        fired = self._fired
        if output is None or fired is None:  # an exception is on its way, or the check was passed before
            return result
        missing = [site.module_name for site in self.sites if site.module_name not in fired]
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
    """Raises AttachError if a model carries an adapter or its modules are bypassed: experts there would do nothing."""
    refuse_adapters(component, model)
    _refuse_fused(component, _attentions(model, sites))
    _refuse_bypassed(component, {site.module_name: _parent(model, site.module_name) for site in sites})


def _refuse_fused(component: str, attentions: Mapping[str, tuple[Any, dict[str, Site]]]) -> None:
    fused = [
        name
        for name, (layer, _) in attentions.items()
        if type(layer.processor).__name__.startswith("Fused") and type(layer.processor) is not FusedAttnProcessor2_0
    ]
    if fused:
        kind = type(attentions[fused[0]][0].processor).__name__
        raise AttachError(
            f"{component} has fused query, key and value projections ({fused[0]}: {kind}), which bypass the modules "
            "the LoRAs adapt. Call `unfuse_qkv_projections()` first."
        )


def _refuse_bypassed(component: str, parents: Mapping[str, tuple[nn.Module, str]]) -> None:
    """Transformers that fuse their projections say so on the attention layer, whose processor stays the same."""
    for name, (parent, leaf) in parents.items():
        if leaf in FUSED and getattr(parent, "fused_projections", False) and not isinstance(parent, Attention):
            raise AttachError(
                f"{component} has fused query, key and value projections ({name.rpartition('.')[0]}), which bypass the "
                "modules the LoRAs adapt. Call `unfuse_qkv_projections()` first."
            )


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds another, and the other's name there."""
    above, _, leaf = name.rpartition(".")
    return model.get_submodule(above), leaf


def _site_hook(
    add: AddExperts, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
) -> Tensor:
    hidden_states: Tensor = args[0] if args else next(iter(kwargs.values()))
    if site.place is not None and torch.compiler.is_compiling():
        return compiled.add(site.place, hidden_states, output)
    return add(site, hidden_states, output)


class _SiteHook:
    """A forward hook under the same key in every module, where torch takes another for each.

    Blocks of one kind that are compiled share a graph only where nothing in them differs.
    """

    KEY: Any = "mole_diffusion"

    def __init__(self, module: nn.Module, hook: Callable[..., Tensor]) -> None:
        self._module = module
        self._key = self.KEY
        while self._key in module._forward_hooks:  # other LoRAs of ours
            self._key += "'"
        module._forward_hooks[self._key] = hook
        module._forward_hooks_with_kwargs[self._key] = True

    def remove(self) -> None:
        self._module._forward_hooks.pop(self._key, None)
        self._module._forward_hooks_with_kwargs.pop(self._key, None)


class _Watch:
    """The seam of a layer with somebody else's processor, by hooks: its own projections of the same input show what it
    attends to, and a bias goes in as the attention mask that every processor knows."""

    def __init__(self, layer: Attention, seam: AttentionSeam) -> None:
        self._seam = seam
        self._handles = [
            layer.register_forward_pre_hook(self._before, with_kwargs=True),
            layer.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, layer: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() or not self._seam.biased():
            return None
        bias = self._seam.bias(*self._projections(layer, args, kwargs))
        if bias is None:
            return None
        mask = kwargs.get("attention_mask")
        return args, {**kwargs, "attention_mask": bias[:, 0] if mask is None else mask + bias[:, 0]}

    def _after(self, layer: Attention, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if not torch.compiler.is_compiling() and self._seam.watched():
            self._seam.attended(*self._projections(layer, args, kwargs), output)

    def _projections(self, layer: Attention, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        context = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        context = context[0] if isinstance(context, tuple) else context  # an IP-Adapter's: the text, then its pictures
        query = layer.to_q(hidden_states)
        key = layer.to_k(hidden_states if context is None else context)
        query, key = (x.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x in (query, key))
        return query, key


def _meeting_layers(model: nn.Module, architecture: Architecture) -> list[tuple[str, nn.Module]]:
    """Attention layers in which words and pixels meet."""
    found = []
    for name, module in model.named_modules():
        match = None if architecture.meeting is None else architecture.meeting.match(name)
        if match is not None and match[1] == name:
            found.append((name, module))
    return found


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
        compiled = module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        if compiled:
            raise AttachError(
                f"{component}{'.' + name if name else ''} is compiled; a compiled graph does not see hooks added "
                "later. Load the LoRAs before `torch.compile`."
            )
