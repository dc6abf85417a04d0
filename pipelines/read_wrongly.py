"""Models that were opened without what their files hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor

from ..loading import LoadingError

# Of CLIP; of T5, which may spell it in both ways; of Qwen and Mistral; of vision models. Whatever stands before them.
EMBEDDINGS = (("token_embedding.weight", "shared.weight", "embed_tokens.weight"), ("patch_embedding.weight",))
NAMED_ALIKE = (transformers.CLIPPreTrainedModel, transformers.T5PreTrainedModel)
"""Kinds of transformers whose weights are files' tensors one by one; it may put others together from several."""
ROWS = 64  # as many are compared: enough to know random numbers, and Qwen's whole table is a gigabyte
ALIKE = 0.5  # cosine: of random numbers it is near 0, of a model that was trained further near 1


def refuse_random_weights(components: Mapping[str, Any]) -> None:
    """Refuses models that do not hold what their files do.

    Where a file lacks weights, or has them by names that are not known, diffusers and transformers only warn, and leave
    those of the model random. Older versions of transformers do so with files of newer ones, which write other names.

    Args:
        components: Of a pipeline that was just opened, by name.

    Raises:
        LoadingError: Weights are not the file's.
    """
    for name, model in components.items():
        folder = _folder(model)
        # What is quantised is not what the file holds, and what is spread over devices may lie on none.
        if folder is None or any(getattr(model, key, None) for key in ("hf_quantizer", "hf_device_map")):
            continue
        with ExitStack() as stack:
            written: dict[str, list[Any]] = {}  # a variant, such as fp16, may lie beside
            for file in sorted(folder.glob("*.safetensors")):
                tensors = stack.enter_context(safe_open(file, "pt"))
                for key in tensors.keys():
                    written.setdefault(key, []).append(tensors.get_slice(key))
            if written:
                _refuse_random(f"the {name} in {folder}", model, written)


def _folder(model: Any) -> Path | None:
    """The folder that a model was read from, as it remembers it."""
    of_a_part = getattr(model, "_diffusers_load_id", "null")
    if of_a_part != "null":  # of a modular pipeline
        spec = ComponentSpec.decode_load_id(of_a_part)
        place, inside = str(spec["pretrained_model_name_or_path"]), spec["subfolder"] or ""
        if Path(place).exists():
            return Path(place) / inside
        file = try_to_load_from_cache(place, f"{inside}/config.json".lstrip("/"), revision=spec["revision"])
        return Path(file).parent if isinstance(file, str) else None
    remembered: str | None = None
    if isinstance(model, transformers.PreTrainedModel):
        remembered = model.name_or_path
    elif isinstance(model, diffusers.ModelMixin):
        remembered = model.config.get("_name_or_path")
    return Path(remembered) if remembered else None


def _refuse_random(what: str, model: Any, written: Mapping[str, list[Any]]) -> None:
    held = {key: one for key, one in model.named_parameters() if one.is_floating_point()}
    if isinstance(model, transformers.PreTrainedModel):
        for spellings in EMBEDDINGS:
            ours = next((one for key, one in held.items() if key.endswith(spellings)), None)
            theirs = [one for key, found in written.items() if key.endswith(spellings) for one in found]
            if ours is not None and theirs and not any(_alike(ours, one) for one in theirs):
                raise LoadingError(
                    f"{what} holds nothing of its files: transformers {transformers.__version__} knows other names "
                    "than theirs, as of files that a newer one saved, and leaves its weights random. Upgrade it: "
                    "pip install --upgrade transformers"
                )
    if isinstance(model, (diffusers.ModelMixin, *NAMED_ALIKE)):
        lacking = [key for key in held if key not in written]
        if lacking:  # what has another name in the file, as attention had in older versions, is known by its numbers
            unnamed = [_first_row(one) for key, found in written.items() if key not in held for one in found]
            lacking = [key for key in lacking if not any(_same(held[key], *other) for other in unnamed)]
        if lacking:
            raise LoadingError(
                f"the files of {what} lack {len(lacking)} of its {len(held)} weights, {lacking[0]!r} among them, which "
                "would be random. Get the model again, or give one of its kind."
            )


def _alike(ours: Tensor, theirs: Any) -> bool:
    """Whether the first rows of a tensor and of one in a file point the same way."""
    one, other = ours[:ROWS].detach().cpu().double().flatten(), theirs[:ROWS].double().flatten()
    return one.shape == other.shape and float(torch.cosine_similarity(one, other, dim=0)) > ALIKE


def _first_row(theirs: Any) -> tuple[int, Tensor]:
    """How many numbers a tensor in a file has, and those of its first row."""
    shape = theirs.get_shape()
    return math.prod(shape), (theirs[:1] if shape else theirs[...]).flatten()


def _same(ours: Tensor, count: int, first: Tensor) -> bool:
    """Whether a tensor has as many numbers as one in a file, which may be a convolution there, and its first row."""
    if ours.is_meta or not ours.ndim or ours.numel() != count:
        return False
    return torch.equal(ours[:1].detach().cpu().flatten(), first.to(ours.dtype))
