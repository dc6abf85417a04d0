"""Which tokens of a call's prompts call which LoRA, in the rows of text encoders and of the denoiser."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class PromptWords:
    """The tokens of each LoRA in each prompt.

    A text encoder and a denoiser see rows, and which row is which prompt depends on the pipeline: negative prompts come
    before, after or not at all, some pipelines add a third part, and several pictures of one prompt repeat it. So rows
    are recognised by what they are given. A row that is none of the prompts (a negative prompt, say) has nobody's
    words.

    Args:
        owned: `(prompts, N, tokens)` bool: which of the tokens that the denoiser is given are words of which LoRA.
        read: What each text encoder is given: the prompts' tokens `(prompts, tokens)`, and whose words they are,
            `(prompts, N, tokens)` bool. None where only embeddings are known.
        ends: `(prompts, tokens)` bool: where the denoiser's tokens end a prompt, if that is known.
    """

    def __init__(self, owned: Tensor, read: Sequence[tuple[Tensor, Tensor]] = (), ends: Tensor | None = None) -> None:
        self.owned = owned
        self._read = list(read)
        self._ends = ends
        self._beside: list[Tensor] = []
        self._whose: tuple[Tensor, Tensor | None] | None = None
        self._embeddings: Tensor | None = None
        self._latest: tuple[Tensor, Tensor] | None = None

    def add_region(self, words: PromptWords) -> None:
        """A prompt of one LoRA's region, whose tokens come after those of every prompt.

        Args:
            words: The words of that prompt alone.
        """
        self._read += words._read
        self._beside.append(words.owned)

    def encoded(self, embeddings: Tensor, whose: Tensor | None = None, negative: Tensor | None = None) -> None:
        """Says what the prompts became.

        Args:
            embeddings: `(prompts * pictures, tokens, width)`, pictures of a prompt side by side.
            whose: Where regions have prompts of their own, which of the tokens are theirs, as in `Together`; with a
                row for each prompt, or for each picture.
            negative: The same for rows that are none of the prompts.
        """
        self._embeddings = embeddings
        if whose is not None:
            self._whose = whose[:: len(whose) // len(self.owned)], negative
        self._latest = None

    @property
    def pictures(self) -> int:
        """How many pictures the call draws at once."""
        return len(self.owned) if self._embeddings is None else len(self._embeddings)

    @property
    def tokens(self) -> int:
        """How many tokens the denoiser is given of a prompt."""
        return self.owned.shape[2] if self._embeddings is None else self._embeddings.shape[1]

    def of_tokens(self, input_ids: Tensor) -> Tensor:
        """Which tokens of a text encoder's rows are whose, `(rows, N, tokens)` bool.

        Args:
            input_ids: `(rows, tokens)`.
        """
        rows = input_ids.cpu()
        found = torch.zeros(len(rows), self.owned.shape[1], rows.shape[1], dtype=torch.bool)
        for prompts, owned_by_prompt in self._read:
            for prompt, owned in zip(prompts, owned_by_prompt, strict=True):
                if len(prompt) == rows.shape[1]:
                    found[(rows == prompt).all(dim=1)] |= owned
        return found.to(input_ids.device)

    def rows(self, embeddings: Tensor) -> Tensor:
        """Which picture's prompt each of the denoiser's rows is given, `(rows,)`; −1 where none (a negative prompt).

        Args:
            embeddings: What the denoiser is given, `(rows, tokens, width)`: one part of `pictures` rows after
                another.
        """
        if self._latest is not None and self._latest[0] is embeddings:
            return self._latest[1]
        found = torch.full((len(embeddings),), -1)
        own = self._embeddings
        if own is not None and len(embeddings) % len(own) == 0 and embeddings.shape[1] >= own.shape[1]:
            parts = embeddings[:, : own.shape[1]].unflatten(0, (-1, len(own)))
            same = (parts == own.to(parts.device, parts.dtype)).flatten(2).all(dim=2).cpu()  # (parts, pictures)
            found = torch.where(same, torch.arange(len(own)), -1).flatten()
        self._latest = embeddings, found
        return found

    def conditional(self, embeddings: Tensor) -> Tensor:
        """The row of each picture that is given its prompt, `(pictures,)`; empty in a pass of negative prompts only.

        The first, where there are several: perturbed attention guidance appends the same prompts with worse attention.

        Args:
            embeddings: What the denoiser is given, `(rows, tokens, width)`.
        """
        rows = self.rows(embeddings)
        parts = rows.unflatten(0, (-1, self.pictures)) if len(rows) % self.pictures == 0 else rows[None, :0]
        whole = (parts >= 0).all(dim=1).nonzero().flatten()
        if not len(whole) or not parts.numel():
            return torch.zeros(0, dtype=torch.long)
        return whole[0] * self.pictures + torch.arange(self.pictures)

    def of_embeddings(self, embeddings: Tensor) -> Tensor:
        """Which tokens of the denoiser's rows are whose, `(rows, N, tokens)` bool.

        Args:
            embeddings: What the denoiser is given, `(rows, tokens, width)`.
        """
        if self._whose is None:
            return self._by_row(self.owned, embeddings)
        whose = self._whose[0]
        owned = self.owned.new_zeros(len(whose), self.owned.shape[1], max(self.owned.shape[2], whose.shape[1]))
        owned[:, :, : self.owned.shape[2]] = self.owned
        for row, of_prompt in enumerate(whose):
            for region, marks in enumerate(self._beside, start=1):
                # Prompts are read up to a length that few have: what was filled up may be gone again.
                places = (of_prompt == region).nonzero().flatten()
                own = marks[0, :, : len(places)]
                owned[row][:, places] = torch.nn.functional.pad(own, (0, len(places) - own.shape[1]))
        return self._by_row(owned, embeddings)

    def whose(self, embeddings: Tensor) -> Tensor:
        """Which tokens of the denoiser's rows are of which region's own prompt, `(rows, tokens)`.

        0: of the call's prompt, or of none; k: of the k-th region's that has one; −1: they only fill a row up.

        Args:
            embeddings: What the denoiser is given, `(rows, tokens, width)`.
        """
        found = torch.zeros(embeddings.shape[:2], dtype=torch.long)
        if self._whose is not None:
            whose, negative = self._whose
            rows = self.rows(embeddings)
            known = rows >= 0
            width = min(whose.shape[1], embeddings.shape[1])
            found[known, :width] = whose[rows[known] // (self.pictures // len(whose)), :width]
            if negative is not None and negative.shape[0] <= embeddings.shape[1]:
                found[~known, : len(negative)] = negative
        return found.to(embeddings.device)

    def ends(self, embeddings: Tensor) -> Tensor:
        """Where the denoiser's rows end their prompt, `(rows, 1, tokens)` bool; nowhere if only embeddings are known.

        Args:
            embeddings: What the denoiser is given, `(rows, tokens, width)`.
        """
        ends = torch.zeros_like(self.owned[:, 0]) if self._ends is None else self._ends
        return self._by_row(ends[:, None], embeddings)

    def there(self, embeddings: Tensor, words: Tensor | None) -> Tensor | None:
        """Which tokens of the denoiser's rows are of their prompt, and neither fill up nor of a region's own.

        Args:
            embeddings: What the denoiser is given, `(rows, tokens, width)`.
            words: Which do not fill up, `(rows, tokens)`; `None`: all.

        Returns:
            `(rows, tokens)` bool, or `None`: all.
        """
        if self._whose is None:
            return words
        of_prompt = self.whose(embeddings) == 0
        return of_prompt if words is None else of_prompt & words.to(of_prompt.device)

    def _by_row(self, by_prompt: Tensor, embeddings: Tensor) -> Tensor:
        """`(prompts, k, tokens)` to `(rows, k, tokens)`."""
        rows = self.rows(embeddings)
        found = torch.zeros(len(rows), by_prompt.shape[1], embeddings.shape[1], dtype=torch.bool)
        pictures_each = self.pictures // len(by_prompt)
        known = rows >= 0
        width = min(by_prompt.shape[2], embeddings.shape[1])  # prompts are read up to a length that few of them have
        found[known, :, :width] = by_prompt[rows[known] // pictures_each, :, :width]
        return found.to(embeddings.device)
