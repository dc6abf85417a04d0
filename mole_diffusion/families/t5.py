"""T5: an encoder of text, and with its decoder a model of text to text."""

from __future__ import annotations

from torch import nn

from .architecture import Architecture, Reads, unit

NAMES = r"encoder_block_\d"


class T5(Architecture):
    """transformers' `T5EncoderModel` and `T5ForConditionalGeneration` (T5, Flan-T5)."""

    classes = ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model")
    blocks = unit(r"block\.\d+")
    layers = unit("SelfAttention|EncDecAttention|DenseReluDense")
    order = (
        "encoder", "decoder", "block", "layer", "layer_norm", "SelfAttention", "EncDecAttention", "DenseReluDense",
        "q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo", "final_layer_norm", "lm_head",
    )  # fmt: skip
    siblings = (("q", "k", "v"), ("wi_0", "wi_1"))
    targets = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")

    def reads(self, model: nn.Module, module: str) -> Reads:
        parts = module.split(".")
        # The decoder's keys and values there come from what the encoder read.
        return "text" if "EncDecAttention" in parts and parts[-1] in ("k", "v") else "own"

    def network(self, module: str) -> str:
        return module.partition(".")[0]


def t5_skeleton() -> nn.Module:
    """The encoder of T5 XXL."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu", vocab_size=32128
    )
    model: nn.Module = T5EncoderModel(config)
    return model
