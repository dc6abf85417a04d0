"""Where in the prompts of a call each LoRA's words stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..composition.call import Call
from ..composition.prompt import PromptWords
from ..composition.trigger_words import require_triggers, trigger_tokens
from ..errors import MoLEError
from ..families.base import Reading, spelled
from .loaded import Loaded

Spans = Mapping[str, Sequence[int]]


def prompt_words(
    pipe: Any, prompt: str | Sequence[str], loaded: Loaded, call: Call, others: Mapping[str, Any] | None = None
) -> PromptWords:
    """The words of each LoRA in the prompts a pipeline is about to encode.

    Args:
        pipe: The pipeline.
        prompt: The prompts.
        loaded: The LoRAs.
        call: The call.
        others: Other arguments of `encode_prompt`, such as `prompt_2`, by name.

    Raises:
        MoLEError: A subject that takes part, and has no region of its own, is not called by its words.
    """
    readings = pipe.family.readings(pipe, {**(others or {}), "prompt": prompt})
    marks = []
    for reading in readings:
        triggers = {
            name: tuple(spelled(pipe, reading.tokenizer, phrase) for phrase in loaded.triggers[name])
            for name in call.names
        }
        marks.append(
            trigger_tokens(
                reading.tokenizer,
                reading.texts,
                triggers,
                reading.length,
                before=reading.before,
                after=reading.after,
                special=reading.special,
                padding_side=_side(reading),
            )
        )
    words = _joined(readings, marks)
    experts = loaded.experts
    assert experts is not None
    kept = experts.keep.amax(dim=0).tolist()
    taking_part = [index for index, keep in enumerate(kept) if keep]
    names = [call.names[index] for index in taking_part]
    subjects_and_styles = sum(loaded.roles[name] != "utility" for name in names)
    if subjects_and_styles > 1 or call.regions is not None:
        fixed = () if call.regions is None else call.regions.fixed
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        require_triggers(words.owned[:, taking_part], texts, names, loaded.triggers, loaded.roles, fixed)
    return words


def _joined(readings: Sequence[Reading], marks: Sequence[Tensor]) -> PromptWords:
    """What every tokenizer marked, `(prompts, N, tokens)` each, as the denoiser is given it."""
    length = max(reading.place.stop for reading in readings if reading.place is not None)
    owned = torch.zeros(*marks[0].shape[:2], length, dtype=torch.bool)
    ends = torch.zeros(len(owned), length, dtype=torch.bool)
    read = []
    for reading, mark in zip(readings, marks, strict=True):
        ids = _token_ids(reading)
        read.append((ids, mark))
        if reading.place is not None:
            owned[..., reading.place] |= mark[..., reading.dropped :]
            tokenizer = reading.tokenizer
            end = tokenizer.eos_token_id if reading.end is None else tokenizer.convert_tokens_to_ids(reading.end)
            ended = ids[:, reading.dropped :] == end
            ends[:, reading.place] |= ended & (ended.cumsum(dim=1) == 1)  # many tokenizers pad with it
    return PromptWords(owned, read, ends)


def given_words(spans: Spans, names: Sequence[str], prompt_embeds: Tensor | None) -> PromptWords:
    """The words of each LoRA in embeddings, as the caller says.

    Raises:
        MoLEError: There are no embeddings, a name is unknown, or a position lies outside of the prompt.
    """
    if prompt_embeds is None:
        raise MoLEError("`spans` says where words stand in `prompt_embeds`, and none are given. Leave it out.")
    prompts, tokens = prompt_embeds.shape[:2]
    owned = torch.zeros(prompts, len(names), tokens, dtype=torch.bool)
    for name, positions in spans.items():
        if name not in names:
            raise MoLEError(f"`spans` has {name!r}, which is not loaded. Loaded are: {', '.join(names)}.")
        places = list(positions)
        if not places or not all(isinstance(p, int) and 0 <= p < tokens for p in places):
            raise MoLEError(
                f"`spans` of {name!r} must be positions of tokens from 0 to {tokens - 1}, got {positions!r}."
            )
        owned[:, list(names).index(name), places] = True
    return PromptWords(owned)


def split_prompts(regions: Any) -> tuple[Any, dict[str, str]]:
    """Regions alone, and the prompts that some have of their own.

    Raises:
        MoLEError: An entry has other keys than `region` and `prompt`, or a prompt is no text.
    """
    if not isinstance(regions, Mapping):
        return regions, {}
    places, prompts = {}, {}
    for name, region in regions.items():
        if isinstance(region, Mapping):
            if set(region) != {"region", "prompt"} or not isinstance(region["prompt"], str):
                raise MoLEError(
                    f"`regions` of {name!r} has the keys {sorted(map(str, region))}. A region with words of its own is "
                    'written {"region": (0, 0, 0.5, 1), "prompt": "a <v1> cat asleep"}.'
                )
            prompts[name], region = region["prompt"], region["region"]
        places[name] = region
    return places, prompts


def add_region_words(pipe: Any, call: Call, limits: Mapping[str, Any]) -> None:
    """Tells whose the words of regions' own prompts are.

    Args:
        pipe: The pipeline.
        call: The call.
        limits: How many tokens are read, by the names of `encode_prompt`, where the call says so.
    """
    assert call.words is not None
    for name, text in call.region_prompts.items():
        readings = pipe.family.readings(pipe, {**limits, "prompt": [text]})
        marks = []
        for reading in readings:
            special = torch.tensor(reading.tokenizer.all_special_ids)
            mark = torch.zeros(1, len(call.names), reading.length, dtype=torch.bool)
            mark[0, call.names.index(name)] = ~torch.isin(_token_ids(reading)[0], special)
            marks.append(mark)
        call.words.add_region(_joined(readings, marks))


def _token_ids(reading: Reading) -> Tensor:
    ids: Tensor = reading.tokenizer(
        [reading.before + text + reading.after for text in reading.texts],
        padding="max_length",
        max_length=reading.length,
        truncation=True,
        add_special_tokens=reading.special,
        padding_side=_side(reading),
        return_tensors="pt",
    ).input_ids
    return ids


def _side(reading: Reading) -> str:
    """Where padding stands; prompts from which it is taken out begin at their beginning."""
    return "right" if reading.gathered else str(reading.tokenizer.padding_side)
