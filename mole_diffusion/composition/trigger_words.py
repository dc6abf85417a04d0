"""Where in a prompt the words of each LoRA stand."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.errors import MoLEError

# Scripts that put no spaces between words (Thai, kana, Han, Hangul with its particles): there a word ends anywhere.
UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
WORD = rf"[^\W{UNSPACED}]"
MOST_TOKENS = 1_000_000  # tokenizers that know no limit say 1e30


def trigger_tokens(
    tokenizer: Any,
    prompts: Sequence[str],
    triggers: Mapping[str, Sequence[str]],
    max_length: int | None = None,
    *,
    before: str = "",
    after: str = "",
    special: bool = True,
    padding_side: str | None = None,
) -> Tensor:
    """Marks the tokens of each LoRA's trigger phrases in each prompt.

    A phrase is found as whole words ("cat" is in "a cat, asleep", not in "category"), with any white space between its
    words, in capitals or not as the tokenizer has it. Where phrases of different LoRAs overlap, the longest gets the
    tokens: "<v1> cat" before "cat".

    Args:
        tokenizer: The text encoder's, fast or slow. Prompts are padded on the side that it pads on.
        prompts: The prompts as the text encoder gets them.
        triggers: LoRA to its phrases, in the order of the result; no phrases for a LoRA that has none.
        max_length: Tokens the text encoder reads; default `tokenizer.model_max_length`.
        before: What a template puts before each prompt; its words are nobody's.
        after: What it puts behind.
        special: Whether the tokenizer adds tokens of its own to such a text.
        padding_side: `"left"` or `"right"`; default the tokenizer's.

    Returns:
        bool `(prompts, N, max_length)`. Tokens that the tokenizer adds (start, end, padding) are never marked.

    Raises:
        MoLEError: Two LoRAs have the same phrase, a phrase is empty, a LoRA's only phrases stand beyond `max_length`,
            or there is no limit to pad to.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    length = tokenizer.model_max_length if max_length is None else max_length
    if not 0 < length <= MOST_TOKENS:
        raise MoLEError(
            f"the length of the prompts in tokens is {length}. Give `max_length`: how many the text encoder reads."
        )
    _check_phrases(tokenizer, triggers)
    patterns = {
        name: [_pattern(tokenizer, phrase) for phrase in ((phrases,) if isinstance(phrases, str) else phrases)]
        for name, phrases in triggers.items()
    }
    marks = torch.zeros(len(prompts), len(triggers), length, dtype=torch.bool)
    for row, prompt in zip(marks, prompts, strict=True):
        text = before + prompt + after
        ids = _plain_ids(tokenizer, text)
        added = _added(tokenizer, text, ids) if special else (0, 0)
        room = max(0, length - sum(added))
        first = added[0]
        if (padding_side or tokenizer.padding_side) == "left":
            first += max(0, length - sum(added) - len(ids))
        for index, tokens in enumerate(_shared_out(tokenizer, text, prompt, len(before), ids, list(patterns.values()))):
            kept = [token for token in tokens if token < room]
            if tokens and not kept:
                name = list(triggers)[index]
                raise MoLEError(
                    f"the words that call the LoRA {name!r} ({_quoted(triggers[name])}) stand beyond the {length} "
                    f"tokens the text encoder reads of the prompt {_shortened(prompt)}. Write them nearer to its start."
                )
            row[index, [first + token for token in kept]] = True
    return marks


def missing_triggers(spans: Tensor, names: Sequence[str]) -> dict[str, list[int]]:
    """The LoRAs that some prompt does not call, each with the numbers of those prompts.

    Args:
        spans: `(prompts, N, tokens)`, from `trigger_tokens`.
        names: The N LoRAs.
    """
    absent = ~spans.any(dim=-1)
    missing = {name: absent[:, index].nonzero().flatten().tolist() for index, name in enumerate(names)}
    return {name: rows for name, rows in missing.items() if rows}


def require_triggers(
    spans: Tensor,
    prompts: Sequence[str],
    names: Sequence[str],
    triggers: Mapping[str, Sequence[str]],
    roles: Mapping[str, str] | None = None,
    regions: Collection[str] = (),
) -> None:
    """Checks that every prompt calls every subject that has no region of its own.

    Args:
        spans: `(prompts, N, tokens)`, from `trigger_tokens`.
        prompts: The prompts that `spans` was made of.
        names: The N LoRAs.
        triggers: LoRA to its phrases.
        roles: LoRA to `"subject"` (where it is not named), `"style"` or `"utility"`; only subjects must be called.
        regions: LoRAs whose region is given; they need no words.

    Raises:
        MoLEError: A prompt does not call a subject.
    """
    subjects = [name for name in names if (roles or {}).get(name, "subject") == "subject" and name not in regions]
    missing = {name: rows for name, rows in missing_triggers(spans, names).items() if name in subjects}
    if not missing:
        return
    row = min(min(rows) for rows in missing.values())
    absent = [name for name, rows in missing.items() if row in rows]
    rest = [name for name in names if name not in absent]
    own = "; ".join(f"{name!r} ({_quoted(triggers.get(name, ())) or 'it has none'})" for name in absent)
    raise MoLEError(
        f"the prompt {_shortened(prompts[row])} lacks the words that call a LoRA: {own}. Write them into the prompt, "
        f"or name others with triggers={{{absent[0]!r}: …}}, or draw without it, loras={rest}, or say where it "
        f"belongs, regions={{{absent[0]!r}: (0, 0, 0.5, 1)}}."
    )


