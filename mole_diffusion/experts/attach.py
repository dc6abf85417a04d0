"""Hanging experts on one component, and giving the component back as it was."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NoReturn, Protocol

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..families import Architecture, Joint, Told
from ..families.architecture import parameters
from ..families.base import is_compiled, unwrapped
from . import compiled, graphs
from .compiled import Callback, Component
from .hanging import Hanging
from .hooks import SiteHook, Watch
from .kinds import Kinds
from .meeting import Meeting
from .processor import MoLEAttnProcessor
from .refusals import AttachError, may_fuse, refuse_adapters, refuse_bypassed, refuse_fused
from .seam import LayerSeam
from .site import Site, made_beside

Engine = Literal["auto", "hooks", "processors"]
ENGINES: tuple[Engine, ...] = ("auto", "hooks", "processors")
# Perturbed and self-attention guidance: their processors take the batch for two or three parts of equal size.
POSITIONAL = ("PAG", "CrossAttnStore", "SAG")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class Passes(Protocol):
    """What hooks, attention processors and compiled graphs call; see `ForwardPasses`."""

    def begin(
        self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None: ...

    def add(self, site: Site, hidden_states: Tensor, output: Tensor) -> Tensor: ...

    def end(self, output: Any) -> Any: ...

    def tell(self, told: Told) -> None: ...

    def serve(self, site: Site, hidden_states: Tensor, output: Tensor, learning: bool) -> Tensor: ...

    def weigh(
        self, site: Site, rows: int, tokens: int, spatial: tuple[int, int] | None, device: torch.device
    ) -> Tensor | None: ...

    def weigh_all(self, sites: Sequence[Site], rows: int, device: torch.device) -> Tensor | None: ...

    def choose(self, weigher: Any, rows: int, device: torch.device) -> Tensor | None: ...


class Attachment:
    """Hooks and attention processors of ours on one component.

    Args:
        model: The component.
        architecture: What is known of it.
        sites: Its adapted modules.
        engine: `"hooks"`: a forward hook on every site. `"processors"` and `"auto"`: attention layers that run
            the stock `AttnProcessor2_0` get a `MoLEAttnProcessor`, everything else a hook. With
            `"processors"` a component without such a layer is an error.
        passes: What happens in its forward passes.
        seam: What an attention layer of a denoiser asks, by its name, whether it attends to the prompt, its scale, and
            how often a picture was halved on its way there; `None` in a text encoder.
        where: Says where words and pixels stand in the sequences of both, in the present pass.
        kinds: Which kind of graph is wanted.

    Attributes:
        ran: Whether a pass ended since it was seen that nothing is kept for one: so something may be.

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
        passes: Passes,
        seam: Callable[[str, bool, float, int], LayerSeam] | None,
        where: Callable[[], Joint | None],
        kinds: Kinds,
    ) -> None:
        self.component = component
        self.model = model
        self.architecture = architecture
        self.sites = list(sites)
        self._groups = list({id(site.group): site.group for site in sites}.values())
        self._passes = passes
        self._seam = seam
        self._handles: list[RemovableHandle] = []
        self._site_hooks: dict[str, SiteHook] = {}
        self._watch_hooks: dict[str, Watch] = {}
        self._made: list[MoLEAttnProcessor] = []
        # attention name -> (layer, its own processor, ours)
        self._swapped: dict[str, tuple[Attention, Any, MoLEAttnProcessor]] = {}
        self._all_reached = False
        make = graphs.Maker(self.sites, self._parts)
        weigh_all = functools.partial(passes.weigh_all, self.sites)
        self._graphs = Component(kinds, len(self.sites), make, passes.tell, weigh_all, passes.choose, passes.end)
        self._callbacks = [self._graphs.begin, self._graphs.choice, self._graphs.end]
        self._argument_names = parameters(type(model))
        for site in self.sites:
            serve, weigh = functools.partial(passes.serve, site), functools.partial(passes.weigh, site)
            site.callback = Callback(self._graphs, serve, weigh)
            self._callbacks.append(site.callback)
        self._parents = {site.module_name: _parent(model, site.module_name) for site in self.sites}
        self._blocks = _blocks(model, self.sites)
        self._may_fuse: dict[str, tuple[nn.Module, str]] = {}
        self._blocks_hang = Hanging((modules, leaf) for modules, leaf, _ in self._blocks.values())
        self._processors: list[tuple[Attention, Any]] = []
        self._compiled: tuple[list[str] | None, dict[str, str]] = None, {}
        self.ran = False
        self._dtype: torch.dtype | None = None

        self._attentions = _attentions(model, self.sites)
        # A transformer of words and pixels shows the layers in which they meet, whatever attention processors it has.
        met = [] if seam is None else _matching(model, architecture.meeting)
        refining = [] if seam is None else _matching(model, architecture.refining)
        self._meetings = [
            Meeting(layer, self._ask(name, True, layer), self._ask(name, False, layer), where, alone)
            for layers, alone in ((met, False), (refining, True))
            for name, layer in layers
        ]
        self._layers = dict(_attention_layers(model)) if seam is not None and not met else {}
        self._around = _around(model, [*dict(met), *dict(refining), *self._layers])
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
        hooks: list[RemovableHandle | SiteHook | Watch | Meeting] = [*self._handles, *self._meetings]
        for hook in (*hooks, *self._site_hooks.values(), *self._watch_hooks.values()):
            hook.remove()
        for callback in self._callbacks:
            callback.retire()  # a compiled graph may go on without
        self._graphs.forget()
        self._swapped.clear()
        self._handles.clear()
        self._site_hooks.clear()
        self._watch_hooks.clear()

    def _parts(self) -> dict[str, str]:
        """Of each site, by its name, the part of the model that is compiled around it; "" where that is all of it."""
        hung = [(name, modules, leaf) for name, (modules, leaf, _) in self._blocks.items()]
        hung += [(name, parent._modules, leaf) for name, (parent, leaf) in self._parents.items()]
        compiled = [name for name, modules, leaf in hung if is_compiled(modules.get(leaf))]  # the outermost first
        compiled = [] if is_compiled(self.model) else compiled
        if compiled != self._compiled[0]:
            parts = {
                site.name: next((part for part in compiled if f"{site.module_name}.".startswith(f"{part}.")), "")
                for site in self.sites
            }
            self._compiled = compiled, parts
        return self._compiled[1]

    def refit(self) -> None:
        """Make products anew where modules are of another dtype than in the pass before: as they would be at first."""
        weight = getattr(self.sites[0].module, "weight", None) if self.sites else None  # none: text encoders alone
        dtype = weight.dtype if isinstance(weight, Tensor) else None
        if self._dtype is not None and dtype != self._dtype:
            for group in self._groups:
                group.start_again()
        self._dtype = dtype

    def follow(self) -> None:
        """Keep nothing on a device that the component has left, as offloading has it leave a GPU."""
        if not self.ran:
            return
        made = made_beside(self._groups)
        if made is None:
            self.ran = False  # and until it runs again nothing will be
            return
        device, module = made
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.device != device:
            for group in self._groups:
                group.start_again()

    @property
    def meets(self) -> bool:
        """Whether attention is read by hooks, which a compiled graph leaves out."""
        return bool(self._meetings or self._watch_hooks)

    def hides(self) -> bool:
        """Whether some of that attention lies in a part of the model that is compiled, such as a block."""
        return self.meets and any(is_compiled(modules.get(leaf)) for modules, leaf in self._around)

    def refuse_widening(self) -> None:
        """Raises AttachError where an attention processor tells rows of the batch apart by their position."""
        for name, layer in self._layers.items():
            kind = type(layer.processor).__name__
            if kind.startswith(POSITIONAL):
                raise AttachError(
                    f"{self.component} runs several passes at once as one wider batch, and {kind} (at {name}) splits "
                    "the batch by position. Use a composition of one pass (masks), or draw without that processor."
                )

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
                attention.processor = ours = MoLEAttnProcessor(sites, self._passes.add, seam, attention)
                if seam is not None:
                    ours.callback = Callback(self._graphs, ours.attend)
                    self._callbacks.append(ours.callback)
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
                self._watch_hooks[name] = Watch(layer, self._ask(name, layer.is_cross_attention, layer))
        for site in self.sites:
            name = site.module_name
            if name in served and name in self._site_hooks:
                self._site_hooks.pop(name).remove()
            elif name not in served and name not in self._site_hooks:
                self._site_hooks[name] = SiteHook(site, self._passes.add)

    def _ask(self, name: str, crossed: bool, layer: Any) -> LayerSeam:
        assert self._seam is not None
        scale = getattr(layer, "scale", None)
        scale = float(layer.head_dim**-0.5 if scale is None else scale)
        return self._seam(name, bool(crossed), scale, self.architecture.halvings(self.model, name))

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Somebody may have changed the model since: replaced our processors (IP-Adapter, attention slicing) or fused
        # projections, or exchanged modules (PEFT, when its adapters are loaded and unloaded).
        if torch.compiler.is_compiling():
            given = {**dict(zip(self._argument_names[: len(args)], args, strict=True)), **kwargs}
            compiled.begin(self._graphs.begin, self.architecture.told(model, given))
            return None
        if not self._blocks_hang.unchanged():
            self._refuse_exchanged()
        if not self._unchanged():
            self._find_modules()
            if self._engine != "hooks":
                self._swap_processors()
            refuse_fused(self.component, {name: layer for name, (layer, _) in self._attentions.items()})
            self._place_hooks()
            self._look()
        if self._may_fuse:
            refuse_bypassed(self.component, self._may_fuse)
        return self._passes.begin(model, args, kwargs)

    def _refuse_exchanged(self) -> None:
        """Raises AttachError where a block around a site is another one, and no wrapper around the one there was."""
        for name, (modules, leaf, block) in self._blocks.items():
            now = modules.get(leaf)
            if now is not block and (now is None or unwrapped(now) is not block):
                raise AttachError(
                    f"{self.component}.{name}, in which LoRAs act, was exchanged after they were loaded, so they would "
                    "do nothing there. Call `unload_loras()`, then `load_loras` again."
                )

    def _look(self) -> None:
        """Remember which modules and attention processors there are."""
        self._may_fuse = may_fuse(self._parents)
        self._modules_hang = Hanging((parent._modules, leaf) for parent, leaf in self._parents.values())
        layers = {**self._layers, **{name: layer for name, (layer, _) in self._attentions.items()}}.values()
        self._processors = [(layer, layer.processor) for layer in layers]

    def _unchanged(self) -> bool:
        """Whether they are all still there."""
        if not self._modules_hang.unchanged():
            return False
        for layer, processor in self._processors:
            if layer.processor is not processor:
                return False
        return True

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
                site.seen, self._all_reached = None, False  # look again whether it is reached
                for _, _, ours in self._swapped.values():
                    ours.look_again()

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling():
            compiled.end(self._graphs.end)
            return None
        result = self._passes.end(output)
        if output is None or self._all_reached:  # an exception is on its way, or the check was passed before
            return result
        missing = [site.module_name for site in self.sites if site.seen is None]
        # A graph that has the products itself does not tell which modules it runs.
        missing = [name for name in missing if not _lies_in_a_graph(model, name)]
        self._all_reached = not missing
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
    refuse_fused(component, {name: layer for name, (layer, _) in _attentions(model, sites).items()})
    refuse_bypassed(component, {site.module_name: _parent(model, site.module_name) for site in sites})


