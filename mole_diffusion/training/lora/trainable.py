"""A LoRA under training: plain parameters hung on a frozen model by forward hooks, and taken off without a trace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_diffusion.errors import MoLEError
from mole_diffusion.lora import LoRAFactors
from mole_diffusion.lora.pieces import largest_rank
from mole_diffusion.training.engine.models import without_gradients


class LoRALayer(nn.Module):
    """The low-rank addition to one Linear or Conv2d: `scaling * up(down(x))`.

    `up` starts at zero, so training starts at the base model; `down` starts as torch initialises a Linear.

    Args:
        base: The frozen layer; a convolution gives `down` its kernel, stride and padding, and `up` is 1x1.
        rank: r.
        scaling: alpha / r.
        generator: Draws `down`.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, scaling: float, generator: torch.Generator) -> None:
        super().__init__()
        out_features, *rest = base.weight.shape
        bound = 1 / math.sqrt(base.weight[0].numel())
        down = torch.empty(rank, *rest).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down.to(base.weight.device))
        self.up = nn.Parameter(torch.zeros(out_features, rank, *[1] * (len(rest) - 1), device=base.weight.device))
        self.scaling = scaling

    def add_to_output(self, base: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Forward hook of the base layer."""
        hidden_states = args[0] if torch.is_autocast_enabled(output.device.type) else args[0].to(self.down.dtype)
        if isinstance(base, nn.Conv2d):
            reduced = F.conv2d(hidden_states, self.down, None, base.stride, base.padding, base.dilation)
            addition = F.conv2d(reduced, self.up)
        else:
            addition = F.linear(F.linear(hidden_states, self.down), self.up)
        return output.add(addition.to(output.dtype), alpha=self.scaling)

    def factors(self) -> LoRAFactors:
        """What was learned so far, fp32 on the CPU."""
        down, up = (tensor.detach().float().cpu().clone() for tensor in (self.down, self.up))
        return LoRAFactors(down=down, up=up, scaling=self.scaling)


class TrainableLoRA:
    """One `LoRALayer` per target module of the given components.

    Args:
        components: "unet" and the like.
        targets: Per component, module names or their last parts ("to_q", "ff.net.2"). An empty list leaves it alone.
        rank, alpha: Of every layer; scaling is alpha / rank.
        seed: Draws the starting factors.

    Raises:
        MoLEError: A target that names nothing, or something that is no Linear and no plain Conv2d; or `rank` is more
            than a LoRA of it can have.
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        targets: Mapping[str, Sequence[str]],
        *,
        rank: int,
        alpha: float,
        seed: int,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._components = {name: components[name] for name, wanted in targets.items() if wanted}
        self.layers: dict[tuple[str, str], tuple[nn.Linear | nn.Conv2d, LoRALayer]] = {}
        for component, model in self._components.items():
            for name, module in _find(component, model, targets[component]).items():
                most = largest_rank(module.weight[0].numel(), len(module.weight))
                if rank > most:  # its file would be refused
                    raise MoLEError(
                        f"rank {rank} is more than {component}.{name} can have, a module of {len(module.weight)} "
                        f"outputs: at most {most}. Try rank=8."
                    )
                self.layers[component, name] = (module, LoRALayer(module, rank, alpha / rank, generator))

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Every trained tensor by a readable name, in a fixed order."""
        return {
            f"{component}.{name}.{side}": getattr(layer, side)
            for (component, name), (_, layer) in self.layers.items()
            for side in ("down", "up")
        }

    def factors(self) -> dict[str, dict[str, LoRAFactors]]:
        """Component -> module -> factors, as `mole_diffusion.lora.save_lora` takes it."""
        learned: dict[str, dict[str, LoRAFactors]] = {}
        for (component, name), (_, layer) in self.layers.items():
            learned.setdefault(component, {})[name] = layer.factors()
        return learned

    @contextmanager
    def attached(self, *frozen: nn.Module) -> Iterator[None]:
        """Hangs the layers on the model, freezes it and `frozen`; on exit, hooks and `requires_grad` are as before."""
        handles: list[Any] = []
        try:
            with without_gradients(*self._components.values(), *frozen):
                for module, layer in self.layers.values():
                    handles.append(module.register_forward_hook(layer.add_to_output))
                yield
        finally:
            for handle in handles:
                handle.remove()


def _find(component: str, model: nn.Module, wanted: Sequence[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    """Modules of `model` whose dotted name is, or ends in, one of `wanted`."""
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    missing = set(wanted)
    for name, module in model.named_modules():
        hits = {target for target in wanted if name == target or name.endswith(f".{target}")}
        if not hits:
            continue
        missing -= hits
        if isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
        ):
            found[name] = module
        else:
            raise MoLEError(
                f"target {sorted(hits)} of {component} is {name}, a {type(module).__name__}; "
                "a LoRA goes on Linear and on ungrouped, zero-padded Conv2d."
            )
    if missing:
        raise MoLEError(
            f"{component} ({type(model).__name__}) has no module named {sorted(missing)}. Give last parts of its "
            'dotted module names, such as "to_q" or "ff.net.2" in a UNet, "q_proj" or "fc1" in a CLIP text encoder.'
        )
    return found
