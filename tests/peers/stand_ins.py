"""Stand-ins for the tiny models that diffusers' tests fetch from the Hub, as a cache of the Hub."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mole_diffusion import toybox

REVISION = "0" * 40


def write_stand_ins(cache: Path) -> None:
    """Writes a random text encoder, and the toybox's tokenizer, under the names that the tests ask for."""
    tokenizer = CLIPTokenizer.from_pretrained(toybox.base_dir() / "tokenizer", model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=37,
        projection_dim=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    encoder = CLIPTextModel(config)
    for name in ("hf-internal-testing/tiny-random-clip", "peft-internal-testing/tiny-clip-text-2"):
        repository = cache / f"models--{name.replace('/', '--')}"
        if repository.exists():  # written for the run with the other pipelines
            continue
        snapshot = repository / "snapshots" / REVISION
        tokenizer.save_pretrained(snapshot)
        encoder.save_pretrained(snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION, encoding="utf-8")
