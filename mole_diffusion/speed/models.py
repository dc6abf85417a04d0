"""The models, LoRAs and inputs that are measured: random weights, real shapes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ..extras import needs
from ..families.flux import GUIDANCE
from ..families.latents import positions, to_patches
from ..lora import LoRA, LoRAFactors
from .config import SIZES, TARGETS, SpeedConfig

STEP, STEPS = 100, 1000  # late: every LoRA has joined in


def make_model(config: SpeedConfig) -> Any:
    """The denoiser, in eval mode and frozen."""
    size = SIZES[config.size]
    dtype = getattr(torch, config.precision)
    kind = getattr(diffusers, size.kind)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = kind(**size.settings)
    model = nn.Module.to(model, dtype).to_empty(device=config.device)  # diffusers' own warns of what has no values yet
    if config.device == "meta":
        return model.eval().requires_grad_(False)
    generator = torch.Generator(config.device).manual_seed(0)
    with torch.no_grad():  # several times as fast as every layer's own initialisation
        for parameter in model.parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02
            parameter.normal_(0, spread, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm) and module.weight is not None:
                module.weight.fill_(1)
        for buffer in model.buffers():
            buffer.zero_()
    return model.eval().requires_grad_(False)


def make_inputs(config: SpeedConfig, model: Any) -> dict[str, Any]:
    """What the denoiser is called with."""
    size = SIZES[config.size]
    generator = torch.Generator().manual_seed(1)
    side = config.latent or size.latent

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(config.device, model.dtype)

    text = random(config.batch, size.tokens, size.width)
    latents = random(config.batch, size.channels, side, side)
    step = torch.tensor(STEP, device=config.device)
    if size.kind == "ZImageTransformer2DModel":  # told how clean the picture is, from 0 to 1; a list of samples
        clean = (1 - step / STEPS).expand(config.batch)
        return {"x": list(latents[:, :, None]), "t": clean, "cap_feats": list(text), "return_dict": False}
    if size.kind == "FluxTransformer2DModel":
        rows = side // size.patch
        return {
            "hidden_states": to_patches(latents),
            "timestep": (step / STEPS).expand(config.batch).to(model.dtype),
            "encoder_hidden_states": text,
            "pooled_projections": random(config.batch, model.config.pooled_projection_dim),
            "guidance": torch.full((config.batch,), GUIDANCE, device=config.device),
            "txt_ids": torch.zeros(size.tokens, 3, device=config.device, dtype=model.dtype),
            "img_ids": positions(rows, rows, 3, latents),
            "return_dict": False,
        }
    if size.kind == "SD3Transformer2DModel":
        return {
            "hidden_states": latents,
            "timestep": step.expand(config.batch),
            "encoder_hidden_states": text,
            "pooled_projections": random(config.batch, model.config.pooled_projection_dim),
            "return_dict": False,
        }
    inputs = {"sample": latents, "timestep": step, "encoder_hidden_states": text, "return_dict": False}
    if getattr(model.config, "addition_embed_type", None) == "text_time":
        inputs["added_cond_kwargs"] = {"text_embeds": random(config.batch, 1280), "time_ids": random(config.batch, 6)}
    return inputs


def with_gradient(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs, of which the latents take a gradient."""
    name = next(name for name in ("sample", "x", "hidden_states") if name in inputs)
    latents = inputs[name]
    wanted = [one.clone().requires_grad_() for one in (latents if isinstance(latents, list) else [latents])]
    return {**inputs, name: wanted if isinstance(latents, list) else wanted[0]}


def adapted(model: nn.Module, targets: str) -> dict[str, Any]:
    """The modules that get factors."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and any(part in f".{name}" for part in TARGETS[targets])
    }


def make_loras(config: SpeedConfig, model: nn.Module, number: int) -> list[LoRA]:
    """Random LoRAs of one rank on the modules that are asked for."""
    component = component_of(config)
    generator = torch.Generator().manual_seed(2)
    modules = adapted(model, config.targets)
    loras = []
    for index in range(number):
        factors = {}
        for name, module in modules.items():
            out_features, *inputs = module.weight.shape
            down = torch.randn(config.rank, *inputs, generator=generator) / module.weight[0].numel() ** 0.5
            up = torch.randn(out_features, config.rank, *[1] * (len(inputs) - 1), generator=generator) / 100
            factors[name] = LoRAFactors(down, up)
        loras.append(LoRA(f"lora{index}", "<random>", "diffusers", "", {component: factors}))
    return loras


def component_of(config: SpeedConfig) -> str:
    """What a pipeline calls the denoiser."""
    return "unet" if SIZES[config.size].kind == "UNet2DConditionModel" else "transformer"


def state_dict(lora: LoRA, component: str) -> dict[str, Tensor]:
    """The LoRA as diffusers reads it."""
    return {
        f"{name}.{part}.weight": tensor
        for name, factors in lora.factors[component].items()
        for part, tensor in (("lora_A", factors.down), ("lora_B", factors.up))
    }


def twin(model: nn.Module) -> Any:
    """The same model with the very same weights, and modules of its own."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def load_into_peft(model: Any, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Puts LoRAs on a model as diffusers does, one after another, which it warns of."""
    with needs("metrics", "the comparison with peft"):
        import peft  # noqa: F401  (diffusers does)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        for name, state in states.items():
            model.load_lora_adapter(dict(state), prefix=None, adapter_name=name)


def merged(model: nn.Module, loras: list[LoRA], component: str) -> Any:
    """A twin with all LoRAs added to the weights."""
    other = twin(model)
    changes: Mapping[str, LoRAFactors] = loras[0].factors[component]
    for name in changes:
        module = other.get_submodule(name)
        its = (lora.factors[component][name] for lora in loras)
        there = (LoRAFactors(one.down.to(module.weight.device), one.up.to(module.weight.device)) for one in its)
        change = torch.stack([factors.delta() for factors in there]).sum(dim=0)
        module.weight = nn.Parameter(module.weight + change.to(module.weight.dtype), requires_grad=False)
    return other
