"""Text encoders that were opened without what their file holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from ..loading import LoadingError

# Of CLIP; of T5, which may spell it in both ways; of Qwen and Mistral. Whatever stands before them.
EMBEDDINGS = ("token_embedding.weight", "shared.weight", "embed_tokens.weight")
ROWS = 64  # as many are compared: enough to know random numbers, and Qwen's whole table is a gigabyte


def refuse_random_text_encoders(components: Mapping[str, Any]) -> None:
    """Refuses text encoders that do not hold what their files do.

    Where transformers finds none of a file's names in the model, it only warns, and leaves the weights random. Older
    versions do so with files of newer ones, which write other names: CLIP's without a `text_model.` in front.

    Args:
        components: Of a pipeline that was just opened, by name.

    Raises:
        LoadingError: The token embedding is not the file's.
    """
    for name, model in components.items():
        folder = getattr(model, "name_or_path", None)
        if not isinstance(model, transformers.PreTrainedModel) or not folder:
            continue
        rows = [tensor for key, tensor in model.named_parameters() if key.endswith(EMBEDDINGS)]
        held = [tensor[:ROWS].detach().cpu() for tensor in rows if tensor.is_floating_point() and not tensor.is_meta]
        written = []
        for file in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                written += [tensors.get_slice(key)[:ROWS] for key in tensors.keys() if key.endswith(EMBEDDINGS)]
        if held and written and not any(torch.equal(one.to(held[0].dtype), held[0]) for one in written):
            raise LoadingError(
                f"the {name} in {folder} holds nothing of its files: transformers {transformers.__version__} knows "
                "other names than theirs, as of files that a newer one saved, and leaves its weights random. Upgrade "
                "it: pip install --upgrade transformers"
            )
