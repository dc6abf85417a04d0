"""What is not read, told by its keys, so that a refusal can name it and say what to do.

No advice here is to leave keys out: they change what the LoRA does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_CONVERT = "Convert it to a plain LoRA (extract one from the merged model by SVD), or train one."
_WHOLE = "Merge the adapter into its base with PEFT and draw with that, or train one without."
_REMEDIES = {
    "GLoRA (factors that read the weight)": (r"\.[ab][12]\.weight$", _CONVERT),
    "(IA)³, IA3 (a factor for every feature)": (r"\.on_input$|\bia3_l\b", _CONVERT),
    "AdaLoRA (singular values between the factors)": (r"\.(lora_E|ranknum)\b", _CONVERT),
    "VeRA (shared random factors)": (r"\bvera_(lambda|A|B)", _CONVERT),
    "OFT or BOFT (orthogonal factors)": (r"\.(oft_|boft_)", _CONVERT),
    "weights that replace those of the base": (r"\.(set_weight|reshape_weight)$", _CONVERT),
    "trainable tokens, embeddings trained beside the LoRA": (r"\.trainable_tokens_", _CONVERT),
    "a sparse difference beside the factors": (r"\.bias_(values|size|indices)$", _CONVERT),
    "LoRA of an embedding": (r"\.lora_embedding_[AB]", "Train it on Linear and Conv2d modules only."),
    "LoRA in quantised numbers with a scale of their own": (
        r"(?<!\.lora_A)(?<!\.lora_B)(?<!\.lora_up)(?<!\.lora_down)(?<!\.lora_mid)\.(scale_weight|weight_scale)$"
        r"|\.(weight_scale_(2|inv)|scale_input|input_scale|comfy_quant|absmax|quant_map|SCB)$|\.quant_state\b",
        "Save it in floating point, such as bfloat16, with the program that wrote it.",
    ),
    "a textual-inversion embedding": (
        r"^(emb_params$|string_to_param)",
        "Load it with `pipe.load_textual_inversion`; a LoRA it is not.",
    ),
}


def find_unsupported(keys: Iterable[str]) -> tuple[str, list[str], str] | None:
    """Kind of the first family of keys that is not read, those keys, and a remedy; None where all may be."""
    ordered = sorted(keys)
    lines = "\n".join(ordered)  # searched as a whole first, which takes a twentieth of the time of key by key
    for kind, (pattern, remedy) in _REMEDIES.items():
        if re.search(pattern, lines, re.MULTILINE) and (found := [key for key in ordered if re.search(pattern, key)]):
            return kind, found, remedy
    return None


def explain_unplaced(keys: Sequence[str]) -> tuple[str, str]:
    """What keys beside those of a LoRA are, and a remedy."""
    if all(re.search(r"\.bias$", key) and "lora" not in key for key in keys):
        return 'are whole biases (PEFT\'s `bias="all"` or "lora_only")', _WHOLE
    if all(re.search(r"\.(weight|bias|running_mean|running_var)$", key) and "lora" not in key for key in keys):
        return "are full weights of whole modules (PEFT's modules_to_save)", _WHOLE
    return "do not belong to this layout", "They may change what it does: save the LoRA again, all in one layout."
