"""Embeddings of words of its own that a LoRA file brings along (`bundle_emb`): textual inversion, for its prompts.

OneTrainer and people who bundle by hand for A1111 write them beside the factors. Here they are only read;
`pipe.load_loras` gives them to diffusers' `load_textual_inversion`.
"""

from __future__ import annotations

import re
from collections import defaultdict

import torch
from torch import Tensor

from mole_diffusion.errors import printable
from mole_diffusion.lora.errors import refusal
from mole_diffusion.lora.sources import LoRAFile

Embeddings = dict[str, dict[str, Tensor]]
"""Word to component to vectors, `(n, width)`: of several vectors, diffusers makes tokens `word`, `word_1` and so on."""

_KEY = re.compile(r"bundle_emb\.(?P<word>.+)\.(?P<part>string_to_param\.\*|emb_params|clip_l|clip_g)")
LONGEST_WORD = 100


def is_embedding(key: str) -> bool:
    """Whether a key is of such an embedding."""
    return key.startswith("bundle_emb.")


def find_embeddings(file: LoRAFile) -> dict[str, dict[str, str]]:
    """Word to component to key, told by the header alone.

    Raises:
        LoRAError: An embedding is for another encoder than CLIP, has no vectors, or a word cannot be one.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for key in sorted(filter(is_embedding, file.entries)):
        match, entry = _KEY.fullmatch(key), file.entries[key]
        if match is None:
            raise refusal(
                file.source,
                "a textual-inversion embedding of a kind that is not read",
                "Those of CLIP are: `bundle_emb.<word>.string_to_param.*`, `.emb_params`, `.clip_l` and `.clip_g`.",
                keys=[key],
            )
        word, component = match["word"], "text_encoder_2" if match["part"] == "clip_g" else "text_encoder"
        problem = None
        if not word.isprintable() or len(word) > LONGEST_WORD or not word.strip():
            problem = "a textual-inversion embedding whose word nobody can write in a prompt"
        elif len(entry.shape) not in (1, 2) or 0 in entry.shape or not entry.dtype.is_floating_point:
            problem = f"a textual-inversion embedding that holds no vectors: {entry.dtype} of shape {entry.shape}"
        elif component in found[word]:
            problem = f"two textual-inversion embeddings of {printable(word)!r} for {component}"
        if problem:
            raise refusal(file.source, problem, "Save the LoRA again.", keys=[key])
        found[word][component] = key
    return dict(found)


def read_embeddings(file: LoRAFile) -> Embeddings:
    """The embeddings of a file, fp32 on the CPU.

    Raises:
        LoRAError: As in `find_embeddings`, or a value is not finite.
    """
    read: Embeddings = {}
    for word, keys in find_embeddings(file).items():
        read[word] = {}
        for component, key in keys.items():
            tensor = file.tensors[key].detach().to(device="cpu", dtype=torch.float32, copy=True)
            if not tensor.isfinite().all():
                raise refusal(file.source, "NaN or infinity", "Training diverged; use another checkpoint.", keys=[key])
            read[word][component] = tensor.reshape(-1, tensor.shape[-1])
    return read
