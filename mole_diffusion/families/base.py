"""A family of models: what the pipelines of one base model have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ..errors import MoLEError
from .architecture import Architecture
from .skeleton import Skeleton
from .together import Together


class Text(NamedTuple):
    """One tokenizer of a family.

    Attributes:
        tokenizer: Name of the tokenizer among the components.
        prompt: The argument of `encode_prompt` that it reads; where that is not given, it reads `prompt`.
        stretch: Which stretch of the denoiser's text its tokens are, from 0. Two tokenizers with the same stretch read
            for two encoders whose embeddings are one beside the other. `None`: the denoiser is not given its tokens.
        limit: The argument of `encode_prompt` that says how many tokens are read, and how many by default; `None`:
            as many as the tokenizer says.
    """

    tokenizer: str = "tokenizer"
    prompt: str = "prompt"
    stretch: int | None = 0
    limit: tuple[str, int] | None = None


@dataclass(frozen=True, eq=False)
class Reading:
    """The prompts of a call as one tokenizer reads them.

    Attributes:
        tokenizer: The tokenizer.
        texts: The prompts, as they stand in what it is given.
        length: How many tokens are read, padding and all.
        start: Where these tokens begin among those that the denoiser is given; `None`: it is given none of them.
        dropped: How many of the first tokens the denoiser is not given (a template's).
        before: What a chat's template puts before each prompt.
        after: What it puts behind.
        special: Whether the tokenizer adds tokens of its own.
        gathered: Whether padding is taken out again, so that prompts are as long as they are.
        end: The token that ends a prompt; by default the tokenizer's end of a text.
    """

    tokenizer: Any
    texts: list[str]
    length: int
    start: int | None = 0
    dropped: int = 0
    before: str = ""
    after: str = ""
    special: bool = True
    gathered: bool = False
    end: str | None = None

    @property
    def place(self) -> slice | None:
        """Which of the denoiser's tokens of text these are."""
        return None if self.start is None else slice(self.start, self.start + self.length - self.dropped)


class Conditions(NamedTuple):
    """What a denoiser is told of prompts.

    Attributes:
        prompt_embeds: `(rows, tokens, width)`.
        others: Its other arguments by name; tensors and dictionaries of tensors with a row for each prompt.
    """

    prompt_embeds: Tensor
    others: dict[str, Any]

    def take(self, rows: Tensor) -> Conditions:
        """Those of some prompts.

        Args:
            rows: Their numbers, in the order of the result.
        """

        def rows_of(value: Any) -> Any:
            return (
                {key: rows_of(one) for key, one in value.items()}
                if isinstance(value, dict)
                else value[rows.to(value.device)]
            )

        return Conditions(rows_of(self.prompt_embeds), rows_of(self.others))


class Listening(NamedTuple):
    """What a call of a pipeline takes from its text encoders; by default what any call may.

    Attributes:
        skipped: How many of the last layers of CLIP are left out for the prompt (`clip_skip`).
        negative: Whether a negative prompt is read too, for which no layers are left out.
        summary: Whether the summaries of the prompts are read, and not given with the call.
    """

    skipped: int = 0
    negative: bool = True
    summary: bool = True


ALL = Listening()


class Family:
    """One family of base models. A subclass sets what differs; an instance has no state.

    Attributes:
        name: Its name in files and settings.
        title: The name that people know it by.
        denoiser: The component that predicts noise.
        architectures: The components that can take LoRAs, and what they are. The denoiser is among them.
        texts: The tokenizers of the family.
        patch: Latent pixels to a side of what the denoiser takes as one token.
        skeletons: Published models of the family, by which a file of LoRAs is known.
        never_read: How many of the last layers of its CLIPs have no part in what a prompt's words are taken from.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    denoiser: ClassVar[str]
    architectures: ClassVar[Mapping[str, Architecture]]
    texts: ClassVar[tuple[Text, ...]] = (Text(),)
    patch: ClassVar[int] = 1
    skeletons: ClassVar[tuple[Skeleton, ...]] = ()
    never_read: ClassVar[int] = 0

    def fits(self, components: Mapping[str, Any]) -> bool:
        """Whether the components of a pipeline are of this family.

        Args:
            components: The components by name. Those that are no models are passed over.
        """
        model = components.get(self.denoiser)
        return isinstance(model, nn.Module) and is_a(model, self.architectures[self.denoiser])

    def refuse(self, components: Mapping[str, Any]) -> None:
        """Raises MoLEError for models of this family that no LoRAs are composed on."""

    def is_read(self, components: Mapping[str, Any], component: str, module: str, listening: Listening = ALL) -> bool:
        """Whether a picture depends on what a module computes; a LoRA on others alone would do nothing.

        Args:
            components: The components by name.
            component: That of the module.
            module: Its name.
            listening: What is taken from the text encoders.
        """
        return self.architectures[component].is_read(unwrapped(components[component]), module)

    def readings(self, pipe: Any, given: Mapping[str, Any]) -> list[Reading]:
        """How the prompts of a call become tokens.

        Args:
            pipe: The pipeline.
            given: The arguments of `encode_prompt` by name; `prompt` is among them.
        """
        readings: list[Reading] = []
        starts: dict[int, int] = {}
        for text in self.texts:
            tokenizer = getattr(pipe, text.tokenizer, None)
            if tokenizer is None:  # an encoder that was left out to save memory
                continue
            prompts = given.get(text.prompt) or given["prompt"]
            texts = [spelled(pipe, tokenizer, one) for one in ([prompts] if isinstance(prompts, str) else prompts)]
            length = tokenizer.model_max_length
            if text.limit is not None:
                name, default = text.limit
                length = given.get(name) or default
            start = None
            if text.stretch is not None:
                ends = [reading.place.stop for reading in readings if reading.place is not None]
                start = starts.setdefault(text.stretch, max(ends, default=0))
            readings.append(Reading(tokenizer, texts, length, start))
        return readings

    def encode(self, pipe: Any, prompts: list[str], device: Any, **limits: int) -> Any:
        """What `encode_prompt` gives for prompts without guidance.

        Args:
            pipe: The pipeline.
            prompts: The prompts, for all its tokenizers.
            device: Where the embeddings go.
            limits: How many tokens are read, by the names of `encode_prompt`, where a call says so.
        """
        return pipe.encode_prompt(prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)

    def together(self, encoded: Any, others: Sequence[Any]) -> Together:
        """Prompts with others behind them: those that regions have of their own.

        Args:
            encoded: What `encode_prompt` gave for the prompts of a call.
            others: What `encode` gave, for one prompt each.

        Raises:
            MoLEError: Nobody said how this family reads several prompts at once.
        """
        raise MoLEError(
            f"regions of this call have prompts of their own, and nobody said where further prompts of {self.title} "
            "go (`together` of its family). Leave their prompts out, and write all words into the one prompt."
        )

    def as_long(self, encoded: Any, tokens: int) -> Any:
        """A negative prompt's encoding, where its pipeline counts the tokens of the prompt for both.

        Args:
            encoded: What `encode_prompt` gave for the negative prompt in a call of its own.
            tokens: How many tokens the prompt became, with those of regions behind it.
        """
        return encoded

    def embedded(self, encoded: Any, each: int) -> Tensor:
        """Prompt embeddings, `(pictures, tokens, width)`, as the denoiser will be given them in a call.

        Args:
            encoded: What `encode_prompt` gave.
            each: How many pictures there are of one prompt.
        """
        embeds: Tensor = encoded[0]
        return embeds

    def conditions(self, pipe: Any, prompts: list[str]) -> Conditions:
        """What the denoiser is told of prompts, for pictures of the base's own size.

        Args:
            pipe: The pipeline.
            prompts: The prompts; the empty one as its pipeline takes it for guidance.
        """
        return Conditions(self.encode(pipe, prompts, getattr(pipe, self.denoiser).device)[0], {})

    def latent_shape(self, pipe: Any) -> tuple[int, ...]:
        """The shape of one latent of the base's own size, as the denoiser is given it."""
        config = getattr(pipe, self.denoiser).config
        return (config.in_channels, config.sample_size, config.sample_size)

    def refuse_cut(self, pipe: Any, *sides: int) -> None:
        """Raises MoLEError unless sides in pixels are whole tokens: diffusers cuts pictures to them, with a warning."""
        multiple = self.patch * int(getattr(pipe, "vae_scale_factor", 8))
        for side in sides:
            if side % multiple:
                raise MoLEError(
                    f"pictures of {self.title} have sides that are multiples of {multiple} pixels, got {side}. "
                    f"Try {max(side // multiple, 1) * multiple}."
                )

    def side(self, pipe: Any) -> int:
        """Pixels to a side of a picture of the base's own size."""
        shape = self.latent_shape(pipe)
        side = shape[-1] if len(shape) == 3 else self.patch * math.isqrt(shape[0])
        return int(side * pipe.vae_scale_factor)

    def distribution(self, pipe: Any, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of what the autoencoder makes of pictures, `(rows, channels, height, width)`.

        Args:
            pipe: The pipeline.
            pictures: `(rows, 3, height, width)` from -1 to 1.
        """
        found = pipe.vae.encode(pictures.to(pipe.vae.device, pipe.vae.dtype)).latent_dist
        return found.mean, found.std

    def latents(self, pipe: Any, encoded: Tensor) -> Tensor:
        """What the autoencoder made of pictures, as the denoiser is given it: `picture` undoes it."""
        config = pipe.vae.config
        return (encoded - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

    def shift(self, pipe: Any) -> float | None:
        """The shift of the noise levels at the base's own size, where it depends on the size of the picture."""
        return None

    def predict(self, pipe: Any, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The denoiser's prediction for a batch.

        Args:
            pipe: The pipeline.
            latents: `(rows, *latent_shape)`.
            timesteps: `(rows,)`, in the scheduler's units.
            conditions: What the denoiser is told, with as many rows.
        """
        denoiser = getattr(pipe, self.denoiser)
        prediction: Tensor = denoiser(
            latents, timestep=timesteps, encoder_hidden_states=conditions.prompt_embeds, return_dict=False,
            **conditions.others,
        )[0]  # fmt: skip
        return prediction

    def picture(self, pipe: Any, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Pictures `(rows, 3, height, width)` from -1 to 1 of latents, with graph.

        Args:
            pipe: The pipeline.
            latents: As the denoiser is given them.
            grid: Height and width of the picture in patches, where latents are a row of these; `None`: a square.
        """
        vae = pipe.vae
        latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        decoded: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return decoded


def spelled(pipe: Any, tokenizer: Any, text: str) -> str:
    """A prompt as a tokenizer is given it, with the tokens of textual inversion."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return text if convert is None else str(convert(text, tokenizer))


def is_a(model: nn.Module, architecture: Architecture) -> bool:
    """Whether a model is of an architecture, by the names of its class and of those it stands on."""
    return any(ancestor.__name__ in architecture.classes for ancestor in type(unwrapped(model)).__mro__)


def is_compiled(module: nn.Module | None) -> bool:
    """Whether a module has a graph of its own: by `torch.compile(module)`, `module.compile()`, or of its `forward`."""
    if module is None:
        return False
    if module._compiled_call_impl is not None or unwrapped(module) is not module:
        return True
    forward = module.__dict__.get("forward")
    left_out = getattr(forward, "_torchdynamo_disable", False)  # by `torch.compiler.disable`, which marks it likewise
    return hasattr(forward, "_torchdynamo_orig_callable") and not left_out


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what `torch.compile` returned."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model
