"""Checkpoints of a running training: what was learned and the optimiser as safetensors, the rest as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mole_diffusion.files import write_json, write_safetensors

STATE_FILE = "state.json"


def fingerprint(config: Any, tensors: Iterable[Tensor], texts: Iterable[str] = ()) -> str:
    """SHA-256 over a config dataclass, tensors (dtype, shape, bytes) and texts: what a resumed run must have too."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    for text in texts:
        digest.update(b"\0" + text.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class CheckpointFolder:
    """A work folder that holds the newest checkpoint of one training.

    The tensors go to a file of their own name first, then `state.json` points at it, then the old tensors go: whenever
    the run is cut, the folder holds one whole checkpoint.

    Args:
        folder: Where; made if missing.
        run: `fingerprint` of the training; a checkpoint of another one is refused.
    """

    def __init__(self, folder: str | os.PathLike[str], run: str) -> None:
        self.folder = Path(folder)
        self.run = run

    def save(
        self,
        step: int,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        extra: Mapping[str, Any],
    ) -> None:
        """Writes the state after `step` steps; `extra` is any JSON value to be handed back."""
        names = list(parameters)
        tensors = {f"parameter/{name}": value for name, value in parameters.items()}
        for index, entries in optimizer.state_dict()["state"].items():
            for entry, value in entries.items():
                tensors[f"optimizer/{entry}/{names[index]}"] = value
        file = f"step-{step:07d}.safetensors"
        write_safetensors(self.folder / file, tensors)
        write_json(self.folder / STATE_FILE, {"run": self.run, "step": step, "tensors": file, "extra": dict(extra)})
        for old in self.folder.glob("step-*.safetensors"):
            if old.name != file:
                old.unlink()
        for left_over in self.folder.glob(".st*"):  # of a run that was killed while it wrote
            shutil.rmtree(left_over, ignore_errors=True)

    @property
    def latest(self) -> Path | None:
        """The tensors of the newest checkpoint, or None."""
        state_file = self.folder / STATE_FILE
        if not state_file.is_file():
            return None
        return self.folder / json.loads(state_file.read_text(encoding="utf-8"))["tensors"]

    def load(
        self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> tuple[int, dict[str, Any]] | None:
        """Puts the saved state into `parameters` and `optimizer`; returns (steps done, extra), or None without one.

        Raises:
            ValueError: The checkpoint is of another config, of other data or of another model.
        """
        state_file = self.folder / STATE_FILE
        if not state_file.is_file():
            return None
        state = json.loads(state_file.read_text(encoding="utf-8"))
        if state["run"] != self.run:
            raise ValueError(
                f"The checkpoint in {self.folder} (step {state['step']}) is of another training: config, data or base "
                "model differ. Give the same ones to go on, or another folder, or delete this one to start anew."
            )
        tensors = load_file(self.folder / state["tensors"])
        names = list(parameters)
        saved: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, rest = key.split("/", 1)
            if kind == "parameter":
                parameters[rest].data.copy_(value)
            else:
                entry, name = rest.split("/", 1)
                if value.shape == parameters[name].shape:
                    # Laid out in memory as the parameter is (channels last, say): the fused optimiser walks both as
                    # they lie, and would mix up the elements.
                    value = torch.empty_like(parameters[name]).copy_(value)
                saved.setdefault(names.index(name), {})[entry] = value
        optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(state["step"]), state["extra"]
