"""Which program wrote a LoRA file, by what it leaves in the header or how it spells its keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# Entry of the header, what its text must hold, and the program; the first that fits counts.
_HEADERS = (
    ("ss_network_module", "lycoris", "LyCORIS in kohya's sd-scripts"),
    ("modelspec.implementation", "musubi", "musubi-tuner"),
    ("ss_network_module", "networks.lora_", "kohya's sd-scripts or musubi-tuner"),
    ("ss_network_module", "", "kohya's sd-scripts"),
    ("ot_branch", "", "OneTrainer"),
    ("ot_revision", "", "OneTrainer"),
    ("software", "ai-toolkit", "ai-toolkit"),
    ("mole_diffusion.triggers", "", "mole_diffusion"),
    ("lora_adapter_metadata", "", "diffusers"),
    ("adapter_config.json", "", "PEFT"),
)
_KEYS = (
    (r"lora_transformer_|(unet|transformer)\..*\.lora_(down|up)\.weight|bundle_emb\.", "OneTrainer"),
    (r"lycoris_", "LyCORIS, as SimpleTuner uses it"),
    (r"lora_(unet|te\d?)_", "kohya's sd-scripts or musubi-tuner"),
    (r"(base_model\.model\.)?(model\.)?diffusion_model\.|text_encoders\.", "ai-toolkit or ComfyUI"),
    (r"(double|single)_blocks\.\d+\.processor\.", "XLabs' trainer"),
    (r"base_model\.model\.", "PEFT"),
    (r"(unet|transformer|text_encoder\w*)\.", "diffusers"),
    (r".*\.lora_[AB]\.default\.weight", "DiffSynth"),
)


def trainer_of(metadata: Mapping[str, str], keys: Iterable[str]) -> str | None:
    """The program as people call it; None where nothing tells.

    Args:
        metadata: The metadata in the file's header.
        keys: The names of its tensors.
    """
    for entry, text, name in _HEADERS:
        if entry in metadata and text in metadata[entry]:
            return name
    ordered = sorted(keys)
    for pattern, name in _KEYS:
        if any(re.match(pattern, key) for key in ordered):
            return name
    return None
