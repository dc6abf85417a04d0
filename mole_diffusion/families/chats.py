"""Prompts as language models are given them: as a message in the template of a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Reading

MARK = "\ue000"  # a character that nobody writes, in the place of a prompt
QWEN_END = "<|im_end|>"


def chat_reading(
    tokenizer: Any,
    given: Mapping[str, Any],
    rendered: str,
    length: int,
    *,
    dropped: int = 0,
    gathered: bool = False,
    special: bool = True,
    end: str = QWEN_END,
) -> Reading:
    """The prompts of a call in a template.

    Args:
        tokenizer: The tokenizer.
        given: The arguments of `encode_prompt` by name.
        rendered: The template around `MARK`.
        length, dropped, gathered, special, end: As in `Reading`.
    """
    before, _, after = rendered.partition(MARK)
    prompts = given["prompt"]
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    return Reading(
        tokenizer, texts, length,
        dropped=dropped, before=before, after=after, gathered=gathered, special=special, end=end,
    )  # fmt: skip
