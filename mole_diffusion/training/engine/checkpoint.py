"""Checkpoints of a running training: what was learned and the optimiser as safetensors, the rest as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mole_diffusion.errors import MoLEError
from mole_diffusion.families import family_of
from mole_diffusion.files import write_json, write_safetensors
from mole_diffusion.reading import regular_size, regular_text
from mole_diffusion.tensor_files import TensorFile

STATE_FILE = "state.json"
RUN = "mole_diffusion.run"  # in the header of a checkpoint's tensors


Contents = Iterable[Tensor | str]


def made_of(config: Any, parts: Mapping[str, Contents]) -> dict[str, str]:
    """What a training depends on, by the words that messages call it by; a resumed one must have the same.

    Args:
        config: A dataclass; each setting is listed with its value.
        parts: Tensors and texts, of which the SHA-256 is listed.
    """
    settings = {f"`{name}`": json.dumps(value) for name, value in dataclasses.asdict(config).items()}
    return settings | {name: content_hash(contents) for name, contents in parts.items()}


def differences(there: Any, here: Mapping[str, str]) -> str:
    """In words, what a training that was begun and this one differ in; nothing where they do not.

    Args:
        there: `made_of` of the one that was begun, as it was read.
        here: `made_of` of this one.
    """
    if not isinstance(there, dict) or not there or not here:
        return "its settings, its data or its base are others"
    changed = sorted(name for name in {*here, *there} if there.get(name) != here.get(name))
    settings = [name for name in changed if name.startswith("`")]
    said = [f"{name} is {_short(there.get(name))} there and {_short(here.get(name))} here" for name in settings]
    if len(changed) > len(settings):
        said.append(f"not the same: {', '.join(name for name in changed if name not in settings)}")
    return "; ".join(said)


def content_hash(contents: Contents) -> str:
    """SHA-256 over tensors (dtype, shape, bytes) and texts."""
    digest = hashlib.sha256()
    for one in contents:
        if isinstance(one, str):
            digest.update(b"\0" + one.encode(errors="surrogatepass"))
        else:
            digest.update(f"{one.dtype}{tuple(one.shape)}".encode())
            digest.update(one.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parts_of_base(pipe: Any) -> dict[str, Contents]:
    """What a training asks of the base, for `made_of`: weights, the scheduler's settings, the tokenizers' words."""
    parts: dict[str, Contents] = {}
    for name in (*family_of(pipe.components).architectures, "vae"):
        model = pipe.components.get(name)
        if model is not None:
            weights = [tensor for _, tensor in sorted(model.state_dict().items())]
            parts[f"the base's {name}"] = [*weights, _settings(model)] if name == "vae" else weights
    parts["the base's scheduler"] = [type(pipe.scheduler).__name__, _settings(pipe.scheduler)]
    for name, part in sorted(pipe.components.items()):
        if name.startswith("tokenizer") and part:
            parts[f"the base's {name}"] = [json.dumps(part.get_vocab(), sort_keys=True)]
    return parts


def _short(value: object) -> str:
    return str(value) if len(str(value)) <= 60 else f"{str(value)[:60]}…"


def _settings(part: Any) -> str:
    plain = {key: repr(value) for key, value in part.config.items() if not key.startswith("_")}
    return json.dumps(plain, sort_keys=True)


class CheckpointFolder:
    """A work folder that holds the newest checkpoint of one training.

    The tensors go to a file of their own name first, then `state.json` points at it, then the old tensors go: whenever
    the run is cut, the folder holds one whole checkpoint.

    Args:
        folder: Where; made if missing.
        run: Which training it is, in any words; a checkpoint of another one is refused.
        made_of: Instead, what it depends on, by name: then the refusal says what is another.
    """

    def __init__(
        self, folder: str | os.PathLike[str], run: str = "", *, made_of: Mapping[str, str] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.made_of = dict(made_of or {})
        self.run = content_hash([json.dumps(self.made_of, sort_keys=True)]) if made_of else run
        self.latest: Path | None = None  # the tensors of the newest checkpoint, once one was written or read

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
        write_safetensors(self.folder / file, tensors, {RUN: self.run})
        state = {"run": self.run, "step": step, "tensors": file, "threads": torch.get_num_threads()}
        write_json(self.folder / STATE_FILE, state | {"made_of": self.made_of, "extra": dict(extra)})
        before, self.latest = self.latest, self.folder / file
        for old in (before, *self.tensors_of(self.run)):
            if old is not None and old != self.latest:
                old.unlink(missing_ok=True)

    def load(
        self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, expects: Collection[str] = ()
    ) -> tuple[int, dict[str, Any]] | None:
        """Puts the saved state into `parameters` and `optimizer`; returns (steps done, extra), or None without one.

        Args:
            parameters: What is trained, by name.
            optimizer: The optimiser of these parameters.
            expects: What `extra` must hold.

        Raises:
            MoLEError: The checkpoint is of another config, of other data or of another model, or it is damaged.
        """
        state = self.state()
        if state is None:
            return None
        if state["run"] != self.run:
            raise MoLEError(
                f"The checkpoint in {self.folder} (step {state['step']}) is of another training: "
                f"{differences(state.get('made_of'), self.made_of)}. Give the same to go on, or another folder, or "
                "delete this one to start anew."
            )
        if not set(expects) <= set(state["extra"]):
            raise self._damaged(STATE_FILE, f"`extra` lacks {sorted(set(expects) - set(state['extra']))}")
        values, saved = self._read_tensors(state["tensors"], parameters)
        for name, value in values.items():
            parameters[name].data.copy_(value)
        optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
        before, now = state.get("threads", torch.get_num_threads()), torch.get_num_threads()
        if before != now:
            warnings.warn(
                f"The checkpoint in {self.folder} was computed with {before} threads, and this run has {now}: the "
                f"last digits will differ from those of one run. For the same bits set OMP_NUM_THREADS={before}.",
                stacklevel=1,
            )
        self.latest = self.folder / state["tensors"]
        return state["step"], state["extra"]

    def state(self) -> dict[str, Any] | None:
        """What `state.json` says, or None without one.

        Raises:
            MoLEError: It is damaged.
        """
        file = self.folder / STATE_FILE
        if not file.exists():
            return None
        try:
            state = json.loads(regular_text(file))
        except (ValueError, RecursionError) as error:
            raise self._damaged(STATE_FILE, str(error) or type(error).__name__) from None
        kinds = {"run": str, "step": int, "tensors": str, "extra": dict}
        if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in kinds.items()):
            raise self._damaged(STATE_FILE, f"it is no object with {', '.join(kinds)}")
        if Path(state["tensors"]).name != state["tensors"]:
            raise self._damaged(STATE_FILE, f"`tensors` is {state['tensors']!r}, which is no name of a file beside it")
        return state

    def tensors_of(self, run: str) -> list[Path]:
        """Files of tensors of one training: the folder may hold other people's of such names."""
        found = []
        for file in self.folder.glob("step-*.safetensors"):
            with contextlib.suppress(MoLEError):
                if TensorFile(file).metadata.get(RUN) == run:
                    found.append(file)
        return found

    def _read_tensors(
        self, file: str, parameters: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
        """What was learned by name, and the optimiser's state by the number of the parameter."""
        try:
            regular_size(self.folder / file)  # a pipe would be waited for
            tensors = load_file(self.folder / file)
        except (OSError, SafetensorError, MoLEError) as error:
            raise self._damaged(file, str(error)) from None
        names = list(parameters)
        values: dict[str, Tensor] = {}
        saved: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            entry, _, name = ("", "", rest) if kind == "parameter" else rest.partition("/")
            if name not in parameters or (value.ndim and value.shape != parameters[name].shape):
                raise self._damaged(file, f"{key!r} {tuple(value.shape)} does not belong to this training")
            if kind == "parameter":
                values[name] = value
            else:
                if value.shape == parameters[name].shape:
                    # Laid out in memory as the parameter is (channels last, say): the fused optimiser walks both as
                    # they lie, and would mix up the elements.
                    value = torch.empty_like(parameters[name]).copy_(value)
                saved.setdefault(names.index(name), {})[entry] = value
        if set(values) != set(names) or len({frozenset(entries) for entries in saved.values()}) > 1:
            raise self._damaged(file, "some of its tensors are missing")
        return values, saved

    def _damaged(self, file: str, why: str) -> MoLEError:
        return MoLEError(
            f"{self.folder / file} is damaged: {' '.join(why.split()).rstrip('.')}. "
            f"Delete the folder {self.folder} to start anew."
        )


def clear_checkpoints(folder: Path) -> None:
    """Takes the checkpoint in a folder away, and the folder where nothing else is in it."""
    checkpoints = CheckpointFolder(folder)
    state = checkpoints.state()
    if state is not None:
        for file in (folder / state["tensors"], *checkpoints.tensors_of(state["run"]), folder / STATE_FILE):
            file.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
