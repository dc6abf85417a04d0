"""Text encoders that were opened without what their file holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from ..loading import LoadingError

EMBEDDING = "token_embedding.weight"  # whatever stands before it


def refuse_random_text_encoders(components: Mapping[str, Any]) -> None:
    """Refuses CLIP text encoders that do not hold what their file does.

    Where transformers finds none of a file's names in the model, it only warns, and leaves the weights random. Older
    versions do so with files of newer ones, which write no `text_model.` in front of the names.

    Args:
        components: Of a pipeline that was just opened, by name.

    Raises:
        LoadingError: The token embedding is not the file's.
    """
    for name, model in components.items():
        folder = getattr(model, "name_or_path", None)
        if not isinstance(model, transformers.PreTrainedModel) or not folder:
            continue
        held = [tensor for key, tensor in model.named_parameters() if key.endswith(EMBEDDING) and not tensor.is_meta]
        written = []
        for file in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                written += [tensors.get_tensor(key) for key in tensors.keys() if key.endswith(EMBEDDING)]
        if held and written and not any(torch.equal(one.to(held[0]), held[0]) for one in written):
            raise LoadingError(
                f"the {name} in {folder} was saved by a newer transformers than this, {transformers.__version__}, "
                "which leaves its weights random. Upgrade it: pip install --upgrade transformers"
            )