def _check_phrases(tokenizer: Any, triggers: Mapping[str, Sequence[str]]) -> None:
    owners: dict[tuple[int, ...], str] = {}
    for name, phrases in triggers.items():
        for phrase in (phrases,) if isinstance(phrases, str) else phrases:
            if not phrase.strip():
                raise MoLEError(f"a trigger of the LoRA {name!r} is empty. Give its words, or no trigger at all: ().")
            ids = tuple(_plain_ids(tokenizer, " ".join(phrase.split())))
            other = owners.setdefault(ids, name)
            if other != name:
                raise MoLEError(
                    f"the LoRAs {other!r} and {name!r} have the same trigger {phrase!r}, so a prompt cannot tell them "
                    f"apart. Give one of them words of its own: triggers={{{name!r}: …}}."
                )


def phrase_pattern(phrase: str, *, capitals_count: bool) -> re.Pattern[str]:
    """What finds `phrase` as whole words, with any white space between them.

    Args:
        phrase: At least one word.
        capitals_count: Whether "Cat" is another word than "cat".
    """
    words = phrase.split()
    left = rf"(?<!{WORD})" if re.match(WORD, words[0]) else ""
    right = rf"(?!{WORD})" if re.match(WORD, words[-1][-1]) else ""
    return re.compile(left + r"\s+".join(map(re.escape, words)) + right, 0 if capitals_count else re.IGNORECASE)


def _pattern(tokenizer: Any, phrase: str) -> re.Pattern[str]:
    capitals_count = _plain_ids(tokenizer, phrase.swapcase()) != _plain_ids(tokenizer, phrase)
    return phrase_pattern(phrase, capitals_count=capitals_count)


def _shared_out(
    tokenizer: Any, text: str, prompt: str, begin: int, ids: list[int], patterns: Sequence[Sequence[re.Pattern[str]]]
) -> list[list[int]]:
    """For each LoRA the tokens of its phrases, as positions in `ids`; a token belongs to one LoRA at most.

    The prompt begins at the character `begin` of the text that has the tokens `ids`.
    """
    found = [
        (begin + match.start(), begin + match.end(), lora)
        for lora, own in enumerate(patterns)
        for pattern in own
        for match in pattern.finditer(prompt)
    ]
    tokens_of = _by_offsets if tokenizer.is_fast else _by_parts
    owner: dict[int, int] = {}
    for start, end, lora in sorted(found, key=lambda place: (place[0] - place[1], place)):
        for token in tokens_of(tokenizer, text, ids, start, end):
            owner.setdefault(token, lora)
    return [sorted(token for token, mine in owner.items() if mine == lora) for lora in range(len(patterns))]


def _by_offsets(tokenizer: Any, prompt: str, ids: list[int], start: int, end: int) -> list[int]:
    """Positions of the tokens that touch the characters from `start` to `end`, as a fast tokenizer knows them."""
    offsets = tokenizer(prompt, add_special_tokens=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    return [token for token, (left, right) in enumerate(offsets) if left < end and right > start]


def _by_parts(tokenizer: Any, prompt: str, ids: list[int], start: int, end: int) -> list[int]:
    """The same for any tokenizer, from the ids of parts of the prompt, which agree with `ids` up to where they end."""
    before, through, rest = (_plain_ids(tokenizer, part) for part in (prompt[:start], prompt[:end], prompt[start:]))
    first, last = _common(before, ids), _common(through, ids)
    if rest == ids[len(ids) - len(rest) :]:  # surer than `before`, whose last piece may look otherwise at an end
        first = len(ids) - len(rest)
    # A piece that reaches over the end of the phrase is in `ids` only, and touches it.
    return list(range(first, last if last == len(through) else last + 1))


def _common(some: Sequence[int], other: Sequence[int]) -> int:
    """How many of the first ids two lists have in common."""
    length = 0
    while length < min(len(some), len(other)) and some[length] == other[length]:
        length += 1
    return length


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` without what the tokenizer adds, however long."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _added(tokenizer: Any, prompt: str, ids: list[int]) -> tuple[int, int]:
    """How many tokens the tokenizer puts before and after a text."""
    whole = list(tokenizer(prompt, verbose=False)["input_ids"])
    added = len(whole) - len(ids)
    before = next(count for count in range(added + 1) if whole[count : count + len(ids)] == ids)
    return before, added - before


def _quoted(phrases: Sequence[str]) -> str:
    return ", ".join(repr(phrase) for phrase in ((phrases,) if isinstance(phrases, str) else phrases))


def _shortened(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 80 else prompt[:77] + "…")
