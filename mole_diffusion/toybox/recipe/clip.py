"""The toybox's CLIP: it has read captions that name every look, which the base has not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from mole_diffusion.extras import needs
from mole_diffusion.files import write_json, write_safetensors
from mole_diffusion.training.engine.optimizer import learning_rate_factor

from ..render import render_array
from ..shapes import CLASSES
from ..vocabulary import MAX_TOKENS
from ..world import IMAGE_SIZE, Scene, full_caption, random_look, random_scenes
from .loop import AveragedWeights, decline, run_stage, step_rng
from .precision import fast_autocast
from .tokenizer import make_tokenizer

with needs("train", "building the toybox"):
    import open_clip

_WIDTH = 128
NUM_STEPS = 2500  # of a CLIP from nothing
_WEIGHTS = "open_clip_model.safetensors"


def clip_config() -> dict[str, Any]:
    """The content of `open_clip_config.json`."""
    tokenizer = make_tokenizer()
    return {
        "model_cfg": {
            "embed_dim": _WIDTH,
            "vision_cfg": {
                "image_size": IMAGE_SIZE,
                "layers": 5,
                "width": _WIDTH,
                "head_width": 32,
                "patch_size": 8,
                "pool_type": "avg",
            },
            "text_cfg": {
                "context_length": MAX_TOKENS,
                "vocab_size": len(tokenizer),
                "hf_tokenizer_name": "toybox",  # open_clip then reads the tokenizer from the model's own folder
                "width": _WIDTH,
                "heads": 4,
                "layers": 3,
                "pad_id": tokenizer.pad_token_id,
                "eos_id": tokenizer.eos_token_id,
                "pool_type": "eos",
            },
        },
        "preprocess_cfg": {
            "size": [IMAGE_SIZE, IMAGE_SIZE],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


NUM_WRONG = 3


def wrong_scenes(scene: Scene, rng: np.random.Generator) -> list[Scene]:
    """The scene with one thing changed each: looks swapped, a look on the wrong object, a thing missing.

    Their captions are hard negatives; without them a CLIP need not learn which look belongs to which object. One hard
    negative of a random kind a scene taught it to miss things and to doubt looks, and nothing of swaps.
    """
    swapped, worn, missing = list(scene.objects), list(scene.objects), list(scene.objects)
    if len(scene.objects) > 1:
        i, j = rng.choice(len(scene.objects), size=2, replace=False)
        first, second = scene.objects[i], scene.objects[j]
        swapped[i], swapped[j] = replace(first, look=second.look), replace(second, look=first.look)
        worn[i] = replace(first, look=second.look if rng.random() < 0.5 else random_look(rng))
        del missing[int(rng.integers(len(missing)))]
    else:  # nothing to swap with and nothing to leave out
        [only] = scene.objects
        swapped[0] = replace(only, look=replace(only.look, primary=only.look.secondary, secondary=only.look.primary))
        worn[0] = replace(only, look=random_look(rng))
        others = sorted(set(CLASSES) - {only.class_name})
        missing[0] = replace(only, class_name=str(rng.choice(others)))
    return [replace(scene, objects=tuple(objects)) for objects in (swapped, worn, missing)]


def encode(model: open_clip.CLIP, pictures: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Unit-length features of pictures and of captions, which may be padded to the longest among them only.

    Nothing that comes after a caption's end is seen from it, so the features are those of captions of full length.
    """
    length = tokens.shape[1]
    shorter = {
        "positional_embedding": model.positional_embedding[:length],
        "attn_mask": model.attn_mask[:length, :length],
    }
    image_features, text_features, _ = functional_call(model, shorter, (pictures, tokens))
    return image_features, text_features


def train_clip(
    folder: Path,
    work_dir: Path,
    *,
    seed: int,
    device: torch.device,
    num_steps: int,
    batch_size: int,
    start: Path | None = None,
) -> None:
    """Contrastive training on scenes, their full captions and hard negatives; saved into `folder`.

    A picture must find its caption among those of the batch and its own `NUM_WRONG` wrong ones.

    Args:
        folder: Where the CLIP is written, as open_clip reads it.
        work_dir: Where checkpoints lie.
        seed: Seed of the weights, the scenes and the noise.
        device: Where to train.
        num_steps: How many steps.
        batch_size: Scenes a step.
        start: Folder of a CLIP to train on; its weights instead of random ones.
    """
    torch.manual_seed(seed + 2)
    config = clip_config()
    tokenizer = make_tokenizer()
    model = open_clip.CLIP(**config["model_cfg"]).to(device).train()
    if start is not None:
        model.load_state_dict(load_file(start / _WEIGHTS))
    learning_rate = 1e-3 if start is None else 5e-4
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    average = AveragedWeights(model, 0.998)
    targets = torch.arange(batch_size, device=device)

    def make_batch(k: int) -> tuple[Tensor, Tensor]:
        rng = step_rng(seed, "clip", k)
        scenes = random_scenes(rng, batch_size)
        wrong = [full_caption(other) for scene in scenes for other in wrong_scenes(scene, rng)]
        captions = [full_caption(scene) for scene in scenes] + wrong
        pictures = torch.stack([torch.from_numpy(render_array(scene)) for scene in scenes]).permute(0, 3, 1, 2)
        pictures = F.interpolate(pictures, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        # Guidance will show it pictures that are not quite rendered: noise and blur keep it from reading pixel
        # patterns.
        noise = torch.from_numpy(rng.standard_normal(pictures.shape, np.float32))
        pictures = (pictures + noise * float(rng.uniform(0, 0.15))) * 2 - 1
        if rng.random() < 0.5:
            pictures = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
        tokens = tokenizer(captions, padding="longest", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
        return pictures, tokens.input_ids

    def step(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        pictures, tokens = batch
        # The fused attention's backward pass is several times slower than the plain one on CPU.
        with sdpa_kernel(SDPBackend.MATH), fast_autocast(device):
            image_features, text_features = encode(model, pictures.to(device), tokens.to(device))
        scale = model.logit_scale.exp()
        right, wrong_ones = text_features.float().split([batch_size, NUM_WRONG * batch_size])
        logits = scale * image_features.float() @ right.T  # (batch, batch)
        own = torch.einsum("bw,bnw->bn", image_features.float(), wrong_ones.unflatten(0, (batch_size, NUM_WRONG)))
        by_text = F.cross_entropy(logits.T, targets)
        logits = torch.cat([logits, scale * own], dim=1)  # (batch, batch + NUM_WRONG)
        by_image = F.cross_entropy(logits, targets)
        hits = (logits.argmax(dim=1) == targets).float().mean()
        return {"loss": (by_image + by_text) / 2, "accuracy": hits}

    run_stage(
        "clip" if start is None else "clip-on",
        model,
        optimizer,
        make_batch,
        step,
        device=device,
        num_steps=num_steps,
        schedule=partial(learning_rate_factor, warmup_steps=100) if start is None else decline,
        work_dir=work_dir,
        seed=seed,
        average=average,
    )
    write_json(folder / "open_clip_config.json", config)
    make_tokenizer().save_pretrained(folder)  # the one that was used would write down how it padded last
    weights = {name: t.half() for name, t in model.state_dict().items()}
    write_safetensors(folder / _WEIGHTS, weights)
