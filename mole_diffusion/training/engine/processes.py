"""Several processes that train the same gates, each on its part of every batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, reduce
from torch import Tensor

from mole_diffusion.errors import MoLEError


class Processes:
    """The processes that `accelerate launch` or `torchrun` started, or this one alone.

    Gradients are averaged by hand: DistributedDataParallel follows a module's own forward pass, and gates act through
    hooks in other modules. They are few, so nothing is lost. Precision stays torch's own, one setting per training
    where accelerate has one per process.

    Args:
        device: Where the pipeline is. On the CPU processes talk through gloo, on GPUs through NCCL.
    """

    def __init__(self, device: torch.device) -> None:
        self._state = PartialState(cpu=device.type == "cpu")
        # Each of several processes has a GPU of its own; one alone stays where the user put the pipeline.
        self.device: torch.device = self._state.device if self.num > 1 else device

    @property
    def num(self) -> int:
        return int(self._state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this one writes files."""
        return bool(self._state.is_main_process)

    def parts(self, batch_size: int, accumulation: int) -> list[slice]:
        """The rows of a batch that this process runs, in `accumulation` equal parts.

        Raises:
            MoLEError: The batch cannot be cut into equal parts.
        """
        rows, rest = divmod(batch_size, self.num * accumulation)
        if rest:
            raise MoLEError(
                f"`batch_size` ({batch_size}) must be a multiple of processes x `gradient_accumulation` "
                f"({self.num} x {accumulation}), so that every process has the same share."
            )
        first = int(self._state.process_index) * accumulation
        return [slice((first + k) * rows, (first + k + 1) * rows) for k in range(accumulation)]

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replaces every gradient by its mean over the processes."""
        if self.num > 1:
            for parameter in parameters:
                parameter.grad = reduce(parameter.grad, "mean")

    def average(self, values: Tensor) -> Tensor:
        """The mean of `values` over the processes."""
        return reduce(values.to(self.device), "mean").to(values.device) if self.num > 1 else values

    def from_main(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The main process's tensors, in every process."""
        return broadcast(tensors) if self.num > 1 else tensors

    def texts_from_main(self, texts: list[str]) -> list[str]:
        """The main process's texts, in every process; all have as many."""
        return list(broadcast_object_list(list(texts))) if self.num > 1 else texts

    def wait(self) -> None:
        """Waits until every process is here."""
        self._state.wait_for_everyone()