def _lies_in_a_graph(model: nn.Module, name: str) -> bool:
    """Whether a module, or one that it lies in, is compiled."""
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts) + 1))
    return any(map(is_compiled, around))


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds another, and the other's name there."""
    above, _, leaf = name.rpartition(".")
    return model.get_submodule(above), leaf


def _blocks(model: nn.Module, sites: Sequence[Site]) -> dict[str, tuple[Any, str, nn.Module | None]]:
    """Everything that the sites lie in, below the model itself: by its name, where it hangs, and what hangs there."""
    found: dict[str, tuple[Any, str, nn.Module | None]] = {}
    for site in sites:
        above, name = model, ""
        for part in site.module_name.split(".")[:-1]:
            name = f"{name}.{part}" if name else part
            found[name] = above._modules, part, above._modules.get(part)
            above = getattr(above, part)
    return found


def _matching(model: nn.Module, pattern: re.Pattern[str] | None) -> list[tuple[str, nn.Module]]:
    """The modules that a pattern names; none without."""
    found = []
    for name, module in model.named_modules():
        match = None if pattern is None else pattern.match(name)
        if match is not None and match[1] == name:
            found.append((name, module))
    return found


def _around(model: nn.Module, names: Sequence[str]) -> list[tuple[Any, str]]:
    """Where the named modules hang, and those that they lie in, below the model itself."""
    within = {
        ".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(1, len(parts) + 1)
    }
    return [(parent._modules, leaf) for parent, leaf in (_parent(model, name) for name in sorted(within))]


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
