"""What each LoRA stands for, in words that CLIP knows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations

from PIL import Image

from mole_diffusion.errors import MoLEError

PLACEHOLDER = "{concepts}"


@dataclass(frozen=True, kw_only=True)
class Concept:
    """What one LoRA was trained to draw.

    Args:
        token: The rare token that calls it in a prompt, such as "<v1>" or "sks".
        class_name: What kind of thing it is: "cat".
        description: What CLIP should read for it, the class included, where you can say more than the class: "orange
            cat with white stripes". None: the class.
        references: Pictures of it. Without any, those that its LoRA draws alone stand in where one is needed.

    Raises:
        MoLEError: A text is empty, or the token has a space in it.
    """

    token: str
    class_name: str
    description: str | None = None
    references: Sequence[Image.Image] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("token", "class_name", "description"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise MoLEError(f"`{name}` of a concept is empty, got {value!r}.")
        if len(self.token.split()) != 1:
            raise MoLEError(f"`token` must be one word, got {self.token!r}.")

    @property
    def words(self) -> str:
        """What CLIP reads for it."""
        return self.description or self.class_name

    def is_in(self, prompt: str) -> bool:
        """Whether `prompt` calls it, by its token as a word of its own."""
        return re.search(_word(self.token), prompt) is not None

    def describe(self, prompt: str) -> str:
        """`prompt` with the concept's words instead of "token class", "token" alone included."""
        return re.sub(self.pattern, lambda _: self.words, prompt)

    @property
    def pattern(self) -> str:
        """Matches "token class", or the token alone, in a prompt."""
        return rf"{_word(self.token)}(?:\s+{re.escape(self.class_name)}\b)?"


def text_for_clip(prompt: str, concepts: Mapping[str, Concept]) -> str:
    """`prompt` with every rare token, which CLIP cannot know, replaced by the words of its concept."""
    # In one pass: the words of one concept may hold the token of another, and stay as they are.
    by_token = {concept.token: concept for concept in concepts.values()}
    if not by_token:
        return prompt
    tokens = sorted(by_token, key=len, reverse=True)
    patterns = (f"(?P<c{index}>{by_token[token].pattern})" for index, token in enumerate(tokens))
    return re.sub("|".join(patterns), lambda found: by_token[tokens[int(str(found.lastgroup)[1:])]].words, prompt)


def prompts_from_templates(templates: Sequence[str], concepts: Mapping[str, Concept]) -> list[str]:
    """Every template with all concepts in its place "{concepts}", in every order: "a <v1> cat and a <v2> boot".

    With more than three concepts only the rotations of their order, since all orders would be too many.

    Raises:
        MoLEError: A template has no such place, or there are no concepts.
    """
    bad = [template for template in templates if template.count(PLACEHOLDER) != 1]
    if bad:
        example = f"a photo of {PLACEHOLDER} on grass"
        raise MoLEError(f'A template needs "{PLACEHOLDER}" once, got {bad[0]!r}. Try "{example}".')
    if templates and not concepts:
        raise MoLEError(f'Templates need concepts to put in the place of "{PLACEHOLDER}": give token and class.')
    items = [f"a {concept.token} {concept.class_name}" for concept in concepts.values()]
    rotations = [(*items[k:], *items[:k]) for k in range(len(items))]
    orders = list(permutations(items)) if len(items) <= 3 else rotations
    return [template.replace(PLACEHOLDER, _enumerate(order)) for template in templates for order in orders]


def _word(token: str) -> str:
    """A pattern for `token` between anything but letters and digits; it may hold signs itself."""
    return rf"(?<!\w){re.escape(token)}(?!\w)"


def _enumerate(items: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))
