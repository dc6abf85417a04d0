"""Whose words stand where in the prompts of a call, for text encoders by tokens and for the denoiser by embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


class PromptWords:
    """The tokens of each LoRA in each prompt.

    A text encoder and a denoiser see rows, and which row is which prompt depends on the pipeline: negative prompts come
    before, after or not at all, some pipelines add a third part, and several pictures of one prompt repeat it. So rows
    are recognised by what they are given. A row that is none of the prompts (a negative prompt, say) has nobody's
    words.

    Args:
        input_ids: The prompts as the text encoder is given them, ``(prompts, tokens)``; ``None`` where only embeddings
            are known.
        owned: ``(prompts, N, tokens)`` bool: which tokens are words of which LoRA.
    """

    def __init__(self, input_ids: Tensor | None, owned: Tensor) -> None:
        self.input_ids = input_ids
        self.owned = owned
        self._embeddings: Tensor | None = None
        self._latest: tuple[Tensor, Tensor] | None = None

    def encoded(self, embeddings: Tensor) -> None:
        """Say what the prompts became: ``(prompts * pictures, tokens, width)``, pictures of a prompt side by side."""
        self._embeddings = embeddings
        self._latest = None

    @property
    def pictures(self) -> int:
        """How many pictures the call draws at once."""
        return len(self.owned) if self._embeddings is None else len(self._embeddings)

    def of_tokens(self, input_ids: Tensor) -> Tensor:
        """Which tokens of a text encoder's rows are whose, ``(rows, N, tokens)`` bool.

        Args:
            input_ids: ``(rows, tokens)``.
        """
        rows = input_ids.cpu()
        found = torch.zeros(len(rows), self.owned.shape[1], rows.shape[1], dtype=torch.bool)
        if self.input_ids is not None and self.input_ids.shape[1] == rows.shape[1]:
            for prompt, owned in zip(self.input_ids, self.owned, strict=True):
                found[(rows == prompt).all(dim=1)] = owned
        return found.to(input_ids.device)

    def rows(self, embeddings: Tensor) -> Tensor:
        """Which picture's prompt each of the denoiser's rows is given, ``(rows,)``; −1 where none (a negative prompt).

        Args:
            embeddings: What the denoiser is given, ``(rows, tokens, width)``: one part of ``pictures`` rows after
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

    def of_embeddings(self, embeddings: Tensor) -> Tensor:
        """Which tokens of the denoiser's rows are whose, ``(rows, N, tokens)`` bool.

        Args:
            embeddings: What the denoiser is given, ``(rows, tokens, width)``.
        """
        rows = self.rows(embeddings)
        tokens = self.owned.shape[2]
        found = torch.zeros(len(rows), self.owned.shape[1], embeddings.shape[1], dtype=torch.bool)
        pictures_each = self.pictures // len(self.owned)
        known = rows >= 0
        found[known, :, :tokens] = self.owned[rows[known] // pictures_each]
        return found.to(embeddings.device)
