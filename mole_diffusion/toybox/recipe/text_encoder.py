"""The toybox's text encoder learns to read before the base learns to draw, as Stable Diffusion's has.

Started from random numbers beside a random denoiser, a text encoder learns nothing for tens of thousands of pictures:
the denoiser has no use for words that say nothing, and words get no gradient from a denoiser that has no use for them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mole_diffusion.training.engine.optimizer import learning_rate_factor

from ..shapes import CLASSES, PATTERNS
from ..vocabulary import MAX_TOKENS, RARE_TOKENS
from ..world import COLORS, GROUNDS, MAX_OBJECTS, caption, random_scene
from .loop import AveragedWeights, run_stage, step_rng

TEXT_WIDTH = 128
# What the state of an object's noun must say, and how many answers there are; 0 is "not named".
NOUN_LABELS = {
    "class": len(CLASSES) + 1,
    "primary": len(COLORS) + 1,
    "secondary": len(COLORS) + 1,
    "pattern": len(PATTERNS) + 1,
    "place": MAX_OBJECTS + 1,
}
IGNORED = -100  # of cross_entropy: no answer is asked for


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder of the toybox."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def reading(text: str) -> Tensor:
    """What each token of a caption must say: one row per entry of `NOUN_LABELS`, then the ground.

    Nouns speak for their object. The tokens after the caption, which are most of the text, say the ground and the
    objects in turn, so that a denoiser whose attention is still spread over all tokens hears of the objects at all.

    Returns:
        Shape `(6, MAX_TOKENS)`, int64, `IGNORED` where nothing is asked.
    """
    labels = torch.full((len(NOUN_LABELS) + 1, MAX_TOKENS), IGNORED)
    words = text.replace(",", " ,").split()
    look: list[str] = []
    nouns: list[int] = []
    for k, word in enumerate(words, start=1):  # token 0 is the start of text
        if word in ("a", "an"):
            look = []
        elif word in CLASSES:
            colors = [1 + list(COLORS).index(w) for w in look if w in COLORS] + [0, 0]
            patterns = [1 + PATTERNS.index(w) for w in look if w in PATTERNS]
            pattern = patterns[0] if patterns else int(colors[1] > 0)  # two colours and no pattern: plain
            nouns.append(k)
            labels[:-1, k] = torch.tensor([1 + CLASSES.index(word), colors[0], colors[1], pattern, len(nouns)])
        else:
            look.append(word)
    rest = torch.arange(len(words) + 1, MAX_TOKENS)
    labels[-1, rest] = GROUNDS.index(words[-1])
    labels[:-1, rest] = labels[:-1, torch.tensor(nouns)[rest % len(nouns)]]
    return labels


class _NounReader(nn.Module):
    """A text encoder and the head that is thrown away after training."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.head = nn.Linear(TEXT_WIDTH, sum(NOUN_LABELS.values()) + len(GROUNDS))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        answers = self.head(self.text_encoder(input_ids)[0]).transpose(1, 2)  # (batch, answers, tokens)
        parts = answers.float().split([*NOUN_LABELS.values(), len(GROUNDS)], dim=1)
        return torch.stack([F.cross_entropy(part, labels[:, k]) for k, part in enumerate(parts)]).sum()


def train_text_encoder(
    tokenizer: CLIPTokenizer, work_dir: Path, *, seed: int, device: torch.device, num_steps: int, batch_size: int
) -> CLIPTextModel:
    """Every noun learns to say what its object is and wears, so far as the caption tells."""
    torch.manual_seed(seed + 3)
    module = _NounReader(make_text_encoder(tokenizer)).to(device).train()
    module.text_encoder.set_attn_implementation("eager")  # see base.py
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    average = AveragedWeights(module, 0.98)

    def make_batch(k: int) -> tuple[Tensor, Tensor]:
        rng = step_rng(seed, "words", k)
        captions = [caption(random_scene(rng), rng, odd_words=RARE_TOKENS) for _ in range(batch_size)]
        tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        return tokens, torch.stack([reading(text) for text in captions])

    def step(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        tokens, labels = batch
        return {"loss": module(tokens.to(device), labels.to(device))}

    run_stage(
        "words",
        module,
        optimizer,
        make_batch,
        step,
        device=device,
        num_steps=num_steps,
        schedule=partial(learning_rate_factor, warmup_steps=min(50, num_steps // 5)),
        work_dir=work_dir,
        seed=seed,
        average=average,
    )
    return module.text_encoder
