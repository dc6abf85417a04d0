"""Z-Image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .architecture import Architecture, Joint, Told, unit
from .base import Conditions, Family, Reading
from .chats import MARK, chat_reading
from .latents import latent_side, size_shift
from .skeleton import Components, Skeleton
from .together import PROMPT, Together, behind, whose

TIMESTEPS = 1000
LENGTH = 512  # tokens of a prompt that are read at most, where a call does not say
MULTIPLE = 32  # the model fills words and pixels up to multiples of this many tokens, each by itself


class ZImageTransformer(Architecture):
    """diffusers' `ZImageTransformer2DModel`.

    Refiners of the pixels, refiners of the words, then layers of one sequence `[pixels, words]`. It takes lists,
    one tensor for each sample. Prompts are as long as they are; in one batch the shorter ones get zeros behind. Two
    embedders are given the tokens of all samples in one long row.
    """

    classes = ("ZImageTransformer2DModel",)
    denoiser = True
    tokens = "pixels"
    vectors = frozenset({"t_embedder", "adaLN_modulation"})
    words = frozenset({"cap_embedder", "context_refiner"})
    both = frozenset({"layers", "all_final_layer"})
    blocks = unit(r"(?:noise_refiner|context_refiner|layers)\.\d+")
    layers = unit("attention|feed_forward")
    order = (
        "t_embedder", "all_x_embedder", "noise_refiner", "cap_embedder", "context_refiner", "layers",
        "adaLN_modulation", "attention_norm1", "attention", "to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out",
        "attention_norm2", "ffn_norm1", "feed_forward", "w1", "w3", "w2", "ffn_norm2",
        "all_final_layer", "linear",
    )  # fmt: skip
    siblings = (("to_q", "to_k", "to_v"), ("w1", "w3"))
    targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "w1", "w2", "w3")
    originals: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "x_embedder": ("all_x_embedder.2-1",),
        **{
            f"{part}.*.attention.{theirs}": tuple(f"{part}.*.attention.{name}" for name in ours)
            for part in ("noise_refiner", "context_refiner", "layers")
            for theirs, ours in {
                "qkv": ("to_q", "to_k", "to_v"),
                "out": ("to_out.0",),
                "q_norm": ("norm_q",),
                "k_norm": ("norm_k",),
            }.items()
        },
        "final_layer.linear": ("all_final_layer.2-1.linear",),
        "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    }
    meeting = unit(r"(?<!\w)layers\.\d+\.attention")
    refining = unit(r"context_refiner\.\d+\.attention")
    heads = 2
    lists = True

    def told(self, model: nn.Module, given: Mapping[str, Any]) -> Told:
        pictures, prompts = given["x"], given["cap_feats"]
        if isinstance(pictures[0], list):  # the omni model: several pictures for each sample
            return Told(rows=len(pictures), timestep=_thousands(given.get("t")))
        patch = given.get("patch_size", 2)
        height, width = pictures[0].shape[-2] // patch, pictures[0].shape[-1] // patch
        lengths, device = tuple(len(prompt) for prompt in prompts), prompts[0].device
        pixels, words = _filled(height * width), _filled(max(lengths))
        return Told(
            rows=len(pictures),
            timestep=_thousands(given.get("t")),
            encoder_hidden_states=padded(prompts, words),
            sample_size=(height, width),
            joint=Joint(slice(pixels, pixels + words), slice(0, height * width)),
            words=torch.arange(words, device=device) < torch.tensor(lengths, device=device)[:, None],
            prompt_lengths=lengths,
        )

    def packs(self, module: str) -> bool:
        return not {"all_x_embedder", "cap_embedder"}.isdisjoint(module.split("."))

    def lengths(self, module: str, told: Told) -> tuple[int, ...] | None:
        if told.joint is None or not self.packs(module):
            return None
        if "all_x_embedder" in module.split("."):
            return (told.joint.text.start,) * told.rows
        return tuple(map(_filled, told.prompt_lengths))


def padded(prompts: Sequence[Tensor], tokens: int | None = None) -> Tensor:
    """Prompt embeddings of different lengths as one tensor `(rows, tokens, width)`, with zeros behind.

    Args:
        prompts: `(length, width)` each.
        tokens: Tokens of the result; by default as many as the longest prompt has.
    """
    together = pad_sequence(list(prompts), batch_first=True)
    return together if tokens is None else nn.functional.pad(together, (0, 0, 0, tokens - together.shape[1]))


def _filled(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


def _thousands(time: Any) -> Any:
    """The scheduler's timestep: the model is told how clean the picture is, from 0 to 1."""
    return None if time is None else TIMESTEPS * (1 - time)


def _published() -> Components:
    from diffusers import ZImageTransformer2DModel

    return {"transformer": ZImageTransformer2DModel()}


class ZImage(Family):
    """A transformer of one stream; Qwen3 reads the text."""

    name = "z-image"
    title = "Z-Image"
    denoiser = "transformer"
    patch = 2
    architectures: ClassVar[Mapping[str, Architecture]] = {"transformer": ZImageTransformer()}
    skeletons = (Skeleton("Z-Image", r"(layers|_refiner)_\d+_(attention|feed_forward|adaLN_modulation)_", _published),)

    def readings(self, pipe: Any, given: Mapping[str, Any]) -> list[Reading]:
        message = [{"role": "user", "content": MARK}]
        rendered = pipe.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        length = given.get("max_sequence_length") or LENGTH
        return [chat_reading(pipe.tokenizer, given, rendered, length, gathered=True)]

    def embedded(self, encoded: Any, each: int) -> Tensor:
        return padded(encoded[0]).repeat_interleave(each, dim=0)  # the pipeline itself repeats them later

    def encode(self, pipe: Any, prompts: list[str], device: Any, **limits: int) -> Any:
        return pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False, **limits)

    def together(self, encoded: Any, others: Sequence[Any]) -> Together:
        embeds, negative = encoded
        further = [other[0][0][None] for other in others]
        owners = [whose(prompt[None], further)[0] for prompt in embeds]
        joined = [behind(prompt[None], further)[0] for prompt in embeds]
        return Together((joined, negative), pad_sequence(owners, batch_first=True, padding_value=PROMPT))

    def conditions(self, pipe: Any, prompts: list[str]) -> Conditions:
        embeds, _ = self.encode(pipe, prompts, pipe.transformer.device)
        lengths = torch.tensor([len(prompt) for prompt in embeds], device=embeds[0].device)
        return Conditions(padded(embeds), {"lengths": lengths})

    def latent_shape(self, pipe: Any) -> tuple[int, ...]:
        return (pipe.transformer.config.in_channels, latent_side(pipe), latent_side(pipe))

    def shift(self, pipe: Any) -> float | None:
        return size_shift(pipe, (latent_side(pipe) // 2) ** 2)

    def predict(self, pipe: Any, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        lengths = conditions.others["lengths"].tolist()
        prompts = [prompt[:length] for prompt, length in zip(conditions.prompt_embeds, lengths, strict=True)]
        pictures = list(latents.unsqueeze(2).unbind(0))
        prediction = pipe.transformer(pictures, 1 - timesteps / TIMESTEPS, prompts, return_dict=False)[0]
        return -torch.stack(prediction).squeeze(2)  # it points from noise to the picture
