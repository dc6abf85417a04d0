"""Kinds of adapter that are not plain LoRA, told by their keys, so that a refusal can name them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_CONVERT = "Convert it to a plain LoRA (extract one from the merged model by SVD), or train one."
_REMEDIES = {
    "DoRA (its magnitudes are missing from a plain LoRA)": (r"\.(dora_scale|lora_magnitude_vector)\b", _CONVERT),
    "LoHa (Hadamard factors)": (r"\.hada_", _CONVERT),
    "LoKr (Kronecker factors)": (r"\.lokr_", _CONVERT),
    "a Tucker (CP) decomposed convolution": (r"\.lora_mid\.", _CONVERT),
    "OFT or BOFT (orthogonal factors)": (r"\.(oft_|boft_)", _CONVERT),
    "full weight differences": (r"\.(diff|diff_b|w_norm|b_norm)$", _CONVERT),
    "LoRA of an embedding": (r"\.lora_embedding_[AB]", "Train it on Linear and Conv2d modules only."),
    "LoRA with biases": (r"\.lora_B(\.[^.]+)?\.bias$", "Train it with `lora_bias=False`."),
    "a textual-inversion embedding": (
        r"^(bundle_emb\.|emb_params$|string_to_param)",
        "Load the embedding with `pipe.load_textual_inversion`, and save the LoRA without it.",
    ),
}


def find_unsupported(keys: Iterable[str]) -> tuple[str, list[str], str] | None:
    """Kind of the first family of keys that is not plain LoRA, those keys, and a remedy; None for plain LoRA."""
    ordered = sorted(keys)
    for kind, (pattern, remedy) in _REMEDIES.items():
        if found := [key for key in ordered if re.search(pattern, key)]:
            return kind, found, remedy
    return None
