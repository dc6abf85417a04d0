"""What a LoRA is once it is read: factors and a scaling for each module it changes, and what some add to these."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from mole_diffusion.errors import MoLEError
from mole_diffusion.families.names import canonical_name
from mole_diffusion.lora.embeddings import Embeddings
from mole_diffusion.lora.kinds import dora
from mole_diffusion.lora.kronecker import Kronecker


@dataclass(frozen=True, eq=False)
class LoRAFactors:
    """One module of one LoRA: the weight changes by `scaling * (up @ down + kronecker)`, then to its `magnitude`.

    Of a layer of normalisation, with `down` `(0, d)` and `up` `(d, 0)`, it changes by `gain`.

    Attributes:
        down: A, `(r, d_in)` for a Linear, `(r, c_in, kh, kw)` for a Conv2d. No rows where all is in `kronecker`.
        up: B, `(d_out, r)` for a Linear, `(d_out, r, 1, 1)` for a Conv2d.
        scaling: `alpha / r`; `alpha / sqrt(r)` for rsLoRA; 1.0 where no alpha is known.
        kronecker: A change as a Kronecker product (LoKr, full differences), which has no small rank.
        magnitude: DoRA's m, `(d_out, 1)` or `(1, d_in)`: how long each row, or column, of the changed weight is.
        bias: By how much the module's bias changes, `(d_out,)`.
        gain: By how much the weight of a layer of normalisation changes, `(d,)`.

    Raises:
        MoLEError: The two factors do not belong together, or the scaling is not finite.
    """

    down: Tensor
    up: Tensor
    scaling: float = 1.0
    kronecker: Kronecker | None = None
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    gain: Tensor | None = None

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
        """Rank of `up @ down`."""
        return self.down.shape[0]

    @property
    def plain(self) -> bool:
        """Whether `down`, `up` and `scaling` say all."""
        return all(part is None for part in (self.kronecker, self.magnitude, self.bias, self.gain))

    def lie_in(self, down: Tensor | None = None, up: Tensor | None = None) -> None:
        """Becomes parts of larger tensors that hold the very same values, so that these are in memory once."""
        if down is not None:
            object.__setattr__(self, "down", down.reshape(self.down.shape))
        if up is not None:
            object.__setattr__(self, "up", up.reshape(self.up.shape))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Change of the module's weight, in the shape of that weight.

        Args:
            weight: The weight of the module, which DoRA's change depends on.

        Raises:
            MoLEError: A magnitude is there and no weight.
        """
        if self.gain is not None:
            return self.gain
        product = self.scaling * (self.up.flatten(1) @ self.down.flatten(1))
        change = product.reshape(self.up.shape[0], *self.down.shape[1:])
        if self.kronecker is not None:
            change = change + self.scaling * self.kronecker.matrix().reshape(change.shape)
        if self.magnitude is None:
            return change
        if weight is None:
            raise MoLEError("What a DoRA changes depends on the weight. Pass `weight=`, that of the module.")
        c = dora.scale(self.magnitude, weight.to(change), change)
        return (weight.to(change) + change) * c.reshape(*c.shape, *[1] * (change.ndim - 2)) - weight.to(change)

    def as_run(self) -> Iterator[tuple[str, Tensor]]:
        """The numbers that decide what it does, in fp32, by name; always in the same order."""
        # In fp32 as in files: an alpha that was stored and divided by the rank gives the same number again.
        scaling = torch.tensor(self.scaling, dtype=torch.float32)
        yield "down", self.down.float().flatten(1)
        yield "up", (self.up.float() * scaling).flatten(1)
        if self.kronecker is not None:
            yield "w1", self.kronecker.w1.float() * scaling
            yield "w2", self.kronecker.w2.float().flatten(1)
            yield "rows", torch.tensor([[part.start, part.stop] for part in self.kronecker.rows or ()]).float()
        if self.magnitude is not None:
            yield "magnitude", self.magnitude.float()
        if self.bias is not None:
            yield "bias", self.bias.float()
        if self.gain is not None:
            yield "gain", self.gain.float()


@dataclass(frozen=True, eq=False)
class LoRA:
    """A checked LoRA: every factor has a module of the model it was read for, and fits it.

    Attributes:
        name: What the user calls it.
        source: Path as given, or `<state dict>`.
        layout: The layout of its keys, one of `lora.layouts.LAYOUTS`, such as `"kohya"`.
        sha256: Of the file's bytes; of the sorted tensors for a state dict. What a LoRA *does* has `fingerprint`.
        factors: Component (`"unet"`, `"text_encoder"`, …) to module name, as in `named_modules()`, to factors.
            fp32, on the CPU.
        triggers: Words that call it in a prompt, as far as its file tells.
        embeddings: Of words of its own, word to component to vectors `(n, width)`, for a text encoder that is to know
            them: `pipe.load_textual_inversion(vectors, token=word)`, which `pipe.load_loras` does.
    """

    name: str
    source: str
    layout: str
    sha256: str
    factors: dict[str, dict[str, LoRAFactors]]
    triggers: tuple[str, ...] = ()
    embeddings: Embeddings = field(default_factory=dict)

    @property
    def ranks(self) -> tuple[int, int]:
        """Smallest and largest rank."""
        ranks = [factors.r for modules in self.factors.values() for factors in modules.values()]
        return min(ranks), max(ranks)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what the LoRA does.

        That is `down` and `scaling * up` of every module, by name, and what is beside them; then its embeddings. The
        same in every layout, whatever the file is called and says of itself, and wherever the scaling is kept:
        as alpha in a kohya file, in `up` in diffusers'. Values count exactly, as fp32.
        """
        digest = hashlib.sha256()
        modules = {
            f"{component}.{canonical_name(module)}": factors
            for component, found in self.factors.items()
            for module, factors in found.items()
        }
        for name, factors in sorted(modules.items()):
            tensors = dict(factors.as_run())
            shapes = " ".join(str(tuple(tensor.shape)) for tensor in (tensors["down"], tensors["up"]))
            digest.update(f"{name} {shapes}\n".encode())
            for what, tensor in tensors.items():
                if what not in ("down", "up"):
                    digest.update(f"{what} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().astype("<f4").tobytes())
        for word, by_component in sorted(self.embeddings.items()):
            for component, vectors in sorted(by_component.items()):
                digest.update(f"{word} {component} {tuple(vectors.shape)}\n".encode())
                digest.update(vectors.float().cpu().contiguous().numpy().astype("<f4").tobytes())
        return digest.hexdigest()
