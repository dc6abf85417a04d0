"""What a LoRA is once it is read: a pair of factors and a scaling for each module it touches."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mole_diffusion.errors import MoLEError
from mole_diffusion.families.names import canonical_name


@dataclass(frozen=True, eq=False)
class LoRAFactors:
    """One module of one LoRA: the weight changes by `scaling * up @ down`.

    Attributes:
        down: A, `(r, d_in)` for a Linear, `(r, c_in, kh, kw)` for a Conv2d.
        up: B, `(d_out, r)` for a Linear, `(d_out, r, 1, 1)` for a Conv2d.
        scaling: `alpha / r`; `alpha / sqrt(r)` for rsLoRA; 1.0 where no alpha is known.

    Raises:
        MoLEError: If the two factors do not belong together, or the scaling is not finite.
    """

    down: Tensor
    up: Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        if len(down) != len(up) or len(down) not in (2, 4) or up[1] != down[0] or up[2:] not in ((), (1, 1)):
            raise MoLEError(
                f"`down` {down} and `up` {up} are not factors of one module. "
                "Give (r, d_in) and (d_out, r), or (r, c_in, kh, kw) and (d_out, r, 1, 1)."
            )
        if not math.isfinite(self.scaling):
            raise MoLEError(f"`scaling` is {self.scaling}. Give a finite number.")

    @property
    def r(self) -> int:
        """Rank."""
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """Change of the module's weight, in the shape of that weight."""
        product = self.up.flatten(1) @ self.down.flatten(1)
        return self.scaling * product.reshape(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True, eq=False)
class LoRA:
    """A checked LoRA: every factor has a module of the model it was read for, and fits it.

    Attributes:
        name: What the user calls it.
        source: Path as given, or `<state dict>`.
        layout: `"diffusers"`, `"diffusers-old"`, `"peft"` or `"kohya"`.
        sha256: Of the file's bytes; of the sorted tensors for a state dict. What a LoRA *does* has :attr:`fingerprint`.
        factors: Component (`"unet"`, `"text_encoder"`, …) to module name, as in `named_modules()`, to factors.
            fp32, on the CPU.
        triggers: Words that call it in a prompt, as far as its file tells.
    """

    name: str
    source: str
    layout: str
    sha256: str
    factors: dict[str, dict[str, LoRAFactors]]
    triggers: tuple[str, ...] = ()

    @property
    def ranks(self) -> tuple[int, int]:
        """Smallest and largest rank."""
        ranks = [factors.r for modules in self.factors.values() for factors in modules.values()]
        return min(ranks), max(ranks)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what it does: `down` and `scaling * up` of every module, by name.

        The same in every layout, whatever the file is called and says of itself, and wherever the scaling is kept:
        as alpha in a kohya file, in `up` in diffusers'. Values count exactly, as fp32.
        """
        digest = hashlib.sha256()
        modules = {
            f"{component}.{canonical_name(module)}": factors
            for component, found in self.factors.items()
            for module, factors in found.items()
        }
        for name, factors in sorted(modules.items()):
            # In fp32 as in files: an alpha that was stored and divided by the rank gives the same number again.
            up = (factors.up.float() * torch.tensor(factors.scaling, dtype=torch.float32)).flatten(1)
            down = factors.down.float().flatten(1)
            digest.update(f"{name} {tuple(down.shape)} {tuple(up.shape)}\n".encode())
            for tensor in (down, up):
                digest.update(tensor.detach().cpu().contiguous().numpy().astype("<f4").tobytes())
        return digest.hexdigest()
