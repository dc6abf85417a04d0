"""The toybox's denoiser and text encoder, trained together on captioned scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mole_diffusion.files import write_safetensors

from ..render import render_array
from ..shapes import CLASSES
from ..vocabulary import MAX_TOKENS
from ..world import IMAGE_SIZE, Scene, caption, random_scene
from .loop import AveragedWeights, run_stage, step_rng, trapezoid
from .tokenizer import make_tokenizer
from .vae import LATENT_CHANNELS

LATENT_SIZE = 16
_TEXT_WIDTH = 128
_NULL_CAPTION_PROBABILITY = 0.1
_LAYOUT_WEIGHT = 0.1
_LAYOUT_SIZE = 8


def make_scheduler() -> DDIMScheduler:
    """Zero terminal SNR, v-prediction and trailing timesteps.

    On 16×16 latents the usual schedule ends before the mean colour is gone, so a base trained on it can guess the
    ground from the noise and never learns to read.
    """
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        cross_attention_dim=_TEXT_WIDTH,
        attention_head_dim=32,
        norm_num_groups=16,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=4 * _TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=_TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class _Trained(nn.Module):
    """Denoiser, text encoder, and a head that is thrown away after training.

    The head reads the features from which the 8×8 up block draws, and must name the class that stands in each of 8×8
    cells. The renderer knows that for free, and features that know what stands where learn to draw it sooner.
    """

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.layout_head = nn.Conv2d(unet.config["block_out_channels"][-1], len(CLASSES) + 1, 1)
        self._features = torch.empty(0)
        unet.up_blocks[0].register_forward_hook(self._keep_features)

    def _keep_features(self, module: nn.Module, args: object, output: Tensor) -> None:
        self._features = output

    def forward(self, noisy: Tensor, timesteps: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        text = self.text_encoder(input_ids)[0]
        velocity = self.unet(noisy, timesteps, text, return_dict=False)[0]
        return velocity, self.layout_head(self._features)


def layout(scene: Scene) -> np.ndarray:
    """Which class stands in each of 8×8 cells: 0 for the ground, k + 1 for the k-th class. Shape ``(8, 8)``, int64."""
    cell = IMAGE_SIZE // _LAYOUT_SIZE
    cells = np.zeros((_LAYOUT_SIZE, _LAYOUT_SIZE), np.int64)
    centers = (np.arange(_LAYOUT_SIZE) + 0.5) * cell
    for item in scene.objects:
        left, top, right, bottom = item.box
        rows, columns = (centers > top) & (centers < bottom), (centers > left) & (centers < right)
        cells[np.ix_(rows, columns)] = CLASSES.index(item.class_name) + 1
    return cells


def _scene(seed: int, index: int) -> Scene:
    return random_scene(step_rng(seed, "base-scene", index))


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, path: Path, *, seed: int, num_scenes: int, device: torch.device) -> Tensor:
    """Scaled latents of the training scenes, ``(scenes, 8, 16, 16)``, fp16; kept in ``path`` for the next run."""
    if path.exists():
        with safe_open(path, framework="pt") as file:
            if file.metadata() == {"seed": str(seed), "num_scenes": str(num_scenes)}:
                return file.get_tensor("latents")
    latents = torch.empty(num_scenes, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, dtype=torch.float16)
    chunk = 64
    for start in tqdm(range(0, num_scenes, chunk), desc="scenes"):
        indices = range(start, min(start + chunk, num_scenes))
        pictures = torch.stack([torch.from_numpy(render_array(_scene(seed, k))) for k in indices])
        pictures = pictures.permute(0, 3, 1, 2).to(device) * 2 - 1
        with torch.autocast(device.type, torch.bfloat16):
            mean = vae.encode(pictures).latent_dist.mean
        latents[start : start + len(indices)] = (mean.float() * vae.config["scaling_factor"]).half().cpu()
    write_safetensors(path, {"latents": latents}, {"seed": str(seed), "num_scenes": str(num_scenes)})
    return latents


def train_base(
    vae: AutoencoderKL,
    work_dir: Path,
    *,
    seed: int,
    device: torch.device,
    num_steps: int,
    batch_size: int,
    num_scenes: int,
    compile_model: bool = False,
) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """Velocity loss on captioned scenes; one caption in ten is empty, for classifier-free guidance."""
    torch.manual_seed(seed + 1)
    tokenizer = make_tokenizer()
    module = _Trained(make_unet(), make_text_encoder(tokenizer)).to(device).train()
    # On CPU the backward pass of fused attention takes more time than all convolutions together.
    module.unet.set_attn_processor(AttnProcessor())
    module.text_encoder.set_attn_implementation("eager")
    latents = encode_scenes(vae, work_dir / "scenes.safetensors", seed=seed, num_scenes=num_scenes, device=device)
    layouts = torch.from_numpy(np.stack([layout(_scene(seed, k)) for k in range(num_scenes)]))
    alphas = make_scheduler().alphas_cumprod.to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = AveragedWeights(module, 0.999)
    forward = torch.compile(module, dynamic=False) if compile_model else module

    def step(k: int) -> dict[str, Tensor]:
        rng = step_rng(seed, "base", k)
        chosen = rng.integers(num_scenes, size=batch_size)
        captions = [
            "" if rng.random() < _NULL_CAPTION_PROBABILITY else caption(_scene(seed, int(index)), rng)
            for index in chosen
        ]
        tokens = tokenizer(
            captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids.to(device)
        clean = latents[chosen].to(device).float()
        noise = torch.from_numpy(rng.standard_normal(clean.shape, np.float32)).to(device)
        # One timestep in each of batch_size equal strata: the loss is less noisy than with independent draws.
        strata = (rng.permutation(batch_size) + rng.random(batch_size)) / batch_size
        timesteps = torch.from_numpy((strata * 1000).astype(np.int64)).to(device)
        signal, spread = (x.sqrt().view(-1, 1, 1, 1) for x in (alphas[timesteps], 1 - alphas[timesteps]))
        with torch.autocast(device.type, torch.bfloat16):
            velocity, classes = forward(signal * clean + spread * noise, timesteps, tokens)
        denoising = F.mse_loss(velocity.float(), signal * noise - spread * clean)
        placing = F.cross_entropy(classes.float(), layouts[chosen].to(device))
        return {
            "loss": denoising + _LAYOUT_WEIGHT * placing,
            "denoising": denoising.detach(),
            "placing": placing.detach(),
        }

    run_stage(
        "base",
        module,
        optimizer,
        step,
        num_steps=num_steps,
        schedule=trapezoid,
        work_dir=work_dir,
        seed=seed,
        average=average,
    )
    return module.unet.eval(), module.text_encoder.eval(), tokenizer
