"""N LoRAs as one stacked map beside the modules of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

from torch import Tensor, nn

from mole_diffusion.errors import MoLEError

from ..families import architecture_of, is_denoiser
from ..lora import LoRA, LoRAFactors
from . import adapter_calls
from .attach import ENGINES, Attachment, Engine, refuse_unfit
from .beside import settle
from .forward_passes import ForwardPasses
from .merged import Merged, refuse_unmergeable
from .refusals import AttachError, refuse_compiled
from .run import Run, Weigher
from .runs import Runs
from .seam import LayerSeam
from .site import Site, group_sites
from .stack import ExpertStack


class Experts:
    """The experts E_i(x) = s_i B_i A_i x of several LoRAs, hung on a model and weighed by a `Weigher`.

    Every adapted module computes `y = W x + sum_i gamma_i E_i(x)`. Factors are frozen; gradients flow to the weights
    gamma and to x. Without a weigher, or with every LoRA masked out, the model is the base model bit for bit.

    Several threads may run the model at once, each inside a `using` of its own.

    Example::

        experts = Experts([cat, boot])
        experts.attach({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
        experts.weigher = composition.Normalized()
        with experts.using(keep=torch.tensor([1, 0])):
            ...
        experts.detach()

    Args:
        loras: The LoRAs; their order is the index of an expert.

    Raises:
        MoLEError: If there are none, or two share a name.
    """

    def __init__(self, loras: Sequence[LoRA]) -> None:
        self.loras = tuple(loras)
        self.names = tuple(lora.name for lora in self.loras)
        if not self.loras:
            raise MoLEError("Experts need at least one LoRA, got none.")
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise MoLEError(f"LoRA names must differ, got {list(self.names)}: {repeated} come more than once.")
        self._factors = _by_module(self.loras)
        self._sites: dict[str, Site] = {}
        self._attachments: dict[str, Attachment] = {}
        self._on_detach: list[Callable[[], None]] = []
        self._runs = Runs(self.names)

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.loras)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that any LoRA touches."""
        return tuple(self._factors)

    @property
    def sites(self) -> Mapping[str, Site]:
        """Adapted modules by `component.module`; empty while detached."""
        return self._sites

    @property
    def attached(self) -> bool:
        return bool(self._attachments)

    @property
    def keep(self) -> Tensor:
        """`(rows | 1, N)` of 0 and 1: the LoRAs that take part. Gates are renormalised over them."""
        return self._runs.choice.keep

    @property
    def scale(self) -> Tensor:
        """`(rows | 1, N)`: a factor on the final weights."""
        return self._runs.choice.scale

    @property
    def context(self) -> Run | None:
        """The denoiser's latest forward pass: timestep, prompt embeddings, sample size. `None` before the first."""
        return self._runs.context

    @property
    def weigher(self) -> Weigher | None:
        """Who weighs where no `using` says otherwise; `None` is the base model."""
        return self._runs.weigher

    @weigher.setter
    def weigher(self, weigher: Weigher | None) -> None:
        if weigher is not None and not isinstance(weigher, Weigher):
            given = type(weigher).__name__
            raise TypeError(f"A weigher needs a method `weigh(site, projections, run)`, got {given}.")
        bind = getattr(weigher, "bind", None)
        if bind is not None:
            bind(self)
        self._runs.weigher = weigher

    def attach(self, components: Mapping[str, nn.Module], engine: Engine = "auto") -> None:
        """Hang the experts on a model.

        Args:
            components: At least the components the LoRAs touch, by name; others are left alone.
            engine: `"auto"`: attention processors in the UNet, hooks for the rest. `"hooks"`: hooks only.
                `"processors"`: as auto, but it is an error if the denoiser's attention takes no processor of ours.

        Raises:
            AttachError: If a component or module is missing, compiled, or has fused projections.
            MoLEError: If shapes do not fit, the engine is unknown, or the experts are attached already.
        """
        if engine not in ENGINES:
            raise MoLEError(f"`engine` must be one of {list(ENGINES)}, got {engine!r}.")
        if self.attached:
            raise MoLEError("These experts are attached already; call `detach()` first.")
        planned = self.check(components)
        try:
            for name, model in components.items():
                # The denoiser also where no LoRA touches it: it says which step it is, and shows its attention.
                if name in planned or is_denoiser(model):
                    self._attach_component(name, model, planned.get(name, []), engine)
            self.weigher = self.weigher  # whoever was set before now sees these modules
        except Exception:
            self.detach()
            raise

    def check(self, components: Mapping[str, nn.Module]) -> dict[str, list[Site]]:
        """Whether `attach` would take these components; changes nothing on them, also where others hang there.

        Returns:
            By component, the places where experts will sit.

        Raises:
            AttachError, MoLEError: As `attach`.
        """
        missing = [name for name in self.components if not isinstance(components.get(name), nn.Module)]
        if missing:
            raise AttachError(
                f"The LoRAs {list(self.names)} touch {missing}, but the model has only {sorted(components)}. "
                "Give those components, or load LoRAs without them."
            )
        return {name: self._sites_of(name, components[name]) for name in self.components}

    def detach(self) -> None:
        """Give the model back bit-identical, with its own attention processors and without a hook of ours."""
        for attachment in self._attachments.values():
            attachment.remove()
        for undo in self._on_detach:
            undo()
        self._on_detach.clear()
        self.unmerge()
        for site in self._sites.values():
            site.group.start_again()  # what lies on a GPU goes now, and not when garbage is collected
        self._attachments.clear()
        self._sites = {}
        self._runs.forget()

    @property
    def merged(self) -> bool:
        """Whether `merge` was called."""
        return self._runs.merged

    def merge(self) -> None:
        """Run modules with the LoRAs in their weights wherever a weigher's weights are constant.

        Merged weights are made when a choice of LoRAs is first drawn with and kept until another one is; they take as
        much memory as those of the adapted modules. The model's own weights stay as they are.

        Raises:
            MoLEError: The experts are not attached, or a weight is quantised or in half precision.
        """
        if not self.attached:
            raise MoLEError("These experts hang on no model; call `experts.attach(components)` first.")
        for site in self._sites.values():
            refuse_unmergeable(site)
        for site in self._sites.values():
            if site.merged is None:
                site.merged = Merged(site, self._runs)
        self._runs.merged = True

    def unmerge(self) -> None:
        """Undo `merge`: LoRAs run beside the weights again."""
        for site in self._sites.values():
            if site.merged is not None:
                site.merged.remove()
                site.merged = None
        self._runs.merged = False

    def component(self, name: str) -> nn.Module:
        """The model a component was attached to."""
        return self._attachments[name].model

    def on_detach(self, undo: Callable[[], None]) -> None:
        """Have `undo()` called when the experts are detached, say to remove a hook a weigher placed."""
        self._on_detach.append(undo)

    def run(self, component: str) -> Run:
        """The forward pass a component is in, or is being recomputed for.

        A part of the model that is called alone is in a pass of its own, with the present settings.
        """
        return self._runs.run(component)

    def using(
        self,
        keep: Tensor | None = None,
        scale: Tensor | None = None,
        weigher: Weigher | None = None,
        call: Any = None,
    ) -> AbstractContextManager[None]:
        """Choose and scale LoRAs inside a `with` block; what was set before comes back on exit.

        The choice holds for this thread alone.

        Args:
            keep: `(N,)` or `(rows, N)` of 0 and 1. Rows are the batch of the model's forward, or one.
            scale: `(N,)` or `(rows, N)`, multiplies the final weights.
            weigher: Who weighs inside the block.
            call: Handed on to the weigher as `run.call`.
                What is not given stays as it is outside the block.

        Raises:
            MoLEError: On another shape, a value of `keep` that is neither 0 nor 1, or a scale that is not finite.
        """
        return self._runs.using(keep, scale, weigher, call)

    @property
    def chosen(self) -> Weigher | None:
        """Who weighs just now, in this thread."""
        return self._runs.chosen

    def matches(self) -> dict[str, dict[str, int]]:
        """Number of modules each LoRA touches, by LoRA and component."""
        return {
            lora.name: {c: len(lora.factors.get(c, {})) for c in self.components if lora.factors.get(c)}
            for lora in self.loras
        }

    def report(self) -> str:
        """One line per LoRA: ranks, and how many modules of which component it touches."""
        width = max(map(len, self.names))
        lines = []
        for lora in self.loras:
            low, high = lora.ranks
            rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
            counts = ", ".join(f"{count} modules of {name}" for name, count in self.matches()[lora.name].items())
            lines.append(f"{lora.name:<{width}}  {rank}: {counts}")
        return "\n".join(lines)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        # Copied hooks and processors would go on reading from this object, weighing the copy by the original's state.
        raise AttachError(
            "A model with experts attached cannot be copied, pickled or saved as a whole. Call `pipe.unload_loras()`, "
            "or `detach()`, first; `save_pretrained` and `state_dict` need nothing undone."
        )

    def _sites_of(self, component: str, model: nn.Module) -> list[Site]:
        refuse_compiled(component, model)  # first: in what `torch.compile` returned, modules have other names
        modules = dict(model.named_modules())
        stacks = self._factors.get(component, {})
        unknown = [name for name in stacks if name not in modules]
        if unknown:
            raise AttachError(
                f"{len(unknown)} adapted modules are not in this {component}: {', '.join(unknown[:5])}"
                f"{' ...' if len(unknown) > 5 else ''}. The LoRAs were trained for another model."
            )
        # In the order of the model, not of the file, so that experts do not depend on how a LoRA was written.
        sites = []
        for name, module in modules.items():
            if name in stacks:
                place = f"{component}.{name}"
                rows, beside = settle(stacks[name], module, place)
                sites.append(Site(component, name, module, ExpertStack(rows, place), beside))
        group_sites(sites, model, architecture_of(model))
        refuse_unfit(component, model, sites)
        return sites

    def _attach_component(self, component: str, model: nn.Module, sites: list[Site], engine: Engine) -> None:
        architecture = architecture_of(model)
        if engine == "processors" and not architecture.denoiser:
            engine = "auto"  # a text encoder has no attention processors
        passes = ForwardPasses(component, model, architecture, sites, self._runs, self._attachments)
        seam = functools.partial(LayerSeam, self._runs, component) if architecture.denoiser else None
        self._attachments[component] = Attachment(
            component,
            model,
            architecture,
            sites,
            engine,
            passes,
            seam,
            lambda: self.run(component).told.joint,
            self._runs.kinds,
        )
        adapter_calls.guard(model, self.names)
        self.on_detach(functools.partial(adapter_calls.release, model, self.names))
        self._sites.update({site.name: site for site in sites})


def _by_module(loras: Sequence[LoRA]) -> dict[str, dict[str, list[LoRAFactors | None]]]:
    """Component -> module -> one entry per LoRA, `None` where it does not touch the module."""
    factors: dict[str, dict[str, list[LoRAFactors | None]]] = {}
    for index, lora in enumerate(loras):
        for component, modules in lora.factors.items():
            for module, pair in modules.items():
                row = factors.setdefault(component, {}).setdefault(module, [None] * len(loras))
                row[index] = pair
    return factors
