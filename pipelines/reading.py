"""Where in the prompts of a call each LoRA's words stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..composition.call import Call
from ..composition.prompt import PromptWords
from ..composition.words import require_triggers, trigger_tokens
from ..errors import MoLEError
from .loaded import Loaded

Spans = Mapping[str, Sequence[int]]


def prompt_words(pipe: Any, prompt: str | Sequence[str], loaded: Loaded, call: Call) -> PromptWords:
    """The words of each LoRA in the prompts a pipeline is about to encode.

    Raises:
        MoLEError: A subject that takes part, and has no region of its own, is not called by its words.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    tokenizer = pipe.tokenizer
    spelled = getattr(
        pipe, "maybe_convert_prompt", lambda text, _: text
    )  # tokens of textual inversion, as they are read
    prompts = [spelled(text, tokenizer) for text in prompts]
    triggers = {name: tuple(spelled(phrase, tokenizer) for phrase in loaded.triggers[name]) for name in call.names}
    length = tokenizer.model_max_length
    owned = trigger_tokens(tokenizer, prompts, triggers, length)
    experts = loaded.experts
    assert experts is not None
    kept = experts.keep.amax(dim=0).tolist()
    taking_part = [index for index, keep in enumerate(kept) if keep]
    names = [call.names[index] for index in taking_part]
    subjects_and_styles = sum(loaded.roles[name] != "utility" for name in names)
    if subjects_and_styles > 1 or call.regions is not None:
        fixed = () if call.regions is None else call.regions.fixed
        require_triggers(owned[:, taking_part], prompts, names, triggers, loaded.roles, fixed)
    ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return PromptWords(ids, owned, tokenizer.eos_token_id)


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
    return PromptWords(None, owned)
