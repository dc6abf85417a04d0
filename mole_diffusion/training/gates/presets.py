"""Ways to train gates: ours, alone or on top of masks, the paper's, and its released code's."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "default": {"gates": {"input": "hidden", "token_axis": "token", "scope": "layer", "null_expert": True}},
    "real": {
        "gates": {"input": "hidden", "token_axis": "token", "scope": "layer", "null_expert": True},
        "gradient_accumulation": 4,
        "gradient_checkpointing": True,
    },
    "masks": {
        "gates": {"input": "hidden", "token_axis": "token", "scope": "layer", "residual": True},
        "learning_rate": 2e-4,
    },
    "paper": {
        "gates": {"token_axis": "flatten", "scope": "block"},
        "local_weight": 1.0,
        "identity_weight": 0.0,
        "balance": "uniform",
        "rollout_steps": 50,
        "gradient_steps": 0,
        "eta": 1.0,
        "guidance_scale": 7.5,
        "steps": 400,
        "batch_size": 2,
        "learning_rate": 1e-5,
        "learning_rate_schedule": "constant",
        "warmup_steps": 0,
        "checkpoint_every": 5,
    },
    "official": {
        "gates": {
            "input": "hidden",
            "scope": "transformer",
            "token_axis": "flatten",
            "normalization": "l2",
            "learn_temperature": False,
        },
        "local_weight": 1.0,
        "identity_weight": 0.0,
        "loss_shape": "log",
        "balance": "off",
        "rollout_steps": 20,
        "rollout_steps_max": 50,
        "gradient_steps": 0,
        "update_every": 2,
        "picture": "noisy",
        "eta": 1.0,
        "guidance_scale": 1.0,
        "steps": 400,
        "batch_size": 2,
        "learning_rate": 1e-5,
        "learning_rate_schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 1e-2,
        "checkpoint_every": 5,
    },
}
"""Field values by name of the preset; what is not named is the field's own default.

"real" is the default for models of real size on a GPU of 16 GB: a picture at a time, and nothing is kept for the
backward pass that can be computed again. Beside it, `mixed_precision` or a pipeline in bf16, and `resolution` where the
base's own is too much.

"masks" is the default for gates that correct masks (the composition "masked_gates") instead of weighing alone. They
start from what works, and at the default's learning rate CLIP leads them away from it.

"paper" is section 3.3 of "Mixture of LoRA Experts" (https://openreview.net/forum?id=uWvKBCYh4S) to the letter, where it
has one. "official" is its released code: no expert output is read, the temperature is never used, the balance loss has
no gradient there and so is off, and still noisy pictures are decoded. Its gates are in the text encoder too, and on
queries and values only, wherever the LoRAs are. What differs from it: it reads the hidden state before the first layer
norm of the block and we after it, its walks start at a lightly noised training picture and ours at noise, its text
directions are means over 80 templates, and an odd last loss, which it drops, counts.

Their walks take the gradient at every step and so last many times ours; a checkpoint is more often, so that an
interruption costs minutes.
"""
