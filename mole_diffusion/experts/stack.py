"""The low-rank factors of N LoRAs at one module, stacked into two matrices."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.errors import MoLEError

from ..lora import LoRAFactors
from .uncast import uncast


class ExpertStack:
    """All experts of one module: `sum_i gamma_i s_i B_i A_i x = up (gamma * s * down x)`.

    Two products serve any number of LoRAs and any mixture of ranks, and a weight may differ per sample and per token.
    The factors stay with their LoRAs; what is kept here is what the products need, on the device and in the dtype of
    the module. With R the sum of the ranks:

    Attributes:
        input_shape: `(d_in,)` or, for a convolution, `(c_in, kh, kw)`.
        is_convolution: Whether it is a convolution's.
        out_features: d_out.
        rank: R.
        ranks: r of every LoRA in order; 0 where a LoRA does not touch this module.
        indices: Of the LoRAs that do.
        scalings: s of each of those.
        expert_of_rank: `(R,)`, the LoRA each row of `down` belongs to.
        same_rank: Whether all of those have one rank.
        orthonormal: Whether it is one of `with_orthonormal_columns`.

    Args:
        factors: One entry per LoRA, `None` where it does not touch the module.
        place: Readable name of the module, for messages.

    Raises:
        MoLEError: If no LoRA touches the module or their shapes disagree.
    """

    def __init__(self, factors: Sequence[LoRAFactors | None], place: str) -> None:
        present = [factor for factor in factors if factor is not None]
        if not present:
            raise MoLEError(f"No LoRA has factors for {place}; leave the module out instead.")
        inputs = {tuple(factor.down.shape[1:]) for factor in present}
        outputs = {factor.up.shape[0] for factor in present}
        if len(inputs) > 1 or len(outputs) > 1:
            raise MoLEError(
                f"The LoRAs disagree about {place}: inputs {sorted(inputs)}, outputs {sorted(outputs)}. "
                "They were trained for different base models; load only those that fit yours."
            )
        self.num_experts = len(factors)
        self.take_input(inputs.pop())
        self.out_features: int = outputs.pop()
        self._whole = True
        self.orthonormal = False
        self._take(factors)

    def take_input(self, shape: tuple[int, ...]) -> None:
        """Be those of inputs of this shape: a convolution of one pixel may be written down as a matrix."""
        self.input_shape = shape
        self.is_convolution = len(shape) == 3

    def _take(self, factors: Sequence[LoRAFactors | None]) -> None:
        self._factors = tuple(factors)
        self._present = tuple(factor for factor in factors if factor is not None)
        ranks = [0 if factor is None else factor.r for factor in factors]
        self.ranks = tuple(min(rank, self.out_features) if self.orthonormal else rank for rank in ranks)
        self.indices = tuple(index for index, factor in enumerate(factors) if factor is not None)
        self._ranks = tuple(self.ranks[index] for index in self.indices)
        self.rank = sum(self._ranks)
        self.scalings = tuple(1.0 if self.orthonormal else float(factor.scaling) for factor in self._present)
        self.expert_of_rank = torch.tensor(self.indices, dtype=torch.long).repeat_interleave(
            torch.tensor(self._ranks, dtype=torch.long)
        )
        self.same_rank = len(set(self._ranks)) == 1
        # Where all ranks are the same, the LoRAs have an axis of their own, as in what `scaled` gives.
        self._rank_shape = (len(self._ranks), self._ranks[0]) if self.same_rank else (self.rank,)
        self._scales = any(scaling != 1 for scaling in self.scalings)
        self._ups: tuple[Tensor, Tensor] | None = None  # B, and the same turned
        self._alike: _Alike | None = None
        self._spread: Tensor | None = None
        self._columns: Tensor | None = None
        self._numbers: Tensor | None = None

    def only(self, kept: Collection[int]) -> ExpertStack:
        """The same place with the rows of the `kept` LoRAs alone; their indices stay, the others have rank 0.

        There may be none left.
        """
        stack = copy.copy(self)
        stack._whole = False
        stack._take([factor if index in kept else None for index, factor in enumerate(self._factors)])
        return stack

    def with_orthonormal_columns(self) -> ExpertStack:
        """The same place with factors of which `down x` tells how large each LoRA's output is.

        With `s_i B_i = Q_i R_i`, orthonormal columns of Q, and c_i the size of B_i, `down` has `R_i A_i / c_i` and `up`
        `c_i Q_i`: so the same is added, and `|E_i(x)| = c_i |z_i|`. By c both stay about as large as A and B are.
        """
        stack = copy.copy(self)
        stack._whole = False
        stack.orthonormal = True
        stack._take(self._factors)
        return stack

    @property
    def down(self) -> Tensor:
        """`(R, d_in)` or `(R, c_in, kh, kw)`; fp32, as loaded, made anew each time."""
        return self.down_as(torch.float32)

    @property
    def up(self) -> Tensor:
        """`(d_out, R)` with every LoRA's scaling folded in; fp32, made anew each time."""
        return self.up_as(torch.float32)

    def down_as(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """`down` in another dtype, on another device."""
        if not self._present:
            return torch.empty(0, *self.input_shape, dtype=dtype, device=device)
        if self.orthonormal:
            ups, rows = self._turned(dtype, device)
            up = torch.cat(ups, dim=1)
            self._ups = up, up.t()  # made with them, and asked for next
        else:
            rows = [factor.down.reshape(-1, *self.input_shape).to(device, dtype) for factor in self._present]
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def _turned(self, dtype: torch.dtype, device: torch.device | None) -> tuple[list[Tensor], list[Tensor]]:
        """`up` and `down` of each LoRA, `with_orthonormal_columns`."""
        ups, downs, wide = [], [], torch.promote_types(dtype, torch.float32)
        for factor in self._present:
            columns, root = torch.linalg.qr(factor.up.flatten(1).to(wide) * factor.scaling)
            size = float(root.norm()) or 1.0  # of a LoRA that adds nothing
            down = (root / size) @ factor.down.flatten(1).to(wide)
            ups.append((columns * size).to(device, dtype))
            downs.append(down.reshape(-1, *self.input_shape).to(device, dtype))
        return ups, downs

    def up_as(self, dtype: torch.dtype) -> Tensor:
        """`up` in another dtype, scaled before it is rounded."""
        wide = torch.promote_types(dtype, torch.float32)
        if not self._present:
            return torch.empty(self.out_features, 0, dtype=dtype)
        ups = [up * scaling for up, scaling in zip(self._ups_as(wide, None), self.scalings, strict=True)]
        return torch.cat(ups, dim=1).to(dtype)

    def _ups_as(self, dtype: torch.dtype, device: torch.device | None) -> list[Tensor]:
        """B of each LoRA, unscaled."""
        if self.orthonormal:
            return self._turned(dtype, device)[0]
        return [factor.up.flatten(1).to(device, dtype) for factor in self._present]

    def up_like(self, output: Tensor) -> Tensor:
        """B of all LoRAs, unscaled, `(d_out, R)` on the device and in the dtype of `output`; kept."""
        return self.ups_like(output)[0]

    def ups_like(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """`up_like`, and the same turned, `(R, d_out)`; both kept."""
        ups = self._ups
        if ups is None or ups[0].device != output.device or ups[0].dtype != output.dtype:
            parts = self._ups_as(output.dtype, output.device)
            up = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            self._ups = ups = up, up.t()
            if self._whole and self.is_like(output):
                for factor, part in zip(self._present, up.split(self._ranks, dim=1), strict=True):
                    factor.lie_in(up=part)
        return ups

    def lie_in(self, down: Tensor) -> None:
        """Let the factors be parts of `down`, which holds their values, where that is of their device and dtype."""
        if self._whole and self.is_like(down):
            for factor, part in zip(self._present, down.split(self._ranks), strict=True):
                factor.lie_in(down=part)

    def is_like(self, tensor: Tensor) -> bool:
        """Whether the factors, as they were loaded, are of a tensor's device and dtype."""
        factors = (x for factor in self._present for x in (factor.down, factor.up))
        return all(x.device == tensor.device and x.dtype == tensor.dtype for x in factors)

    def let_go(self) -> None:
        """Forget what was made for the products; it is made again when it is needed."""
        self._ups = self._spread = self._columns = self._numbers = None

    @property
    def up_ready(self) -> Tensor | None:
        """What `up_like` keeps."""
        return None if self._ups is None else self._ups[0]

    def add_to(self, output: Tensor, projected: Tensor, weights: Tensor | None, spare: bool = False) -> Tensor:
        """`output + up (gamma * s * z)`: into `output` itself, except where autograd needs what it was.

        Args:
            output: What the base module gave: `(batch, ..., d_out)`, or `(batch, d_out, height, width)`.
            projected: z = down x as its product gives it, `(batch * tokens, R)`, or `(batch, R, tokens)` of a
                convolution: nothing is turned round.
            weights: gamma, `(batch | 1, tokens | 1, N)`; `None` where `projected` is weighed already.
            spare: Whether nobody else reads `projected`, so that it may be weighed where it lies.
        """
        ups, dtype = self._ups, output.dtype
        if ups is None or ups[0].device != output.device or ups[0].dtype != dtype:
            ups = self.ups_like(output)
        scaled = 1.0 if weights is None else self.scaled_again(weights, dtype)
        up, turned = ups
        if isinstance(scaled, float):  # one number for all: the product itself multiplies by it
            weighted, factor = projected, scaled
        else:
            weighted, factor = self.weighted(projected, scaled, output.shape[0], spare), 1.0
        graded = torch.is_grad_enabled() and (output.requires_grad or weighted.requires_grad)
        if not self.is_convolution:
            place, factors = output.reshape(-1, self.out_features), (weighted, turned)
        elif graded and not output.is_contiguous():  # channels last, which stays so
            place = output.permute(0, 2, 3, 1).reshape(-1, self.out_features)
            factors = weighted.transpose(1, 2).flatten(0, 1), turned
        else:
            place, factors = output.flatten(2), (up.expand(output.shape[0], -1, -1), weighted)
        if place.data_ptr() == output.data_ptr() and not graded:
            (place.addmm_ if place.ndim == 2 else place.baddbmm_)(*factors, alpha=factor)
            return output
        added = (torch.addmm if place.ndim == 2 else torch.baddbmm)(place, *factors, alpha=factor)
        if self.is_convolution and added.ndim == 2:
            batch, _, height, width = output.shape
            return added.view(batch, height, width, -1).permute(0, 3, 1, 2)
        return added.view(output.shape)

    def weigh_all(self, projected: Tensor, weights: Tensor, members: int, batch: int) -> bool:
        """Weighs, where they lie, rows of several modules that have the same LoRAs, ranks and scalings.

        Args:
            projected: `(batch * tokens, members * R)`.
            weights: As in `add_to`, of all modules alike; or of each, `(batch, tokens, members, N)`.
            members: How many modules.
            batch: Samples.

        Returns:
            Whether it was done: it is where weights differ from place to place and nobody needs a gradient.
        """
        if weights.shape[0] == weights.shape[1] == 1 or (torch.is_grad_enabled() and projected.requires_grad):
            return False
        scaled = self.scaled(weights, projected.dtype)
        if isinstance(scaled, float) or scaled.requires_grad:
            return False
        of_each = scaled if weights.ndim == 4 else scaled.unsqueeze(2)
        projected.view(batch, -1, members, *self._rank_shape).mul_(of_each)
        return True

    def scaled(self, weights: Tensor, dtype: torch.dtype) -> Tensor | float:
        """Weights `(rows, tokens, N)` as `weighted` takes them, times the scalings of the LoRAs here.

        In `dtype` if that is wider than theirs.

        The answer is kept as long as `weights` lives, and shared by all modules of these LoRAs and scalings: a
        weigher that gives the same tensor to many modules, or pass after pass, has it worked through once.

        Returns:
            One number where all LoRAs here, in all rows and at all tokens, weigh alike. A number for each rank where
            rows and tokens do: `(R,)`, or `(R, 1)` of a convolution.
            Else, if all LoRAs here have one rank, a number for each LoRA, which is less to read than one for each rank:
            `(rows, tokens, n, 1)` or `(rows, n, 1, tokens)`. If they have not, `(rows, tokens, R)` or `(rows, R,
            tokens)`, but `(rows, tokens, n)` or `(rows, n, tokens)` where autograd would keep that at each module.
        """
        if weights.requires_grad:
            return self._scale(weights, dtype)
        known = _kept_with(weights)
        key = self.indices, self._ranks, self.scalings, self.is_convolution, dtype
        scaled = known.get(key)
        if scaled is None:
            one = self._one_number(weights) if weights.shape[0] == weights.shape[1] == 1 else None
            scaled = known[key] = self._scale(weights, dtype) if one is None else one
        return scaled

    def scaled_again(self, weights: Tensor, dtype: torch.dtype) -> Tensor | float:
        """`scaled`, looked up faster where these very weights were asked for last."""
        alike = self._alike
        if alike is not None and alike[0]() is weights and alike[1] == dtype and not weights.requires_grad:
            known = alike[2] if isinstance(alike[2], float) else alike[2]()
            if known is not None:
                return known
        scaled = self.scaled(weights, dtype)
        if isinstance(scaled, float) or not scaled.requires_grad:
            # What is kept with `weights` goes with them.
            self._alike = weakref.ref(weights), dtype, scaled if isinstance(scaled, float) else weakref.ref(scaled)
        return scaled

    def _one_number(self, weights: Tensor) -> float | None:
        """What `(1, 1, N)` weighs all LoRAs here, scalings included; `None` where that is not one number."""
        if not _readable(weights):
            return None
        numbers = numbers_of(weights)
        found = {numbers[i] * scaling for i, scaling in zip(self.indices, self.scalings, strict=True)}
        return float(found.pop()) if len(found) == 1 else None

    def _scale(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        if weights.dtype != dtype:
            weights = weights.to(torch.promote_types(weights.dtype, dtype))
        alike = weights.shape[0] == weights.shape[1] == 1
        if not (alike or self.same_rank or weights.requires_grad):
            spread = self._spread_like(weights)
            with uncast(weights.device.type):
                return spread.t() @ weights.transpose(1, 2) if self.is_convolution else weights @ spread
        if len(self.indices) < self.num_experts:
            weights = weights.index_select(-1, self._columns_like(weights))
        if self._scales:
            weights = weights * self._scalings_like(weights)
        if alike:
            of_each = zip(weights.flatten().split(1), self._ranks, strict=True)
            of_ranks = torch.cat([weight.expand(rank) for weight, rank in of_each])
            return of_ranks[:, None] if self.is_convolution else of_ranks
        if self.is_convolution:
            weights = weights.transpose(1, 2)
        weights = weights.contiguous()  # a product that reads it with jumps takes three times as long
        return weights.unsqueeze(2 if self.is_convolution else -1) if self.same_rank else weights

    def _columns_like(self, weights: Tensor) -> Tensor:
        """The LoRAs here as a tensor to select with: to make one of a list takes longer than the selection."""
        columns = self._columns
        if columns is None or columns.device != weights.device:
            with torch.inference_mode(False):  # a later pass may be one with gradients
                self._columns = columns = torch.tensor(self.indices, dtype=torch.long, device=weights.device)
        return columns

    def _scalings_like(self, weights: Tensor) -> Tensor:
        """The scalings as a tensor, which on a GPU would else be copied there each time."""
        numbers = self._numbers
        if numbers is None or numbers.device != weights.device or numbers.dtype != weights.dtype:
            with torch.inference_mode(False):
                self._numbers = numbers = torch.tensor(self.scalings, dtype=weights.dtype, device=weights.device)
        return numbers

    def _spread_like(self, weights: Tensor) -> Tensor:
        """`(N, R)`: the scaling of every LoRA at its own ranks, 0 elsewhere.

        One product makes a number for each rank of a number for each LoRA; all but one of what it adds up are 0.
        """
        spread = self._spread
        if spread is None or spread.device != weights.device or spread.dtype != weights.dtype:
            numbers = torch.zeros(self.num_experts, self.rank, dtype=torch.float64)
            scalings = torch.tensor(self.scalings, dtype=torch.float64)
            numbers[self.expert_of_rank, torch.arange(self.rank)] = scalings.repeat_interleave(
                torch.tensor(self._ranks)
            )
            self._spread = spread = numbers.to(weights.device, weights.dtype)
        return spread

    def weighted(self, z: Tensor, scaled: Tensor, batch: int, spare: bool) -> Tensor:
        """`gamma * s * z` in the layout of z, taken in the wider of both dtypes and rounded once."""
        if scaled.ndim < 3:
            return (z * scaled).to(z.dtype)
        if not (torch.is_grad_enabled() and (z.requires_grad or scaled.requires_grad)):
            if spare:
                self._by_sample(z, batch).mul_(scaled)
                return z
            weighted = z.new_empty(z.shape)
            torch.mul(self._by_sample(z, batch), scaled, out=self._by_sample(weighted, batch))
            return weighted
        by_sample = self._by_sample(z, batch)
        if scaled.requires_grad and not self.same_rank:
            dim = 1 if self.is_convolution else 2
            parts = zip(by_sample.split(self._ranks, dim), scaled.split(1, dim), strict=True)
            weighted = torch.cat([part * weight for part, weight in parts], dim)
        else:
            weighted = by_sample * scaled
        return weighted.reshape(z.shape).to(z.dtype)

    def _by_sample(self, z: Tensor, batch: int) -> Tensor:
        """z as `scaled` is laid out."""
        ranks = self._rank_shape
        return z.view(batch, *ranks, z.shape[2]) if self.is_convolution else z.view(batch, -1, *ranks)


# Weights, a dtype, and what `scaled` makes of them.
_Alike = tuple["weakref.ref[Tensor]", torch.dtype, "weakref.ref[Tensor] | float"]
_KEPT: dict[int, tuple[Any, dict[Any, Any]]] = {}


def numbers_of(weights: Tensor) -> list[float]:
    """All weights as plain numbers, read once for all modules: on a GPU, reading waits for what runs."""
    known = _kept_with(weights)
    if "numbers" not in known:
        known["numbers"] = weights.flatten().tolist()
    numbers: list[float] = known["numbers"]
    return numbers


def _readable(tensor: Tensor) -> bool:
    """Whether its numbers can be had now: it has some, and no CUDA graph is being recorded."""
    return not (tensor.is_meta or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()))


def _kept_with(tensor: Tensor) -> dict[Any, Any]:
    """A place for what is worked out from a tensor; it goes with that."""
    key = id(tensor)
    found = _KEPT.get(key)
    if found is None or found[0]() is not tensor:

        def forget(reference: Any) -> None:
            if key in _KEPT and _KEPT[key][0] is reference:
                del _KEPT[key]

        _KEPT[key] = found = weakref.ref(tensor, forget), {}
    return found[1]
